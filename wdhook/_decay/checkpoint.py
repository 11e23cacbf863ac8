"""What a checkpoint holds of a handle: λ, progress, doses, memories and targets, by names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .._base.errors import ArgumentError
from .._base.problem import Problem
from .._base.validate import check_factor
from .._plan.anchor import Anchor, probe
from .._plan.names import plain_name
from .engine import Engine
from .formulas import first_values
from .memory import Memo
from .parameters import Known, has_values
from .rate import NO_PROGRESS
from .tally import Tally

_KEYS = {*NO_PROGRESS, "memory", "doses"}
REMOVED: Mapping[str, Any] = {**NO_PROGRESS, "memory": (), "doses": (), "removed": True}
"""What is saved of a handle that is removed: λ alone has a meaning."""

_BY_NAME = {
    "anchored",
    "doses",
    "finished_steps",
    "lr_peaks",
    "memory",
    "probes",
    "targets",
    "toward",
}
_PROGRESS = ("finished_steps", "lr_peaks", "memory", "doses")


# ------------------------------------------------------------------------------------ save, load


def save(engine: Engine) -> dict[str, Any]:
    """What a saved handle holds besides λ and mode, by the plain names that parameters have now."""
    progress = engine.state.parameters.progress()
    tallies = {name: one.tally for name, one in progress.items() if one.tally is not None}
    memos = {name: one.memo for name, one in progress.items() if one.memo is not None}
    saved = {
        **engine.state.rate.save(progress),
        "memory": engine.memory.save(memos),
        "doses": engine.tallies.save(tallies),
    }
    saved |= _targets(engine) if engine.state.config.formula.begins else {}
    decided = {name: then for name, then in _decided_names(engine).items() if name != then}
    return saved | ({"decided": (decided,)} if decided else {})


def load(engine: Engine, saved: Mapping[str, Any]) -> None:
    """Undo of `save`, and of the λ that a schedule has given since.

    Args:
        engine: of the handle.
        saved: a state that was `checked`.
    """
    parameters = engine.state.parameters
    parameters.forget_progress()
    tracked = parameters.track_all()
    engine.state.rate.load(saved, [(name, entry) for name, _, entry in tracked])
    memos = {name: entry.memo for name, _, entry in tracked if entry.memo is not None}
    engine.memory.load(saved["memory"], saved.get("targets", {}), memos)
    tallies: list[Tally | None]
    tallies = engine.tallies.load(saved["doses"], [name for name, *_ in tracked])
    for (_, param, entry), tally in zip(tracked, tallies, strict=True):
        entry.progress.tally = tally
        if entry.terms.place is None and param is not None:
            entry.terms = parameters.unowned_terms(entry, param)
        if not engine.state.config.in_gradient:
            # Training goes on from another point: what was shrunk since the last step is gone.
            entry.reopen()
    engine.state.optimizers.forget()


def complete(state: Mapping[str, Any], mode: str) -> dict[str, Any]:
    """A state with the keys that older versions did not write.

    Raises:
        ArgumentError: it is not the state of a handle, or one of another mode.
    """
    if not isinstance(state, Mapping):
        raise ArgumentError(f"`state` is not the state of a handle.\n  got: {type(state).__name__}")
    whole = {"finished_steps": (), "memory": (), "doses": None, **state}
    missing = {"weight_decay", "mode", *_KEYS} - set(whole)
    if missing:
        raise ArgumentError(
            f"`state` is not the state of a handle.\n  missing: {', '.join(sorted(missing))}"
        )
    if whole["mode"] != mode:
        raise ArgumentError(
            "`state` is of another mode, in which the same λ means something else.\n"
            f"  state: {whole['mode']}\n  handle: {mode}"
        )
    check_factor(whole["weight_decay"])
    for key in _BY_NAME & set(whole):
        of = whole[key]
        parts = of if isinstance(of, (tuple, list)) else [of]
        if of is not None and not all(isinstance(part, Mapping) for part in parts):
            raise ArgumentError(
                f"`state` is not the state of a handle.\n  {key}: {type(of).__name__}"
            )
    return whole


def checked(engine: Engine, state: Mapping[str, Any]) -> dict[str, Any]:
    """A whole state by the names that parameters have now, if training can go on with it.

    Raises:
        ArgumentError: a schedule, targets, or decay that is pending, and the state or the handle
            has none of them.
    """
    schedule, formula = engine.state.config.schedule, engine.state.config.formula
    if state.get("removed") and (schedule is not None or formula.needs_peak or formula.begins):
        raise ArgumentError(
            Problem(
                "`state` was taken after remove(), or of a copy of the handle: it has λ alone, and "
                "not how far training has come.",
                "Take the state before remove(), or inside of `with attach(...)`",
                {"mode": state["mode"]},
            )
        )
    if schedule is not None and not any(state["finished_steps"]):
        raise ArgumentError(
            "`state` is of a handle without a schedule: it does not say how many steps were "
            "finished.\n"
            f"  weight_decay: {state['weight_decay']!r}, then; now {schedule!r}\n"
            "  Attach with the number, or do not load this state"
        )
    by_name = _by_present_names(engine, state)
    _check_names(engine, by_name)
    _check_anchored(by_name)
    _check_targets(engine, by_name)
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
    return by_name


def _check_names(engine: Engine, state: Mapping[str, Any]) -> None:
    """Raise where a state says how far other parameters have come, and nothing of these."""
    present = set(engine.state.parameters.names().values())
    saved: set[str] = set()
    for key in ("finished_steps", "lr_peaks", "memory"):
        for part in state[key]:
            saved |= set(part)
    if saved and present and not saved & present:
        raise ArgumentError(
            Problem(
                "`state` is of a model whose parameters have other names: none of them is here.",
                "Attach to the model that was attached when the state was saved, or to one with "
                "the same names",
                {"in the state": min(saved), "in this model": min(present)},
            )
        )


# --------------------------------------------------------------------------------------- targets


_Named = list[tuple[str, Tensor, Known]]
"""Decayed parameters with their names in checkpoints."""


def _targets(engine: Engine) -> dict[str, Any]:
    """What is saved of targets: all in words or numbers, first values whole, and a few of given
    ones."""
    named = _named(engine)
    targets = engine.memory.save_targets(_firsts(named))
    more = {"targets": targets, "probes": _probes(named)}
    more = {key: of for key, of in more.items() if of}
    # torch.distributed.checkpoint loads only the targets that a fresh state has too.
    return {"toward": (_words(named),), "anchored": (dict.fromkeys(targets, True),), **more}


def _named(engine: Engine) -> _Named:
    names = engine.state.parameters.names()
    eligible = engine.state.parameters.eligible()
    return [(names[id(found.param)], found.param, known) for found, known in eligible]


def _words(named: _Named) -> dict[str, float | str]:
    """Name → target, of those that are not drawn to 0."""
    return {name: known.decision.aim for name, _, known in named if known.decision.toward}


def _firsts(named: _Named) -> dict[str, Tensor]:
    """Name → values before the first update. A frozen parameter that no optimizer has had is not
    trained."""
    firsts: dict[str, Tensor] = {}
    for name, param, known in named:
        memo = known.progress.memo if known.progress is not None else None
        memo = Memo(known.decision) if memo is None else memo
        if memo.is_of_init and memo.target is not None:
            firsts[name] = memo.target
        elif memo.waits and param.requires_grad and has_values(param):
            assert isinstance(memo.toward, Anchor)
            firsts[name] = first_values(param, memo.toward)
    return firsts


def _probes(named: _Named) -> dict[str, list[float]]:
    """Name → a few of the values that were given."""
    given = {name: known.decision.given for name, _, known in named}
    return {name: few for name, of in given.items() if of is not None and (few := probe(of))}


def _check_anchored(state: Mapping[str, Any]) -> None:
    """Raise where first values were saved and are no longer in the state."""
    anchored: dict[str, bool] = (state.get("anchored") or ({},))[0]
    lost = [name for name in anchored if name not in state.get("targets", {})]
    if lost:
        raise ArgumentError(
            Problem(
                "`state` has lost values before the first update: a checkpoint was loaded into a "
                "state without a place for them, as that of a parameter that is frozen.",
                "Load the checkpoint while the parameters are trained that had been trained",
                {"parameters": ", ".join(lost[:3])},
                tuple(lost),
            )
        )


def _check_targets(engine: Engine, state: Mapping[str, Any]) -> None:
    """Raise where decay would draw a parameter to another value than before."""
    named = _named(engine)
    before: dict[str, float | str] = (state.get("toward") or ({},))[0]
    words, probes, now = _words(named), state.get("probes", {}), _probes(named)
    others = []
    for name, _, known in named:
        then, word = before.get(name, 0.0), words.get(name, 0.0)
        if then != word and not known.is_new:
            others.append(f"{name}: {then}, now {word}")
        elif name in probes and name in now and str(list(probes[name])) != str(now[name]):
            others.append(f"{name}: other values of the source")  # as text: nan is nan
    if others:
        raise ArgumentError(
            Problem(
                "`state` is of other targets: decay would draw parameters to other values than "
                "before.",
                "Attach with the same `toward`, or do not load this state",
                {"parameters": f"{len(others)}, first {others[0]}"},
            )
        )


# ----------------------------------------------------------------------------------------- names


def _by_present_names(engine: Engine, saved: Mapping[str, Any]) -> dict[str, Any]:
    """A state by the names of a model that may be wrapped, tied or parametrized otherwise than the
    one that was saved."""
    present = _of_before(engine, saved) or engine.state.parameters.aliases()

    def renamed(of: Mapping[str, Any]) -> dict[str, Any]:
        return {_present(name, present): value for name, value in of.items()}

    changed = dict(saved)
    for key in _BY_NAME & set(saved):
        of = saved[key]
        if of is not None:
            is_several = isinstance(of, (tuple, list))
            changed[key] = tuple(map(renamed, of)) if is_several else renamed(of)
    return changed


def _decided_names(engine: Engine) -> dict[str, str]:
    """Name now → name that was decided, of the decayed tensors that `attach` has seen."""
    return {
        name: plain_name(known.decision.name)
        for name, _, known in _named(engine)
        if not known.is_new
    }


def _of_before(engine: Engine, saved: Mapping[str, Any]) -> dict[str, str] | None:
    """Saved name → name now, for a state of before the model was cut: names have passed on to other
    tensors since, and what was decided has not. None for any other state."""
    then = {plain_name(name) for key in _PROGRESS for part in saved[key] or () for name in part}
    decided = _decided_names(engine)
    renamed: dict[str, str] = (saved.get("decided") or ({},))[0]
    now = {before: name for name, before in decided.items()}
    is_cut = then != set(decided) and {renamed.get(name, name) for name in then} == set(now)
    return {name: now[renamed.get(name, name)] for name in then} if is_cut else None


def _present(name: str, present: Mapping[str, str]) -> str:
    plain = plain_name(name)
    return present.get(name) or present.get(plain) or plain
