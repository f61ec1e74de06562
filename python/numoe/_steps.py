"""The steps of a layer's forward between the public functions: the router's pass, experts at work, losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from numoe import _core, losses
from numoe._arrays import BoolArray, FloatArray, as_float, converted
from numoe.config import ExpertConfig, MoEConfig, RouterConfig, SharedExpertConfig, checked_rng
from numoe.experts import ExpertCache, expert_options, expert_params, experts_backward, experts_forward
from numoe.routing import (
    Dispatch,
    Routing,
    checked_choice_bias,
    combine_weights,
    dispatch,
    route,
    router_logits,
    router_options,
)

NAN_POLICIES = ("propagate", "raise")


class RouterPass(NamedTuple):
    """The logits and how they came about."""

    logits: FloatArray  # (T, E), what was routed on
    clean: FloatArray  # (T, E), before the noise
    noise_std: float  # 0: no noise was drawn
    x: FloatArray | None  # (T, D), the router's input; None: the logits came from outside
    jitter: FloatArray | None  # (T, D), the factor in that input


def router_pass(
    config: RouterConfig, params: Mapping[str, FloatArray], x: FloatArray, logits: FloatArray | None, rng: Any
) -> RouterPass:
    """Logits of the linear router or from outside; jitter, then noise, are drawn in float64 if rng is given."""
    generator = None if rng is None else checked_rng(rng)
    jitter: FloatArray | None = None
    seen: FloatArray | None = None
    if logits is not None:
        clean = logits
    else:
        seen = x
        if generator is not None and config.jitter > 0:
            jitter = generator.uniform(1 - config.jitter, 1 + config.jitter, x.shape).astype(x.dtype)
            with np.errstate(all="ignore"):
                seen = x * jitter
        clean = router_logits(seen, params["w_router"], params.get("b_router"))
    if generator is None or config.noise_std == 0:
        return RouterPass(clean, clean, 0.0, seen, jitter)
    noise = generator.standard_normal(clean.shape).astype(clean.dtype)
    with np.errstate(all="ignore"):
        noisy = clean + clean.dtype.type(config.noise_std) * noise
    return RouterPass(noisy, clean, config.noise_std, seen, jitter)


def check_nan(policy: str, x: FloatArray, router: RouterPass | None, real: BoolArray | None) -> None:
    """With ``nan_policy="raise"``, a real token with NaN in x or in its logits is an error that names it."""
    if policy not in NAN_POLICIES:
        raise ValueError(f"nan_policy must be 'propagate' or 'raise'; got {policy!r}.")
    if policy == "propagate":
        return
    for name, values in (("x", x), ("router logits", None if router is None else router.logits)):
        if values is None:
            continue
        bad = np.isnan(values) if real is None else np.isnan(values) & real[:, None]
        if bad.any():
            t, i = (int(n) for n in np.argwhere(bad)[0])
            raise FloatingPointError(
                f"{name} hold{'s' * (name == 'x')} {int(bad.sum())} NaN (first at token {t}, column {i}); "
                'set nan_policy="propagate" to let such tokens give NaN.'
            )


# ── experts ──────────────────────────────────────────────────────────────────────────────────────────────────────────

SHARED_GATE = RouterConfig(num_experts=1, top_k=1, score="sigmoid", normalize="none")


class Branch(NamedTuple):
    """One set of experts at work: its plan, the weights it combined with, and its cache."""

    config: ExpertConfig
    params: dict[str, FloatArray]
    routing: Routing
    plan: Dispatch
    weights: FloatArray | None
    cache: ExpertCache

    def backward(
        self, dy: FloatArray, x: FloatArray, into: Mapping[str, FloatArray] | None, accumulate: bool
    ) -> tuple[FloatArray, FloatArray | None, dict[str, FloatArray]]:
        return experts_backward(
            dy,
            x,
            self.plan,
            self.params,
            self.config,
            self.cache,
            weights=self.weights,
            combined=True,
            into=into,
            accumulate=accumulate,
        )


def run_experts(
    config: MoEConfig,
    params: dict[str, FloatArray],
    x: FloatArray,
    routing: Routing,
    plan: Dispatch,
    keep_cache: bool,
) -> tuple[FloatArray, Branch, Branch | None]:
    """The routed experts' and the shared expert's sum (T, D), and what their backwards need."""
    used = combine_weights(routing, plan, config.router, config.dispatch)
    y, routed = _run(config.experts, params, x, routing, plan, used, keep_cache)
    return y, routed, _add_shared(config, params, x, routing.mask, y, keep_cache)


def infer(
    config: MoEConfig,
    params: dict[str, FloatArray],
    buffers: Mapping[str, FloatArray],
    x: FloatArray,
    real: BoolArray | None,
) -> FloatArray:
    """What `router_pass`, `route`, `dispatch` and `run_experts` give where nothing is drawn, dropped or kept: y (T, D).

    The routed experts are one call of the core.
    """
    bias = params.get("b_router")
    y = _core.layer_forward(
        x,
        real,
        as_float(params["w_router"], "w_router", x.dtype, ndim=2),
        None if bias is None else as_float(bias, "b_router", x.dtype, ndim=1),
        checked_choice_bias(buffers.get("choice_bias"), x.dtype),
        router_options(config.router),
        expert_params(params, config.experts, x.dtype),
        expert_options(config.experts),
    )
    _add_shared(config, params, x, real, y, keep_cache=False)
    return y


def _add_shared(
    config: MoEConfig,
    params: Mapping[str, FloatArray],
    x: FloatArray,
    real: BoolArray | None,
    y: FloatArray,
    keep_cache: bool,
) -> Branch | None:
    """Add the shared expert's output to y (T, D), if there is one."""
    if config.shared is None:
        return None
    y_shared, shared = _run_shared(config.shared, params, x, real, keep_cache)
    with np.errstate(all="ignore"):
        y += y_shared
    return shared


