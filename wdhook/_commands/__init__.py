"""The commands of the command line: each module has `add`, which adds its parser, and `run`, which does the work."""
