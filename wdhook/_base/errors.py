"""Every error and warning that wdhook raises.

Each error is also the builtin that a caller would expect (`ValueError` for a bad argument,
`RuntimeError` for a training loop that cannot be decayed correctly), so that code which
does not know wdhook can handle it.
"""

from __future__ import annotations


class WdhookError(Exception):
    """Base of every error raised by wdhook."""


class ArgumentError(WdhookError, ValueError):
    """An argument has no meaning: a negative λ, an unknown mode, a selector of the wrong kind."""


class SelectorError(ArgumentError):
    """A key of `overrides` matches no parameter."""


class NothingToDecayError(ArgumentError):
    """The model has no eligible parameter."""


class LearningRateError(ArgumentError):
    """Decoupled decay needs a learning rate and there is none, or it is not the effective one."""


class AlreadyAttachedError(WdhookError, RuntimeError):
    """A parameter is already decayed by another handle."""


class DoubleDecayError(WdhookError, RuntimeError):
    """The optimizer decays a parameter that wdhook decays too."""


class MasterWeightsError(WdhookError, RuntimeError):
    """Decoupled decay of a parameter that no stepping optimizer owns."""


class LossScaleError(WdhookError, RuntimeError):
    """A gradient scaler is in use that coupled decay was not told about."""


class UnreachedError(WdhookError, RuntimeError):
    """A gradient came from other ranks alone, so that this rank's share of the decay is not in it."""


class UnsupportedOptimizerError(WdhookError, RuntimeError):
    """The optimizer's update cannot be combined with this mode of decay."""


class NoGradientError(WdhookError, RuntimeError):
    """One-shot decay was asked for before any gradient exists."""


class WdhookWarning(UserWarning):
    """Something that is probably not what the user wants, but has a meaning."""
