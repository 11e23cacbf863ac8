"""Process groups that stay for the whole test run: most of a test would be the import of torch."""

from __future__ import annotations

import faulthandler
import multiprocessing
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class Group:
    """`size` processes in one gloo process group that meet through a file, from the first call on.

    A call in which one of them dies or hangs ends them all: the next call starts new ones.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder: Path | None = None
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def __call__(self, function: Callable[..., T], *args: Any, timeout: float = 300) -> list[T]:
        """Run `function(*args)`, a function of a module, in every process.

        Returns:
            What each rank returned.

        Raises:
            AssertionError: some rank raised, or was not done in `timeout` seconds; with its
                traceback.
        """
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args, timeout))
        answers, failures, stuck = self._collect(time.monotonic() + timeout)
        if stuck:
            self.stop()
        if failures:
            raise AssertionError("\n".join(failures))
        return answers

    def _start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._folder = Path(tempfile.mkdtemp())
        for rank in range(self.size):
            here, there = spawn.Pipe()
            process = spawn.Process(
                target=_serve, args=(rank, self.size, str(self._folder), there), daemon=True
            )
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def _collect(self, deadline: float) -> tuple[list[Any], list[str], bool]:
        """The answers, the failures, and whether some rank gave neither."""
        waiting = dict(enumerate(self._pipes))
        answers: dict[int, Any] = {}
        failures: list[str] = []
        dead: list[int] = []
        while waiting:
            ready = wait(list(waiting.values()), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                try:
                    done, value = waiting.pop(rank).recv()
                except (EOFError, ConnectionError):
                    dead.append(rank)
                    failures.append(f"rank {rank} has died")
                else:
                    if done:
                        answers[rank] = value
                    else:
                        failures.append(value)
            if failures:  # the others may wait for the one that failed
                deadline = min(deadline, time.monotonic() + 3)
        failures += [f"rank {rank} is not done:\n{self._stack(rank)}" for rank in waiting]
        return [answers[rank] for rank in sorted(answers)], failures, bool(waiting or dead)

    def _stack(self, rank: int) -> str:
        """Where a process was when its time was up."""
        time.sleep(0.5)
        assert self._folder is not None
        return (self._folder / f"stack{rank}").read_text()

    def stop(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._processes, self._pipes, self._folder = [], [], None


def _serve(rank: int, size: int, folder: str, pipe: Connection) -> None:
    """Join the group, then run what comes through the pipe until it is closed."""
    stack = open(Path(folder) / f"stack{rank}", "w")  # noqa: SIM115 - open as long as the process
    faulthandler.enable(stack)
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=280),
    )
    while True:
        try:
            function, args, timeout = pipe.recv()
        except EOFError:
            return
        faulthandler.dump_traceback_later(timeout, file=stack)
        try:
            pipe.send((True, _run(function, args)))
        except BaseException:
            pipe.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
        faulthandler.cancel_dump_traceback_later()


def _run(function: Callable[..., T], args: tuple[Any, ...]) -> T:
    """Run one function; our warnings are errors, and nothing may stay attached."""
    import torch

    from wdhook import WdhookWarning
    from wdhook._decay import step_listener as _listener

    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # torch's own, of distributed code that is no longer or not yet stable
            warnings.simplefilter("error", WdhookWarning)
            return function(*args)
    finally:
        for engine in _listener.attached():
            engine.close()
        assert not _listener._registered
