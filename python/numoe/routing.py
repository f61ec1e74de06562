"""Who goes where: logits → `Routing` (experts and weights) → `Dispatch` (the order of rows) → `combine`, and back.

Each function stands alone.  Bring your own router by giving `route` your logits, or `dispatch` your indices.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from numoe import _core
from numoe._arrays import (
    INT32,
    BoolArray,
    FloatArray,
    IntArray,
    as_float,
    as_indices,
    as_lengths,
    as_mask,
    check_distinct,
    is_ready,
)
from numoe.config import DispatchConfig, RouterConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """The router's decision for T tokens.

    Attributes
    ----------
    indices : (T, K) int32
        Chosen experts, best first; -1 for a token that the mask leaves out.
    weights : (T, K)
        How much each chosen expert counts; 0 where the index is -1.
    logits : (T, E) or None
        What the decision was made from; None if it came from outside.
    mask : (T,) bool or None
        True for real tokens.
    """

    indices: IntArray
    weights: FloatArray
    logits: FloatArray | None = None
    mask: BoolArray | None = None

    def __repr__(self) -> str:
        tokens, choices = self.indices.shape
        experts = "?" if self.logits is None else self.logits.shape[1]
        return f"Routing(T={tokens}, K={choices}, E={experts}, dtype={self.weights.dtype})"


@dataclass(frozen=True, kw_only=True, eq=False)
class Dispatch:
    """Rows in expert order: integers only, so one plan serves every dtype, the forward and the backward.

    Attributes
    ----------
    offsets : (E+1,) int64
        The rows of expert e are ``offsets[e]:offsets[e + 1]``; inside an expert they are in token order.
    row_token : (M,) int32
        Row → token.
    row_assignment : (M,) int32
        Row → ``token * K + choice``.
    assignment_row : (T, K) int32
        Assignment → row; -1 if it was dropped or not routed.
    capacity : int or None
        The largest number of rows per expert and capacity group; None if nothing can be dropped.
    """

    offsets: np.ndarray[Any, np.dtype[np.int64]]
    row_token: IntArray
    row_assignment: IntArray
    assignment_row: IntArray
    capacity: int | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.assignment_row.shape[0])

    @property
    def top_k(self) -> int:
        """K."""
        return int(self.assignment_row.shape[1])

    @property
    def num_rows(self) -> int:
        """M, the assignments that were kept."""
        return len(self.row_token)

    @property
    def load(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Rows per expert (E,), after dropping; `numoe.metrics.expert_load` counts before it."""
        return np.diff(self.offsets)

    @property
    def kept(self) -> BoolArray:
        """(T, K), True where the assignment has a row."""
        return self.assignment_row >= 0

    def __repr__(self) -> str:
        capacity = "none" if self.capacity is None else self.capacity
        return (
            f"Dispatch(T={self.num_tokens}, K={self.top_k}, E={self.num_experts}, M={self.num_rows} rows, "
            f"capacity={capacity})"
        )


# ── router ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def router_logits(x: Any, w_router: Any, b_router: Any = None) -> FloatArray:
    r"""The linear router: :math:`z = x\,W_{router} + b`, shape (T, E).

    Parameters
    ----------
    x : (T, D) float32 or float64
    w_router : (D, E)
        Same dtype as `x`.
    b_router : (E,), optional

    Returns
    -------
    logits : (T, E)
        A token's logits do not depend on the other tokens, bit for bit.

    Raises
    ------
    TypeError, ValueError
        If an argument is no floating-point array, or shapes do not agree.

    Examples
    --------
    >>> import numpy as np, numoe
    >>> numoe.router_logits(np.ones((1, 2)), np.array([[1.0, 0.0, 2.0], [1.0, 0.5, 0.0]]))
    array([[2. , 0.5, 2. ]])
    """
    x = as_float(x, "x", ndim=2)
    w_router = as_float(w_router, "w_router", x.dtype, ndim=2)
    if b_router is not None:
        b_router = as_float(b_router, "b_router", x.dtype, ndim=1)
    return _core.router_logits(x, w_router, b_router)


