"""Every error and warning that wdhook raises.

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
    """Decoupled decay needs a learning rate, and the one at hand is missing or not effective."""


class AlreadyAttachedError(WdhookError, RuntimeError):
    """A parameter is already decayed by another handle."""


class DoubleDecayError(WdhookError, RuntimeError):
    """The optimizer decays a parameter that wdhook decays too."""


class MasterWeightsError(WdhookError, RuntimeError):
    """The optimizer that steps does not own a decayed parameter that has a gradient."""


class LossScaleError(WdhookError, RuntimeError):
    """The loss is scaled in a way that coupled decay does not know."""


class UndecayedError(WdhookError, RuntimeError):
    """A step has ended in which a decayed parameter had a gradient and was not decayed."""


class AmbiguousGradientError(WdhookError, RuntimeError):
    """wdhook cannot tell how often a gradient contains the decay of this step."""


class UnsupportedOptimizerError(WdhookError, RuntimeError):
    """The optimizer's update cannot be combined with this mode of decay."""


class NoGradientError(WdhookError, RuntimeError):
    """One-shot decay was asked for before any gradient exists."""


class WdhookWarning(UserWarning):
    """Something that is probably not what the user wants, but has a meaning.

    Attributes:
        problem: what is wrong, as data; None where the message is all there is.
        rule: id of the broken rule (docs/limits.md lists them).
    """

    def __init__(self, said: str | Problem = "", rule: str = "") -> None:
        super().__init__(str(said))
        self.problem = said if isinstance(said, Problem) else None
        self.rule = rule
