"""One thread: small models are faster with it, and sums are made in one order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from processes import Group

from wdhook._decay import step_listener as _listener

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _leaves_nothing_attached() -> Iterator[None]:
    """No test may leave a handle behind for the next one."""
    yield
    for engine in _listener.attached():
        engine.close()
    assert not _listener._registered


@pytest.fixture(scope="session")
def two() -> Iterator[Group]:
    """Two processes that have met."""
    group = Group(2)
    yield group
    group.stop()


@pytest.fixture(scope="session")
def four() -> Iterator[Group]:
    """Four processes that have met."""
    group = Group(4)
    yield group
    group.stop()
