"""`MoELayer`: parameters plus the functions of `numoe.routing`, `numoe.experts` and `numoe.losses` in their order."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from numoe import checkpoint, losses
from numoe._arrays import BoolArray, FloatArray, as_float, as_lengths
from numoe._gradients import check_own, grad_store, layer_gradients
from numoe._inputs import check_out, lengths_of, outside_logits, outside_routing, routing_source, tokens_of
from numoe._state import check_numbers, check_state, initial_buffers, initial_params, read_state
from numoe._steps import RouterPass, aux_losses_of, check_nan, in_shape, infer, router_pass, run_experts
from numoe.config import MoEConfig, checked_flag, checked_real, checked_rng, show_options
from numoe.outputs import ForwardCache, LossTerm, MoEGrads, MoEOutput, check_output
from numoe.packed import PackedMoELayer
from numoe.routing import Routing, dispatch, route


class MoELayer:
    r"""A Mixture-of-Experts layer.

    .. math:: y_t = \sum_{k} w_{tk}\, f_{e(t,k)}(x_t)\; (+\; f_{shared}(x_t)), \qquad
              f_e(x) = (act(x W^{gate}_e) \circ x W^{up}_e)\, W^{down}_e

    The defaults are Mixtral's form: softmax router, the K chosen weights renormalised, SwiGLU experts without bias,
    nothing dropped, no auxiliary loss.  Most other published forms are combinations of options;
    the README's table says which are not there.

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
        ``w_up`` (E, D, F), ``w_down`` (E, F, D), and what the options add.  The layer's dtype; in a bfloat16 layer
        only the experts' matrices are bfloat16, everything else is float32.
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

    References
    ----------
    Shazeer et al. 2017 (sparsely gated experts); Fedus et al. 2021 (Switch); Jiang et al. 2024 (Mixtral); Dai et al.
    2024 (DeepSeekMoE: shared experts).

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

    __slots__ = ("__weakref__", "_config", "buffers", "params")

    params: dict[str, FloatArray]
    buffers: dict[str, FloatArray]

    @show_options
    def __init__(self, *, config: MoEConfig | None = None, rng: Any = None, **options: Any) -> None:
        if config is not None and options:
            raise TypeError(f"give config or single options, not both; got config and {', '.join(options)}.")
        if config is not None and not isinstance(config, MoEConfig):
            raise TypeError(f"config must be a numoe.MoEConfig; got {type(config).__name__}.")
        self._config = MoEConfig.from_options(**options) if config is None else config
        self.params = initial_params(self._config, checked_rng(rng))
        self.buffers = initial_buffers(self._config)

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
        """Inference: ``y`` alone, keeping nothing for a backward; the bits of ``forward(x).y``.

        Parameters
        ----------
        x : (..., D)
            Any leading shape, restored in the result; (D,) is one token.  Other floating dtypes than the layer's are
            converted.
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
            Of the layer's dtype.

        Raises
        ------
        TypeError, ValueError, OverflowError, FloatingPointError
            As `forward`.

        Examples
        --------
        >>> import numpy as np, numoe
        >>> layer = numoe.MoELayer(d_model=8, d_ff=16, num_experts=4, top_k=2, rng=0)
        >>> x = np.ones((3, 8), np.float32)
        >>> y = layer(x, mask=np.array([True, False, True]))
        >>> y.shape, bool(np.all(y[0] == layer(x[0]))), bool(np.any(y[1]))
        ((3, 8), True, False)
        """
        self._check_state()
        config = self._config
        tokens, shape, real = tokens_of(x, mask, config)
        if out is not None:
            check_out(out, tokens, shape, self.dtype)
        if rng is None and nan_policy == "propagate" and config.dispatch.dropless:
            result = infer(config, self.params, self.buffers, tokens, real)
        else:
            router = router_pass(config.router, self.params, tokens, None, rng)
            check_nan(nan_policy, tokens, router, real)
            routing = self._route(router, real)
            plan = dispatch(routing, config.router, config.dispatch, sequence_lengths=lengths_of(shape))
            result, _, _ = run_experts(config, self.params, tokens, routing, plan, keep_cache=False)
        y = in_shape(result, shape, config)
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
            Any leading shape, restored in ``out.y``; the last but one axis is the sequence.  Other floating dtypes than
            the layer's are converted.
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
            For an argument, or a parameter that was replaced, that does not fit: the message names it.  For a token
            whose logits are all -inf.
        OverflowError
            If T·K is 2³¹ or more, or ``aux_loss`` beyond float64.
        FloatingPointError
            With ``nan_policy="raise"``, for NaN in a real token or its logits.

        Examples
        --------
        >>> import numpy as np, numoe
        >>> layer = numoe.MoELayer(d_model=8, d_ff=16, num_experts=4, top_k=2, aux_losses={"z": 0.1}, rng=0)
        >>> out = layer.forward(np.ones((3, 8), np.float32))
        >>> out.routing.weights.sum(axis=1), out.dispatch.load.sum(), out.aux_loss == 0.1 * out.losses["z"].value
        (array([1., 1., 1.], dtype=float32), np.int64(6), True)
        """
        config = self._config
        keep = not checked_flag("recompute", recompute)
        self._check_state()
        tokens, shape, real = tokens_of(x, mask, config)
        if np.may_share_memory(tokens, x):
            tokens = tokens.copy()  # x may be overwritten before the backward reads it
        lengths = lengths_of(shape) if sequence_lengths is None else sequence_lengths
        lengths = as_lengths(lengths, len(tokens))
        router: RouterPass | None = None
        if routing_source(logits, indices, weights) == "indices":
            routing, given = outside_routing(indices, weights, shape, real, config), np.shape(weights)
            check_nan(nan_policy, tokens, None, real)
        else:
            outside = None if logits is None else outside_logits(logits, shape, config)
            router = router_pass(config.router, self.params, tokens, outside, rng)
            check_nan(nan_policy, tokens, router, real)
            routing, given = self._route(router, real), None if logits is None else np.shape(logits)
        plan = dispatch(routing, config.router, config.dispatch, sequence_lengths=lengths)
        y, routed, shared = run_experts(config, self.params, tokens, routing, plan, keep_cache=keep)
        found = aux_losses_of(config, routing, router, lengths)
        terms = {name: LossTerm(loss.value, config.aux_losses[name]) for name, loss in found.items()}
        return MoEOutput(
            y=in_shape(y, shape, config),
            routing=routing,
            dispatch=plan,
            losses=terms,
            aux_loss=_weighted_sum(terms),
            _cache=ForwardCache(self.params, config, tokens, router, routed, shared, found, given),
        )

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

        Raises
        ------
        TypeError, ValueError
            If `dy` has another shape than ``out.y``, `out` comes from another layer, or arrays of `into` do not fit;
            before anything was written.

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
        config = self._config
        check_own(out, config, self.params)
        self._check_state()
        dy = as_float(dy, "dy", config.compute_dtype)
        if dy.shape != out.y.shape:
            raise ValueError(f"dy must have the shape of out.y, {out.y.shape}; got {dy.shape}.")
        store = grad_store(into, checked_flag("accumulate", accumulate), dy, config, self.params)
        largest = float(np.finfo(config.compute_dtype).max) / max([1.0, *config.aux_losses.values()])
        scale = checked_real("d_aux_loss", d_aux_loss, low=-largest, high=largest)
        return layer_gradients(dy, out, scale, store)

    # ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _check_state(self) -> None:
        check_state(self._config, self.params, self.buffers)

    def _route(self, router: RouterPass, real: BoolArray | None) -> Routing:
        return route(router.logits, self._config.router, choice_bias=self.buffers.get("choice_bias"), mask=real)

    def pack(self, dtype: Any = None) -> PackedMoELayer:
        """A copy for inference whose weights lie as the kernels read them; see `PackedMoELayer`.

        Parameters
        ----------
        dtype : dtype-like, optional
            How the experts' weights are stored: float32, bfloat16 or float64; default: the layer's own dtype.

        Raises
        ------
        TypeError
            For another dtype than these.
        ValueError
            For a layer with a capacity, a choice bias that is not finite, or a dtype that its weights cannot be stored
            in.

        Examples
        --------
        >>> import numoe
        >>> numoe.MoELayer(d_model=8, d_ff=16, num_experts=4, top_k=2, rng=0).pack("bfloat16").dtype
        'bfloat16'
        """
        self._check_state()
        check_numbers(self.buffers)
        return PackedMoELayer(self, self._config.dtype if dtype is None else dtype)

    # ── state ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def update_choice_bias(self, out: MoEOutput, rate: float = 1e-3) -> None:
        r"""Loss-free balancing: push the choice bias towards the experts that `out` underused, in place.

        .. math:: b_e \leftarrow b_e + rate \cdot sign(mean(c) - c_e)

        with the counts :math:`c` of ``out.routing.indices``, taken before dropping.

        Raises
        ------
        TypeError, ValueError
            If the layer was built without ``choice_bias=True`` or holds a read-only bias, `out` comes from a layer
            with another number of experts, or `rate` is negative or not finite in the bias's dtype.

        References
        ----------
        Wang et al. 2024, arXiv:2408.15664 (loss-free balancing); see `numoe.losses.update_choice_bias`.

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
        self._check_state()
        check_output(out)
        experts, bias, chosen = self._config.router.num_experts, self.buffers["choice_bias"], out.routing.indices
        if out.dispatch.num_experts != experts:
            raise ValueError(
                f"out comes from a layer with {out.dispatch.num_experts} experts; this one has {experts}.  "
                "Pass this layer's own forward result."
            )
        if not bias.flags.writeable:
            raise ValueError("read-only buffer 'choice_bias'; replace it by a writable copy first.")
        bias[...] = losses.update_choice_bias(bias, np.bincount(chosen[chosen >= 0], minlength=experts), rate)

    def state_dict(self) -> dict[str, FloatArray]:
        """Name → array of all parameters and buffers: the layer's own arrays, not copies.

        Examples
        --------
        >>> import numoe
        >>> list(numoe.MoELayer(d_model=8, d_ff=16, num_experts=4, top_k=2, rng=0).state_dict())
        ['w_router', 'w_gate', 'w_up', 'w_down']
        """
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
            For missing or unexpected names, shapes or dtypes that do not fit.
        TypeError, ValueError
            If `state` is no mapping, or an array of the layer is read-only or does not fit its configuration.  In all
            cases before anything was changed.

        Examples
        --------
        >>> import numoe
        >>> layer, other = (numoe.MoELayer(d_model=8, d_ff=16, num_experts=4, top_k=2, rng=seed) for seed in (0, 1))
        >>> layer.load_state_dict({"w_up": other.params["w_up"]}, strict=False)
        ['w_router', 'w_gate', 'w_down']
        """
        self._check_state()
        return checkpoint.copy_state(state, self.state_dict(), strict=strict)

    def save(self, path: Any) -> None:
        """Write parameters, buffers and configuration to one ``.safetensors`` file, atomically.

        Raises
        ------
        ValueError
            If `path` has another suffix, or an array of the layer does not fit its configuration.
        OSError
            If the file cannot be written; one that was there before is untouched then.

        See Also
        --------
        MoELayer.load : with an example of both.
        """
        self._check_state()
        check_numbers(self.buffers)
        checkpoint.save(path, self.state_dict(), config=self._config.to_dict())

    @classmethod
    def load(cls, path: Any) -> MoELayer:
        """The layer written by `save`.  Executes nothing from the file and checks all of it first.

        Raises
        ------
        numoe.CheckpointError
            If the file is not one, is damaged, or does not fit its own configuration.
        OSError
            If it cannot be read.

        Examples
        --------
        >>> import pathlib, tempfile, numoe
        >>> layer = numoe.MoELayer(d_model=8, d_ff=16, num_experts=4, top_k=2, rng=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "layer.safetensors"
        ...     layer.save(path)
        ...     numoe.MoELayer.load(path).config == layer.config
        True
        """
        layer = cls.__new__(cls)
        layer._config, layer.params, layer.buffers = read_state(path)
        return layer

    def __getstate__(self) -> dict[str, Any]:
        state = self._attributes()
        return {"config": state.pop("_config").to_dict(), **state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            if name == "config":
                self._config = MoEConfig.from_dict(value)
            else:
                setattr(self, name, value)

    def __copy__(self) -> MoELayer:
        """A second layer on the same arrays; `copy.deepcopy` gives it its own."""
        twin = type(self).__new__(type(self))
        for name, value in self._attributes().items():
            setattr(twin, name, value)
        twin.params, twin.buffers = dict(self.params), dict(self.buffers)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> MoELayer:
        twin = memo[id(self)] = type(self).__new__(type(self))
        memo[id(self._config)] = self._config  # immutable
        for name, value in self._attributes().items():
            setattr(twin, name, copy.deepcopy(value, memo))
        return twin

    def _attributes(self) -> dict[str, Any]:
        """All of them, those of subclasses included."""
        plain, slots = cast(tuple[dict[str, Any] | None, dict[str, Any]], object.__getstate__(self))
        return {**(plain or {}), **slots}


def _weighted_sum(terms: Mapping[str, LossTerm]) -> float:
    try:
        total = math.fsum(term.coefficient * term.value for term in terms.values())
    except OverflowError:
        total = math.inf
    if math.isinf(total) and all(math.isfinite(term.value) for term in terms.values()):
        given = {name: term.coefficient for name, term in terms.items()}
        raise OverflowError(f"aux_loss, Σ coefficient · value, is beyond float64; the coefficients are {given}.")
    return total
