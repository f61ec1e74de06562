"""The backward of a layer: the steps of its forward in reverse, and where the parameters' gradients are stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from numoe import losses
from numoe._arrays import FloatArray, overlap
from numoe._steps import SHARED_GATE, Branch, in_shape
from numoe.config import MoEConfig
from numoe.outputs import ForwardCache, MoEGrads, MoEOutput, check_output
from numoe.routing import combine_weights_backward, route_backward, router_logits_backward

# ── where gradients are stored ───────────────────────────────────────────────────────────────────────────────────────


class GradStore(NamedTuple):
    """Where the parameters' gradients go: into new arrays, or into given ones, overwritten or added to."""

    into: Mapping[str, FloatArray] | None
    accumulate: bool

    def all_of(
        self, config: MoEConfig, done: Mapping[str, FloatArray], found: Mapping[str, FloatArray]
    ) -> dict[str, FloatArray]:
        """All gradients in the order of ``params``; exact zeros for what got none (frozen, or routed from outside).

        The core has stored those of `done` in `into`; those of `found` follow here.
        """
        gradients = {}
        for name, shape in config.param_shapes().items():
            if self.into is None:
                gradient = done.get(name, found.get(name))
                gradients[name] = np.zeros(shape, config.compute_dtype) if gradient is None else gradient
                continue
            gradients[name] = self.into[name]
            if name in done:
                continue
            if self.accumulate:
                self.into[name][...] += found.get(name, 0)
            else:
                self.into[name][...] = found.get(name, 0)
        return gradients


def grad_store(
    into: MoEGrads | None, accumulate: bool, dy: FloatArray, config: MoEConfig, params: Mapping[str, FloatArray]
) -> GradStore:
    """``into=`` and ``accumulate=`` of a backward, checked: the arrays fit, and writing one changes nothing else."""
    if into is None:
        if accumulate:
            raise ValueError("accumulate=True adds to earlier gradients; pass them as into=.")
        return GradStore(None, False)
    if not isinstance(into, MoEGrads):
        raise TypeError(f"into must be the MoEGrads of an earlier backward; got {type(into).__name__}.")
    if not isinstance(into.params, Mapping):
        raise TypeError(f"into.params must map names to arrays; got {type(into.params).__name__}.")
    places = {}
    for name, shape in config.param_shapes().items():
        called = f"into.params[{name!r}]"
        places[called] = _checked_place(called, into.params.get(name), shape, config.compute_dtype)
    shared = overlap(places, {"dy": dy} | {f"layer.params[{name!r}]": value for name, value in params.items()})
    if shared is not None:
        raise ValueError(f"{shared[0]} overlaps {shared[1]}; pass the arrays of an earlier backward.")
    return GradStore(into.params, accumulate)


def _checked_place(name: str, value: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> FloatArray:
    ours = isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray)
    if not ours or value.shape != shape or value.dtype != dtype:
        got = f"{value.dtype} {value.shape}" if ours else "nothing" if value is None else type(value).__name__
        raise ValueError(f"{name} must be a {dtype} array of shape {shape}; got {got}.")
    flags = value.flags
    if not (flags.c_contiguous and flags.aligned and flags.writeable):
        raise ValueError(f"{name} must be C-contiguous, aligned and writable.")
    place: FloatArray = value
    return place


# ── the steps in reverse ─────────────────────────────────────────────────────────────────────────────────────────────


def check_own(out: Any, config: MoEConfig, params: Mapping[str, FloatArray]) -> None:
    """`out` came from the forward of the layer that has this configuration and these parameters."""
    check_output(out)
    cache = out._cache
    if cache.config is not config and cache.config != config:
        raise ValueError("out comes from a layer with another configuration; pass this layer's own forward result.")
    if cache.params is not params:
        raise ValueError("out comes from another layer; pass this layer's own forward result.")


def layer_gradients(dy: FloatArray, out: MoEOutput, scale: float, store: GradStore) -> MoEGrads:
    """Gradients of ``<dy, y> + scale * aux_loss``; dy (..., D)."""
    cache = out._cache
    config = cache.config
    dy = dy.reshape(cache.x.shape)
    # y = routed + shared
    dx, dused, done = cache.routed.backward(dy, cache.x, store.into, store.accumulate)
    found: dict[str, FloatArray] = {}  # computed here: still to be stored or added
    if cache.shared is not None:
        dx_shared, done_shared, found = _shared_backward(cache, cache.shared, dy, store)
        dx += dx_shared
        done |= done_shared

    def result(**given: FloatArray) -> MoEGrads:
        return MoEGrads(x=in_shape(dx, out.y.shape, config), params=store.all_of(config, done, found), **given)

    # used = combine_weights(routing.weights);  aux_loss = Σ coefficient * loss(weights, logits)
    assert dused is not None
    dweights = combine_weights_backward(dused, out.routing, out.dispatch, config.router, config.dispatch)
    dweights_aux, dlogits_aux = _aux_gradients(config, cache.losses, scale)
    dweights = dweights + dweights_aux
    if cache.router is None:
        return result(weights=dweights.reshape(cache.given))
    # weights = route(logits)
    dlogits = route_backward(dweights, out.routing, config.router) + dlogits_aux
    if cache.router.x is None:
        return result(logits=dlogits.reshape(cache.given))
    # logits = (x * jitter) @ w_router + b_router + noise
    dx_router, dw, db = router_logits_backward(dlogits, cache.router.x, cache.params["w_router"])
    dx += dx_router if cache.router.jitter is None else dx_router * cache.router.jitter
    if not config.router.frozen:
        found |= {"w_router": dw, "b_router": db}
    return result()


def _shared_backward(
    cache: ForwardCache, shared: Branch, dy: FloatArray, store: GradStore
) -> tuple[FloatArray, dict[str, FloatArray], dict[str, FloatArray]]:
    """dx, the finished gradients of the shared expert's matrices, and that of its score."""
    names = {name: name.replace("w_", "w_shared_") for name in shared.params}
    own = None if store.into is None else {name: store.into[of][None] for name, of in names.items()}
    dx, dgate, dparams = shared.backward(dy, cache.x, own, store.accumulate)
    done = {names[name]: gradient[0] for name, gradient in dparams.items()}
    if dgate is None:
        return dx, done, {}
    # gate = sigmoid(x @ w_shared_score)
    dscore = route_backward(dgate, shared.routing, SHARED_GATE)
    dx_score, dw, _ = router_logits_backward(dscore, cache.x, cache.params["w_shared_score"][:, None])
    dx += dx_score
    return dx, done, {"w_shared_score": dw[:, 0]}


def _aux_gradients(
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