def _run_shared(
    config: SharedExpertConfig,
    params: Mapping[str, FloatArray],
    x: FloatArray,
    real: BoolArray | None,
    keep_cache: bool,
) -> tuple[FloatArray, Branch]:
    """The shared expert is an MoE of one expert that every token visits."""
    score = params.get("w_shared_score")
    logits = np.zeros((len(x), 1), x.dtype) if score is None else router_logits(x, score[:, None])
    routing = route(logits, SHARED_GATE, mask=real)
    own = {
        name: params[f"w_shared_{name[2:]}"][None]
        for name in ("w_gate", "w_up", "w_down")
        if f"w_shared_{name[2:]}" in params
    }
    weights = None if score is None else routing.weights
    return _run(config.experts, own, x, routing, dispatch(routing, SHARED_GATE), weights, keep_cache)


def _run(
    config: ExpertConfig,
    params: dict[str, FloatArray],
    x: FloatArray,
    routing: Routing,
    plan: Dispatch,
    weights: FloatArray | None,
    keep_cache: bool,
) -> tuple[FloatArray, Branch]:
    y, cache = experts_forward(x, plan, params, config, weights=weights, combined=True, keep_cache=keep_cache)
    return y, Branch(config, params, routing, plan, weights, cache)


def in_shape(tokens: FloatArray, shape: tuple[int, ...], config: MoEConfig) -> FloatArray:
    """The result (T, D) in x's shape and the layer's dtype."""
    return converted(tokens, config.array_dtype).reshape(shape)


# ── auxiliary losses ─────────────────────────────────────────────────────────────────────────────────────────────────


def aux_losses_of(
    config: MoEConfig, routing: Routing, router: RouterPass | None, lengths: Any
) -> dict[str, losses.Loss]:
    """Every configured loss of this routing, by name."""

    def of(name: str) -> losses.Loss:
        mask, experts = routing.mask, config.router.num_experts
        if name == "importance":
            return losses.importance_loss(routing.weights, routing.indices, experts, mask=mask)
        if router is None:
            raise ValueError(f"aux_losses {name!r} needs logits; this routing came as indices and weights.")
        if name == "load" and router.noise_std == 0:  # no noise was drawn: hard counts, which have no gradient
            ones = np.ones_like(routing.weights)
            return losses.Loss(value=losses.importance_loss(ones, routing.indices, experts, mask=mask).value)
        if name == "load":
            return losses.load_loss(router.clean, router.logits, router.noise_std, config.router.top_k, mask=mask)
        if name == "z":
            return losses.z_loss(router.logits, mask=mask)
        return losses.load_balance_loss(
            router.logits,
            routing.indices,
            convention=name,
            score=config.router.score,
            mask=mask,
            sequence_lengths=lengths,
        )

    return {name: of(name) for name in config.aux_losses}
