"""Is it right?  Every contender against `numoe.reference` in float64, with the weights and inputs it was given."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from numoe import reference
from numoe.bench.contenders import Array, Runner
from numoe.bench.workloads import LayerShape
from numoe.config import EXPERT_PARAMS, MoEConfig
from numoe.layer import MoELayer

_CHECKED_TOKENS = 8
_FLOAT64_BYTES = 2e9  # what the hit experts of all checked tokens may take
_BFLOAT16_LIMIT = 0.05  # 2⁻⁹ per rounding, of inputs to sums and of results that are rounded several times


def checked_tokens(shape: LayerShape, tokens: int = _CHECKED_TOKENS) -> int:
    """How many tokens a check can afford: their experts are converted to float64."""
    affordable = int(_FLOAT64_BYTES / (8 * (shape.top_k * shape.numbers_per_expert + shape.shared_numbers)))
    return max(1, min(_CHECKED_TOKENS, tokens, affordable))


def is_wrong(error: float, dtype: str) -> bool:
    """Beyond rounding, however unfavourable the order of the sums.

    >>> is_wrong(1e-5, "float32"), is_wrong(1e-2, "float32"), is_wrong(1e-2, "bfloat16"), is_wrong(np.inf, "bfloat16")
    (False, True, False, True)
    """
    limit = _BFLOAT16_LIMIT if dtype == "bfloat16" else 1e4 * float(np.finfo(dtype).eps)
    return not error <= limit


# ── a few tokens, every gradient ────────────────────────────────────────────────────────────────────────────


def error_against_reference(
    runner: Runner, layer: MoELayer, x: Array, indices: Array, weights: Array, dy: Array | None = None
) -> float:
    r"""Largest :math:`\max|got - want| / \max|want|` of y and (with `dy`) of every gradient.

    `want` is `numoe.reference` in float64, on a layer that holds the hit experts only.
    """
    runner.prepare([(indices, weights)])
    exact = _Exact(layer, x, indices, weights, dy)
    if dy is None:
        return relative_error(runner.forward(x, indices, weights), exact.y)
    step = runner.forward_backward(x, indices, weights, dy)
    dparams = step.dparams()
    pairs = [(step.y, exact.y), (step.dx, exact.dx), (step.dweights, exact.dweights)]
    pairs += [(_of_experts(dparams[n], n, exact.hit), g) for n, g in exact.dparams.items() if n != "w_router"]
    return _worst(pairs)


class _Exact:
    """The reference's results, float64; gradients if `dy` is given."""

    def __init__(self, layer: MoELayer, x: Array, indices: Array, weights: Array, dy: Array | None) -> None:
        self.hit, compact = np.unique(indices, return_inverse=True)
        config = _compact_config(layer.config, len(self.hit))
        params = {name: _of_experts(value, name, self.hit) for name, value in layer.params.items()}
        x, weights = x.astype(np.float64), weights.astype(np.float64)
        out = reference.forward(config, params, x, indices=compact.reshape(indices.shape), weights=weights)
        self.y = out.y
        if dy is not None:
            grads = reference.backward(config, params, dy.astype(np.float64), out)
            assert grads.weights is not None
            self.dx, self.dweights, self.dparams = grads.x, grads.weights, grads.params


def _compact_config(config: MoEConfig, num_experts: int) -> MoEConfig:
    router = dataclasses.replace(config.router, num_experts=num_experts)
    return dataclasses.replace(config, router=router, dtype="float64")


def _of_experts(value: Array, name: str, hit: Array) -> Array:
    """The hit experts' part of a parameter or gradient."""
    if name == "w_router":
        return value[:, hit]
    return value[hit] if name in EXPERT_PARAMS else value


# ── some rows of a large call ───────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Sample:
    """What some tokens' rows of a call have to be: every token is computed alone, so a few can be checked cheaply."""

    tokens: Array  # (n,)
    y: Array  # (n, D)
    dx: Array | None = None
    dweights: Array | None = None


def sample(layer: MoELayer, x: Array, indices: Array, weights: Array, dy: Array | None, count: int) -> Sample:
    """Rows of `count` tokens, spread over the call."""
    tokens = np.unique(np.linspace(0, len(x) - 1, count).astype(np.intp))
    part = None if dy is None else dy[tokens]
    exact = _Exact(layer, x[tokens], indices[tokens], weights[tokens], part)
    if part is None:
        return Sample(tokens, exact.y)
    return Sample(tokens, exact.y, exact.dx, exact.dweights)


def error_of_sample(
    runner: Runner, wanted: Sample, x: Array, indices: Array, weights: Array, dy: Array | None = None
) -> float:
    """The error of those rows in a call with all tokens."""
    if dy is None:
        return relative_error(runner.forward(x, indices, weights)[wanted.tokens], wanted.y)
    step = runner.forward_backward(x, indices, weights, dy)
    assert wanted.dx is not None and wanted.dweights is not None
    pairs = ((step.y, wanted.y), (step.dx, wanted.dx), (step.dweights, wanted.dweights))
    return _worst((got[wanted.tokens], want) for got, want in pairs)


def _worst(pairs: Iterable[tuple[Array, Array]]) -> float:
    return max(relative_error(got, want) for got, want in pairs)


def relative_error(got: Array, want: Array) -> float:
    """Largest difference over largest value; infinite for NaN.

    >>> float(relative_error(np.array([1.0, 2.5]), np.array([1.0, 2.0])))
    0.25
    """
    difference = np.abs(got.astype(np.float64) - want)
    error = float(np.max(difference, initial=0.0) / max(np.max(np.abs(want), initial=0.0), 1e-300))
    return float("inf") if np.isnan(error) else error
