"""Weight decay as a callback of Lightning (``pip install lightning``)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import Plan
from ._callback import Arguments, Attached

if TYPE_CHECKING or find_spec("lightning") is not None:
    from lightning.pytorch.callbacks import Callback
else:
    from pytorch_lightning.callbacks import Callback

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..schedules import Schedule


class WeightDecay(Attached, Callback):
    r"""Decay the weights of a LightningModule, and nothing else, once per optimizer step of each
    ``fit``.

    Construct the optimizers with ``weight_decay=0``. The callback attaches when ``fit`` starts,
    after the strategy has set up model and optimizers, and uses these optimizers and the scaler of
    the precision plugin. It removes its handle when ``fit`` ends, also by an exception. Each
    ``fit`` begins with `weight_decay`, unless it resumes from a checkpoint, which holds λ.

    Args:
        weight_decay: λ per optimizer step, a schedule of it (`wdhook.schedules`), or a ready plan
            of the module.
        log: log λ as ``wdhook/weight_decay`` and the norm of the parameters of each role as
            ``wdhook/norm/<role>``, at the steps that the Trainer logs. They stay on the device
            until the logger reads them.
        **arguments: ``mode``, ``at``, ``lr``, ``overrides``, ``recipe``, ``foreach``,
            ``low_precision``, ``cautious``, ``toward``, ``inputs``; see `wdhook.attach`.

    Raises:
        ArgumentError: `arguments` has another name. All that `wdhook.attach` raises comes when
            ``fit`` starts.
    """

    def __init__(
        self,
        weight_decay: float | Schedule | Plan,
        *,
        log: bool = False,
        **arguments: Unpack[Arguments],
    ) -> None:
        super().__init__(weight_decay, arguments)
        self._log = log
        self._state: dict[
            str, Any
        ] = {}  # of a checkpoint, until `fit` starts; of the last handle, after `fit`

    # ---------------------------------------------------------------- life cycle

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Forget earlier runs. A checkpoint is loaded after this, by most strategies before
        ``on_fit_start``."""
        self._state = {}

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Attach: parameters are final, and optimizers exist."""
        decay = self.attach(
            pl_module, trainer.optimizers, getattr(trainer.precision_plugin, "scaler", None)
        )
        if self._state:
            decay.load_state_dict(self._state)

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """Remove."""
        self.remove()

    def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Remove. A checkpoint can still be saved."""
        self.remove()

    def remove(self) -> None:
        """Remove the handle now; ``fit`` does this when it ends."""
        if self.decay is not None:
            self._state = self.decay.state_dict()
        super().remove()

    # ---------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What the handle's state is, or was when ``fit`` ended."""
        return self._state if self.decay is None else self.decay.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with the λ of a checkpoint."""
        if self.decay is None:
            self._state = dict(state_dict)
        else:  # a strategy that loads after `on_fit_start`
            self.decay.load_state_dict(state_dict)

    # ---------------------------------------------------------------- logging

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Log, if asked to."""
        # The connector is private, but what Lightning's own monitors ask.
        if self._log and self.decay is not None and trainer._logger_connector.should_update_logs:
            values = {"weight_decay": self.decay.weight_decay, **norms(pl_module, self.decay.plan)}
            pl_module.log_dict(
                {f"wdhook/{name}": value for name, value in values.items()},
                on_step=True,
                on_epoch=False,
            )


def norms(model: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """``norm/<role>`` → L2 norm of all parameters of that role, on the device, without a
    synchronisation."""
    found: dict[str, list[Tensor]] = {}
    for name, param in model.named_parameters():
        if name in plan:
            norm = torch.linalg.vector_norm(param.detach(), dtype=torch.float32)
            found.setdefault(f"norm/{plan[name].role}", []).append(_whole(norm))
    return {
        role: torch.linalg.vector_norm(torch.stack([n.to(parts[0].device) for n in parts]))
        for role, parts in found.items()
    }


def _whole(norm: Tensor) -> Tensor:
    """The norm itself, where it is that of a sharded parameter."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
