"""What a checkpoint holds of a handle: λ, progress, doses, memories and targets, by names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .._base.errors import ArgumentError
from .._base.problem import Problem
from .._plan.anchor import Anchor
from .engine import Engine
from .entry import Progress
from .formulas import kept
from .memory import Memo
from .parameters import has_values
from .rate import NO_PROGRESS
from .tally import Tally

NOTHING: Mapping[str, Any] = {**NO_PROGRESS, "memory": (), "doses": ()}
"""What is saved of a handle that is removed."""

_BY_NAME = {"doses", "finished_steps", "lr_peaks", "memory", "probes", "targets"}


# ------------------------------------------------------------------------------------ save, load


def save(engine: Engine) -> dict[str, Any]:
    """What a saved handle holds besides λ and mode, by the names that parameters have now."""
    progress = engine.state.parameters.progress()
    tallies = {name: one.tally for name, one in progress.items() if one.tally is not None}
    saved = {
        **engine.state.rate.save(progress),
        "memory": engine.memory.save(_memos(progress)),
        "doses": engine.tallies.save(tallies),
    }
    if engine.state.config.formula.begins:
        more = {"targets": _targets(engine), "probes": _probes(engine)}
        saved |= {"toward": engine.toward, **{key: of for key, of in more.items() if of}}
    return _by_names(saved, engine.state.parameters.renamed())


def load(engine: Engine, saved: Mapping[str, Any]) -> None:
    """Undo of `save`, and of the λ that a schedule has given since."""
    parameters, rate = engine.state.parameters, engine.state.rate
    saved = _by_decided_names(engine, saved)
    entries = parameters.entries()
    parameters.forget_progress()
    rate.load(saved, entries)
    memos = _memos(parameters.progress())
    engine.memory.load(saved["memory"], memos)
    engine.memory.load_targets(saved.get("targets", {}), memos)
    tallies: list[Tally | None]
    tallies = engine.tallies.load(saved["doses"], [entry.name for entry in entries])
    for entry, tally in zip(entries, tallies, strict=True):
        entry.progress.tally = tally
    for param, entry in parameters.pairs():
        if entry.terms.place is None:
            entry.move(rate.clock_after(rate.saved_steps(entry.name)))
            entry.terms = parameters.unowned_terms(entry, param)
    engine.state.optimizers.forget()
    if not engine.state.config.in_gradient:
        # Training goes on from another point: what was shrunk since the last step is gone.
        for entry in entries:
            entry.reopen()


def complete(state: Mapping[str, Any], mode: str) -> dict[str, Any]:
    """A state with the keys that older versions did not write.

    Raises:
        ArgumentError: it is not the state of a handle, or one of another mode.
    """
    whole = {"finished_steps": (), "memory": (), "doses": None, **state}
    missing = {"weight_decay", "mode", *NOTHING} - set(whole)
    if missing:
        raise ArgumentError(
            f"`state` is not the state of a handle.\n  missing: {', '.join(sorted(missing))}"
        )
    if whole["mode"] != mode:
        raise ArgumentError(
            "`state` is of another mode, in which the same λ means something else.\n"
            f"  state: {whole['mode']}\n  handle: {mode}"
        )
    return whole


def check(engine: Engine, state: Mapping[str, Any]) -> None:
    """Raise for a state with which training would not go on as it did.

    Raises:
        ArgumentError: a schedule, targets, or decay that is pending, and the state or the handle
            has none of them.
    """
    schedule = engine.state.config.schedule
    if schedule is not None and not state["finished_steps"]:
        raise ArgumentError(
            "`state` is of a handle without a schedule: it does not say how many steps were "
            "finished.\n"
            f"  weight_decay: {state['weight_decay']!r}, then; now {schedule!r}\n"
            "  Attach with the number, or do not load this state"
        )
    _check_targets(engine, state)
    if state["memory"] and not engine.state.config.formula.remembers:
        raise ArgumentError(
            Problem(
                "`state` holds decay that was counted and not written yet, and this handle "
                "cannot write it.",
                "Call flush() before the state and the model are saved, or attach without "
                "`cautious`",
                {"parameters": ", ".join(state["memory"][0])},
            )
        )


def _memos(progress: Mapping[str, Progress]) -> dict[str, Memo]:
    return {name: one.memo for name, one in progress.items() if one.memo is not None}


# --------------------------------------------------------------------------------------- targets


def _targets(engine: Engine) -> dict[str, Tensor]:
    """Name → values before the first update; of frozen parameters, those of trained ones."""
    targets: dict[str, Tensor] = {}
    for found, known in engine.state.parameters.eligible():
        param, name = found.param, known.decision.name
        memo = known.progress.memo if known.progress is not None else None
        memo = Memo(known.decision) if memo is None else memo
        if memo.is_of_init and memo.target is not None:
            targets[name] = memo.target
        elif memo.waits and param.requires_grad and has_values(param):
            targets[name] = kept(param, memo.toward)
    return engine.memory.save_targets(targets)


def _probes(engine: Engine) -> dict[str, tuple[float, ...]]:
    """Name → a few of the values that were given as target."""
    decisions = [known.decision for _, known in engine.state.parameters.eligible()]
    probes = {
        d.name: d.toward.probe(d.name, d.shape) for d in decisions if isinstance(d.toward, Anchor)
    }
    return {name: probe for name, probe in probes.items() if probe}


def _check_targets(engine: Engine, state: Mapping[str, Any]) -> None:
    toward, saved = engine.toward, state.get("toward", "0")
    if saved != toward:
        raise ArgumentError(
            Problem(
                "`state` is of a handle with other targets: decay would draw parameters to "
                "other values than before.",
                "Attach with the same `toward`, or do not load this state",
                {"toward in the state": saved, "toward of this handle": toward},
            )
        )
    before, now = _by_decided_names(engine, state).get("probes", {}), _probes(engine)
    others = [name for name in before if name in now and before[name] != now[name]]
    if others:
        raise ArgumentError(
            Problem(
                "`toward` has other values than in the run that saved `state`.",
                "Give the source of that run to wdhook.Anchor",
                {"parameters": f"{len(others)}, first {others[0]}"},
                tuple(others),
            )
        )


# ----------------------------------------------------------------------------------------- names


def _by_decided_names(engine: Engine, saved: Mapping[str, Any]) -> dict[str, Any]:
    names = engine.state.parameters.renamed()
    return _by_names(saved, {now: decided for decided, now in names.items()})


def _by_names(saved: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """A state with other names of parameters. A name that passes to another tensor belongs to a
    tensor that has left the model."""
    passed_on = set(names.values())

    def renamed(of: Mapping[str, Any]) -> dict[str, Any]:
        stay = {name: value for name, value in of.items() if name in names or name not in passed_on}
        return {names.get(name, name): value for name, value in stay.items()}

    changed = dict(saved)
    for key in _BY_NAME & set(saved) if names else ():
        of = saved[key]
        if of is not None:
            changed[key] = tuple(map(renamed, of)) if isinstance(of, tuple) else renamed(of)
    return changed
