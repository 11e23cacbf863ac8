"""Settings of every test: one thread, no handle left behind, slow tests marked as slow."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import Group
from selection import FAST, heading, is_slow, skips, slow_ones

from wdhook._decay import step_listener as _listener

# One thread: small models are faster, and sums are made in one order.
torch.set_num_threads(1)
# Programs that a test starts find tests/support, as pytest does by `pythonpath` in setup.cfg.
_SUPPORT = str(Path(__file__).parent / "support")
_GIVEN = os.environ.get("PYTHONPATH")
os.environ["PYTHONPATH"] = os.pathsep.join([_SUPPORT, _GIVEN]) if _GIVEN else _SUPPORT


# -- fixtures --------------------------------------------------------------------------------------


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


# -- the slow tests, and what a run says of itself -------------------------------------------------


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_slow(item.path, getattr(item, "fixturenames", ())):
            item.add_marker("slow")


def pytest_report_header(config: pytest.Config) -> str:
    return heading(config.getoption("markexpr"))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    stats = terminalreporter.stats
    deselected = [item for item in stats.get("deselected", ()) if item.get_closest_marker("slow")]
    if deselected and config.getoption("markexpr") == FAST:
        named = config.args_source is pytest.Config.ArgsSource.ARGS
        terminalreporter.write_line(slow_ones(len(deselected), config.args if named else ()))
    for line in skips(report.longrepr[2] for report in stats.get("skipped", ())):
        terminalreporter.write_line(line)
