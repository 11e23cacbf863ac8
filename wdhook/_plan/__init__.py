"""Decides what is decayed: roles and the user's rules come in, an immutable `Plan` goes out.

It knows nothing of gradients, hooks or optimizers, and changes nothing.
"""
