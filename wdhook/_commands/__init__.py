"""The commands of the command line.

Words of a command line come in; text or JSON, and an exit status, go out. A command is one module
with `add`, which adds its parser, and `run`, which does the work. Nothing else in the package
imports this room.
"""
