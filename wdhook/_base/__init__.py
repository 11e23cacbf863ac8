"""Holds the common ground of all rooms: errors, checks of arguments, rows of text, private torch.

It knows nothing of models, plans or optimizers, and imports no other room.
"""
