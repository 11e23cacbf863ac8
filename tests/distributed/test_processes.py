"""The processes of the distributed tests: they answer, and what goes wrong in them is seen."""

from __future__ import annotations

import os
import time

import pytest
import torch
from processes import Group

import wdhook


def _sum(value: float) -> float:
    total = torch.tensor(value + torch.distributed.get_rank())
    torch.distributed.all_reduce(total)
    return total.item()


def _raise_on(rank: int) -> None:
    if torch.distributed.get_rank() == rank:
        raise ValueError("on purpose")
    torch.distributed.barrier()


def _sleep_on_one() -> None:
    if torch.distributed.get_rank() == 1:
        time.sleep(60)


def _die_on_one() -> None:
    if torch.distributed.get_rank() == 1:
        os._exit(3)


def _warn() -> None:
    import warnings

    warnings.warn("on purpose", wdhook.WdhookWarning, stacklevel=1)


def test_every_rank_answers(two: Group) -> None:
    """Each process runs the function in one group, again and again."""
    assert two(_sum, 1.0) == [3.0, 3.0]
    assert two(_sum, 2.0) == [5.0, 5.0]


def test_an_exception_of_one_rank_is_shown(two: Group) -> None:
    """The traceback of the rank that raised is in the failure, and the next call works."""
    with pytest.raises(AssertionError, match=r"(?s)rank 1:.*_raise_on.*ValueError: on purpose"):
        two(_raise_on, 1, timeout=10)
    assert two(_sum, 1.0) == [3.0, 3.0]


def test_a_process_that_hangs_or_dies_is_named(two: Group) -> None:
    """A process that is not done in time is killed, and its stack is shown; so is one that has
    died."""
    with pytest.raises(AssertionError, match=r"(?s)rank 1 is not done:.*_sleep_on_one"):
        two(_sleep_on_one, timeout=8)
    with pytest.raises(AssertionError, match="rank 1 has died"):
        two(_die_on_one)


def test_our_warnings_are_errors(two: Group) -> None:
    """A warning of wdhook in a worker fails the test, as it does in the process of pytest."""
    with pytest.raises(AssertionError, match="WdhookWarning: on purpose"):
        two(_warn)
