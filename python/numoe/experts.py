"""What the chosen experts compute, on expert-sorted rows, and its backward."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from numoe import _core
from numoe._arrays import BFLOAT16, FLOAT32, FloatArray, as_bits, as_float
from numoe.config import EXPERT_PARAMS, ExpertConfig
from numoe.routing import Dispatch, check_config, check_kind


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertCache:
    """What `experts_backward` uses of the forward: the rows before the activation.

    Attributes
    ----------
    gate : (M, F) or None
        ``x @ w_gate + b_gate``; None for plain MLP experts.
    up : (M, F) or None
        ``x @ w_up + b_up``; None if nothing was kept: the backward computes both again.
    """

    gate: FloatArray | None
    up: FloatArray | None


def expert_options(config: ExpertConfig) -> _core.ExpertOptions:
    """The core's form of an `ExpertConfig`."""
    check_config(config, ExpertConfig, "experts")
    return _options_of(config)


@functools.lru_cache
def _options_of(config: ExpertConfig) -> _core.ExpertOptions:
    return _core.ExpertOptions(activation=config.activation, weight_on=config.weight_on)


_NAMES = {  # of the parameters: form, bias →
    ("glu", False): ("w_gate", "w_up", "w_down"),
    ("glu", True): ("w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down"),
    ("mlp", False): ("w_up", "w_down"),
    ("mlp", True): ("w_up", "w_down", "b_up", "b_down"),
}


def expert_params(params: Mapping[str, Any], config: ExpertConfig, dtype: np.dtype[Any]) -> dict[str, FloatArray]:
    """The experts' parameters as the core takes them; never copied, because they may be gigabytes."""
    if not isinstance(params, Mapping):
        raise TypeError(f"params must map names to arrays; got {type(params).__name__}.")
    expected = _NAMES[config.form, config.bias]
    chosen = {name: params[name] for name in EXPERT_PARAMS if name in params}
    if tuple(chosen) != expected:
        raise ValueError(
            f"params must hold exactly {', '.join(expected)} of the experts' parameters for form={config.form!r} and "
            f"bias={config.bias}; got {', '.join(chosen) or 'none of them'}."
        )
    narrow = dtype == FLOAT32 and getattr(chosen["w_up"], "dtype", None) == BFLOAT16
    for name, value in chosen.items():
        expected_dtype = BFLOAT16 if narrow and name.startswith("w_") else dtype
        if not isinstance(value, np.ndarray) or value.dtype != expected_dtype:
            kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
            like = "w_up" if narrow else "x"
            raise TypeError(
                f"params[{name!r}] must be a {expected_dtype} array like {like}; got {kind}.  Convert x to it."
            )
    if not narrow:
        return chosen
    return {name: as_bits(value) if name.startswith("w_") else value for name, value in chosen.items()}


def experts_forward(
    x: Any,
    plan: Dispatch,
    params: Mapping[str, Any],
    config: ExpertConfig,
    *,
    weights: Any = None,
    combined: bool = False,
    keep_cache: bool = True,
) -> tuple[FloatArray, ExpertCache]:
    r"""Run every expert on its rows.

    .. math:: rows_r = (act(x_t W^{gate}_e) \circ x_t W^{up}_e)\, W^{down}_e, \qquad t = token(r),\ e = expert(r)

    (``form="mlp"``: :math:`act(x_t W^{up}_e)\,W^{down}_e`; biases are added where the parameters have them.)

    Parameters
    ----------
    x : (T, D) float32 or float64
        The dtype of the arithmetic and of the result.
    plan : Dispatch
    params : mapping
        ``w_gate`` (E, D, F), ``w_up`` (E, D, F), ``w_down`` (E, F, D), and optionally ``b_gate``, ``b_up`` (E, F),
        ``b_down`` (E, D); C-contiguous arrays of x's dtype, or bfloat16 matrices with float32 x and biases.  Other
        names are ignored.
    config : ExpertConfig
    weights : (T, K), optional
        Needed for ``weight_on="input"``, and for ``combined=True`` unless all weights are 1.
    combined : bool
        Return the weighted sum per token (T, D) - `combine` fused into the last product, without a row buffer -
        instead of the rows (M, D).
    keep_cache : bool
        Keep the rows before the activation, 2·M·F numbers; otherwise the backward computes them again.

    Returns
    -------
    rows (M, D) or y (T, D)
    cache : ExpertCache

    Raises
    ------
    TypeError, ValueError
        If a parameter has another dtype, shape or memory order than stated.

    Examples
    --------
    >>> import numpy as np, numoe
    >>> layer = numoe.MoELayer(d_model=4, d_ff=8, num_experts=3, top_k=2, rng=0, dtype="float64")
    >>> x = np.ones((5, 4))
    >>> out = layer.forward(x)
    >>> rows, _ = numoe.experts_forward(x, out.dispatch, layer.params, layer.config.experts)
    >>> bool(np.all(numoe.combine(rows, out.dispatch, out.routing.weights) == out.y))
    True
    """
    check_kind(plan, Dispatch, "plan")
    x = as_float(x, "x", ndim=2)
    options = expert_options(config)
    if weights is not None:
        weights = as_float(weights, "weights", x.dtype, ndim=2)
    if weights is None and config.weight_on == "input":
        raise ValueError("weights must be given for weight_on='input': they multiply the experts' input.")
    if not combined and config.weight_on == "output":
        weights = None  # they belong to combine
    result, gate, up = _core.experts_forward(
        x,
        plan.offsets,
        plan.row_token,
        plan.row_assignment,
        plan.top_k,
        weights,
        expert_params(params, config, x.dtype),
        options,
        combined,
        keep_cache,
    )
    return result, ExpertCache(gate=gate, up=up)


