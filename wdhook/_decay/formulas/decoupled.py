"""Decoupled decay: p ← p·(1 − lr·λ) (Loshchilov & Hutter 2019; `torch.optim.AdamW`)."""

from __future__ import annotations

from ..tensors import Number
from .base import Rates, Shrinking


class Decoupled(Shrinking):
    """p ← p·(1 − lr·λ) before the update, to the last bit what `torch.optim.AdamW` does."""

    name = "decoupled"
    factor = "lr·λ"

    def amount(self, rates: Rates) -> Number:
        """lr·λ."""
        assert rates.lr is not None
        return rates.lr * rates.weight_decay
