"""Callbacks for training frameworks, one module each: importing that module imports its framework.

`wdhook.integrations.lightning` for Lightning, `wdhook.integrations.transformers` for the Hugging
Face Trainer. Other frameworks need no class: docs/frameworks.md has a few lines for each.
"""
