"""One thread: small models are faster with it, and sums are made in one order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from wdhook import _listener

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _leaves_nothing_attached() -> Iterator[None]:
    """No test may leave a handle behind for the next one."""
    yield
    for engine in _listener.attached():
        engine.close()
    assert not _listener._registered
