"""`MoELayer`: parameters plus the functions of `numoe.routing`, `numoe.experts` and `numoe.losses` in their order."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from numoe import checkpoint, losses
from numoe._arrays import (
    BoolArray,
    FloatArray,
    IntArray,
    as_float,
    as_indices,
    as_mask,
    plain_array,
)
from numoe._steps import (
    SHARED_GATE,
    Branch,
    RouterPass,
    aux_gradients,
    aux_losses_of,
    check_nan,
    run,
    run_shared,
)
from numoe.config import MoEConfig, checked_flag, checked_real
from numoe.packed import PackedMoELayer
from numoe.routing import (
    Dispatch,
    Routing,
    check_sequence_lengths,
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
    """One auxiliary loss of a forward: its raw value and the coefficient it enters ``aux_loss`` with."""

    value: float
    coefficient: float


@dataclass(frozen=True, kw_only=True)
class MoEOutput:
    """What `MoELayer.forward` returns; give it to `MoELayer.backward`.

    Attributes
    ----------
    y : (..., D)
    routing : Routing
        ``indices`` (T, K), ``weights`` (T, K), ``logits`` (T, E).
    dispatch : Dispatch
        Which assignments were kept, and in which row.
    losses : dict of str to LossTerm
    aux_loss : float
        Sum of coefficient times value over `losses`.
    """

    y: FloatArray
    routing: Routing
    dispatch: Dispatch
    losses: dict[str, LossTerm]
    aux_loss: float
    _cache: _Cache = field(repr=False)

    def __repr__(self) -> str:
        dropped = int((self.routing.indices >= 0).sum()) - self.dispatch.num_rows
        return f"MoEOutput(y={self.y.shape}, {self.dispatch!r}, dropped={dropped}, aux_loss={self.aux_loss:.6g})"


@dataclass(frozen=True, kw_only=True)
class MoEGrads:
    """What `MoELayer.backward` returns.

    Attributes
    ----------
    x : (..., D)
    params : dict of str to array
        Same names and shapes as ``layer.params``.
    logits : (..., E) or None
        Given if the forward got its logits from outside.
    weights : (..., K) or None
        Given if the forward got its routing from outside.
    """

    x: FloatArray
    params: dict[str, FloatArray]
    logits: FloatArray | None = None
    weights: FloatArray | None = None

    def __repr__(self) -> str:
        return f"MoEGrads(x={self.x.shape}, params={{{', '.join(self.params)}}})"


@dataclass(frozen=True)
class _Cache:
    """What `backward` needs."""

    params: dict[str, FloatArray]  # the layer's own: tells whose forward this was
    config: MoEConfig
    x: FloatArray  # (T, D), zeros for masked tokens
    router: RouterPass | None  # None: indices and weights came from outside
    routed: Branch
    shared: Branch | None
    losses: dict[str, losses.Loss]
    given: tuple[int, ...] | None  # the shape of the logits or weights from outside


class MoELayer:
    r"""A Mixture-of-Experts layer.

    .. math:: y_t = \sum_{k} w_{tk}\, f_{e(t,k)}(x_t)\; (+\; f_{shared}(x_t)), \qquad
              f_e(x) = (act(x W^{gate}_e) \circ x W^{up}_e)\, W^{down}_e

    The defaults are Mixtral's form: softmax router, the K chosen weights renormalised, SwiGLU experts without bias,
    nothing dropped, no auxiliary loss.  Every other published form is a combination of options.

    Parameters
    ----------
    config : MoEConfig, optional
        Instead of single options.
    rng : anything `numpy.random.default_rng` accepts
        Seeds the initialisation: router N(0, 0.02²), experts N(0, 1/fan_in), biases 0.
    **options
        The fields of `RouterConfig` (``num_experts``, ``top_k``, ``score``, …), `ExpertConfig` (``d_ff``,
        ``activation``, …), `DispatchConfig` (``capacity_factor``, …) and `MoEConfig` (``d_model``, ``dtype``,
        ``shared``, ``aux_losses``).

    Attributes
    ----------
    config : MoEConfig
    params : dict of str to array
        Change them in place at any time; the next call sees it.  ``w_router`` (D, E), ``w_gate`` (E, D, F),
        ``w_up`` (E, D, F), ``w_down`` (E, F, D), and what the options add.
    buffers : dict of str to array
        State without gradient: ``choice_bias`` (E,) if configured.

    Raises
    ------
    TypeError, ValueError
        For an unknown option (with the closest known one) or a value out of range.

    Notes
    -----
    A layer has no hidden state: two forwards may be alive at once, and concurrent forwards are safe.  ``backward`` uses
    the parameters as they are when it is called; change them after it, not between.

    Examples
    --------
    >>> import numpy as np, numoe
    >>> layer = numoe.MoELayer(d_model=8, d_ff=16, num_experts=4, top_k=2, rng=0)
    >>> layer
    MoELayer(d_model=8, d_ff=16, num_experts=4, top_k=2, dtype=float32: 1,568 parameters, 800 active per token)
    >>> x = np.ones((2, 3, 8), np.float32)
    >>> layer(x).shape
    (2, 3, 8)
    >>> out = layer.forward(x)
    >>> grads = layer.backward(np.ones_like(out.y), out)
    >>> grads.x.shape, grads.params["w_up"].shape
    ((2, 3, 8), (4, 8, 16))
    """

    __slots__ = ("_config", "buffers", "params")

    params: dict[str, FloatArray]
    buffers: dict[str, FloatArray]

    def __init__(self, *, config: MoEConfig | None = None, rng: Any = None, **options: Any) -> None:
        if config is not None and options:
            raise TypeError(f"give config or single options, not both; got config and {', '.join(options)}.")
        if config is not None and not isinstance(config, MoEConfig):
            raise TypeError(f"config must be a numoe.MoEConfig; got {type(config).__name__}.")
        self._config = MoEConfig.from_options(**options) if config is None else config
        self.params = _initial_params(self._config, np.random.default_rng(rng))
        self.buffers = {n: np.zeros(s, self._config.param_dtype(n)) for n, s in self._config.buffer_shapes().items()}

    # ── what it is ───────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def config(self) -> MoEConfig:
        """All settings; immutable."""
        return self._config

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32, float64 or bfloat16, of the experts' matrices and of results."""
        return self._config.array_dtype

    @property
    def num_params(self) -> int:
        """All learned numbers."""
        return self._config.num_params()

    @property
    def num_active_params(self) -> int:
        """The learned numbers that one token uses."""
        return self._config.num_active_params()

    def __repr__(self) -> str:
        settings = [f"{name}={value}" for name, value in self._config.main_settings().items()]
        sizes = f"{self.num_params:,} parameters, {self.num_active_params:,} active per token"
        return f"MoELayer({', '.join(settings)}: {sizes})"

    def _repr_html_(self) -> str:
        rows = {
            **self._config.main_settings(),
            "parameters": f"{self.num_params:,}",
            "active per token": f"{self.num_active_params:,}",
            "memory": f"{sum(p.nbytes for p in self.params.values()) / 1e6:,.1f} MB",
        }
        cells = "".join(
            f"<tr><th style='text-align:left'>{name}</th><td>{value}</td></tr>" for name, value in rows.items()
        )
        return f"<table><caption>MoELayer</caption>{cells}</table>"

    # ── forward ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def __call__(
        self,
        x: Any,
        *,
        mask: Any = None,
        rng: Any = None,
        out: FloatArray | None = None,
        nan_policy: str = "propagate",
    ) -> FloatArray:
        """Inference: ``y`` alone, keeping nothing for a backward.

        Parameters
        ----------
        x : (..., D)
            Any leading shape, restored in the result; (D,) is one token.
        mask : (...) bool, optional
            True for real tokens; the others get y = 0.
        rng : anything `numpy.random.default_rng` accepts, optional
            Switches the configured jitter and noise on.
        out : (..., D) array, optional
            Where to put the result; may not overlap `x`.
        nan_policy : {"propagate", "raise"}
            A NaN token gives NaN for itself alone, or ``FloatingPointError``.

        Returns
        -------
        y : (..., D)
        """
        tokens, shape, real = self._tokens(x, mask)
        if out is not None:
            self._check_out(out, tokens, shape)
        router = self._router_pass(tokens, shape, None, rng)
        check_nan(nan_policy, tokens, router, real)
        routing = self._route(router, real)
        plan = dispatch(routing, self._config.router, self._config.dispatch, sequence_lengths=_lengths(shape))
        y = self._result(self._branches(tokens, routing, plan, real, keep_cache=False)[0], shape)
        if out is None:
            return y
        np.copyto(out, y)
        return out

    def forward(
        self,
        x: Any,
        *,
        mask: Any = None,
        rng: Any = None,
        logits: Any = None,
        indices: Any = None,
        weights: Any = None,
        sequence_lengths: Any = None,
        nan_policy: str = "propagate",
        recompute: bool = False,
    ) -> MoEOutput:
        """The layer with everything a backward or an analysis needs.

        Parameters
        ----------
        x : (..., D)
            Any leading shape, restored in ``out.y``; the last but one axis is the sequence.
        mask : (...) bool, optional
            True for real tokens.  The others get y = 0 and count nowhere: not in routing, capacity, losses, gradients.
        rng : anything `numpy.random.default_rng` accepts, optional
            Switches the configured jitter and noise on (training); without it the layer is deterministic.
        logits : (..., E), optional
            Router logits from outside instead of ``x @ w_router``.
        indices, weights : (..., K), optional
            A routing from outside; index -1 means not routed.
        sequence_lengths : sequence of int, optional
            Lengths of the sequences in x if they differ, for per-sequence capacity and losses.
        nan_policy : {"propagate", "raise"}
        recompute : bool
            Keep no activations: the backward computes them again, for a sixth of the step's arithmetic more and
            2·M·F numbers of memory less.  The gradients are the same, bit for bit.

        Returns
        -------
        MoEOutput

        Raises
        ------
        TypeError, ValueError, IndexError
            For an argument that does not fit; the message names it.
        FloatingPointError
            With ``nan_policy="raise"``, for NaN logits.
        """
        config = self._config
        keep = not checked_flag("recompute", recompute)
        tokens, shape, real = self._tokens(x, mask)
        if np.may_share_memory(tokens, x):
            tokens = tokens.copy()  # x may be overwritten before the backward reads it
        lengths = _lengths(shape) if sequence_lengths is None else sequence_lengths
        lengths = check_sequence_lengths(lengths, len(tokens))
        router: RouterPass | None = None
        if _source(logits, indices, weights) == "indices":
            routing, given = self._outside_routing(indices, weights, shape, real), np.shape(weights)
            check_nan(nan_policy, tokens, None, real)
        else:
            router = self._router_pass(tokens, shape, logits, rng)
            check_nan(nan_policy, tokens, router, real)
            routing, given = self._route(router, real), None if logits is None else np.shape(logits)
        plan = dispatch(routing, config.router, config.dispatch, sequence_lengths=lengths)
        y, routed, shared = self._branches(tokens, routing, plan, real, keep_cache=keep)
        found = aux_losses_of(config, routing, router, lengths)
        terms = {name: LossTerm(loss.value, config.aux_losses[name]) for name, loss in found.items()}
        return MoEOutput(
            y=self._result(y, shape),
            routing=routing,
            dispatch=plan,
            losses=terms,
            aux_loss=math.fsum(term.coefficient * term.value for term in terms.values()),
            _cache=_Cache(self.params, config, tokens, router, routed, shared, found, given),
        )

    def _branches(
        self, x: FloatArray, routing: Routing, plan: Dispatch, real: BoolArray | None, *, keep_cache: bool
    ) -> tuple[FloatArray, Branch, Branch | None]:
        """The routed experts' and the shared expert's sum (T, D), and what their backwards need."""
        config = self._config
        used = combine_weights(routing, plan, config.router, config.dispatch)
        y, routed = run(config.experts, self.params, x, routing, plan, used, keep_cache)
        if config.shared is None:
            return y, routed, None
        y_shared, shared = run_shared(config.shared, self.params, x, real, keep_cache)
        with np.errstate(all="ignore"):
            y += y_shared
        return y, routed, shared

    # ── backward ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @np.errstate(all="ignore")
    def backward(
        self,
        dy: Any,
        out: MoEOutput,
        d_aux_loss: float = 1.0,
        *,
        into: MoEGrads | None = None,
        accumulate: bool = False,
    ) -> MoEGrads:
        r"""Gradients of :math:`\langle dy, y \rangle + d\_aux\_loss \cdot aux\_loss`.

        Which experts were chosen, and who was dropped, is a constant.

        Parameters
        ----------
        dy : (..., D)
            Gradient of the objective with respect to ``out.y``; same shape.
        out : MoEOutput
            From this layer's `forward`; usable any number of times.
        d_aux_loss : float
            Factor on the auxiliary losses' gradient; 0 leaves them out.
        into : MoEGrads, optional
            Of an earlier backward of this layer: its ``params`` arrays are used again, which saves the system the work
            of finding fresh memory at every step.
        accumulate : bool
            Add the parameters' gradients to those in `into`, for batches that come in parts.

        Returns
        -------
        MoEGrads
            Gradients of parameters are float32 for a bfloat16 layer.

        Examples
        --------
        >>> import numpy as np, numoe
        >>> layer = numoe.MoELayer(d_model=8, d_ff=16, num_experts=4, top_k=2, rng=0)
        >>> out = layer.forward(np.ones((3, 8), np.float32))
        >>> grads = layer.backward(np.ones_like(out.y), out)
        >>> once = grads.params["w_up"].copy()
        >>> twice = layer.backward(np.ones_like(out.y), out, into=grads, accumulate=True)
        >>> twice.params["w_up"] is grads.params["w_up"], bool(np.all(twice.params["w_up"] == 2 * once))
        (True, True)
        """
        cache, config = self._cache_of(out), self._config
        self._check_into(into, checked_flag("accumulate", accumulate))
        dy, shape = as_float(dy, "dy", config.compute_dtype), out.y.shape
        if dy.shape != shape:
            raise ValueError(f"dy must have the shape of out.y, {shape}; got {dy.shape}.")
        dy = dy.reshape(cache.x.shape)
        largest = float(np.finfo(config.compute_dtype).max) / max([1.0, *config.aux_losses.values()])
        scale = checked_real("d_aux_loss", d_aux_loss, low=-largest, high=largest)
        # y = routed + shared
        given = None if into is None else into.params
        dx, dused, done = cache.routed.backward(dy, cache.x, given, accumulate)
        dparams: dict[str, FloatArray] = {}  # computed here: still to be stored or added
        if cache.shared is not None:
            dx_shared, done_shared, dparams = self._shared_backward(cache, dy, given, accumulate)
            dx += dx_shared
            done |= done_shared
        assert dused is not None
        # used = combine_weights(routing.weights);  aux_loss = Σ coefficient * loss(weights, logits)
        dweights = combine_weights_backward(dused, out.routing, out.dispatch, config.router, config.dispatch)
        dweights_aux, dlogits_aux = aux_gradients(config, cache.losses, scale)
        dweights = dweights + dweights_aux
        if cache.router is None:
            params = self._stored(done, dparams, given, accumulate)
            return MoEGrads(x=self._result(dx, shape), params=params, weights=dweights.reshape(cache.given))
        # weights = route(logits)
        dlogits = route_backward(dweights, out.routing, config.router) + dlogits_aux
        if cache.router.x is None:
            params = self._stored(done, dparams, given, accumulate)
            return MoEGrads(x=self._result(dx, shape), params=params, logits=dlogits.reshape(cache.given))
        # logits = (x * jitter) @ w_router + b_router + noise
        dx_router, dw, db = router_logits_backward(dlogits, cache.router.x, self.params["w_router"])
        dx += dx_router if cache.router.jitter is None else dx_router * cache.router.jitter
        if not config.router.frozen:
            dparams |= {"w_router": dw, "b_router": db}
        return MoEGrads(x=self._result(dx, shape), params=self._stored(done, dparams, given, accumulate))

    def _shared_backward(
        self, cache: _Cache, dy: FloatArray, into: Mapping[str, FloatArray] | None, accumulate: bool
    ) -> tuple[FloatArray, dict[str, FloatArray], dict[str, FloatArray]]:
        """dx, the finished gradients of the shared expert's matrices, and that of its score."""
        assert cache.shared is not None
        names = {name: name.replace("w_", "w_shared_") for name in cache.shared.params}
        own = None if into is None else {name: into[shared][None] for name, shared in names.items()}
        dx, dgate, dparams = cache.shared.backward(dy, cache.x, own, accumulate)
        done = {names[name]: gradient[0] for name, gradient in dparams.items()}
        if dgate is None:
            return dx, done, {}
        # gate = sigmoid(x @ w_shared_score)
        dscore = route_backward(dgate, cache.shared.routing, SHARED_GATE)
        dx_score, dw, _ = router_logits_backward(dscore, cache.x, self.params["w_shared_score"][:, None])
        dx += dx_score
        return dx, done, {"w_shared_score": dw[:, 0]}

    def _stored(
        self,
        done: Mapping[str, FloatArray],
        found: Mapping[str, FloatArray],
        into: Mapping[str, FloatArray] | None,
        accumulate: bool,
    ) -> dict[str, FloatArray]:
        """All gradients in the order of ``params``; exact zeros for what got none (frozen, or routed from outside).

        The core has stored those of `done` in `into`; those of `found` follow here.
        """
        gradients = {}
        for name, shape in self._config.param_shapes().items():
            if into is None:
                gradient = done.get(name, found.get(name))
                gradients[name] = np.zeros(shape, self._config.compute_dtype) if gradient is None else gradient
                continue
            gradients[name] = into[name]
            if name in done:
                continue
            if accumulate:
                into[name][...] += found.get(name, 0)
            else:
                into[name][...] = found.get(name, 0)
        return gradients

    def _check_into(self, into: MoEGrads | None, accumulate: bool) -> None:
        if into is None:
            if accumulate:
                raise ValueError("accumulate=True adds to earlier gradients; pass them as into=.")
            return
        if not isinstance(into, MoEGrads):
            raise TypeError(f"into must be the MoEGrads of an earlier backward; got {type(into).__name__}.")
        dtype = self._config.compute_dtype
        for name, shape in self._config.param_shapes().items():
            value = into.params.get(name)
            if value is None or value.shape != shape or value.dtype != dtype:
                got = "nothing" if value is None else f"{value.dtype} {value.shape}"
                raise ValueError(f"into.params[{name!r}] must be a {dtype} array of shape {shape}; got {got}.")
            if not value.flags.c_contiguous or not value.flags.writeable:
                raise ValueError(f"into.params[{name!r}] must be C-contiguous and writable.")
            if np.may_share_memory(value, self.params[name]):
                raise ValueError(f"into.params[{name!r}] overlaps the parameter itself; pass a backward's own arrays.")

    def _result(self, value: FloatArray, shape: tuple[int, ...]) -> FloatArray:
        """Tokens in the user's shape and the layer's dtype."""
        return value.astype(self.dtype, copy=False).reshape(shape)

    def _cache_of(self, out: MoEOutput) -> _Cache:
        if not isinstance(out, MoEOutput):
            raise TypeError(f"out must be the MoEOutput of layer.forward(x); got {type(out).__name__}.")
        if out._cache.params is not self.params and out._cache.config == self._config:
            raise ValueError("out comes from another layer; pass this layer's own forward result.")
        if out._cache.config != self._config:
            raise ValueError("out comes from a layer with another configuration; pass this layer's own forward result.")
        self._check_params()
        return out._cache

    # ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _tokens(self, x: Any, mask: Any) -> tuple[FloatArray, tuple[int, ...], BoolArray | None]:
        """X as (T, D) in the dtype of the arithmetic with zeros where masked, its original shape, and the mask (T,)."""
        self._check_params()
        width, choices = self._config.d_model, self._config.router.top_k
        if math.prod(getattr(x, "shape", ())[:-1]) * choices >= 2**31:
            raise OverflowError(f"T * K = {math.prod(x.shape[:-1])} * {choices} must be below 2**31; split the batch.")
        array = as_float(x, "x", self.dtype)
        if array.ndim == 0 or array.shape[-1] != width:
            raise ValueError(f"x must have shape (..., d_model) = (..., {width}); got {array.shape}.")
        shape = array.shape
        tokens = array.reshape(math.prod(shape[:-1]), width).astype(self._config.compute_dtype, copy=False)
        if mask is None:
            return tokens, shape, None
        valid = as_mask(mask, len(tokens), shape[:-1])
        return np.where(valid[:, None], tokens, tokens.dtype.type(0)), shape, valid

    def _check_params(self) -> None:
        """The parameters are the user's to change; their names, shapes and dtype are not."""
        for kind, values, shapes in (
            ("params", self.params, self._config.param_shapes()),
            ("buffers", self.buffers, self._config.buffer_shapes()),
        ):
            for name, shape in shapes.items():
                value, dtype = values.get(name), self._config.param_dtype(name)
                if type(value) is np.ndarray and value.shape == shape and value.dtype == dtype:
                    continue
                ours = isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray)
                if value is None or not ours or value.shape != shape or value.dtype != dtype:
                    got = f"{value.dtype} {value.shape}" if value is not None and ours else type(value).__name__
                    raise ValueError(
                        f"layer.{kind}[{name!r}] must be a {dtype} array of shape {shape}; got {got}.  "
                        f"Assign in place: layer.{kind}[{name!r}][...] = value."
                    )

    def _router_pass(self, x: FloatArray, shape: tuple[int, ...], logits: Any, rng: Any) -> RouterPass:
        """Logits of the linear router or from outside; jitter, then noise, are drawn in float64 if rng is given."""
        router = self._config.router
        generator = None if rng is None else np.random.default_rng(rng)
        jitter: FloatArray | None = None
        seen: FloatArray | None = None
        if logits is not None:
            clean = as_float(logits, "logits", self._config.compute_dtype)
            if clean.shape not in ((*shape[:-1], router.num_experts), (len(x), router.num_experts)):
                raise ValueError(
                    f"logits must have x's leading shape {shape[:-1]} and E = {router.num_experts}; got {clean.shape}."
                )
            clean = clean.reshape(len(x), router.num_experts)
        else:
            seen = x
            if generator is not None and router.jitter > 0:
                jitter = generator.uniform(1 - router.jitter, 1 + router.jitter, x.shape).astype(x.dtype)
                with np.errstate(all="ignore"):
                    seen = x * jitter
            clean = router_logits(seen, self.params["w_router"], self.params.get("b_router"))
        if generator is None or router.noise_std == 0:
            return RouterPass(clean, clean, 0.0, seen, jitter)
        noise = generator.standard_normal(clean.shape).astype(clean.dtype)
        with np.errstate(all="ignore"):
            noisy = clean + clean.dtype.type(router.noise_std) * noise
        return RouterPass(noisy, clean, router.noise_std, seen, jitter)

    def _route(self, router: RouterPass, real: BoolArray | None) -> Routing:
        return route(router.logits, self._config.router, choice_bias=self.buffers.get("choice_bias"), mask=real)

    def _outside_routing(self, indices: Any, weights: Any, shape: tuple[int, ...], real: BoolArray | None) -> Routing:
        """The caller's decision; masked tokens are not routed, and what is not routed weighs 0."""
        choices = self._config.router.top_k
        width = (math.prod(shape[:-1]), choices)
        chosen, value = plain_array(indices, "indices"), as_float(weights, "weights", self._config.compute_dtype)
        if chosen.shape != value.shape or chosen.shape not in ((*shape[:-1], choices), width):
            raise ValueError(
                f"indices and weights must both have x's leading shape {shape[:-1]} and K = {choices}; got "
                f"{chosen.shape} and {value.shape}."
            )
        chosen = as_indices(chosen.reshape(width), self._config.router.num_experts)
        value = value.reshape(width)
        if real is not None:
            chosen = np.where(real[:, None], chosen, np.int32(-1))
        return Routing(indices=chosen, weights=np.where(chosen >= 0, value, value.dtype.type(0)), mask=real)

    def _check_out(self, out: Any, x: FloatArray, shape: tuple[int, ...]) -> None:
        if not isinstance(out, np.ndarray) or out.dtype != self.dtype:
            raise TypeError(f"out must be a {self.dtype} array; got {getattr(out, 'dtype', type(out).__name__)}.")
        if out.shape != shape or not out.flags.c_contiguous or not out.flags.writeable:
            raise ValueError(
                f"out must be writable, C-contiguous and of shape {shape}; got {out.shape}, {out.strides=}."
            )
        if np.shares_memory(out, x):
            raise ValueError("out overlaps x; pass another array.")

    def pack(self, dtype: str | None = None) -> PackedMoELayer:
        """A copy for inference whose weights lie as the kernels read them; see `PackedMoELayer`.

        Parameters
        ----------
        dtype : {"float32", "bfloat16", "float64"}, optional
            How the experts' weights are stored; default: the layer's own dtype.

        Examples
        --------
        >>> import numoe
        >>> numoe.MoELayer(d_model=8, d_ff=16, num_experts=4, top_k=2, rng=0).pack("bfloat16").dtype
        'bfloat16'
        """
        self._check_params()
        return PackedMoELayer(self, self._config.dtype if dtype is None else dtype)

    # ── state ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def update_choice_bias(self, out: MoEOutput, rate: float = 1e-3) -> None:
        """Loss-free balancing: push the choice bias towards the experts that `out` underused, in place.

        See `numoe.losses.update_choice_bias`; counts are taken before dropping.

        Examples
        --------
        >>> import numpy as np, numoe
        >>> layer = numoe.MoELayer(d_model=2, d_ff=4, num_experts=2, top_k=1, choice_bias=True, rng=0)
        >>> layer.params["w_router"][...] = [[1, 0], [1, 0]]
        >>> layer.update_choice_bias(layer.forward(np.ones((3, 2), np.float32)), rate=0.5)
        >>> layer.buffers["choice_bias"]
        array([-0.5,  0.5], dtype=float32)
        """
        if "choice_bias" not in self.buffers:
            raise ValueError("this layer has no choice bias; build it with choice_bias=True.")
        if not isinstance(out, MoEOutput):
            raise TypeError(f"out must be the MoEOutput of layer.forward(x); got {type(out).__name__}.")
        chosen = out.routing.indices
        counts = np.bincount(chosen[chosen >= 0], minlength=self._config.router.num_experts)
        self.buffers["choice_bias"][...] = losses.update_choice_bias(self.buffers["choice_bias"], counts, rate)

    def state_dict(self) -> dict[str, FloatArray]:
        """Name → array of all parameters and buffers: the layer's own arrays, not copies."""
        return {**self.params, **self.buffers}

    def load_state_dict(self, state: Mapping[str, npt.ArrayLike], strict: bool = True) -> list[str]:
        """Copy `state` into the parameters and buffers, after checking all of it.

        Parameters
        ----------
        state : mapping of str to array
        strict : bool
            Missing or unexpected names are an error; otherwise they are returned.

        Returns
        -------
        list of str
            Names that were missing or unexpected.

        Raises
        ------
        numoe.CheckpointError
            Before anything was changed.
        """
        own = self.state_dict()
        return checkpoint.copy_state(state, own, strict=strict)

    def save(self, path: Any) -> None:
        """Write parameters, buffers and configuration to one ``.safetensors`` file, atomically.

        See Also
        --------
        MoELayer.load
        """
        checkpoint.save(path, self.state_dict(), config=self._config.to_dict())

    @classmethod
    def load(cls, path: Any) -> MoELayer:
        """The layer written by `save`.  Executes nothing from the file and checks all of it first.

        Raises
        ------
        numoe.CheckpointError
            If the file is not one, is damaged, or does not fit its own configuration.
        """
        state, settings = checkpoint.load(path)
        try:
            config = MoEConfig.from_dict(settings)
        except (TypeError, ValueError, KeyError) as error:
            raise checkpoint.CheckpointError(f"{path}: the configuration inside is not valid: {error}") from None
        layer = cls.__new__(cls)
        layer._config = config
        shapes = config.param_shapes() | config.buffer_shapes()
        for name, value in state.items():
            if name in shapes and value.dtype != config.param_dtype(name):
                expects = config.param_dtype(name)
                raise checkpoint.CheckpointError(f"{path}: {name!r} must be {expects}; got {value.dtype}.")
        expected = {name: (shape, config.param_dtype(name)) for name, shape in shapes.items()}
        arrays, _ = checkpoint.checked_state(state, expected, source=str(path))
        layer.params = {name: arrays[name] for name in config.param_shapes()}
        layer.buffers = {name: arrays[name] for name in config.buffer_shapes()}
        return layer

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self._config.to_dict(), "params": self.params, "buffers": self.buffers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._config = MoEConfig.from_dict(state["config"])
        self.params, self.buffers = state["params"], state["buffers"]

    def __copy__(self) -> MoELayer:
        """A second layer on the same arrays; `copy.deepcopy` gives it its own."""
        twin = type(self).__new__(type(self))
        twin._config, twin.params, twin.buffers = self._config, dict(self.params), dict(self.buffers)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> MoELayer:
        twin = self.__copy__()
        twin.params, twin.buffers = copy.deepcopy(self.params, memo), copy.deepcopy(self.buffers, memo)
        return twin


