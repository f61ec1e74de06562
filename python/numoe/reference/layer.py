"""The layer: router → dispatch → experts → combine, shared expert, auxiliary losses; then all backwards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from numoe.config import MoEConfig, RouterConfig, SharedExpertConfig
from numoe.reference.experts import (
    Cache,
    experts_backward,
    experts_forward,
    feed_forward,
    feed_forward_backward,
)
from numoe.reference.functions import Array, quiet, sigmoid
from numoe.reference.losses import Loss, importance_loss, load_balance_loss, load_loss, z_loss
from numoe.reference.routing import (
    Dispatch,
    Routing,
    combine,
    combine_backward,
    combine_weights,
    combine_weights_backward,
    dispatch,
    route,
    route_backward,
    router_logits,
    router_logits_backward,
)


@dataclass(frozen=True)
class LossTerm:
    """One auxiliary loss of the layer."""

    value: float
    coefficient: float


@dataclass(frozen=True, eq=False)
class MoEOutput:
    """What `forward` returns."""

    y: Array  # the shape of x
    routing: Routing
    dispatch: Dispatch
    losses: dict[str, LossTerm]
    aux_loss: float  # Σ coefficient * value
    cache: _Cache = field(repr=False)


@dataclass(frozen=True, eq=False)
class MoEGrads:
    """What `backward` returns."""

    x: Array
    params: dict[str, Array]
    logits: Array | None = None  # if the logits came from outside, in their shape
    weights: Array | None = None  # if the weights came from outside, in their shape


@dataclass(frozen=True, eq=False)
class RouterLogits:
    """The router's logits and how they came about."""

    noisy: Array  # (T, E), what is routed on
    clean: Array  # (T, E), before the noise
    noise_std: float  # 0: no noise was drawn
    jitter: Array | int  # (T, D), the factor on the router's input


@dataclass(frozen=True, eq=False)
class SharedCache:
    """What `shared_backward` needs."""

    x: Array  # (T, D)
    ffn: Cache
    out: Array  # (T, D), before the gate
    gate: Array  # (T, 1), before the sigmoid


@dataclass(frozen=True, eq=False)
class _Cache:
    """What `backward` needs."""

    x: Array  # (T, D), zeros for masked tokens
    real: Array  # (T, 1) bool
    logits: RouterLogits | None  # None: indices and weights came from outside
    given: tuple[int, ...] | None  # the shape of the logits or weights from outside
    weights: Array  # (T, K), after the drop
    experts: list[Cache]
    rows: Array  # (M, D), the experts' output
    shared: SharedCache | None
    losses: dict[str, Loss]


