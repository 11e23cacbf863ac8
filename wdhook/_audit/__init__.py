"""Measures what a model does with each parameter: a model and inputs come in, one pass is traced, an `Audit` goes out.

It runs the model without side effects. It knows nothing of attached handles or optimizers.
"""