def experts_backward(
    dresult: Any,
    x: Any,
    plan: Dispatch,
    params: Mapping[str, Any],
    config: ExpertConfig,
    cache: ExpertCache,
    *,
    weights: Any = None,
    combined: bool = False,
    into: Mapping[str, FloatArray] | None = None,
    accumulate: bool = False,
) -> tuple[FloatArray, FloatArray | None, dict[str, FloatArray]]:
    r"""The adjoint of `experts_forward`, with the same arguments and its cache.

    With :math:`h = act(g) \circ u` and :math:`dh = w\,dy\,W_{down}^T`:
    :math:`dW_{down} = \sum_r w\,h^T dy`, :math:`dW_{gate} = \sum_r x^T dg`, :math:`dW_{up} = \sum_r x^T du`,
    :math:`dx = dg\,W_{gate}^T + du\,W_{up}^T`, and the weight's gradient is :math:`\langle dy\,W_{down}^T, h \rangle +
    \langle dy, b_{down} \rangle`, so the experts' outputs need not be stored.

    Parameters
    ----------
    dresult : (M, D), or (T, D) if combined
        Gradient of the objective with respect to what `experts_forward` returned.
    x, plan, params, config, cache, weights, combined
        As in the forward, and what it returned.
    into : mapping of str to array, optional
        Arrays for the parameters' gradients, of x's dtype and the parameters' shapes; e.g. those of the last step.
    accumulate : bool
        Add the parameters' gradients to what is in `into`.

    Returns
    -------
    dx : (T, D)
    dweights : (T, K) or None
        None if `weights` was None (or, with ``combined=False``, belongs to `combine_backward`).
    dparams : dict
        Same names and shapes as the experts' parameters, in x's dtype; exactly 0 for experts without rows.

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit the forward's; before anything was written.

    Examples
    --------
    >>> import numpy as np, numoe
    >>> layer = numoe.MoELayer(d_model=4, d_ff=8, num_experts=3, top_k=2, rng=0, dtype="float64")
    >>> x = np.ones((5, 4))
    >>> plan = layer.forward(x).dispatch
    >>> rows, cache = numoe.experts_forward(x, plan, layer.params, layer.config.experts)
    >>> dx, _, dparams = numoe.experts_backward(np.ones_like(rows), x, plan, layer.params, layer.config.experts, cache)
    >>> dx.shape, sorted(dparams)
    ((5, 4), ['w_down', 'w_gate', 'w_up'])
    """
    check_kind(plan, Dispatch, "plan")
    check_kind(cache, ExpertCache, "cache")
    options = expert_options(config)
    x = as_float(x, "x", ndim=2)
    dresult = as_float(dresult, "dy" if combined else "drows", x.dtype, ndim=2)
    if weights is not None:
        weights = as_float(weights, "weights", x.dtype, ndim=2)
    if not combined and config.weight_on == "output":
        weights = None
    if into is not None:
        _check_into(into, config)
    return _core.experts_backward(
        dresult,
        x,
        plan.offsets,
        plan.row_token,
        plan.row_assignment,
        plan.top_k,
        weights,
        expert_params(params, config, x.dtype),
        options,
        combined,
        cache.gate,
        cache.up,
        into,
        accumulate,
    )


def _check_into(into: Any, config: ExpertConfig) -> None:
    """Every gradient has a place; the core looks at the arrays."""
    if not isinstance(into, Mapping):
        raise TypeError(f"into must map names to arrays; got {type(into).__name__}.")
    missing = [name for name in _NAMES[config.form, config.bias] if name not in into]
    if missing:
        raise ValueError(f"into must hold an array for every gradient; missing: {', '.join(missing)}.")
