"""Independent decay: p ← p·(1 − (lr/lr_peak)·λ) (Loshchilov & Hutter 2019, eq. 12 with η_t =
lr/lr_peak)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensors import Number
from .base import Rates, Shrinking


class Independent(Shrinking):
    """p ← p·(1 − (lr/lr_peak)·λ): λ does not change with the base learning rate."""

    name = "independent"
    needs_peak = True

    def amount(self, rates: Rates) -> Number:
        """(lr/lr_peak)·λ, and 0 while the peak is 0: a warm-up may start there."""
        assert rates.lr is not None
        if isinstance(rates.peak, Tensor):
            share = torch.where(rates.peak > 0, rates.lr / rates.peak, 0.0)
            return share * rates.weight_decay
        return (rates.lr / rates.peak) * rates.weight_decay if rates.peak else 0.0
