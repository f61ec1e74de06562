"""The router chooses and weighs experts, dispatch orders the rows, combine brings them back to the tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from numoe.config import DispatchConfig, RouterConfig
from numoe.reference.functions import Array, quiet, sigmoid, softmax, softmax_backward, softplus


@dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """What the router decided about T tokens."""

    indices: Array  # (T, K) int32, chosen experts, best first; -1: not routed
    weights: Array  # (T, K), 0 where not routed; before any renormalisation after dropping
    logits: Array | None = None  # (T, E) as routed on, noise included, 0 for masked tokens; None: decided outside
    mask: Array | None = None  # (T,) bool, True: a real token


@dataclass(frozen=True, kw_only=True, eq=False)
class Dispatch:
    """Which row computes which assignment; integers only."""

    offsets: Array  # (E + 1,) int64, expert e owns the rows offsets[e] .. offsets[e + 1] - 1
    row_token: Array  # (M,) int32
    row_assignment: Array  # (M,) int32, t*K + k
    assignment_row: Array  # (T, K) int32, -1: dropped or not routed
    capacity: int | None = None  # C, the largest if capacity groups differ; None: nobody is dropped

    @property
    def num_rows(self) -> int:
        """M."""
        return len(self.row_token)

    @property
    def kept(self) -> Array:
        """(T, K) bool, the surviving assignments."""
        return self.assignment_row >= 0


def router_logits(x: Array, w_router: Array, b_router: Array | None = None) -> Array:
    """``x @ w_router + b_router``, (T, D) → (T, E)."""
    return x @ w_router + (0 if b_router is None else b_router)


def router_logits_backward(dlogits: Array, x: Array, w_router: Array) -> tuple[Array, Array, Array]:
    """The gradients of x (T, D), w_router (D, E) and b_router (E,)."""
    # logits = x @ w_router + b_router
    return dlogits @ w_router.T, x.T @ dlogits, dlogits.sum(axis=0)


def score(kind: str, logits: Array) -> Array:
    """s(z), (T, E) → (T, E): what a choice bias is added to and what groups of experts are ranked by."""
    match kind:
        case "softmax":
            return softmax(logits)
        case "sigmoid":
            return sigmoid(logits)
        case "sqrt_softplus":
            return np.sqrt(softplus(logits))
    return logits  # softmax_chosen


def log_score(kind: str, logits: Array) -> Array:
    """The logarithm of s(z), for a softmax up to a constant per token; finite where s(z) underflows."""
    match kind:
        case "sigmoid":
            return -softplus(-logits)
        case "sqrt_softplus":  # log softplus(z) → z - e^z / 2
            return 0.5 * np.where(logits < -20, logits - 0.5 * np.exp(logits), np.log(softplus(logits)))
    return logits


def log_score_slope(kind: str, logits: Array) -> Array:
    """The derivative d log s / dz, elementwise."""
    match kind:
        case "sigmoid":
            return sigmoid(-logits)
        case "sqrt_softplus":  # σ(z) / softplus(z) → 1 - e^z / 2
            ratio = sigmoid(logits) / softplus(logits)
            return 0.5 * np.where(logits < -20, 1 - 0.5 * np.exp(logits), ratio)
    return np.ones_like(logits)


def kept_groups(s: Array, config: RouterConfig) -> Array:
    """(T, E) bool: the experts in the `groups_kept` best groups of their token (DeepSeek-V2 and V3)."""
    groups = s.reshape(len(s), config.num_groups, config.num_experts // config.num_groups)
    best = np.sort(groups, axis=-1)  # ascending, NaN last: a group with a NaN has the score NaN
    value = best[..., -1]
    if config.group_score == "top2_sum" and config.num_groups > 1:
        value = best[..., -1] + best[..., -2]
    order = np.argsort(-value, axis=-1, kind="stable")  # ties: the lower group; NaN last
    kept = np.zeros(value.shape, bool)
    np.put_along_axis(kept, order[:, : config.groups_kept], True, axis=-1)
    return np.repeat(kept, groups.shape[-1], axis=-1)


def choose(logits: Array, config: RouterConfig, choice_bias: Array | None = None) -> Array:
    """(T, K) int32: the K best experts by (key descending, index ascending), NaN below everything.

    Without a bias the key is z itself: every score grows with z, and z does not underflow into ties.
    """
    s = score(config.score, logits)
    key = logits
    if choice_bias is not None:
        s = key = s + choice_bias
    order = np.lexsort((-key, ~kept_groups(s, config)), axis=-1)  # the last key decides first; stable
    return order[:, : config.top_k].astype(np.int32)


@quiet
def route(
    logits: Array, config: RouterConfig, *, choice_bias: Array | None = None, mask: Array | None = None
) -> Routing:
    r"""Choose K experts per token and weigh them.

    .. math:: w_{tk} = scale \cdot normalise(s(z_{tj}), j \in S_t)

    Parameters
    ----------
    logits : array (T, E)
    config : RouterConfig
    choice_bias : array (E,), optional
        Added to the scores for choosing only (Wang et al. 2024, arXiv:2408.15664).
    mask : bool array (T,), optional
        Tokens that are False are not routed.

    Raises
    ------
    ValueError
        If all logits of a real token are -inf.

    Examples
    --------
    >>> route(np.log([[1.0, 3.0, 1.0]]), RouterConfig(num_experts=3, top_k=2)).weights.round(6)
    array([[0.75, 0.25]])
    """
    real = np.ones((len(logits), 1), bool) if mask is None else mask[:, None]
    z = np.where(real, logits, 0)
    hopeless = np.flatnonzero((z == -np.inf).all(axis=-1))
    if hopeless.size:
        raise ValueError(f"no expert is available for token {hopeless[0]}: all its logits are -inf.")
    indices = choose(z, config, choice_bias)
    if _in_log_space(config):
        v = _softmax_or_zero(log_score(config.score, np.take_along_axis(z, indices, axis=-1)))
    else:
        u = _chosen_scores(z, indices, config)
        _, divisor = _norm_and_divisor(u, config)
        v = np.where(divisor == 0, 0, u / divisor)
    weights = config.scale * v
    return Routing(
        indices=np.where(real, indices, np.int32(-1)), weights=np.where(real, weights, 0), logits=z, mask=mask
    )


@quiet
def route_backward(dweights: Array, routing: Routing, config: RouterConfig) -> Array:
    """The gradient of the logits, (T, E); the choice itself is a constant.

    Chosen experts compete only among themselves when their weights are normalised; with plain softmax weights
    the experts that were not chosen get a gradient too.
    """
    assert routing.logits is not None
    z, indices = routing.logits, np.maximum(routing.indices, 0)
    z_chosen = np.take_along_axis(z, indices, axis=-1)
    # weights = config.scale * v
    dv = config.scale * np.where(routing.indices < 0, 0, dweights)
    if _in_log_space(config):
        # v = _softmax_or_zero(log_score(config.score, z of the chosen))
        dlog_s = softmax_backward(routing.weights / config.scale, dv)
        return _scatter(dlog_s * log_score_slope(config.score, z_chosen), indices, z)
    # v = np.where(divisor == 0, 0, u / divisor)
    u = _chosen_scores(z, indices, config)
    norm, divisor = _norm_and_divisor(u, config)
    du = dv / divisor
    ddivisor = -(dv * u).sum(axis=-1, keepdims=True) / divisor**2
    if config.normalize != "none":
        # divisor = norm + eps    or    np.maximum(norm, eps)
        dnorm = ddivisor if config.eps_mode == "add" else np.where(norm > config.normalize_eps, ddivisor, 0)
        # norm = u.sum()    or    np.sqrt((u * u).sum())
        du += dnorm if config.normalize == "sum" else np.where(norm == 0, 0, dnorm * u / norm)
    du = np.where(divisor == 0, 0, du)
    # u = s(z of the chosen)
    if config.score == "softmax_chosen":
        return _scatter(softmax_backward(u, du), indices, z)
    if config.score == "softmax":
        return softmax_backward(softmax(z), _scatter(du, indices, z))
    return _scatter(du * u * log_score_slope(config.score, z_chosen), indices, z)


def _in_log_space(config: RouterConfig) -> bool:
    """Is it a softmax of log s?  That is s / Σs; computed there it cannot become 0/0."""
    if config.score == "softmax_chosen" and config.normalize == "none":
        return True
    return config.normalize == "sum" and config.normalize_eps == 0


def _softmax_or_zero(v: Array) -> Array:
    """The softmax, or zeros for a row of -inf."""
    return np.where(v.max(axis=-1, keepdims=True) == -np.inf, 0, softmax(v))


def _chosen_scores(z: Array, indices: Array, config: RouterConfig) -> Array:
    """The scores u = s(z) of the chosen experts, (T, K)."""
    if config.score == "softmax_chosen":
        return _softmax_or_zero(np.take_along_axis(z, indices, axis=-1))
    return np.take_along_axis(score(config.score, z), indices, axis=-1)


def _norm_and_divisor(u: Array, config: RouterConfig) -> tuple[Array, Array]:
    """The norm of u and what u is divided by, (T, 1) each."""
    if config.normalize == "none":
        return np.ones_like(u[:, :1]), np.ones_like(u[:, :1])
    norm = u.sum(axis=-1, keepdims=True)
    if config.normalize == "l2":
        norm = np.sqrt((u * u).sum(axis=-1, keepdims=True))
    eps = config.normalize_eps
    return norm, norm + eps if config.eps_mode == "add" else np.maximum(norm, eps)


def _scatter(chosen: Array, indices: Array, like: Array) -> Array:
    """(T, K) → (T, E), zeros elsewhere."""
    full = np.zeros_like(like)
    np.add.at(full, (np.arange(len(full))[:, None], indices), chosen)
    return full


def dispatch(
    routing: Routing,
    router: RouterConfig,
    config: DispatchConfig | None = None,
    *,
    sequence_lengths: npt.ArrayLike | None = None,
) -> Dispatch:
    """Admit assignments as long as their expert has room, then sort the admitted by (expert, token, choice).

    Parameters
    ----------
    routing : Routing
        Its weights decide who gets in first under the priorities "probability" and "batch".
    router : RouterConfig
    config : DispatchConfig, optional
        Default: nobody is dropped.
    sequence_lengths : ints (B,), optional
        Summing to T, for ``capacity_per="sequence"``; one sequence if not given.

    Examples
    --------
    >>> routing = Routing(indices=np.int32([[0, 1], [0, 1], [1, 0]]), weights=np.full((3, 2), 0.5))
    >>> dispatch(routing, RouterConfig(num_experts=2, top_k=2), DispatchConfig(capacity=2)).assignment_row
    array([[ 0,  2],
           [ 1,  3],
           [-1, -1]], dtype=int32)
    """
    config = DispatchConfig() if config is None else config
    (T, K), E = routing.indices.shape, router.num_experts
    expert = routing.indices.ravel()
    admitted = expert >= 0
    capacity: list[int] | None = None
    if not config.dropless:
        group = capacity_groups(T, config, sequence_lengths)
        real = np.ones(T, bool) if routing.mask is None else routing.mask
        sizes = np.bincount(group[real], minlength=group.max(initial=-1) + 1)
        capacity = [min(config.group_capacity(int(size), router) or 0, T) for size in sizes]
        taken = np.zeros((len(sizes), E), np.int64)
        for assignment in admission_order(routing, config.drop_priority):
            g, e = group[assignment // K], expert[assignment]
            if e >= 0:
                admitted[assignment] = taken[g, e] < capacity[g]
                taken[g, e] += 1
    assignments = np.flatnonzero(admitted)
    rows = assignments[np.argsort(expert[assignments], kind="stable")]
    assignment_row = np.full(T * K, -1, np.int32)
    assignment_row[rows] = np.arange(len(rows))
    return Dispatch(
        offsets=np.concatenate([[0], np.cumsum(np.bincount(expert[rows], minlength=E))]).astype(np.int64),
        row_token=(rows // K).astype(np.int32),
        row_assignment=rows.astype(np.int32),
        assignment_row=assignment_row.reshape(T, K),
        capacity=None if capacity is None else max(capacity, default=0),
    )


def capacity_groups(T: int, config: DispatchConfig, sequence_lengths: npt.ArrayLike | None = None) -> Array:
    """(T,) int: the group of tokens with which each token shares the experts' capacity."""
    if isinstance(config.capacity_per, int):
        return np.arange(T) // config.capacity_per
    if config.capacity_per == "sequence" and sequence_lengths is not None:
        lengths: Array = np.asarray(sequence_lengths)
        return np.repeat(np.arange(len(lengths)), lengths)
    return np.zeros(T, np.int64)