def router_logits_backward(dlogits: Any, x: Any, w_router: Any) -> tuple[FloatArray, FloatArray, FloatArray]:
    r"""The adjoint of `router_logits`: :math:`dx = dz\,W^T,\; dW = x^T dz,\; db = \sum_t dz_t`.

    Parameters
    ----------
    dlogits : (T, E)
    x : (T, D)
    w_router : (D, E)

    Returns
    -------
    dx : (T, D)
    dw_router : (D, E)
    db_router : (E,)
        All of x's dtype.

    Raises
    ------
    TypeError, ValueError
        If an argument is no floating-point array, or shapes do not agree.

    Examples
    --------
    >>> import numpy as np, numoe
    >>> dx, dw, db = numoe.router_logits_backward(np.ones((2, 3)), np.ones((2, 4)), np.ones((4, 3)))
    >>> dx.shape, dw[0, 0], db
    ((2, 4), np.float64(2.0), array([2., 2., 2.]))
    """
    x = as_float(x, "x", ndim=2)
    dlogits = as_float(dlogits, "dlogits", x.dtype, ndim=2)
    dx, dw = _core.router_logits_backward(dlogits, x, as_float(w_router, "w_router", x.dtype, ndim=2))
    return dx, dw, dlogits.sum(axis=0)


def router_options(config: RouterConfig) -> _core.RouterOptions:
    """The core's form of a `RouterConfig`."""
    check_config(config, RouterConfig, "router")
    return _options_of(config)


@functools.lru_cache
def _options_of(config: RouterConfig) -> _core.RouterOptions:
    return _core.RouterOptions(
        top_k=config.top_k,
        score=config.score,
        normalize=config.normalize,
        eps=config.normalize_eps,
        eps_mode=config.eps_mode,
        scale=config.scale,
        num_groups=config.num_groups,
        groups_kept=config.groups_kept,
        group_score=config.group_score,
    )


def route(logits: Any, config: RouterConfig, *, choice_bias: Any = None, mask: Any = None) -> Routing:
    r"""Choose K experts per token and weigh them.

    .. math:: S_t = \mathrm{top}K_e\,(s(z_{te}) + b_e), \qquad w_{tk} = scale \cdot norm_{S_t}(s(z_t))_k

    The score `s`, the normalisation and the groups are those of `config`; the choice bias `b` never enters the weight.
    Ties go to the lowest index; NaN ranks below everything, so the choices are distinct and in range for any input.

    Parameters
    ----------
    logits : (T, E) float32 or float64
    config : RouterConfig
    choice_bias : (E,), optional
    mask : (T,) bool, optional
        True for real tokens; the others get indices -1 and weights 0.

    Returns
    -------
    Routing
        Weights of the logits' dtype.

    Raises
    ------
    ValueError
        If the shapes do not fit, the choice bias is not finite, or all logits of an unmasked token are -inf.

    References
    ----------
    Shazeer et al. 2017 (top-k gating); Fedus et al. 2021 (Switch); Jiang et al. 2024 (Mixtral); DeepSeek-AI 2024
    (sigmoid scores, groups, choice bias).

    Examples
    --------
    >>> import numpy as np, numoe
    >>> routing = numoe.route(np.log([[0.1, 0.6, 0.3]]), numoe.RouterConfig(num_experts=3, top_k=2))
    >>> routing.indices, routing.weights.round(4)
    (array([[1, 2]], dtype=int32), array([[0.6667, 0.3333]]))
    """
    check_config(config, RouterConfig, "router")
    z = as_float(logits, "logits", ndim=2)
    if z.shape[1] != config.num_experts:
        raise ValueError(f"logits must have shape (T, E) with E = num_experts = {config.num_experts}; got {z.shape}.")
    if mask is not None:
        mask = as_mask(mask, len(z))
    indices, weights = _core.route(z, _options_of(config), checked_choice_bias(choice_bias, z.dtype), mask)
    return Routing(indices=indices, weights=weights, logits=z, mask=mask)


