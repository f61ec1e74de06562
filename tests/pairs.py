"""What bfloat16 layers compute on targets that multiply bfloat16 pairs, and how exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numoe
import numpy as np
import numpy.typing as npt
from numoe.info import multiplies_pairs
from numoe.reference.functions import activate, activate_slope, sigmoid

Array = npt.NDArray[Any]

USED = multiplies_pairs()


@dataclass(frozen=True, eq=False)
class Bounded:
    """Exact numbers in float64, and how far those of float32 arithmetic may be from them."""

    value: Array
    error: Array | float = 0.0

    @property
    def size(self) -> Array:
        """No number is larger."""
        return abs(self.value) + self.error

    @property
    def T(self) -> Bounded:
        return Bounded(self.value.T, np.broadcast_to(self.error, self.value.shape).T)

    def __add__(self, other: Bounded) -> Bounded:
        value, error = self.value + other.value, self.error + other.error
        return Bounded(value, error + rounding(1) * (abs(value) + error))

    def __mul__(self, other: Bounded) -> Bounded:
        error = self.size * other.size - abs(self.value) * abs(other.value)
        return Bounded(self.value * other.value, error + rounding(1) * self.size * other.size)

    def __matmul__(self, other: Bounded) -> Bounded:
        largest = self.size @ other.size
        error = largest - abs(self.value) @ abs(other.value)
        return Bounded(self.value @ other.value, error + rounding(self.value.shape[-1] + 1) * largest)

    def sum(self, axis: int) -> Bounded:
        n = self.value.shape[axis]
        error = np.broadcast_to(self.error, self.value.shape).sum(axis)
        return Bounded(self.value.sum(axis), error + rounding(n) * self.size.sum(axis))

    def rounded(self) -> Bounded:
        """As bfloat16.  Rounding is monotone: float32's result lies between those of its extremes."""
        value, low, high = (bfloat16(self.value + shift) for shift in (0, -self.error, self.error))
        return Bounded(value, np.maximum(high - value, value - low))

    def activated(self, kind: str) -> Bounded:
        """No activation used here is steeper than 1.2; 16: roundings of its own arithmetic."""
        value = activate(kind, self.value)
        return Bounded(value, 1.2 * self.error + rounding(16) * abs(value))

    def slope(self, kind: str) -> Bounded:
        """The activation's; no slope of a smooth one changes faster than 1 to 1."""
        value = activate_slope(kind, self.value)
        return Bounded(value, self.error + rounding(32) * (abs(value) + abs(self.value)))


def rounding(n: int) -> float:
    """The relative error of n float32 roundings in a row (Higham 2002, lemma 3.1)."""
    return n * 2.0**-24 / (1 - n * 2.0**-24)


def bfloat16(values: Array) -> Array:
    """Rounded, in float64."""
    return values.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


class Expert:
    """One expert on rows of x: both factors of its products are bfloat16 numbers."""

    def __init__(self, rows: Bounded, params: Mapping[str, Array], activation: str) -> None:
        self.w = {n: Bounded(bfloat16(v)) for n, v in params.items() if n.startswith("w_")}
        self.b = {n: Bounded(v.astype(np.float64)) for n, v in params.items() if n.startswith("b_")}
        self.activation, self.rows = activation, rows.rounded()
        self.first = "gate" if "w_gate" in self.w else "up"
        self.pre = self._product(self.rows, self.first)
        self.up = self._product(self.rows, "up") if self.first == "gate" else None
        h = self.pre.activated(activation)
        self.h = h * self.up if self.up else h
        self.y = self._product(self.h.rounded(), "down")

    def _product(self, rows: Bounded, name: str) -> Bounded:
        product = rows @ self.w[f"w_{name}"]
        return product + self.b[f"b_{name}"] if f"b_{name}" in self.b else product

    def backward(self, dy: Bounded, weight: Bounded) -> tuple[Bounded, Bounded, dict[str, Bounded]]:
        """Gradients of ⟨weight · dy, y⟩ with respect to the rows, the weight and the parameters."""
        dh = dy.rounded() @ self.w["w_down"].T
        dweight = (dh * self.h).sum(1)
        if "b_down" in self.b:
            dweight = dweight + (dy * self.b["b_down"]).sum(1)
        dh, h = dh * weight, self.h * weight
        slope = self.pre.slope(self.activation)
        d = {self.first: dh * self.up * slope if self.up else dh * slope}
        if self.up:
            d["up"] = dh * self.pre.activated(self.activation)
        terms = [d[name].rounded() @ self.w[f"w_{name}"].T for name in d]
        drows = terms[0] + terms[1] if self.up else terms[0]
        grads = {f"w_{name}": self.rows.T @ value.rounded() for name, value in d.items()}
        grads["w_down"] = h.rounded().T @ dy.rounded()
        if self.b:
            grads |= {f"b_{name}": value.sum(0) for name, value in d.items()}
            grads["b_down"] = (dy * weight).sum(0)
        return drows, dweight, grads