def admission_order(routing: Routing, priority: str) -> Array:
    """(N,) int: the assignments, first come first served.  In ``np.lexsort`` the last key decides first."""
    T, K = routing.indices.shape
    token, choice = np.divmod(np.arange(T * K), K)
    weight = np.where(routing.indices < 0, -np.inf, routing.weights)  # NaN sorts last
    if priority == "choice":
        return np.lexsort((token, choice))
    if priority == "probability":
        return np.lexsort((choice, token, -weight.ravel()))
    if priority == "batch":
        largest = np.fmax.reduce(weight, axis=-1)
        return np.lexsort((token, -largest[token], choice))
    return np.arange(T * K)  # position


@quiet
def combine_weights(routing: Routing, plan: Dispatch, router: RouterConfig, config: DispatchConfig) -> Array:
    """The weights that multiply the rows, (T, K); after a drop, survivors may have to sum to `scale`."""
    kept = np.where(plan.kept, routing.weights, 0)
    if config.dropless or not config.renormalize_after_drop:
        return kept
    total = kept.sum(axis=-1, keepdims=True)
    return np.where(total == 0, 0, router.scale * kept / total)


@quiet
def combine_weights_backward(
    dweights: Array, routing: Routing, plan: Dispatch, router: RouterConfig, config: DispatchConfig
) -> Array:
    """The gradient of the router's weights, (T, K)."""
    dkept = dweights
    if config.renormalize_after_drop and not config.dropless:
        kept = np.where(plan.kept, routing.weights, 0)
        total = kept.sum(axis=-1, keepdims=True)
        # weights = router.scale * kept / total
        dtotal = -(router.scale * kept * dweights).sum(axis=-1, keepdims=True) / total**2
        # total = kept.sum()
        dkept = np.where(total == 0, 0, router.scale * dweights / total + dtotal)
    # kept = np.where(plan.kept, routing.weights, 0)
    return np.where(plan.kept, dkept, 0)


