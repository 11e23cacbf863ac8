"""Corrected decay: p ← p·(1 − λ·lr²/lr_peak) (AdamC; Defazio 2025, arXiv:2506.02285)."""

from __future__ import annotations

from ..tensors import Number
from .base import Rates, Shrinking, over_peak


class Corrected(Shrinking):
    """p ← p·(1 − λ·lr²/lr_peak): decay whose equilibrium norm does not change with the rate.

    Under decoupled decay a weight before a normalization has an equilibrium norm that goes with
    √(lr/λ), so a schedule that lowers lr lowers norms and raises gradients at the end of a run.
    """

    name = "corrected"
    factor = "(lr²/lr_peak)·λ"
    needs_peak = True

    def amount(self, rates: Rates) -> Number:
        """(lr²/lr_peak)·λ."""
        assert rates.lr is not None
        return over_peak(rates.lr**2, rates.peak) * rates.weight_decay
