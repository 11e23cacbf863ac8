"""A training loop, event by event: the world of `test_machine`, of its twin, and of wdhook."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from machine_draws import OPTIMIZERS, Config, Net, PlannedError, Tied, scheduled, stop
from torch import Tensor, nn
from torch.optim import Optimizer

import wdhook


class World:
    """A model, its optimizers and its scaler, and what a training loop does with them."""

    def __init__(self, model: Net, config: Config) -> None:
        self.model = model
        self.config = config
        self.known: dict[str, nn.Parameter] | None = None
        self.scaler: Any = None
        if config.scale is not None:
            scale = {"init_scale": config.scale or 1.0, "growth_interval": 2}
            self.scaler = torch.amp.GradScaler("cpu", enabled=config.scale > 0, **scale)
        self.construct()

    def params(self) -> dict[str, nn.Parameter]:
        if self.known is None:
            self.known = dict(self.model.named_parameters())
        return self.known

    def grads(self) -> dict[str, Tensor]:
        return {n: p.grad for n, p in self.params().items() if p.grad is not None}

    def construct(self) -> None:
        """New optimizers for the parameters that there are."""
        names = list(self.params())
        parts = [names] * len(self.config.optimizers)
        if len(parts) == 2 and not self.config.shared:
            parts = [
                [n for n in names if n.startswith("two.") is second] for second in (False, True)
            ]
        self.places: list[dict[str, int]] = [
            {} for _ in parts
        ]  # name → index of the param group, in that order
        self.optimizers: list[Optimizer] = []
        for kind, part, place in zip(self.config.optimizers, parts, self.places, strict=True):
            make, arguments = OPTIMIZERS[kind]
            groups = [
                *self.groups(place, 0, part[::2], 0.02),
                *self.groups(place, 1, part[1::2], 0.01),
            ]
            self.optimizers.append(make(groups, lr=0.02, **arguments))

    def groups(
        self, place: dict[str, int], index: int, names: list[str], lr: float
    ) -> list[dict[str, Any]]:
        """What is one param group in the optimizer under test."""
        place.update(dict.fromkeys(names, index))
        params = self.params()
        return [{"params": [params[n] for n in part], "lr": lr} for part in self.split(names)]

    def split(self, names: list[str]) -> list[list[str]]:
        return [names]

    # ---------------------------------------------------------------- events

    def backward(self, batch: int, reach: str, how: str) -> None:
        generator = torch.Generator().manual_seed(batch)
        x = torch.randn((4, 4), generator=generator, dtype=torch.float64).to(self.model.mix.dtype)
        loss = (self.model(x, reach, how == "raises").tanh() - 0.5).square().mean()
        if not loss.requires_grad:
            return
        if self.scaler is not None:
            loss = self.scaler.scale(loss * float("inf") if how == "overflow" else loss)
        if how == "twice":
            self.accumulate(loss, retain_graph=True)
        self.accumulate(loss, create_graph=how == "create_graph")

    def accumulate(self, loss: Tensor, **how: bool) -> None:
        with suppress(PlannedError):
            loss.backward(**how)

    def zero(self, index: int | None, to_none: bool) -> None:
        """By an optimizer, or by the model."""
        (self.model if index is None else self.optimizers[index]).zero_grad(set_to_none=to_none)

    def clip(self, index: int | None, how: str) -> None:
        names = self.params() if index is None else self.places[index]
        params = [p for n, p in self.params().items() if n in names and p.grad is not None]
        if not params:
            return  # torch's own error
        if how == "norm":
            nn.utils.clip_grad_norm_(params, 0.05)
        else:
            nn.utils.clip_grad_value_(params, 0.02)

    def step(self, index: int, closure: Callable[[World], None] | None) -> None:
        self.optimizers[index].step(*([] if closure is None else [lambda: closure(self)]))

    def fail(self, index: int, wrapped: bool) -> None:
        """A step that raises before it changes any parameter; in a wrapper's step, perhaps."""
        optimizer = self.optimizers[index]
        hook = optimizer.register_step_pre_hook(stop)
        with suppress(PlannedError):
            (Outer(optimizer) if wrapped else optimizer).step()
        hook.remove()

    def wrapped_step(self, index: int) -> None:
        """The step of a wrapper, which lets the optimizer inside step."""
        Outer(self.optimizers[index]).step()

    def hooked_step(self, index: int, brought: str | None) -> None:
        """A step pre-hook of the user clips the gradients, or brings one."""

        def hook(*_: Any) -> None:
            if brought is None:
                self.clip(index, "value")
            else:
                self.set_grad(brought, False)

        handle = self.optimizers[index].register_step_pre_hook(hook)
        self.optimizers[index].step()
        handle.remove()

    def scaled_step(self, index: int, clip: bool) -> None:
        if clip:
            self.scaler.unscale_(self.optimizers[index])
            self.clip(index, "norm")
        self.scaler.step(self.optimizers[index])

    def schedule(self, index: int, factor: float, by_hand: bool) -> None:
        if not by_hand:
            torch.optim.lr_scheduler.LambdaLR(self.optimizers[index], lambda _: factor)
        for group in self.optimizers[index].param_groups if by_hand else ():
            group["lr"] = group["lr"] * factor

    def freeze(self, names: list[str], frozen: bool) -> None:
        for name, param in self.params().items():
            if name in names:
                param.requires_grad_(not frozen)

    def set_grad(self, name: str, derived: bool) -> None:
        param = self.params()[name]
        if not derived:
            param.grad = torch.full_like(param, 0.01)
        elif param.grad is not None:
            param.grad = param.grad.detach() * 0.5

    def replace(self, name: str) -> None:
        """A new parameter in the place of another, in the modules and in the optimizers."""
        old = self.params()[name]
        new = nn.Parameter(old.detach().clone(), old.requires_grad)
        for module in self.model.modules():
            for local in [local for local, param in module._parameters.items() if param is old]:
                setattr(module, local, new)
        self.known = None
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]
            optimizer.state.pop(old, None)

    def assign(self) -> None:
        """A checkpoint that replaces all parameters, and new optimizers for them."""
        self.model.load_state_dict(
            {k: v.clone() for k, v in self.model.state_dict().items()}, assign=True
        )
        for block in self.model.modules():
            if isinstance(block, Tied):
                block.tie()
        self.known = None
        self.construct()

    def grow(self, seed: int) -> None:
        """Another layer at the end, for the last optimizer."""
        before = self.params()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model.two.append(nn.Linear(4, 4).to(self.model.mix.dtype))
        self.known = None
        names = [n for n in self.params() if n not in before]
        for group in self.groups(self.places[-1], len(self.model.two) + 9, names, 0.03):
            self.optimizers[-1].add_param_group(group)

    def operate(self, part: str, how: str) -> None:
        """Surgery: the parameters of one part get other names."""
        layers = self.model.get_submodule(part)
        before = {id(p): n for n, p in self.params().items()}
        if how == "insert":
            layers.insert(0, nn.Identity())
        elif how == "wrap":
            layers[0] = nn.Sequential(layers[0])
        elif isinstance(layers[0], nn.Identity):
            del layers[0]
        self.known = None
        self.rename({before[id(p)]: n for n, p in self.params().items()})

    def rename(self, names: dict[str, str]) -> None:
        """Call parameters by their new names."""
        self.places = [{names[n]: i for n, i in place.items()} for place in self.places]

    def turn(self, index: int) -> None:
        """A minimax loop turns round."""
        for group in self.optimizers[index].param_groups:
            group["maximize"] = not group["maximize"]

    def reorder(self, index: int, how: str) -> None:
        """The param groups get other numbers: reversed, or the first is deleted and added again."""
        optimizer, place = self.optimizers[index], self.places[index]
        if how == "reverse":
            optimizer.param_groups.reverse()
            self.places[index] = dict(reversed(place.items()))
            return
        first = next(iter(place.values()))
        moved = [n for n, i in place.items() if i == first]
        count = len(self.split(moved))
        gone = optimizer.param_groups[:count]
        del optimizer.param_groups[:count]
        for group in gone:
            optimizer.add_param_group(group)
        for name in moved:
            place[name] = place.pop(name)

    def reload(self, index: int) -> None:
        """An optimizer's checkpoint replaces its param groups."""
        self.optimizers[index].load_state_dict(copy.deepcopy(self.optimizers[index].state_dict()))


