"""Decoupled decay: p ← p·(1 − lr·λ) (Loshchilov & Hutter 2019; `torch.optim.AdamW`)."""

from __future__ import annotations

from ..tensors import Number
from .base import Rates, Shrinking


class Decoupled(Shrinking):
    """p ← p·(1 − lr·λ) before the update, to the last bit what `torch.optim.AdamW` does."""

    name = "decoupled"

    def number(self, rates: Rates) -> Number:
        """1 − lr·λ."""
        assert rates.lr is not None
        return 1 - rates.lr * rates.weight_decay