def route_backward(dweights: Any, routing: Routing, config: RouterConfig) -> FloatArray:
    r"""The adjoint of `route`: gradients of the weights → gradients of the logits, :math:`(T, K) \to (T, E)`.

    The choice of experts is a constant.  For a softmax renormalised over the chosen experts,
    :math:`dz_k = w_k\,(dw_k - \sum_j w_j\,dw_j)` on the chosen and 0 elsewhere - with K = 1 it is 0 everywhere; without
    renormalisation, :math:`dz = p \circ (dp - \langle p, dp \rangle)` reaches all E logits.

    Parameters
    ----------
    dweights : (T, K)
    routing : Routing
        From `route`, with its logits.
    config : RouterConfig

    Returns
    -------
    dlogits : (T, E)
        Of the logits' dtype.

    Raises
    ------
    TypeError, ValueError, IndexError
        If `routing` did not come from `route`, or shapes do not agree.

    Examples
    --------
    >>> import numpy as np, numoe
    >>> config = numoe.RouterConfig(num_experts=3, top_k=2)
    >>> routing = numoe.route(np.log([[0.1, 0.6, 0.3]]), config)
    >>> numoe.route_backward(np.array([[1.0, 0.0]]), routing, config).round(4)
    array([[ 0.    ,  0.2222, -0.2222]])
    """
    check_kind(routing, Routing, "routing")
    if routing.logits is None:
        raise ValueError("routing has no logits: it came from outside, so there is nothing to differentiate.")
    dweights = as_float(dweights, "dweights", routing.logits.dtype, ndim=2)
    return _core.route_backward(routing.logits, routing.indices, dweights, router_options(config))


# ── dispatch ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class _Groups:
    """Capacity groups: (G, 3) of begin, end, capacity."""

    table: np.ndarray[Any, np.dtype[np.int64]]
    largest: int = field(default=0)


def _capacity_groups(
    num_tokens: int, config: DispatchConfig, router: RouterConfig, mask: BoolArray | None, sequence_lengths: Any
) -> _Groups | None:
    if config.dropless:
        return None
    if config.capacity_per == "batch":
        lengths = np.array([num_tokens])
    elif config.capacity_per == "sequence":
        lengths = np.array([num_tokens]) if sequence_lengths is None else np.asarray(sequence_lengths)
    else:
        size = int(config.capacity_per)
        lengths = np.array([min(size, num_tokens - begin) for begin in range(0, num_tokens, size)], dtype=np.int64)
    ends = np.cumsum(lengths)
    begins = ends - lengths
    real = np.concatenate([[0], np.cumsum(np.ones(num_tokens, bool) if mask is None else mask)])
    sizes = [config.group_capacity(int(real[e] - real[b]), router) for b, e in zip(begins, ends, strict=True)]
    capacities = np.array([0 if size is None else min(size, num_tokens) for size in sizes], dtype=np.int64)
    return _Groups(np.stack([begins, ends, capacities], axis=1).astype(np.int64), max(capacities, default=0))