def combine(rows: Array, plan: Dispatch, weights: Array | None = None) -> Array:
    """``y[t] = Σ weight * row`` over the rows of token t in ascending expert order, (M, D) → (T, D)."""
    return sum_per_token(rows * row_weights(plan, weights), plan)


def combine_backward(dy: Array, rows: Array, plan: Dispatch, weights: Array | None = None) -> tuple[Array, Array]:
    """The gradients of the rows (M, D) and of the weights (T, K)."""
    # y[row_token] += rows * row_weights
    dsum = dy[plan.row_token]
    return dsum * row_weights(plan, weights), per_assignment((dsum * rows).sum(axis=-1), plan)


def row_weights(plan: Dispatch, weights: Array | None) -> Array | int:
    """The weight of every row, (T, K) → (M, 1)."""
    return 1 if weights is None else weights.ravel()[plan.row_assignment][:, None]


def sum_per_token(rows: Array, plan: Dispatch) -> Array:
    """(M, D) → (T, D), added in row order."""
    total = np.zeros((len(plan.assignment_row), rows.shape[1]), rows.dtype)
    np.add.at(total, plan.row_token, rows)
    return total


def per_assignment(of_rows: Array, plan: Dispatch) -> Array:
    """(M,) → (T, K), 0 where there is no row."""
    full = np.zeros(plan.assignment_row.size, of_rows.dtype)
    full[plan.row_assignment] = of_rows
    return full.reshape(plan.assignment_row.shape)
