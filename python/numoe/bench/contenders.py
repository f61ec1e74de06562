"""Who is measured: a table of names and callables, all given the same numbers and checked against float64.

A contender is a function of a layer that returns a `Runner`.  It receives the router's decision (indices and
weights) and has to sort, compute and combine.  To add one, write a runner and add a line to `CONTENDERS`; one
that cannot run here raises `ContenderUnavailableError` with the reason, which is printed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from numoe import reference
from numoe.config import EXPERT_PARAMS, ExpertConfig, MoEConfig, RouterConfig
from numoe.experts import experts_forward
from numoe.layer import MoELayer
from numoe.routing import Routing, dispatch

Array = npt.NDArray[Any]
_ONE_EXPERT = RouterConfig(num_experts=1, top_k=1)


@dataclass(frozen=True)
class Step:
    """The result of a forward and backward."""

    y: Array  # (T, D)
    dx: Array  # (T, D)
    dweights: Array  # (T, K)
    dparams: dict[str, Array]  # of the experts and the shared expert, names and shapes of the layer's


class Runner(Protocol):
    """One implementation of the layer."""

    def forward(self, x: Array, indices: Array, weights: Array) -> Array:
        """The output y (T, D), for inference."""

    def forward_backward(self, x: Array, indices: Array, weights: Array, dy: Array) -> Step:
        """The output and the gradients of ``<dy, y>`` for x, weights and all expert matrices."""


class ContenderUnavailableError(Exception):
    """A contender cannot run here; the message says why."""


# ── numoe ───────────────────────────────────────────────────────────────────────────────────────────────────


class Numoe:
    """The layer as its users call it; the forward without the cache of a backward."""

    def __init__(self, layer: MoELayer) -> None:
        self._layer = layer
        self._config = layer.config
        shared = layer.config.shared
        if shared is not None:
            self._shared = {
                f"w_{part}": layer.params[f"w_shared_{part}"][None]
                for part in ("gate", "up", "down")
                if f"w_shared_{part}" in layer.params
            }
            self._shared_config = ExpertConfig(d_ff=shared.d_ff, form=shared.form, activation=shared.activation)

    def forward(self, x: Array, indices: Array, weights: Array) -> Array:
        """Sorts, runs the experts, combines."""
        config = self._config
        plan = dispatch(Routing(indices=indices, weights=weights), config.router)
        y, _ = experts_forward(
            x, plan, self._layer.params, config.experts, weights=weights, combined=True, keep_cache=False
        )
        if config.shared is not None:
            everyone = Routing(indices=np.zeros((len(x), 1), np.int32), weights=np.ones((len(x), 1), x.dtype))
            plan = dispatch(everyone, _ONE_EXPERT)
            y += experts_forward(x, plan, self._shared, self._shared_config, combined=True, keep_cache=False)[0]
        return y

    def forward_backward(self, x: Array, indices: Array, weights: Array, dy: Array) -> Step:
        """``layer.forward`` and ``layer.backward``."""
        out = self._layer.forward(x, indices=indices, weights=weights)
        grads = self._layer.backward(dy, out)
        assert grads.weights is not None
        return Step(out.y, grads.x, grads.weights, grads.params)


# ── a NumPy loop ────────────────────────────────────────────────────────────────────────────────────────────


def _activate(kind: str, v: Array) -> Array:
    if kind == "silu":
        value: Array = v / (1 + np.exp(-v))
        return value
    return np.maximum(v, 0) if kind == "relu" else reference.activate(kind, v)


def _slope(kind: str, v: Array) -> Array:
    if kind == "silu":
        sigmoid = 1 / (1 + np.exp(-v))
        return sigmoid * (1 + v * (1 - sigmoid))
    return (v > 0).astype(v.dtype) if kind == "relu" else reference.activate_slope(kind, v)


def _hit_experts(indices: Array) -> Iterator[tuple[int, Array, Array]]:
    """Every expert that has rows: its number, the tokens, and which of their choices it is."""
    top_k = indices.shape[1]
    order = np.argsort(indices.ravel(), kind="stable")
    experts, begins = np.unique(indices.ravel()[order], return_index=True)
    for e, mine in zip(experts, np.split(order, begins[1:]), strict=True):
        yield int(e), mine // top_k, mine % top_k


class NumpyLoop:
    """What one writes without a library: sort, then three BLAS products for every expert that was hit."""

    def __init__(self, layer: MoELayer) -> None:
        self._params, self._config = layer.params, layer.config
        self._experts = {name: layer.params[name] for name in EXPERT_PARAMS if name in layer.params}
        self._shared = {n.replace("_shared", ""): p for n, p in layer.params.items() if n.startswith("w_shared")}

    def forward(self, x: Array, indices: Array, weights: Array) -> Array:
        """One expert after the other."""
        y = np.zeros_like(x)
        for e, tokens, choices in _hit_experts(indices):
            out = self._expert({name: value[e] for name, value in self._experts.items()}, x[tokens])
            out *= weights[tokens, choices, None]
            y[tokens] += out
        if self._shared:
            y += self._expert(self._shared, x)
        return y

    def forward_backward(self, x: Array, indices: Array, weights: Array, dy: Array) -> Step:
        """Both directions of an expert before the next one, so that its matrices are still in the cache."""
        y, dx, dweights = np.zeros_like(x), np.zeros_like(x), np.zeros_like(weights)
        dparams = {n: np.zeros_like(p) for n, p in self._params.items() if n != "w_router"}
        for e, tokens, choices in _hit_experts(indices):
            w = {name: value[e] for name, value in self._experts.items()}
            dw = {name: dparams[name][e] for name in w}
            weight, dy_rows = weights[tokens, choices, None], dy[tokens]
            out, dx_rows = self._expert_step(w, dw, x[tokens], weight * dy_rows)
            dweights[tokens, choices] = np.einsum("rd,rd->r", out, dy_rows)
            out *= weight
            y[tokens] += out
            dx[tokens] += dx_rows
        if self._shared:
            dw = {name: dparams[name.replace("w_", "w_shared_")] for name in self._shared}
            out, dx_rows = self._expert_step(self._shared, dw, x, dy)
            y += out
            dx += dx_rows
        return Step(y, dx, dweights, dparams)

    def _expert(self, w: dict[str, Array], x: Array) -> Array:
        """One expert on its rows, (n, D) → (n, D)."""
        return _down(w, self._hidden(w, x)[2])

    def _hidden(self, w: dict[str, Array], x: Array) -> tuple[Array, Array, Array]:
        """Rows of gate (up, if there is none), of up, and the hidden ones, each (n, F)."""
        up = x @ w["w_up"]
        if "b_up" in w:
            up += w["b_up"]
        if "w_gate" not in w:
            return up, up, _activate(self._config.experts.activation, up)
        gate = x @ w["w_gate"]
        if "b_gate" in w:
            gate += w["b_gate"]
        hidden = _activate(self._config.experts.activation, gate)
        hidden *= up
        return gate, up, hidden

    def _expert_step(self, w: dict[str, Array], dw: dict[str, Array], x: Array, dout: Array) -> tuple[Array, Array]:
        """One expert's rows and their dx; its gradients go into `dw`."""
        kind = self._config.experts.activation
        gate, up, hidden = self._hidden(w, x)
        out = _down(w, hidden)
        np.matmul(hidden.T, dout, out=dw["w_down"])
        dhidden = dout @ w["w_down"].T
        if "w_gate" in w:
            dup = dhidden * _activate(kind, gate)
            dgate = dhidden
            dgate *= up
            dgate *= _slope(kind, gate)
            np.matmul(x.T, dgate, out=dw["w_gate"])
            dx = dgate @ w["w_gate"].T
            dx += dup @ w["w_up"].T
        else:
            dgate = dup = dhidden * _slope(kind, up)
            dx = dup @ w["w_up"].T
        np.matmul(x.T, dup, out=dw["w_up"])
        for name, rows in (("b_gate", dgate), ("b_up", dup), ("b_down", dout)):
            if name in w:
                dw[name][...] = rows.sum(axis=0)
        return out, dx


