"""Functions of one number, and the softmax; safe for every float, infinities and NaN included."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Infinite and NaN tokens are legitimate input: they show in the result, not in the warning filter.
quiet = np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore")

_TANH_GELU = 2 * math.sqrt(2 / math.pi)  # v/2 (1 + tanh q) = v σ(2q), 2q = this * (v + 0.044715 v³)


def sigmoid(v: Array) -> Array:
    """1 / (1 + exp(-v)) without overflow."""
    small = np.exp(-np.abs(v))
    result: Array = np.where(v >= 0, 1, small) / (1 + small)
    return result


def softplus(v: Array) -> Array:
    """log(1 + exp(v)) without overflow."""
    return np.maximum(v, 0) + np.log1p(np.exp(-np.abs(v)))


def softmax(v: Array) -> Array:
    """exp(v) / Σ exp(v) over the last axis; what equals the maximum counts as exp(0) = 1, +inf too."""
    top = v.max(axis=-1, keepdims=True)
    powers = np.exp(np.where(v == top, 0, v - top))
    p: Array = powers / powers.sum(axis=-1, keepdims=True)
    return p


def softmax_backward(p: Array, dp: Array) -> Array:
    """The gradient of v for ``p = softmax(v)``."""
    dv: Array = p * (dp - (p * dp).sum(axis=-1, keepdims=True))
    return dv


def normal_cdf(v: Array) -> Array:
    """Φ, exact: erfc(-v/√2)/2 keeps its relative accuracy in the lower tail."""
    erfc = np.vectorize(math.erfc, otypes=[np.float64])
    return np.asarray(0.5 * erfc(-v / math.sqrt(2)), v.dtype)


def normal_pdf(v: Array) -> Array:
    """φ = Φ'."""
    return np.exp(-0.5 * v * v) / math.sqrt(2 * math.pi)


@quiet
def activate(kind: str, v: Array) -> Array:
    """The activation named `kind`, elementwise.

    >>> activate("relu2", np.array([-1.0, 3.0])), activate("silu", np.array([-np.inf, 0.0]))
    (array([0., 9.]), array([0., 0.]))
    """
    match kind:
        case "silu":
            return _times(v, sigmoid(v))
        case "quick_gelu":
            return _times(v, sigmoid(1.702 * v))
        case "gelu":
            return _times(v, normal_cdf(v))
        case "gelu_tanh":
            return _times(v, sigmoid(_TANH_GELU * (v + 0.044715 * v**3)))
        case "relu":
            return np.maximum(v, 0)
        case "relu2":
            return np.square(np.maximum(v, 0))
    raise ValueError(f"unknown activation {kind!r}.")


@quiet
def activate_slope(kind: str, v: Array) -> Array:
    """The derivative of `activate`; 0 at the kink of the relus."""
    match kind:
        case "silu":
            return sigmoid(v) + _times(v, sigmoid(v) * sigmoid(-v))
        case "quick_gelu":
            return sigmoid(1.702 * v) + _times(1.702 * v, sigmoid(1.702 * v) * sigmoid(-1.702 * v))
        case "gelu":
            return normal_cdf(v) + _times(v, normal_pdf(v))
        case "gelu_tanh":
            q2 = _TANH_GELU * (v + 0.044715 * v**3)
            return sigmoid(q2) + _times(_TANH_GELU * (v + 3 * 0.044715 * v**3), sigmoid(q2) * sigmoid(-q2))
        case "relu":
            return np.heaviside(v, 0)
        case "relu2":
            slope: Array = 2 * np.maximum(v, 0)
            return slope
    raise ValueError(f"unknown activation {kind!r}.")


def _times(v: Array, vanishing: Array) -> Array:
    """``v * vanishing``, but 0 · ±inf = 0: the second factor falls exponentially, as in silu(-inf)."""
    return np.where(vanishing == 0, 0, v * vanishing)
