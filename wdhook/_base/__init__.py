"""Holds the common parts of all rooms: errors, checks of arguments, rows of text.

It knows nothing of models, plans or optimizers, and imports no other room.
"""
