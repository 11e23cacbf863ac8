"""The errors and warnings of wdhook.

Each error is also the builtin that a caller would expect (`ValueError` for a bad argument,
`RuntimeError` for a training loop that cannot be decayed correctly), so that code which
does not know wdhook can handle it.
"""

from __future__ import annotations

from .problem import Problem


class WdhookError(Exception):
    """Base of every error raised by wdhook.

    Attributes:
        problem: what is wrong, as data; None where the message is all there is.
        rule: id of the broken rule (docs/limits.md lists them); empty for the check of an argument.
    """

    def __init__(self, said: str | Problem = "", rule: str = "") -> None:
        super().__init__(str(said))
        self.problem = said if isinstance(said, Problem) else None
        self.rule = rule


class ArgumentError(WdhookError, ValueError):
    """An argument has no meaning: a negative λ, an unknown mode, a selector of the wrong kind."""


class SelectorError(ArgumentError):
    """A key of `overrides` matches no parameter."""


class NothingToDecayError(ArgumentError):
    """The model has no eligible parameter."""


class LearningRateError(ArgumentError):
    """Decoupled decay needs a learning rate: none is known, or not the effective rate."""


class AlreadyAttachedError(WdhookError, RuntimeError):
    """A parameter is already decayed by another handle."""


class DoubleDecayError(WdhookError, RuntimeError):
    """The optimizer and wdhook decay the same parameter."""


class MasterWeightsError(WdhookError, RuntimeError):
    """A decayed parameter has a gradient, and the optimizer of the step does not own it."""


class LossScaleError(WdhookError, RuntimeError):
    """The loss is scaled by a factor unknown to coupled decay."""


class UndecayedError(WdhookError, RuntimeError):
    """A step has read the gradient of a decayed parameter without decay."""


class AmbiguousGradientError(WdhookError, RuntimeError):
    """A gradient contains the decay of this step an unknown number of times."""


class UnsupportedOptimizerError(WdhookError, RuntimeError):
    """The optimizer's update cannot be combined with this mode of decay."""


class TargetError(WdhookError, RuntimeError):
    """Decay cannot draw a parameter to its target: values do not fit, or are not known any more."""


class NoGradientError(WdhookError, RuntimeError):
    """One-shot decay came before any gradient."""


class WdhookWarning(UserWarning):
    """A probable mistake with a meaning: training goes on.

    Attributes:
        problem: what is wrong, as data; None where the message is all there is.
        rule: id of the broken rule (docs/limits.md lists them).
    """

    def __init__(self, said: str | Problem = "", rule: str = "") -> None:
        super().__init__(str(said))
        self.problem = said if isinstance(said, Problem) else None
        self.rule = rule
