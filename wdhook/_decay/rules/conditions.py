"""The configurations of a handle under which rules apply."""

from __future__ import annotations

from ..state import State


def in_gradient(state: State) -> bool:
    """Decay is added to gradients."""
    return state.config.in_gradient


def in_parameter(state: State) -> bool:
    """Decay changes parameters."""
    return not state.config.in_gradient


def in_backward(state: State) -> bool:
    """Decay is paid in the backward pass."""
    return state.config.in_backward


def gradient_in_backward(state: State) -> bool:
    """Decay is added to gradients in the backward pass."""
    return in_gradient(state) and in_backward(state)


def parameter_in_backward(state: State) -> bool:
    """Decay changes parameters in the backward pass."""
    return in_parameter(state) and in_backward(state)


def at_step(state: State) -> bool:
    """Decay is paid at the optimizer step."""
    return not state.config.in_backward


def default_mode(state: State) -> bool:
    """The caller has named no mode."""
    return not state.config.said_mode


def aimed(state: State) -> bool:
    """Decay draws some parameter to another value than 0."""
    return state.config.formula.begins
