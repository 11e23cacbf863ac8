"""Corrected decay: p ← p·(1 − λ·lr²/lr_peak) (AdamC; Defazio 2025, arXiv:2506.02285)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensors import Number
from .base import Rates, Shrinking


class Corrected(Shrinking):
    """p ← p·(1 − λ·lr²/lr_peak): decay whose equilibrium norm does not change with the rate.

    Under decoupled decay a weight before a normalization has an equilibrium norm that goes with
    √(lr/λ), so a schedule that lowers lr lowers norms and raises gradients at the end of a run.
    """

    name = "corrected"
    needs_peak = True

    def amount(self, rates: Rates) -> Number:
        """λ·lr²/lr_peak, and 0 while the peak is 0: a warm-up may start there."""
        assert rates.lr is not None
        if isinstance(rates.peak, Tensor):
            effective = torch.where(rates.peak > 0, rates.lr**2 / rates.peak, 0.0)
            return effective * rates.weight_decay
        return (rates.lr**2 / rates.peak) * rates.weight_decay if rates.peak else 0.0
