"""Tells what a parameter is for: a model comes in, a `Role` with a reason for each parameter goes out.

It reads types, names, shapes and the marks of other projects. It knows nothing of λ, and changes nothing.
"""
