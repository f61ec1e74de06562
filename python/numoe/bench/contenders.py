"""Who is measured: a table of names and callables, all given the same numbers and checked against float64.

A contender is a function of a `Task` that returns a `Runner`.  It receives the router's decision (indices and
weights) and has to sort, compute and combine.  Those that need nothing but numoe are here, other libraries in
`numoe.bench.peers`.  To add one, write a runner and add a line to `CONTENDERS` or to its `PEERS`; one that cannot
run here raises `ContenderUnavailableError` with the reason, which is printed.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from numoe import reference
from numoe.bench.workloads import Routings
from numoe.config import EXPERT_PARAMS, ExpertConfig, RouterConfig, SharedExpertConfig
from numoe.experts import experts_forward
from numoe.layer import MoELayer
from numoe.outputs import MoEGrads
from numoe.routing import Routing, dispatch

Array = npt.NDArray[Any]
_ONE_EXPERT = RouterConfig(num_experts=1, top_k=1)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a contender has to run."""

    layer: MoELayer  # float64 if `dtype` is, else float32; rounded to bfloat16 if that is the dtype
    dtype: str = "float32"  # of x, of the experts' weights and of y; bfloat16 adds up in float32
    threads: int = 1
    tokens: int = 4096  # the most that one call brings

    @property
    def experts(self) -> ExpertConfig:
        """The experts' form, activation, biases."""
        return self.layer.config.experts

    @property
    def shared(self) -> SharedExpertConfig | None:
        """The expert that everybody visits."""
        return self.layer.config.shared

    @property
    def num_experts(self) -> int:
        """E."""
        return self.layer.config.router.num_experts

    @property
    def top_k(self) -> int:
        """K."""
        return self.layer.config.router.top_k

    @property
    def d_model(self) -> int:
        """D."""
        return self.layer.config.d_model

    def weights(self, name: str) -> Array:
        """A parameter in the task's dtype."""
        value = self.layer.params[name]
        return value.astype(ml_dtypes.bfloat16) if self.dtype == "bfloat16" else value


@dataclass(frozen=True)
class Step:
    """The result of a forward and backward."""

    y: Array  # (T, D)
    dx: Array  # (T, D)
    dweights: Array  # (T, K)
    dparams: Callable[[], dict[str, Array]]  # experts' and shared gradients as in the layer; called outside the timing


class Runner(abc.ABC):
    """One implementation of the layer."""

    def prepare(self, routings: Routings) -> None:  # noqa: B027  most have nothing to prepare
        """What need not be timed: called once before the calls that will bring these routings."""

    @abc.abstractmethod
    def forward(self, x: Array, indices: Array, weights: Array) -> Array:
        """The output y (T, D), for inference."""

    def forward_backward(self, x: Array, indices: Array, weights: Array, dy: Array) -> Step:
        """The output and the gradients of ``<dy, y>`` for x, weights and all expert matrices."""
        raise ContenderUnavailableError("it has no backward")

    def close(self) -> None:  # noqa: B027  most hold nothing
        """Gives back threads, settings and memory."""


class ContenderUnavailableError(Exception):
    """A contender cannot run here; the message says why."""


# ── numoe ───────────────────────────────────────────────────────────────────────────────────────────────────


class Numoe(Runner):
    """The layer as its users call it; the forward without the cache of a backward."""

    def __init__(self, task: Task) -> None:
        self._layer = layer = _bfloat16_layer(task.layer) if task.dtype == "bfloat16" else task.layer
        self._config = layer.config
        self._grads: MoEGrads | None = None  # of the last step: their arrays are used again, as in training
        shared = layer.config.shared
        if shared is not None:
            self._shared = {
                f"w_{part}": layer.params[f"w_shared_{part}"][None]
                for part in ("gate", "up", "down")
                if f"w_shared_{part}" in layer.params
            }
            self._shared_config = shared.experts

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
        self._grads = grads = self._layer.backward(dy, out, into=self._grads)
        assert grads.weights is not None
        return Step(out.y, grads.x, grads.weights, lambda: grads.params)


def _bfloat16_layer(layer: MoELayer) -> MoELayer:
    try:
        copy = MoELayer(config=layer.config.replace(dtype="bfloat16"), rng=0)
    except (TypeError, ValueError) as error:
        raise ContenderUnavailableError(f"MoELayer refuses this dtype ({error})") from None
    for name, value in copy.params.items():
        value[...] = layer.params[name].astype(value.dtype)
    return copy


class Packed(Runner):
    """The layer packed for inference."""

    def __init__(self, task: Task) -> None:
        self._packed = task.layer.pack(task.dtype)

    def forward(self, x: Array, indices: Array, weights: Array) -> Array:
        """One call."""
        return self._packed.forward_routed(x, indices, weights)


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


class NumpyLoop(Runner):
    """What one writes without a library: sort, then three BLAS products for every expert that was hit."""

    def __init__(self, task: Task) -> None:
        if task.dtype == "bfloat16":
            raise ContenderUnavailableError("NumPy has no bfloat16 products")
        layer = task.layer
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
        return Step(y, dx, dweights, lambda: dparams)

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


Prepare = Callable[[Task], Runner]

CONTENDERS: dict[str, Prepare] = {
    "numoe": Numoe,
    "packed": Packed,
    "numpy": NumpyLoop,
}
