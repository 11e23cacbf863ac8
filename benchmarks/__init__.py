"""What wdhook costs, against what it replaces: `python -m benchmarks`."""
