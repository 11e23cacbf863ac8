"""Weight decay as a callback of the Hugging Face Trainer (``pip install
'wdhook[transformers]'``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from .. import Anchor, ArgumentError, DoubleDecayError, Plan
from ._callback import Attached

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..schedules import Schedule
    from ._callback import Arguments

_LOST = "not in this checkpoint"  # in place of an argument that JSON cannot hold


class WeightDecayCallback(Attached, TrainerCallback, ExportableState):
    r"""Decay the weights of the Trainer's model, and nothing else, once per optimizer step of each
    ``train``.

    Leave ``TrainingArguments.weight_decay`` at 0. The callback attaches when training begins, with
    the Trainer's optimizer and scaler, and removes its handle when training ends. A Trainer does
    not inform its callbacks of an exception: after one, call `remove`, or let the next ``train`` do
    it. ``train(resume_from_checkpoint=...)`` continues with the λ of the checkpoint's
    ``trainer_state.json``.

    Args:
        weight_decay: λ per optimizer step, a schedule of it (`wdhook.schedules`), or a ready plan
            of the model.
        **arguments: ``mode``, ``at``, ``lr``, ``overrides``, ``recipe``, ``foreach``,
            ``low_precision``, ``cautious``, ``toward``, ``inputs``; see `wdhook.attach`.
            ``toward="init"`` is an error: give the values, as `wdhook.Anchor`.

    Raises:
        ArgumentError: `arguments` has another name. All that `wdhook.attach` raises comes when
            training begins.
    """

    def __init__(
        self, weight_decay: float | Schedule | Plan, **arguments: Unpack[Arguments]
    ) -> None:
        given = {"weight_decay": weight_decay, **arguments}
        lost = [name for name, value in given.items() if isinstance(value, str) and value == _LOST]
        if lost:
            raise ArgumentError(
                "The Trainer makes its callbacks anew from a checkpoint, and JSON could not hold "
                f"`{lost[0]}`.\n"
                "  Use TrainingArguments(restore_callback_states_from_checkpoint=False): "
                "this callback goes on with the λ of a checkpoint anyway"
            )
        super().__init__(weight_decay, arguments)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach, and go on with the λ of the checkpoint from which training resumes."""
        _refuse_own_decay(args)
        # A Trainer that resumes from a checkpoint without this callback would fail when it saves
        # the next one.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if isinstance(saved, list):
            raise ArgumentError(
                f"A Trainer can have one {type(self).__name__} only.\n  found: {len(saved)}\n"
                "  Use `overrides` for parameters that have a λ of their own"
            )
        optimizer = kwargs["optimizer"]  # accelerate's wrapper
        decay = self.attach(kwargs["model"], _inside(optimizer), getattr(optimizer, "scaler", None))
        if any(isinstance(d.toward, Anchor) and d.toward.is_init for d in decay.plan.values()):
            self.remove()
            raise ArgumentError(
                "The Trainer keeps the states of its callbacks as JSON, which cannot hold the "
                "values before the first update.\n"
                '  toward: "init"\n'
                "  Give those values: start = copy.deepcopy(model.state_dict()), then "
                "toward=wdhook.Anchor(start), or the pretrained weights"
            )
        if state.global_step and "resumed" in saved["attributes"]:
            decay.load_state_dict(saved["attributes"]["resumed"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove."""
        self.remove()

    def state(self) -> dict[str, Any]:
        """What the Trainer writes into its checkpoints, as JSON."""
        arguments = {"weight_decay": self.weight_decay, **self.arguments}
        return {
            # Read by a Trainer that makes its callbacks anew, with
            # restore_callback_states_from_checkpoint=True.
            "args": {
                name: value if _is_plain(value) else _LOST for name, value in arguments.items()
            },
            "attributes": {}
            if self.decay is None
            else {"resumed": _to_json(self.decay.state_dict())},
        }


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _refuse_own_decay(args: Any) -> None:
    if args.weight_decay:
        raise DoubleDecayError(
            "The Trainer's optimizer would decay parameters that wdhook decays too.\n"
            f"  TrainingArguments.weight_decay: {args.weight_decay}\n"
            "  Use TrainingArguments(weight_decay=0) and, for the decay of AdamW, "
            f'WeightDecayCallback({args.weight_decay}, mode="decoupled", at="step")'
        )


def _inside(optimizer: Any) -> Iterable[Any]:
    """The optimizers that step: not the wrapper, and of layer-wise ones the one of each layer."""
    inner = getattr(optimizer, "optimizer", optimizer)
    layers: Mapping[Any, Any] = getattr(inner, "optimizer_dict", {})
    return layers.values() or [inner]


def _to_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    return value.item() if isinstance(value, Tensor) else value
