"""Measures the use of each parameter: a model and inputs come in, an `Audit` goes out.

It runs the model without side effects. It knows nothing of attached handles or optimizers.
"""
