"""Independent decay: p ← p·(1 − (lr/lr_peak)·λ) (Loshchilov & Hutter 2019, eq. 12 with η_t =
lr/lr_peak)."""

from __future__ import annotations

from ..tensors import Number
from .base import Rates, Shrinking, over_peak


class Independent(Shrinking):
    """p ← p·(1 − (lr/lr_peak)·λ): λ does not change with the base learning rate."""

    name = "independent"
    factor = "(lr/lr_peak)·λ"
    needs_peak = True

    def amount(self, rates: Rates) -> Number:
        """(lr/lr_peak)·λ."""
        assert rates.lr is not None
        return over_peak(rates.lr, rates.peak) * rates.weight_decay
