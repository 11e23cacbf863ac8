"""The slow twin of `test_machine`: the loop without wdhook, and a ledger of owed decay.

The ledger follows the documents, not the engine: it is told of every event, so that it needs
neither hooks nor notes.

* coupled: when an optimizer reads a gradient buffer, λ·p is in it once, as p was when it was added;
* decoupled: p is multiplied by 1 − lr·λ once in each window, which ends when a step ends;
* at "backward" that happens when the parameter receives its gradient, else at the step;
* at "step" torch's own `weight_decay` does it, where it has the formula.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from machine_draws import DECAY_THEMSELVES, OPTIMIZERS, Config, Net, PlannedError, scheduled
from machine_world import World
from torch import Tensor


@dataclass
class Account:
    """One parameter, from one step of its optimizer to the next."""

    paid: bool = False  # it was decayed in this window
    inside: bool = False  # that decay is in the gradient (coupled)
    kept: bool = False  # an earlier window's decay is in the gradient, unchanged since its step
    derived: bool = False  # the gradient was replaced after its decay
    lost: bool = (
        False  # the decay was zeroed away in place, and no gradient came since: nobody can see that
    )
    changed: bool = False  # somebody changed the gradient in place since it was decayed
    payments: int = 0  # in this window, into whatever buffers, less those zeroed in place


class Twin(World):
    """A world whose decay is written by hand, or done by torch."""

    def __init__(self, model: Net, config: Config) -> None:
        super().__init__(model, config)
        own = (
            {n: config.own[i % len(config.own)] for i, n in enumerate(self.params())}
            if config.own
            else {}
        )
        self.own = {n: value for n, value in own.items() if value is not None}
        self.hooked: set[str] = (
            set()
        )  # parameters whose decay is due in the backward, set before each event
        self.theirs: Callable[[], dict[str, Tensor]] = dict  # gradients under test, after the event
        self.attach()

    def split(self, names: list[str]) -> list[list[str]]:
        return [[name] for name in names]  # each parameter with a `weight_decay` of its own

    # ---------------------------------------------------------------- λ

    def attach(self) -> None:
        """New handles know nothing of what was before."""
        self.accounts = {name: Account() for name in self.params()}
        self.λ = list(self.config.λ)
        self.paused = [False] * len(self.λ)
        self.peaks: list[dict[tuple[int, int], float]] = [{} for _ in self.λ]
        self.finished = [
            [0] * len(self.optimizers) for _ in self.λ
        ]  # steps of each optimizer since then
        self.warnings: set[tuple[str, int]] = set()  # that were promised: which, of which handle

    def handle(self, name: str) -> int | None:
        """The index of the handle that looks after a parameter."""
        if len(self.λ) == 1:
            return 0
        return {"one": 0, "two": 1}.get(name.split(".")[0])

    def eligible(self, name: str) -> bool:
        default = self.params()[name].ndim > 1  # matrices and kernels, no biases and scales
        own = self.own.get(name, default)
        return self.handle(name) is not None and (own is True or (own is not False and own > 0))

    def rate(self, name: str) -> float:
        """λ of a parameter now."""
        own = self.own.get(name, True)
        if not self.eligible(name):
            return 0.0
        if own is not True:
            return own
        handle = self.handle(name)
        return (
            scheduled(self.λ[handle], self.finished[handle][self.owner(name)])
            if self.config.scheduled
            else self.λ[handle]
        )

    def awake(self, name: str) -> bool:
        handle = self.handle(name)
        return handle is not None and not self.paused[handle]

    def owner(self, name: str) -> int:
        return next(i for i, place in enumerate(self.places) if name in place)

    def group(self, index: int, name: str) -> dict[str, Any]:
        return self.optimizers[index].param_groups[list(self.places[index]).index(name)]

    def warn(self, which: str, name: str) -> None:
        self.warnings.add((which, self.handle(name)))

    # ---------------------------------------------------------------- decay

    def pay(self, name: str, index: int, scale: float) -> None:
        """Decay by hand."""
        account, param, λ = self.accounts[name], self.params()[name], self.rate(name)
        if not λ:
            self.note_peak(name, index)
            return
        with torch.no_grad():
            if self.config.mode == "coupled":
                param.grad.add_(param, alpha=self.sign(index, name) * λ * scale)
            else:
                param.mul_(1 - self.strength(name, index) * λ)
        account.paid = True
        account.payments += 1
        account.inside = self.config.mode == "coupled"

    def note_peak(self, name: str, index: int) -> None:
        """A step with a λ of 0 has a learning rate all the same."""
        if self.config.mode == "independent":
            self.strength(name, index)

    def sign(self, index: int, name: str) -> float:
        """The sign of coupled decay: an optimizer that maximizes negates the gradient."""
        return -1.0 if self.group(index, name).get("maximize") else 1.0

    def strength(self, name: str, index: int) -> float:
        """What λ is multiplied with in decoupled decay."""
        group = self.group(index, name)
        lr = {None: group["lr"], "half": group["lr"] / 2}.get(self.config.lr, self.config.lr)
        if self.config.mode == "decoupled":
            return lr
        label = self.places[index][name]
        # The peak is the parameter's, whichever optimizer steps it.
        key = (0, label) if self.config.shared else (index, label)
        peaks = self.peaks[self.handle(name)]
        peaks[key] = max(lr, group.get("initial_lr", lr), peaks.get(key, lr))
        return lr / peaks[key]

    def accumulate(self, loss: Tensor, **how: bool) -> None:
        before = {n: (g, g._version) for n, g in self.grads().items()}
        raised = self.went_wrong(loss, **how)
        names = [
            n
            for n, g in self.grads().items()
            if n not in before or g is not before[n][0] or g._version != before[n][1]
        ]
        for suspects in self.suspects():
            if suspects & set(names):  # the others tell whether it was zeroed or clipped
                clipped = sorted(n for n in suspects if not self.accounts[n].lost)
                if clipped and len(suspects) > 1:
                    self.warn("changed", clipped[0])
                for name in suspects:
                    account = self.accounts[name]
                    if account.lost:
                        account.payments -= 1
                    account.changed = False
                    account.paid, account.lost = account.paid and not account.lost, False
                if len(suspects) == 1:
                    self.warn("alone", *suspects)
                    alone = self.accounts[suspects.pop()]
                    alone.inside = False
                    alone.payments -= 1
        for name in names:
            self.receive(name, raised)

    def went_wrong(self, loss: Tensor, **how: bool) -> bool:
        """The backward pass, and whether it raised: then its hooks have noted for nothing."""
        try:
            loss.backward(**how)
        except PlannedError:
            return True
        return False

    def suspects(self) -> list[set[str]]:
        """For each handle: decayed gradients that were changed in place since."""
        changed = {n for n, a in self.accounts.items() if a.changed}
        return [{n for n in changed if self.handle(n) == handle} for handle in range(len(self.λ))]

    def is_mixed(self) -> bool:
        """Whether gradients that changed in place were zeroed, while others were not."""
        return any(
            len({self.accounts[n].lost for n in suspects}) == 2 for suspects in self.suspects()
        )

    def receive(self, name: str, raised: bool) -> None:
        """A gradient came from a backward pass, which pays at its end unless it raised."""
        account = self.accounts[name]
        account.kept = account.lost = False
        if name not in self.hooked:
            return
        if self.config.mode == "coupled" and not account.inside:
            account.paid = account.derived = False  # the buffer is fresh, or was zeroed
        second = self.config.mode != "coupled" and account.paid
        if second:
            self.warn("second gradient", name)
        if raised or not self.awake(name) or second or account.inside:
            return
        if self.config.mode == "coupled":
            self.pay(name, self.owner(name), self.scaler.get_scale() if self.scaler else 1.0)
        else:
            self.pay(name, self.owner(name), 1.0)

    def due(self, index: int) -> list[str]:
        """What the optimizer is going to step and was not decayed yet."""
        return [n for n in self.read(index) if self.is_due(n, self.accounts[n])]

    def read(self, index: int) -> list[str]:
        """What the optimizer reads a gradient of, and is decayed at all now."""
        return [
            n for n in self.grads() if n in self.places[index] and self.awake(n) and self.rate(n)
        ]

    def is_due(self, name: str, account: Account) -> bool:
        if self.config.mode != "coupled":
            return not account.paid
        if account.inside or account.kept or account.derived:
            return False
        # Zeroed away unseen: decayed again, or not; known if a zero became a number.
        return not account.lost or bool(self.theirs()[name].any())

    def warn_of_derived(self, index: int) -> None:
        for name in self.read(index):
            if self.accounts[name].derived and self.config.mode == "coupled":
                self.warn("replaced", name)

    # ---------------------------------------------------------------- events

    def step(self, index: int, closure: Callable[[World], None] | None = None) -> None:
        if closure is not None:
            closure(self)
        self.take(index, self.optimizers[index].step, 1.0)

    def take(self, index: int, step: Callable[[], Any], scale: float) -> None:
        """Decay what is due, step, and end the windows of the optimizer's parameters."""
        kind, arguments = OPTIMIZERS[self.config.optimizers[index]]
        own = self.config.at == "step" and (self.config.mode, kind) in DECAY_THEMSELVES
        own = own and self.config.lr is None and "fused" not in arguments
        self.warn_of_derived(index)
        for name in self.read(index):
            account = self.accounts[name]
            if account.kept and not account.paid and self.config.mode == "coupled":
                self.warn("again", name)
        due, params, read = self.due(index), self.params(), self.read(index)
        old = {name: params[name].detach().clone() for name in due}
        for name in self.places[index]:
            if self.awake(name) and self.eligible(name) and not self.rate(name):
                self.note_peak(name, index)
        for name in due:
            if own:
                self.group(index, name)["weight_decay"] = self.rate(name)
            else:
                self.pay(name, index, scale)
        step()
        for name in due if own else ():
            self.group(index, name)["weight_decay"] = 0.0
            if (
                self.config.mode == "coupled"
            ):  # torch adds it to a copy, wdhook to the gradient itself
                params[name].grad.add_(
                    old[name],
                    alpha=self.sign(index, name) * self.rate(name),
                )
        for finished in self.finished:
            finished[index] += 1
        grads = self.grads()
        for name in self.places[index]:
            account = self.accounts[name]
            held = account.inside or account.kept or account.derived or (own and name in due)
            # Zeroed away unseen, so taken to be there.
            held = held or (account.lost and name in read and name not in due)
            kept = held and self.config.mode == "coupled" and name in grads
            self.accounts[name] = Account(kept=kept, lost=account.lost and name not in due)

    def fail(self, index: int, wrapped: bool) -> None:
        """A step pre-hook raises. Decay comes after the last of them, so nothing has happened."""

    def wrapped_step(self, index: int) -> None:
        self.step(index)

    def hooked_step(self, index: int, brought: str | None) -> None:
        if brought is None:
            self.clip(index, "value")
        else:
            self.set_grad(brought, False)
        self.step(index)

    def rename(self, names: dict[str, str]) -> None:
        super().rename(names)
        self.own = {names[n]: value for n, value in self.own.items()}
        self.accounts = {names[n]: account for n, account in self.accounts.items()}

    def scaled_step(self, index: int, clip: bool) -> None:
        optimizer = self.optimizers[index]
        fused = "fused" in self.config.optimizers[index]
        if clip or not fused:
            self.scaler.unscale_(optimizer)
        if clip:
            self.clip(index, "norm")
        finite = all(
            self.grads()[n].isfinite().all() for n in self.places[index] if n in self.grads()
        )
        if finite or not self.scaler.is_enabled():
            scale = self.scaler.get_scale() if fused and not clip else 1.0
            self.take(index, lambda: self.scaler.step(optimizer), scale)
            return
        self.scaler.step(optimizer)
        if (
            fused and self.config.mode == "coupled"
        ):  # its step is skipped on the device, and nobody reads it there
            self.accounts.update({name: Account() for name in self.places[index]})

    def zero(self, index: int | None, to_none: bool) -> None:
        for name in self.grads():
            account = self.accounts[name]
            if index is None or name in self.places[index]:
                if to_none:
                    self.accounts[name] = Account(paid=account.paid, payments=account.payments)
                else:
                    account.lost = account.lost or (account.inside and self.config.at == "backward")
                    account.changed = account.paid and account.lost
                    account.inside = account.kept = False
        super().zero(index, to_none)

    def clip(self, index: int | None, how: str) -> None:
        super().clip(index, how)
        for name in self.grads():
            if index is None or name in self.places[index]:
                account = self.accounts[name]
                account.kept = False
                account.changed = (
                    account.paid
                    and (account.inside or account.lost)
                    and self.config.at == "backward"
                )

    def set_grad(self, name: str, derived: bool) -> None:
        super().set_grad(name, derived)
        if name in self.grads():
            paid = self.accounts[name].paid
            self.accounts[name] = Account(paid=paid, derived=paid and self.config.at == "backward")

    def replace(self, name: str) -> None:
        super().replace(name)
        self.accounts[name] = Account()

    def assign(self) -> None:
        super().assign()
        self.accounts = {name: Account() for name in self.params()}

    def grow(self, seed: int) -> None:
        super().grow(seed)
        for name in self.params():
            self.accounts.setdefault(name, Account())