def _down(w: dict[str, Array], hidden: Array) -> Array:
    out: Array = hidden @ w["w_down"]
    if "b_down" in w:
        out += w["b_down"]
    return out


CONTENDERS: dict[str, Callable[[MoELayer], Runner]] = {
    "numoe": Numoe,
    "numpy": NumpyLoop,
}


# ── is it right? ────────────────────────────────────────────────────────────────────────────────────────────


def error_against_reference(
    runner: Runner, layer: MoELayer, x: Array, indices: Array, weights: Array, dy: Array | None = None
) -> float:
    r"""Largest :math:`\max|got - want| / \max|want|` of y and (with `dy`) of every gradient.

    `want` is `numoe.reference` in float64, on a layer that holds the hit experts only.
    """
    hit, compact = np.unique(indices, return_inverse=True)
    config = _compact_config(layer.config, len(hit))
    params = {name: _of_experts(value, name, hit) for name, value in layer.params.items()}
    want = reference.forward(config, params, x, indices=compact.reshape(indices.shape), weights=weights)
    if dy is None:
        return relative_error(runner.forward(x, indices, weights), want.y)
    grads = reference.backward(config, params, dy, want)
    step = runner.forward_backward(x, indices, weights, dy)
    assert grads.weights is not None
    pairs = [(step.y, want.y), (step.dx, grads.x), (step.dweights, grads.weights)]
    pairs += [(_of_experts(step.dparams[n], n, hit), g) for n, g in grads.params.items() if n != "w_router"]
    return max(relative_error(got, exact) for got, exact in pairs)


def _compact_config(config: MoEConfig, num_experts: int) -> MoEConfig:
    router = dataclasses.replace(config.router, num_experts=num_experts)
    return dataclasses.replace(config, router=router, dtype="float64")


def _of_experts(value: Array, name: str, hit: Array) -> Array:
    """The hit experts' part of a parameter or gradient."""
    if name == "w_router":
        return value[:, hit]
    return value[hit] if name in EXPERT_PARAMS else value


def relative_error(got: Array, want: Array) -> float:
    """Largest difference over largest value; infinite for NaN.

    >>> float(relative_error(np.array([1.0, 2.5]), np.array([1.0, 2.0])))
    0.25
    """
    error = float(np.max(np.abs(got - want), initial=0.0) / max(np.max(np.abs(want), initial=0.0), 1e-300))
    return float("inf") if np.isnan(error) else error
