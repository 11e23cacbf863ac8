"""What the last optimizer step has decayed."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.nn.parameter import is_lazy

from .._base.terminal import folded_lines
from .._base.text import short
from .engine import Engine
from .entry import Entry

_SHOWN = 6  # names in a line of a check


@dataclass
class Check:
    """What the last optimizer step has decayed, and by how much. Made by `WeightDecay.check`.

    ``print`` it: one sentence, and a line for each kind of parameter that was not decayed.

    Attributes:
        steps: finished steps of optimizers that own a parameter of the plan.
        decayed: parameter name → the multiple of the parameter in the last decay: λ, where λ·p was
            added to the gradient (coupled); lr·λ, where lr·λ·p was subtracted from the parameter.
        weight_decays: parameter name → its λ now, which is that of the next step.
        factor: the multiple as a term: ``"λ"``, ``"lr·λ"``, ...
        numel: number of elements of the decayed parameters.
        absent: names that earlier steps have decayed and the last one has not.
        undecayed: names with a λ other than 0 that no step has decayed so far.
        frozen: names with a λ other than 0 that do not require a gradient.
        in_gradient: the decay is added to gradients (coupled).
        announced: torch announces the steps of the optimizer.
        paused: taken inside of `WeightDecay.paused`.
        removed: the handle is removed, or its model is gone.
        aimed: some parameter is drawn to another value than 0: read p − target for p.
    """

    steps: int = 0
    decayed: dict[str, float] = field(default_factory=dict)
    weight_decays: dict[str, float] = field(default_factory=dict)
    factor: str = "λ"
    numel: int = 0
    absent: list[str] = field(default_factory=list)
    undecayed: list[str] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)
    in_gradient: bool = True
    announced: bool = True
    paused: bool = False
    removed: bool = False
    aimed: bool = False

    @property
    def ok(self) -> bool:
        """The last step has decayed something, and no trained parameter of the plan is without
        decay."""
        stepped = self.steps > 0 or not self.announced
        return bool(self.decayed) and stepped and not self.undecayed

    @property
    def sentence(self) -> str:
        """The first line says what was decayed, and by how much, or why nothing was."""
        if self.removed:
            return "Nothing is decayed: the handle is removed, or its model is gone."
        trained = len(self.decayed) + len(self.absent) + len(self.undecayed)
        if not trained:
            why = "all parameters of the plan are frozen" if self.frozen else "λ is 0"
            return f"Nothing is decayed: {why}."
        if self.steps == 0 and not self.decayed:
            return "Nothing is decayed so far: no optimizer has stepped a parameter of the plan."
        when = f"step {self.steps}" if self.steps else "the last backward pass"
        if not self.decayed:
            why = " (decay is paused)" if self.paused else ""
            return f"Nothing was decayed by {when}{why}: 0 of {trained} eligible tensors."
        claim = "Decay works" if self.ok else "Decay is incomplete"
        if not self.steps and self.announced:
            claim = "No optimizer step yet"
        share = f"{len(self.decayed)} of {trained} eligible tensors"
        return f"{claim}: {when} decayed {share}, {self.numel:,} elements; {self._amounts()}."

    def _amounts(self) -> str:
        counts: dict[str, int] = {}
        p = "(p − target)" if self.aimed else "p"
        for amount in self.decayed.values():
            text = f"{self._short(amount)}·{p}"
            counts[text] = counts.get(text, 0) + 1
        where = "added to the gradient" if self.in_gradient else "subtracted from the parameter"
        term = f"{self.factor}·{p}"
        if len(counts) == 1:
            return f"{term} = {next(iter(counts))} {where}{self._λ_now()}"
        if len(counts) <= 3:
            shares = ", ".join(f"{text} ({n})" for text, n in counts.items())
            return f"{term} {where}: {shares}"
        low, high = min(self.decayed.values()), max(self.decayed.values())
        return f"{term} {where}: {self._short(low)}·{p} to {self._short(high)}·{p}"

    def _λ_now(self) -> str:
        """λ beside its product with learning rates, where all decayed parameters have one λ."""
        λs = {self.weight_decays[name] for name in self.decayed}
        return "" if self.in_gradient or len(λs) > 1 else f"; λ is {short(λs.pop())}"

    def _short(self, amount: float) -> str:
        """λ in full; three digits of a product of λ with learning rates."""
        return short(amount) if self.in_gradient else short(amount, 3)

    def __str__(self) -> str:
        lines = [self.sentence]
        kinds = {
            "no decay so far": self.undecayed,
            "not in the last step (no gradient, or decay was paused)": self.absent,
            "frozen": self.frozen,
        }
        for kind, names in kinds.items():
            if names:
                more = f", ... {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                lines.append(f"  {kind}: {len(names)}: {', '.join(names[:_SHOWN])}{more}")
        if self.undecayed and not self.paused:
            lines.append(
                "  A weight is decayed when it has a gradient and an optimizer steps it; "
                "`python -m wdhook doctor` finds what is missing"
            )
        return "\n".join(folded_lines("\n".join(lines)))


def checked(engine: Engine) -> Check:
    """Read what the engine has kept of the last payments. Waits for the device where ``lr`` is a
    tensor."""
    state = engine.state
    clocks = {id(entry.clock): entry.clock for entry in state.parameters.entries()}
    check = Check(
        steps=state.steps or max((clock.steps for clock in clocks.values()), default=0),
        factor=state.config.formula.factor,
        in_gradient=state.config.in_gradient,
        announced=all(clock.announced for clock in clocks.values()),
        paused=state.pauses > 0,
        aimed=state.config.formula.begins,
    )
    decided = state.parameters.decided()
    for found in state.parameters.walk():
        known = decided.get(id(found.param))
        if known is None or not known.decision.eligible:
            continue
        entry = state.parameters.entry(found.param)
        λ = state.rate.weight_decay_of(known.decision, entry)
        if not λ:
            continue
        check.weight_decays[found.name] = λ
        if not found.param.requires_grad:
            check.frozen.append(found.name)
        elif entry is None or not entry.receipt.number or _is_unowned(entry, state.announced):
            check.undecayed.append(found.name)
        elif entry.stamp < max(0, entry.clock.steps - 1):
            check.absent.append(found.name)
        else:
            number = entry.receipt.number
            check.decayed[found.name] = float(state.config.formula.amount_of(number))
            check.numel += 0 if is_lazy(found.param) else found.param.numel()
    return check


def _is_unowned(entry: Entry, announced: bool) -> bool:
    """Steps were announced, and none of an optimizer that owns the parameter."""
    return announced and entry.terms.owner is None