class Outer(Optimizer):
    """As Lookahead: a wrapper that lets the optimizer inside step."""

    def __init__(self, inside: Optimizer) -> None:
        self.inside = inside
        super().__init__(inside.param_groups, {})
        self.param_groups = inside.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inside.step(closure)


class Subject(World):
    """The world with wdhook in it."""

    def __init__(self, model: Net, config: Config, own: dict[str, Any]) -> None:
        super().__init__(model, config)
        self.own = own
        self.attach()

    def attach(self) -> None:
        config, model = self.config, self.model
        arguments: dict[str, Any] = {
            "mode": config.mode,
            "at": config.at,
            "foreach": config.foreach,
        }
        arguments["lr"] = (lambda group: group["lr"] / 2) if config.lr == "half" else config.lr
        arguments["optimizer"] = self.optimizers if config.given else None
        arguments["scaler"] = self.scaler if config.mode == "coupled" else None
        roots = [("", model)] if len(config.λ) == 1 else [("one.", model.one), ("two.", model.two)]
        self.handles = []
        for λ, (prefix, root) in zip(config.λ, roots, strict=True):
            own = {n[len(prefix) :]: value for n, value in self.own.items() if n.startswith(prefix)}
            given = partial(scheduled, λ) if config.scheduled else λ
            self.handles.append(wdhook.attach(root, given, overrides=own or None, **arguments))

    def rename(self, names: dict[str, str]) -> None:
        super().rename(names)
        self.own = {names[n]: value for n, value in self.own.items()}

    def hooked(self) -> set[str]:
        """Parameters with a hook that decays; at "step" a few have one that only watches."""
        if self.config.at == "step":
            return set()
        return {n for n, p in self.params().items() if p._post_accumulate_grad_hooks}
