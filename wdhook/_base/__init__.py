"""Holds what every room uses: errors, checks of arguments, rows of text, and the one door to
private torch.

It knows nothing of models, plans or optimizers, and imports no other room.
"""
