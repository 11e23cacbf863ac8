"""Tells the job of a parameter: a model comes in, roles with their reasons go out.

The room reads types, names, shapes, first values and the marks of other projects. It knows nothing
of λ, and changes nothing.
"""
