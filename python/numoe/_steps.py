"""The steps of a layer between its public functions: the router's pass, one set of experts at work, its losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from numoe import losses
from numoe._arrays import BoolArray, FloatArray
from numoe.config import ExpertConfig, MoEConfig, RouterConfig, SharedExpertConfig
from numoe.experts import ExpertCache, experts_backward, experts_forward
from numoe.routing import Dispatch, Routing, dispatch, route, router_logits

NAN_POLICIES = ("propagate", "raise")


@dataclass(frozen=True)
class RouterPass:
    """The logits and how they came about."""

    logits: FloatArray  # (T, E), what was routed on
    clean: FloatArray  # (T, E), before the noise
    noise_std: float  # 0: no noise was drawn
    x: FloatArray | None  # (T, D), the router's input; None: the logits came from outside
    jitter: FloatArray | None  # (T, D), the factor in that input


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


@dataclass(frozen=True)
class Branch:
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


# ── the shared expert is an MoE of one expert that every token visits ────────────────────────────────────────────────

SHARED_GATE = RouterConfig(num_experts=1, top_k=1, score="sigmoid", normalize="none")


def run_shared(
    config: SharedExpertConfig,
    params: Mapping[str, FloatArray],
    x: FloatArray,
    real: BoolArray | None,
    keep_cache: bool,
) -> tuple[FloatArray, Branch]:
    score = params.get("w_shared_score")
    logits = np.zeros((len(x), 1), x.dtype) if score is None else router_logits(x, score[:, None])
    routing = route(logits, SHARED_GATE, mask=real)
    own = {
        name: params[f"w_shared_{name[2:]}"][None]
        for name in ("w_gate", "w_up", "w_down")
        if f"w_shared_{name[2:]}" in params
    }
    experts = ExpertConfig(d_ff=config.d_ff, form=config.form, activation=config.activation)
    weights = None if score is None else routing.weights
    return run(experts, own, x, routing, dispatch(routing, SHARED_GATE), weights, keep_cache)


def run(
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


def aux_gradients(
    config: MoEConfig, found: Mapping[str, losses.Loss], scale: float
) -> tuple[FloatArray | float, FloatArray | float]:
    """Gradients of ``scale * aux_loss``: for the router's weights (T, K) and for the logits (T, E)."""
    dweights: Any = 0.0
    dlogits: Any = 0.0
    for name, loss in found.items() if scale != 0.0 else ():
        factor = config.compute_dtype.type(scale * config.aux_losses[name])
        if loss.dweights is not None:
            dweights = dweights + factor * loss.dweights
        for gradient in (loss.dlogits, loss.dnoisy_logits):  # noisy = clean + noise
            if gradient is not None:
                dlogits = dlogits + factor * gradient
    return dweights, dlogits