# ── small helpers ────────────────────────────────────────────────────────────────────────────────────────────────────


def _initial_params(config: MoEConfig, rng: np.random.Generator) -> dict[str, FloatArray]:
    """Router N(0, 0.02²), matrices N(0, 1/fan_in), biases 0; every tensor is drawn whole, in the documented order."""
    params = {name: np.zeros(shape, config.compute_dtype) for name, shape in config.param_shapes().items()}
    for name, value in params.items():
        if name.startswith("w_"):
            fan_in = value.shape[-2] if value.ndim > 1 else value.shape[0]
            std = 0.02 if name == "w_router" else fan_in**-0.5
            rng.standard_normal(out=value, dtype=value.dtype)
            value *= std
    return {name: value.astype(config.param_dtype(name), copy=False) for name, value in params.items()}


def _source(logits: Any, indices: Any, weights: Any) -> str:
    """Where the routing comes from: "x", "logits" or "indices"."""
    names = [n for n, v in (("logits", logits), ("indices", indices), ("weights", weights)) if v is not None]
    if names not in ([], ["logits"], ["indices", "weights"]):
        raise ValueError(f"give logits, or indices and weights, or none of them; got {' and '.join(names)} only.")
    return names[0] if names else "x"


def _lengths(shape: tuple[int, ...]) -> IntArray | None:
    """Sequence lengths of x by its shape: all but the last two axes count sequences."""
    return np.full(math.prod(shape[:-2]), shape[-2], np.int32) if len(shape) > 2 else None