def dispatch(
    routing: Routing,
    router: RouterConfig,
    config: DispatchConfig | None = None,
    *,
    sequence_lengths: Any = None,
) -> Dispatch:
    r"""Sort the assignments by expert, dropping what exceeds the capacity.

    A counting sort, O(N + E) with N = T·K; "probability" and "batch" priorities sort by weight as well.

    Parameters
    ----------
    routing : Routing
    router : RouterConfig
        For E, and K in the capacity formula.
    config : DispatchConfig, optional
        Default: nothing is dropped.
    sequence_lengths : sequence of int, optional
        Lengths of the sequences that make up the T tokens, for ``capacity_per="sequence"``.

    Returns
    -------
    Dispatch

    Raises
    ------
    IndexError
        If an index is outside ``-1..E-1``.
    ValueError
        If a token chooses an expert twice - looked for in routings without logits, because `route` never does so - or
        the sequence lengths do not sum to T.

    References
    ----------
    Lepikhin et al. 2020 (GShard: choice-major order); Riquelme et al. 2021 (V-MoE: batch-prioritised routing).

    Examples
    --------
    >>> import numpy as np, numoe
    >>> routing = numoe.Routing(indices=np.array([[1], [1], [0]], np.int32), weights=np.ones((3, 1)))
    >>> plan = numoe.dispatch(routing, numoe.RouterConfig(num_experts=2, top_k=1), numoe.DispatchConfig(capacity=1))
    >>> plan.row_token, plan.kept[:, 0]
    (array([2, 0], dtype=int32), array([ True, False,  True]))
    """
    check_kind(routing, Routing, "routing")
    config = DispatchConfig() if config is None else config
    check_config(router, RouterConfig, "router")
    check_config(config, DispatchConfig, "dispatch")
    # The core checks the range of indices that it can read as they are, with the same words.
    ready = routing.logits is not None and is_ready(routing.indices, INT32, 2)
    indices = routing.indices if ready else as_indices(routing.indices, router.num_experts)
    if routing.logits is None:
        check_distinct(indices)
    weights = as_float(routing.weights, "weights", ndim=2)
    if weights.shape != indices.shape:
        raise ValueError(f"weights must have the shape of indices, {indices.shape}; got {weights.shape}.")
    mask = None if routing.mask is None else as_mask(routing.mask, len(indices))
    lengths = as_lengths(sequence_lengths, len(indices))
    groups = _capacity_groups(len(indices), config, router, mask, lengths)
    offsets, row_token, row_assignment, assignment_row = _core.dispatch(
        indices, weights, router.num_experts, None if groups is None else groups.table, config.drop_priority
    )
    return Dispatch(
        offsets=offsets,
        row_token=row_token,
        row_assignment=row_assignment,
        assignment_row=assignment_row,
        capacity=None if groups is None else int(groups.largest),
    )


def checked_choice_bias(choice_bias: Any, dtype: np.dtype[Any]) -> FloatArray | None:
    """`choice_bias` as the core takes it, finite; None stays None."""
    if choice_bias is None:
        return None
    array = as_float(choice_bias, "choice_bias", dtype, ndim=1)
    if not np.isfinite(array).all():
        raise ValueError(f"choice_bias must be finite; entry {int(np.argmin(np.isfinite(array)))} is not.")
    return array


def check_config(config: Any, kind: type, part: str) -> None:
    """Each step takes its own part of a layer's configuration; anything else is named."""
    if not isinstance(config, kind):
        hint = f"  Pass config.{part}." if hasattr(config, part) else ""
        raise TypeError(f"config must be a numoe.{kind.__name__}; got {type(config).__name__}.{hint}")


