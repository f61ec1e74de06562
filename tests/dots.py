"""What a packed bfloat16 layer computes on targets with dot products of bfloat16 pairs, and how exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numoe
import numpy as np
import numpy.typing as npt
from numoe import _core
from numoe.reference.functions import activate, sigmoid

Array = npt.NDArray[Any]

USED = next(
    target["bfloat16_dots"]
    for target in [*_core.targets(), *_core.emulated_targets()]
    if target["name"] == _core.target()
)


@dataclass(frozen=True)
class Bounded:
    """Exact numbers in float64, and how far those of float32 arithmetic may be from them."""

    value: Array
    error: Array | float = 0.0

    def times(self, w: Array, bias: Array | float = 0.0) -> Bounded:
        """A matrix product, and a bias."""
        largest = (abs(self.value) + self.error) @ abs(w) + abs(bias)
        return Bounded(self.value @ w + bias, self.error @ abs(w) + rounding(len(w) + 1) * largest)

    def rounded(self) -> Bounded:
        """As bfloat16.  Rounding is monotone: float32's result lies between those of its extremes."""
        value, low, high = (bfloat16(self.value + shift) for shift in (0, -self.error, self.error))
        return Bounded(value, np.maximum(high - value, value - low))


def rounding(n: int) -> float:
    """The relative error of n float32 roundings in a row (Higham 2002, lemma 3.1)."""
    return n * 2.0**-24 / (1 - n * 2.0**-24)


def bfloat16(values: Array) -> Array:
    """Rounded, in float64."""
    return values.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def expert(x: Array, params: dict[str, Array], activation: str) -> Bounded:
    """One expert on rows of x: both factors of its products are bfloat16 numbers."""
    p = {name: bfloat16(value) if name.startswith("w_") else value for name, value in params.items()}
    rows = Bounded(bfloat16(x), np.zeros(x.shape))
    pre = rows.times(p.get("w_gate", p["w_up"]), p.get("b_gate" if "w_gate" in p else "b_up", 0.0))
    h = activate(activation, pre.value)
    error = 1.2 * pre.error + rounding(16) * abs(h)  # no activation used here is steeper; 16: its own arithmetic
    if "w_gate" in p:
        up = rows.times(p["w_up"], p.get("b_up", 0.0))
        error = abs(h) * up.error + abs(up.value) * error + error * up.error
        h = h * up.value
        error += rounding(1) * abs(h)
    return Bounded(h, error).rounded().times(p["w_down"], p.get("b_down", 0.0))


def layer_on_rounded_rows(layer: numoe.MoELayer, x: Array) -> Bounded:
    """The output of `layer.pack("bfloat16")` for float32 tokens x (T, D)."""
    config, params = layer.config, {name: value.astype(np.float32) for name, value in layer.params.items()}
    routing = layer.forward(x).routing
    names = [name for name in ("w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down") if name in params]
    y, error, size = (np.zeros(x.shape) for _ in range(3))

    def add(rows: Any, weight: Bounded, f: Bounded) -> None:
        y[rows] += weight.value * f.value
        error[rows] += abs(weight.value) * f.error + weight.error * (abs(f.value) + f.error)
        size[rows] += abs(weight.value) * (abs(f.value) + f.error)

    for e in range(config.router.num_experts):
        t, k = np.nonzero(routing.indices == e)
        weight = routing.weights[t, k][:, None]
        on_input = config.experts.weight_on == "input"
        own = {name: params[name][e] for name in names}
        f = expert(weight * x[t] if on_input else x[t], own, config.experts.activation)
        add(t, Bounded(np.ones_like(weight) if on_input else weight), f)
    if config.shared is not None:
        own = {f"w_{n}": params[f"w_shared_{n}"] for n in ("gate", "up", "down") if f"w_shared_{n}" in params}
        weights = Bounded(np.ones((len(x), 1)))
        if config.shared.gate == "sigmoid":
            score = Bounded(x.astype(np.float64), np.zeros(x.shape)).times(params["w_shared_score"][:, None])
            value = sigmoid(score.value)
            weights = Bounded(value, score.error / 4 + rounding(16) * value)  # no slope of σ is above ¼
        add(slice(None), weights, expert(x, own, config.shared.activation))
    return Bounded(y, error + rounding(config.router.top_k + 2) * size)


def assert_within(actual: Array, expected: Bounded) -> None:
    excess = abs(actual - expected.value) - expected.error
    assert np.all(excess <= 0), f"beyond the bound by up to {excess.max()} at {np.argwhere(excess > 0)[:3]}"