@quiet
def forward(
    config: MoEConfig,
    params: Mapping[str, npt.ArrayLike],
    x: npt.ArrayLike,
    *,
    buffers: Mapping[str, npt.ArrayLike] | None = None,
    mask: npt.ArrayLike | None = None,
    rng: Any = None,
    logits: npt.ArrayLike | None = None,
    indices: npt.ArrayLike | None = None,
    weights: npt.ArrayLike | None = None,
    sequence_lengths: npt.ArrayLike | None = None,
) -> MoEOutput:
    r"""The whole layer.

    .. math:: y_t = \sum_{k\ kept} w_{tk}\, f_{e(t,k)}(x_t) + \sigma(x_t \cdot w_{score})\, f_{shared}(x_t)

    Parameters
    ----------
    config : MoEConfig
        Its dtype is the dtype of everything that is computed.
    params, buffers : mapping of str to array
        Names and shapes as in ``config.param_shapes()`` and ``config.buffer_shapes()``.
    x : array (..., D)
    mask : bool array (...), optional
        True: a real token.  The others are ignored everywhere and get y = 0.
    rng : seed or numpy.random.Generator, optional
        Switches jitter and noise on.  Drawn in float64: first the jitter, ``uniform`` of shape (T, D), then
        the noise, ``standard_normal`` of shape (T, E); what is not configured is not drawn.
    logits : array (..., E), optional
        Instead of the router's own.  Noise is added to them; jitter has nothing to act on and is not drawn.
    indices, weights : array (..., K), optional
        A routing from outside; index -1: not routed.
    sequence_lengths : ints (B,), optional
        Summing to T.  Default: the next to last axis of x is the sequence.

    Raises
    ------
    ValueError
        For a token without an available expert, and for arguments that exclude each other or do not fit.
    """
    x = np.asarray(x, config.compute_dtype)
    p = _arrays(config, params)
    tokens, real, lengths = _flatten(config, x, mask, sequence_lengths)
    row_mask = None if mask is None else real[:, 0]

    z = None
    if _source(logits, indices, weights) == "indices":
        routing = _outside_routing(indices, np.asarray(weights, x.dtype), row_mask)
    else:
        z = noisy_logits(tokens, p, config.router, rng, logits)
        routing = route(z.noisy, config.router, choice_bias=_choice_bias(config, buffers), mask=row_mask)
    plan = dispatch(routing, config.router, config.dispatch, sequence_lengths=lengths)
    used = combine_weights(routing, plan, config.router, config.dispatch)
    rows, experts = experts_forward(tokens, plan, p, config.experts, weights=used)
    y = combine(rows, plan, used if config.experts.weight_on == "output" else None)
    shared = None
    if config.shared is not None:
        y_shared, shared = shared_forward(tokens, p, config.shared)
        y = y + y_shared

    losses = aux_losses(config, routing, z, lengths)
    terms = {name: LossTerm(loss.value, config.aux_losses[name]) for name, loss in losses.items()}
    aux_loss = float(sum(term.coefficient * term.value for term in terms.values()))
    outside = logits if indices is None else weights
    given = None if outside is None else np.shape(outside)
    cache = _Cache(tokens, real, z, given, used, experts, rows, shared, losses)
    return MoEOutput(np.where(real, y, 0).reshape(x.shape), routing, plan, terms, aux_loss, cache)


@quiet
def backward(
    config: MoEConfig,
    params: Mapping[str, npt.ArrayLike],
    dy: npt.ArrayLike,
    out: MoEOutput,
    d_aux_loss: float = 1.0,
) -> MoEGrads:
    """The gradients of ``L = <dy, y> + d_aux_loss * aux_loss``; who is routed where, or dropped, is constant.

    Parameters
    ----------
    config, params
        As given to `forward`.
    dy : array (..., D)
    out : MoEOutput
        From `forward`; usable any number of times.
    d_aux_loss : float
    """
    p, c, routing, plan = _arrays(config, params), out.cache, out.routing, out.dispatch
    dy = np.where(c.real, np.asarray(dy, config.compute_dtype).reshape(c.x.shape), 0)
    dx = np.zeros_like(c.x)
    dparams = {name: np.zeros_like(value) for name, value in p.items()}

    # y = y + y_shared; y_shared = shared_forward(tokens)
    if config.shared is not None and c.shared is not None:
        dx_shared, dshared = shared_backward(dy, p, config.shared, c.shared)
        dx += dx_shared
        dparams |= dshared
    # y = combine(rows, used)
    on_output = c.weights if config.experts.weight_on == "output" else None
    drows, dused = combine_backward(dy, c.rows, plan, on_output)
    # rows = experts_forward(tokens, used)
    dx_experts, dused_on_input, dexperts = experts_backward(
        drows, c.x, plan, p, config.experts, c.experts, weights=c.weights
    )
    dx += dx_experts
    dparams |= dexperts
    # used = combine_weights(routing.weights)
    dused = dused if dused_on_input is None else dused_on_input
    dweights = combine_weights_backward(dused, routing, plan, config.router, config.dispatch)
    # losses = aux_losses(weights, z)
    daux_weights, daux_logits = aux_losses_backward(config, c.losses)
    dweights = dweights + d_aux_loss * daux_weights
    if c.logits is None:
        return MoEGrads(dx.reshape(out.y.shape), dparams, weights=dweights.reshape(c.given))
    # routing = route(z)
    dlogits = route_backward(dweights, routing, config.router) + d_aux_loss * daux_logits
    if c.given is not None:
        return MoEGrads(dx.reshape(out.y.shape), dparams, logits=dlogits.reshape(c.given))
    # z = noisy_logits(tokens)
    dx_router, drouter = noisy_logits_backward(dlogits, c.x, p, config.router, c.logits)
    dx += dx_router
    return MoEGrads(dx.reshape(out.y.shape), dparams | drouter)