def check_kind(value: Any, kind: type, name: str) -> None:
    """`value` is what the step before makes; anything else is named."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a numoe.{kind.__name__}; got {type(value).__name__}.")


def combine_weights(routing: Routing, plan: Dispatch, router: RouterConfig, config: DispatchConfig) -> FloatArray:
    r"""The weights that `combine` uses, (T, K): the router's, renormalised over the survivors if `config` says so.

    .. math:: w'_{tk} = scale \cdot w_{tk} m_{tk} / \sum_j w_{tj} m_{tj}, \qquad m = kept

    Examples
    --------
    >>> import numpy as np, numoe
    >>> routing = numoe.Routing(indices=np.array([[0, 1], [0, 1]], np.int32), weights=np.full((2, 2), 0.5))
    >>> router = numoe.RouterConfig(num_experts=2, top_k=2)
    >>> drop = numoe.DispatchConfig(capacity=1, renormalize_after_drop=True)
    >>> numoe.combine_weights(routing, numoe.dispatch(routing, router, drop), router, drop)
    array([[0.5, 0.5],
           [0. , 0. ]])
    """
    _check_combination(routing, plan, router, config)
    if not config.renormalize_after_drop or config.dropless:
        return routing.weights
    return _core.renormalize_kept(routing.weights, plan.assignment_row, router.scale)


def combine_weights_backward(
    dweights: FloatArray, routing: Routing, plan: Dispatch, router: RouterConfig, config: DispatchConfig
) -> FloatArray:
    """The adjoint of `combine_weights`: gradients of the used weights → gradients of the router's weights, (T, K).

    Examples
    --------
    >>> import numpy as np, numoe
    >>> routing = numoe.Routing(indices=np.array([[0, 1]], np.int32), weights=np.array([[0.75, 0.25]]))
    >>> router = numoe.RouterConfig(num_experts=2, top_k=2)
    >>> drop = numoe.DispatchConfig(capacity=1, renormalize_after_drop=True)
    >>> plan = numoe.dispatch(routing, router, drop)
    >>> numoe.combine_weights_backward(np.array([[1.0, 0.0]]), routing, plan, router, drop)
    array([[ 0.25, -0.75]])
    """
    _check_combination(routing, plan, router, config)
    dweights = as_float(dweights, "dweights", routing.weights.dtype, ndim=2)
    if dweights.shape != routing.weights.shape:
        raise ValueError(
            f"dweights must have the shape of routing.weights, {routing.weights.shape}; got {dweights.shape}."
        )
    if not config.renormalize_after_drop or config.dropless:
        return dweights
    return _core.renormalize_kept_backward(routing.weights, plan.assignment_row, router.scale, dweights)


def _check_combination(routing: Any, plan: Any, router: Any, config: Any) -> None:
    check_kind(routing, Routing, "routing")
    check_kind(plan, Dispatch, "plan")
    check_config(router, RouterConfig, "router")
    check_config(config, DispatchConfig, "dispatch")


# ── combine ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def combine(rows: Any, plan: Dispatch, weights: Any = None) -> FloatArray:
    r"""Bring the experts' rows back to their tokens.

    .. math:: y_t = \sum_{k\ \text{kept}} w_{tk}\, rows_{row(t,k)}

    added in ascending expert order, so the bits depend neither on threads nor on other tokens.

    Parameters
    ----------
    rows : (M, D)
    plan : Dispatch
    weights : (T, K), optional
        ``routing.weights``, or `combine_weights` of it where weights are renormalised after dropping.  Default 1.

    Returns
    -------
    y : (T, D)
        0 for tokens without a row.

    Examples
    --------
    >>> import numpy as np, numoe
    >>> routing = numoe.Routing(indices=np.array([[1, 0]], np.int32), weights=np.array([[0.75, 0.25]]))
    >>> plan = numoe.dispatch(routing, numoe.RouterConfig(num_experts=2, top_k=2))
    >>> numoe.combine(np.array([[8.0], [4.0]]), plan, routing.weights)
    array([[5.]])
    """
    check_kind(plan, Dispatch, "plan")
    rows = as_float(rows, "rows", ndim=2)
    if weights is not None:
        weights = as_float(weights, "weights", rows.dtype, ndim=2)
    return _core.combine(rows, plan.offsets, plan.row_token, plan.row_assignment, plan.num_tokens, plan.top_k, weights)


def combine_backward(dy: Any, rows: Any, plan: Dispatch, weights: Any = None) -> tuple[FloatArray, FloatArray]:
    r"""The adjoint of `combine`: :math:`drows_r = w_r\,dy_{token(r)}`, :math:`dw_{tk} = \langle dy_t, rows_r \rangle`.

    Parameters
    ----------
    dy : (T, D)
    rows : (M, D)
    plan : Dispatch
    weights : (T, K), optional

    Returns
    -------
    drows : (M, D)
    dweights : (T, K)
        0 where dropped.

    Examples
    --------
    >>> import numpy as np, numoe
    >>> routing = numoe.Routing(indices=np.array([[1, 0]], np.int32), weights=np.array([[0.75, 0.25]]))
    >>> plan = numoe.dispatch(routing, numoe.RouterConfig(num_experts=2, top_k=2))
    >>> numoe.combine_backward(np.array([[1.0]]), np.array([[8.0], [4.0]]), plan, routing.weights)
    (array([[0.25],
           [0.75]]), array([[4., 8.]]))
    """
    check_kind(plan, Dispatch, "plan")
    rows = as_float(rows, "rows", ndim=2)
    dy = as_float(dy, "dy", rows.dtype, ndim=2)
    if weights is not None:
        weights = as_float(weights, "weights", rows.dtype, ndim=2)
    return _core.combine_backward(dy, rows, plan.offsets, plan.row_token, plan.row_assignment, plan.top_k, weights)