def layer_on_rounded_rows(layer: numoe.MoELayer, x: Array) -> Bounded:
    """The output of `layer.pack("bfloat16")` for float32 tokens x (T, D)."""
    config, params = layer.config, {name: value.astype(np.float32) for name, value in layer.params.items()}
    routing = layer.forward(x).routing
    names = [name for name in ("w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down") if name in params]
    sums = Sums(x.shape)
    for e in range(config.router.num_experts):
        t, k = np.nonzero(routing.indices == e)
        weight = Bounded(routing.weights[t, k][:, None].astype(np.float64))
        on_input = config.experts.weight_on == "input"
        rows = Bounded(x[t].astype(np.float64))
        f = Expert(rows * weight if on_input else rows, {n: params[n][e] for n in names}, config.experts.activation).y
        sums.add(t, f if on_input else f * weight)
    if config.shared is not None:
        own = {f"w_{n}": params[f"w_shared_{n}"] for n in ("gate", "up", "down") if f"w_shared_{n}" in params}
        rows = Bounded(x.astype(np.float64))
        f = Expert(rows, own, config.shared.activation).y
        if config.shared.gate == "sigmoid":
            score = rows @ Bounded(params["w_shared_score"][:, None].astype(np.float64))
            value = sigmoid(score.value)
            f = f * Bounded(value, score.error / 4 + rounding(16) * value)  # no slope of σ is above ¼
        sums.add(slice(None), f)
    return sums.result()


class Sums:
    """Rows that are added to tokens, each token's in a row."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.value, self.error, self.size = (np.zeros(shape) for _ in range(3))
        self.terms = 0

    def add(self, tokens: Any, rows: Bounded) -> None:
        self.value[tokens] += rows.value
        self.error[tokens] += rows.error
        self.size[tokens] += rows.size
        self.terms += 1

    def result(self) -> Bounded:
        return Bounded(self.value, self.error + rounding(self.terms + 2) * self.size)


def experts_on_rounded_rows(
    x: Array, dy: Array, plan: numoe.Dispatch, weights: Array, params: Mapping[str, Array], config: numoe.ExpertConfig
) -> tuple[Bounded, Bounded, Bounded, dict[str, Bounded]]:
    """y, dx, dweights and the parameters' gradients of combined experts with float32 x and dy."""
    y, dx = Sums(x.shape), Sums(x.shape)
    dweights = [np.zeros(weights.shape) for _ in range(2)]
    grads = {name: ([], []) for name in params}
    for e in range(len(plan.offsets) - 1):
        rows = slice(plan.offsets[e], plan.offsets[e + 1])
        t, k = np.divmod(plan.row_assignment[rows], plan.top_k)
        weight = Bounded(weights[t, k][:, None].astype(np.float64))
        one = Bounded(np.ones_like(weight.value))
        on_input = config.weight_on == "input"
        own = Bounded(x[t].astype(np.float64))
        expert = Expert(
            own * weight if on_input else own, {name: value[e] for name, value in params.items()}, config.activation
        )
        y.add(t, expert.y if on_input else expert.y * weight)
        out = Bounded(dy[t].astype(np.float64))
        drows, dweight, d = expert.backward(out, one if on_input else weight)
        if on_input:
            dweight = (drows * own).sum(1)
            drows = drows * weight
        dx.add(t, drows)
        for target, found in zip(dweights, (dweight.value, dweight.error), strict=True):
            target[t, k] = found
        for name, gradient in d.items():
            grads[name][0].append(gradient.value)
            grads[name][1].append(gradient.error)
    stacked = {name: Bounded(np.stack(values), np.stack(errors)) for name, (values, errors) in grads.items()}
    return y.result(), dx.result(), Bounded(*dweights), stacked


def assert_within(actual: Array, expected: Bounded, name: str = "") -> None:
    excess = abs(actual - expected.value) - expected.error
    assert np.all(excess <= 0), f"{name} beyond the bound by up to {excess.max()} at {np.argwhere(excess > 0)[:3]}"