def noisy_logits(
    x: Array,
    p: Mapping[str, Array],
    config: RouterConfig,
    rng: Any = None,
    logits: npt.ArrayLike | None = None,
) -> RouterLogits:
    """The router's logits of ``x * jitter``, or the given ones, plus noise; (T, D) → (T, E)."""
    generator = None if rng is None else np.random.default_rng(rng)
    jitter: Array | int = 1
    if logits is not None:
        clean = np.asarray(logits, x.dtype).reshape(-1, config.num_experts)
    else:
        if generator is not None and config.jitter > 0:
            jitter = generator.uniform(1 - config.jitter, 1 + config.jitter, x.shape).astype(x.dtype)
        clean = router_logits(x * jitter, p["w_router"], p.get("b_router"))
    if generator is None or config.noise_std == 0:
        return RouterLogits(clean, clean, 0.0, jitter)
    noise = generator.standard_normal(clean.shape).astype(x.dtype)
    return RouterLogits(clean + config.noise_std * noise, clean, config.noise_std, jitter)


def noisy_logits_backward(
    dlogits: Array, x: Array, p: Mapping[str, Array], config: RouterConfig, z: RouterLogits
) -> tuple[Array, dict[str, Array]]:
    """The gradients of x and of the router's parameters; a frozen router passes it on and keeps none."""
    # clean = router_logits(x * jitter)
    dx_jittered, dw_router, db_router = router_logits_backward(dlogits, x * z.jitter, p["w_router"])
    drouter = {} if config.frozen else {"w_router": dw_router, "b_router": db_router}
    return dx_jittered * z.jitter, {name: gradient for name, gradient in drouter.items() if name in p}


def shared_forward(x: Array, p: Mapping[str, Array], config: SharedExpertConfig) -> tuple[Array, SharedCache]:
    """``sigmoid(x · w_shared_score) * f_shared(x)``, sigmoid as in Qwen2-MoE or 1; (T, D) → (T, D)."""
    out, ffn = feed_forward(config.form, config.activation, _shared_params(p), x)
    if config.gate == "sigmoid":
        gate = x @ p["w_shared_score"][:, None]
    else:
        gate = np.full((len(x), 1), np.inf, x.dtype)  # sigmoid = 1
    return sigmoid(gate) * out, SharedCache(x, ffn, out, gate)


def shared_backward(
    dy: Array, p: Mapping[str, Array], config: SharedExpertConfig, cache: SharedCache
) -> tuple[Array, dict[str, Array]]:
    """The gradients of x and of the shared expert's parameters."""
    # y = sigmoid(gate) * out
    dout = sigmoid(cache.gate) * dy
    # out = feed_forward(x)
    dx, dw = feed_forward_backward(config.form, config.activation, _shared_params(p), cache.ffn, dout)
    dparams = {name.replace("w_", "w_shared_"): gradient for name, gradient in dw.items()}
    if config.gate == "sigmoid":
        dgate = (dy * cache.out).sum(axis=-1, keepdims=True) * sigmoid(cache.gate) * sigmoid(-cache.gate)
        # gate = x @ w_shared_score
        dx = dx + dgate * p["w_shared_score"]
        dparams["w_shared_score"] = (cache.x.T @ dgate)[:, 0]
    return dx, dparams


def aux_losses(config: MoEConfig, routing: Routing, z: RouterLogits | None, lengths: Array) -> dict[str, Loss]:
    """Every configured loss of this routing, by name."""

    def of(name: str) -> Loss:
        if name == "importance":
            return importance_loss(routing.weights, routing.indices, config.router.num_experts, mask=routing.mask)
        if z is None:
            raise ValueError(f"aux_losses {name!r} needs logits; this routing came as indices and weights.")
        if name == "load":
            return load_loss(z.clean, z.noisy, z.noise_std, config.router.top_k, mask=routing.mask)
        if name == "z":
            return z_loss(z.noisy, mask=routing.mask)
        return load_balance_loss(
            z.noisy,
            routing.indices,
            convention=name,
            score=config.router.score,
            mask=routing.mask,
            sequence_lengths=lengths,
        )

    return {name: of(name) for name in config.aux_losses}


def aux_losses_backward(config: MoEConfig, losses: Mapping[str, Loss]) -> tuple[Array | float, Array | float]:
    """The gradients of ``aux_loss = Σ coefficient * value``: for the weights (T, K) and the logits (T, E)."""
    dweights: Array | float = 0.0
    dlogits: Array | float = 0.0
    for name, loss in losses.items():
        coefficient = config.aux_losses[name]
        if loss.dweights is not None:
            dweights = dweights + coefficient * loss.dweights
        for gradient in (loss.dlogits, loss.dnoisy_logits):  # noisy = clean + noise
            if gradient is not None:
                dlogits = dlogits + coefficient * gradient
    return dweights, dlogits


def _arrays(config: MoEConfig, params: Mapping[str, npt.ArrayLike]) -> dict[str, Array]:
    return {name: np.asarray(params[name], config.compute_dtype) for name in config.param_shapes()}


def _choice_bias(config: MoEConfig, buffers: Mapping[str, npt.ArrayLike] | None) -> Array | None:
    if not config.router.choice_bias:
        return None
    if buffers is None:
        raise ValueError("choice_bias=True needs buffers={'choice_bias': array (E,)}; got buffers=None.")
    return np.asarray(buffers["choice_bias"], config.compute_dtype)


def _shared_params(p: Mapping[str, Array]) -> dict[str, Array]:
    """The shared expert's parameters under the names of an expert's."""
    names = {"w_gate": "w_shared_gate", "w_up": "w_shared_up", "w_down": "w_shared_down"}
    return {short: p[name] for short, name in names.items() if name in p}


def _source(logits: Any, indices: Any, weights: Any) -> str:
    """Where the routing comes from: "x", "logits" or "indices"."""
    given = {"logits": logits, "indices": indices, "weights": weights}
    names = [name for name, value in given.items() if value is not None]
    if names not in ([], ["logits"], ["indices", "weights"]):
        raise ValueError(f"give logits, or indices and weights, or none of them; got {' and '.join(names)}.")
    return names[0] if names else "x"


def _outside_routing(indices: npt.ArrayLike | None, weights: Array, mask: Array | None) -> Routing:
    """The routing that the caller decided; masked tokens are not routed, what is not routed weighs 0."""
    experts = np.asarray(indices).reshape(-1, weights.shape[-1])
    routed = experts >= 0 if mask is None else (experts >= 0) & mask[:, None]
    kept = np.where(routed, weights.reshape(experts.shape), 0)
    return Routing(indices=np.where(routed, experts, -1).astype(np.int32), weights=kept, mask=mask)


def _flatten(
    config: MoEConfig, x: Array, mask: npt.ArrayLike | None, sequence_lengths: npt.ArrayLike | None
) -> tuple[Array, Array, Array]:
    """The tokens (T, D) with zeros where masked, which of them are real (T, 1), the sequence lengths (B,)."""
    tokens = x.reshape(-1, config.d_model)
    real = np.ones((len(tokens), 1), bool) if mask is None else np.asarray(mask, bool).reshape(-1, 1)
    if sequence_lengths is None:
        batch, length = math.prod(x.shape[:-2]), x.shape[-2] if x.ndim > 1 else 1
        lengths = np.full(batch, length)
    else:
        lengths = np.asarray(sequence_lengths)
    if lengths.sum() != len(tokens):
        raise ValueError(f"sequence_lengths must sum to the number of tokens, {len(tokens)}; got {lengths.sum()}.")
    return np.where(real, tokens, 0), real, lengths  # padding may hold anything
