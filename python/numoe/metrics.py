r"""Numbers that tell whether a routing is balanced, sharp and stable: pure functions of arrays, no state.

Letters: T tokens, E experts, K choices per token.  ``indices`` (T, K) holds the chosen experts, -1 for a
choice that was not routed; ``mask`` (T,), True for a real token, leaves padding out.  With ``n_e``
assignments of expert e and the shares ``f_e = n_e / Σ_j n_j``:

======================  ===============================  ================  ==========
function                equation                         range             balanced
======================  ===============================  ================  ==========
`expert_load`           n_e                              0 …               N / E
`load_fraction`         f_e                              0 … 1             1 / E
`cv`                    std(n) / mean(n)                 0 … sqrt(E - 1)   0
`max_violation`         max(n) / mean(n) - 1             0 … E - 1         0
`dead_experts`          #{e: n_e = 0}                    0 … E             0
`routing_entropy`       -Σ_e f_e ln f_e                  0 … ln E          ln E
`effective_experts`     exp(routing_entropy)             1 … E             E
`gini`                  Σ_e (2e - E - 1) f_(e) / E       0 … 1 - 1/E       0
`jain`                  (Σ n)² / (E Σ n²)                1/E … 1           1
======================  ===============================  ================  ==========

Where nothing was routed there is nothing to measure: ratios are NaN then, never a reassuring 0 or 1.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from numoe._arrays import as_float, as_indices, as_mask, check_distinct, plain_array
from numoe.config import SCORES, checked_choice, checked_int

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Mask = npt.ArrayLike | None


# ----------------------------------------------------------------------------------------------------- checks


def _mask(mask: Mask, num_tokens: int) -> Bools:
    """`mask` as a (T,) bool array; all True if it is None."""
    return np.ones(num_tokens, dtype=np.bool_) if mask is None else as_mask(mask, num_tokens)


def _indices(indices: npt.ArrayLike, num_experts: int | None, mask: Mask = None, name: str = "indices") -> Ints:
    """`indices` (T, K) as int64, -1 where a token is not real."""
    array = as_indices(indices, np.iinfo(np.int32).max if num_experts is None else num_experts, name)
    return np.where(_mask(mask, len(array))[:, None], array, -1).astype(np.int64)


def _kept(kept: npt.ArrayLike, indices: npt.ArrayLike) -> Bools:
    """`kept` (T, K) bool, checked against `indices` before any mask is applied."""
    array, chosen = plain_array(kept, "kept"), plain_array(indices, "indices")
    if array.dtype != np.bool_:
        raise TypeError(f"kept must be a bool array, True for an assignment that was served; got {array.dtype}.")
    if array.shape != chosen.shape:
        raise ValueError(f"kept must have the shape of indices, {chosen.shape}; got {array.shape}.")
    ghost = array & (chosen < 0)
    if ghost.any():
        t, k = (int(i) for i in np.argwhere(ghost)[0])
        raise ValueError(f"kept[{t}, {k}] is True but indices[{t}, {k}] is -1 (not routed).")
    return array


def _load(load: npt.ArrayLike, num_experts: int | None) -> Floats:
    """A load vector (E,) as float64: finite, not negative, of the expected length."""
    array = plain_array(load, "load")
    if array.dtype.kind not in "iuf":
        raise TypeError(f"load must be a real array (E,); got dtype {array.dtype}.")
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"load must have shape (E,) with E >= 1; got {array.shape}.")
    if num_experts is not None and array.size != checked_int("num_experts", num_experts, 1):
        raise ValueError(f"load must have one entry per expert, num_experts = {num_experts}; got {array.size}.")
    result = array.astype(np.float64)
    if not (np.isfinite(result) & (result >= 0)).all():
        e = int(np.flatnonzero(~(np.isfinite(result) & (result >= 0)))[0])
        raise ValueError(f"load must be finite and >= 0; got load[{e}] = {array[e]}.")
    return result


def _logits(logits: npt.ArrayLike, mask: Mask) -> tuple[Floats, Bools]:
    """`logits` (T, E) as float64 and the mask (T,)."""
    array = cast(Floats, as_float(logits, "logits", np.float64, ndim=2))
    if array.shape[1] == 0:
        raise ValueError(f"logits must have shape (T, E) with E >= 1; got {array.shape}.")
    return array, _mask(mask, array.shape[0])


# ----------------------------------------------------------------------------------- balance of a load vector


def _shares(load: Floats) -> Floats:
    _, exponent = np.frexp(load.max(initial=0.0))
    load = np.ldexp(load, -exponent)  # exact, and the sum cannot overflow
    total = load.sum()
    return load / total if total > 0 else np.full_like(load, math.nan)


def _entropy(p: Floats) -> Floats:
    """-Σ p ln p over the last axis in nats, with 0 ln 0 = 0."""
    positive = np.where(p == 0, 1.0, p)
    return np.maximum(-(p * np.log(positive)).sum(axis=-1), 0.0)  # type: ignore[no-any-return]


def load_summary(load: npt.ArrayLike, num_experts: int | None = None) -> dict[str, float]:
    """Every balance measure of a load vector (E,), e.g. of counts added up over many batches.

    Parameters
    ----------
    load : array (E,)
        Finite and >= 0: assignments per expert, or any other amount (summed weights, seconds).
    num_experts : int, optional
        If given, the length that `load` must have.

    Returns
    -------
    dict of str to float
        ``cv``, ``max_violation``, ``dead_experts``, ``routing_entropy``, ``effective_experts``, ``gini``,
        ``jain``; equations, ranges and balanced values are in the table at the top of `numoe.metrics`.

    Raises
    ------
    TypeError, ValueError
        If `load` is no finite, non-negative vector of length `num_experts`.

    Examples
    --------
    >>> measured = load_summary([6, 2, 0, 0])
    >>> measured["max_violation"], measured["dead_experts"], measured["gini"], measured["jain"]
    (2.0, 2.0, 0.625, 0.4)
    """
    counts = _load(load, num_experts)
    shares, experts = _shares(counts), len(counts)
    entropy = float(_entropy(shares))
    rank = np.arange(1, experts + 1)
    return {
        "cv": float(experts * shares.std()),
        "max_violation": float(experts * shares.max() - 1),
        "dead_experts": float(np.count_nonzero(counts == 0)),
        "routing_entropy": entropy,
        "effective_experts": math.exp(entropy),
        "gini": float((2 * rank - experts - 1) @ np.sort(shares) / experts),
        "jain": float(1 / (experts * (shares @ shares))),
    }


# --------------------------------------------------------------------------------------- balance of a routing


def expert_load(indices: npt.ArrayLike, num_experts: int, *, mask: Mask = None) -> Ints:
    r"""Assignments of each expert, ``n_e = #{(t, k): indices[t, k] = e}``.

    Range 0…N with N = T·K; balanced N/E each.

    Parameters
    ----------
    indices : int array (T, K)
        Chosen experts; -1 = not routed.
    num_experts : int
        E.
    mask : bool array (T,), optional
        True for real tokens; the others are not counted.

    Returns
    -------
    int64 array (E,)

    Raises
    ------
    TypeError, ValueError
        For a wrong dtype or shape.
    IndexError
        For an entry that is neither -1 nor in ``0..E-1``; the sentence names the first one.

    Examples
    --------
    >>> expert_load([[0, 1], [0, 2], [0, -1]], num_experts=4)
    array([3, 1, 1, 0])
    """
    experts = checked_int("num_experts", num_experts, 1)
    chosen = _indices(indices, experts, mask)
    return np.bincount(chosen[chosen >= 0], minlength=experts).astype(np.int64)


def load_fraction(indices: npt.ArrayLike, num_experts: int, *, mask: Mask = None) -> Floats:
    r"""Share of all assignments that each expert gets, ``f_e = n_e / Σ_j n_j``.

    Range 0…1, sums to 1; balanced 1/E.  All NaN if nothing was routed.  Arguments as in `expert_load`.

    Examples
    --------
    >>> load_fraction([[0, 1], [0, 2]], num_experts=4)
    array([0.5 , 0.25, 0.25, 0.  ])
    """
    return _shares(expert_load(indices, num_experts, mask=mask).astype(np.float64))


def _balance(indices: npt.ArrayLike, num_experts: int, mask: Mask, name: str) -> float:
    return load_summary(expert_load(indices, num_experts, mask=mask))[name]


def cv(indices: npt.ArrayLike, num_experts: int, *, mask: Mask = None) -> float:
    r"""Coefficient of variation of the load, ``std(n) / mean(n)`` with the population standard deviation.

    Range 0…sqrt(E - 1); balanced 0.  Its square is the quantity that Shazeer's importance and load losses
    penalise (Shazeer et al. 2017, arXiv:1701.06538).  Arguments as in `expert_load`.

    Examples
    --------
    >>> cv([[0], [0], [0], [1]], num_experts=2)  # loads 3 and 1: std 1, mean 2
    0.5
    """
    return _balance(indices, num_experts, mask, "cv")


def max_violation(indices: npt.ArrayLike, num_experts: int, *, mask: Mask = None) -> float:
    r"""How far the busiest expert is above the mean, ``max(n) / mean(n) - 1``.

    Range 0…E - 1; balanced 0.  "MaxVio" of Wang et al. 2024 (arXiv:2408.15664).
    Arguments as in `expert_load`.

    Examples
    --------
    >>> max_violation([[0], [0], [0], [1]], num_experts=2)
    0.5
    """
    return _balance(indices, num_experts, mask, "max_violation")


def dead_experts(indices: npt.ArrayLike, num_experts: int, *, mask: Mask = None) -> int:
    r"""Number of experts without any assignment, ``#{e: n_e = 0}``.

    Range 0…E; balanced 0 (as soon as N >= E).  Arguments as in `expert_load`.

    Examples
    --------
    >>> dead_experts([[0, 1], [0, 2]], num_experts=8)
    5
    """
    return int(_balance(indices, num_experts, mask, "dead_experts"))


def routing_entropy(indices: npt.ArrayLike, num_experts: int, *, mask: Mask = None) -> float:
    r"""Entropy of the load shares in nats, ``H = -Σ_e f_e ln f_e``.

    Range 0…ln E; balanced ln E.  Arguments as in `expert_load`.

    Examples
    --------
    >>> round(routing_entropy([[0, 1], [2, 3]], num_experts=4), 6)  # ln 4
    1.386294
    """
    return _balance(indices, num_experts, mask, "routing_entropy")


def effective_experts(indices: npt.ArrayLike, num_experts: int, *, mask: Mask = None) -> float:
    r"""Number of equally busy experts with the same entropy, ``exp(-Σ_e f_e ln f_e)``.

    Range 1…E; balanced E.  Arguments as in `expert_load`.

    Examples
    --------
    >>> round(effective_experts([[0, 1], [1, 0]], num_experts=8), 6)  # two experts share all the work
    2.0
    """
    return _balance(indices, num_experts, mask, "effective_experts")


def gini(indices: npt.ArrayLike, num_experts: int, *, mask: Mask = None) -> float:
    r"""Gini coefficient of the load, ``Σ_e (2e - E - 1) f_(e) / E`` over the shares in ascending order.

    Range 0…1 - 1/E; balanced 0.  Arguments as in `expert_load`.

    Examples
    --------
    >>> gini([[0], [0], [0], [1]], num_experts=2)
    0.25
    """
    return _balance(indices, num_experts, mask, "gini")


def jain(indices: npt.ArrayLike, num_experts: int, *, mask: Mask = None) -> float:
    r"""Jain's fairness index, ``(Σ n)² / (E Σ n²) = 1 / (1 + cv²)``.

    Range 1/E…1; balanced 1.  Jain, Chiu, Hawe 1984.  Arguments as in `expert_load`.

    Examples
    --------
    >>> jain([[0], [0], [0], [1]], num_experts=2)
    0.8
    """
    return _balance(indices, num_experts, mask, "jain")


# --------------------------------------------------------------------------------------- dropping and choices


def drop_fraction(indices: npt.ArrayLike, kept: npt.ArrayLike, *, mask: Mask = None) -> float:
    r"""Share of the assignments that found no room, ``1 - Σ kept / #{indices >= 0}``.

    Range 0…1; 0 when nothing is dropped (always, without a capacity).  NaN if nothing was routed.

    Parameters
    ----------
    indices, mask
        As in `expert_load`; the choices before dropping.
    kept : bool array (T, K)
        True where the assignment was served: ``out.dispatch.kept``.

    Raises
    ------
    TypeError, ValueError
        For wrong dtypes or shapes, or a kept assignment whose index is -1.

    Examples
    --------
    >>> drop_fraction([[0, 1], [0, -1]], [[True, True], [False, False]])  # one of three was dropped
    0.3333333333333333
    """
    chosen = _indices(indices, None, mask)
    served = _kept(kept, indices) & (chosen >= 0)
    routed = int(np.count_nonzero(chosen >= 0))
    return (routed - int(np.count_nonzero(served))) / routed if routed else math.nan


def choices_per_token(indices: npt.ArrayLike, *, kept: npt.ArrayLike | None = None, mask: Mask = None) -> Floats:
    r"""Share of the tokens that are served by exactly 0, 1, …, K experts.

    ``h_j = #{t: j choices of t are kept} / T``; range 0…1, sums to 1; h_K = 1 if nothing is dropped.  Those
    in h_0 pass the layer by.  All NaN without tokens.

    Parameters
    ----------
    indices, mask
        As in `expert_load`.
    kept : bool array (T, K), optional
        Survivors of the capacity limit, ``out.dispatch.kept``; without it every routed choice counts as kept.

    Examples
    --------
    >>> choices_per_token([[0, 1], [0, 2], [0, -1], [-1, -1]])
    array([0.25, 0.25, 0.5 ])
    """
    chosen = _indices(indices, None, mask)
    served = (chosen >= 0 if kept is None else _kept(kept, indices))[_mask(mask, len(chosen))]
    tokens, choices = served.shape
    histogram = np.bincount(served.sum(axis=1), minlength=choices + 1).astype(np.float64)
    return histogram / tokens if tokens else np.full(choices + 1, math.nan)


def coactivation(indices: npt.ArrayLike, num_experts: int, *, mask: Mask = None) -> Ints:
    r"""Number of tokens that chose experts i and j together; the diagonal is the load.

    ``M = AᵀA`` with the membership ``A_te = 1[e chosen by t]``; symmetric.  Balanced: N/E on the diagonal and
    ``N (K - 1) / (E (E - 1))`` elsewhere.  Arguments as in `expert_load`.

    Raises
    ------
    ValueError
        Also if a token names one expert twice.

    Examples
    --------
    >>> coactivation([[0, 1], [1, 0], [1, 2]], num_experts=3)
    array([[2, 2, 0],
           [2, 3, 1],
           [0, 1, 1]])
    """
    experts = checked_int("num_experts", num_experts, 1)
    chosen = _indices(indices, experts, mask)
    check_distinct(chosen, "indices")
    matrix = np.zeros(experts * experts, dtype=np.int64)
    for k in range(chosen.shape[1]):
        for j in range(chosen.shape[1]):
            both = (chosen[:, k] >= 0) & (chosen[:, j] >= 0)
            matrix += np.bincount(chosen[both, k] * experts + chosen[both, j], minlength=experts * experts)
    return matrix.reshape(experts, experts)


def routing_drift(before: npt.ArrayLike, after: npt.ArrayLike, *, mask: Mask = None) -> float:
    r"""Share of the choices that differ between two routings of the same tokens, whatever their order.

    .. math:: 1 - \sum_t |S_t \cap S'_t| \;/\; \sum_t \max(|S_t|, |S'_t|)

    Range 0 (the same experts for every token)…1 (none in common).  Two unrelated balanced routings: 1 - K/E
    on average.  NaN if neither routes anything.

    Parameters
    ----------
    before, after : int arrays (T, K) and (T, K')
        Chosen experts of the same tokens, -1 = not routed; within a token all distinct.
    mask : bool array (T,), optional
        True for real tokens.

    Raises
    ------
    TypeError, ValueError
        For wrong dtypes or shapes, different numbers of tokens, or an expert named twice by a token.

    Examples
    --------
    >>> routing_drift([[0, 1], [2, 3]], [[1, 0], [2, 4]])  # one choice of four has changed
    0.25
    """
    old, new = _indices(before, None, mask, "before"), _indices(after, None, mask, "after")
    if old.shape[0] != new.shape[0]:
        raise ValueError(f"before and after must route the same tokens; got T = {old.shape[0]} and {new.shape[0]}.")
    check_distinct(old, "before")
    check_distinct(new, "after")
    common = ((old[:, :, None] == new[:, None, :]) & (old[:, :, None] >= 0)).sum()
    sizes = np.maximum((old >= 0).sum(axis=1), (new >= 0).sum(axis=1)).sum()
    return float(1 - common / sizes) if sizes else math.nan


# ---------------------------------------------------------------------------------------------- router logits


def _log_sum_exp(z: Floats) -> Floats:
    """Row-wise ln Σ_e exp(z_te), (T,); ±inf are handled, NaN propagates."""
    top = z.max(axis=1, keepdims=True)
    safe = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore", over="ignore"):
        result: Floats = np.log(np.exp(z - safe).sum(axis=1)) + safe[:, 0]
    return result


def _probabilities(z: Floats, score: str) -> Floats:
    """Scores divided by their sum per token, (T, E); softmax: entries equal to the maximum count exp(0)."""
    checked_choice("score", score, SCORES)
    top = z.max(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", over="ignore"):
        if score == "sigmoid":
            s = np.exp(-np.logaddexp(0.0, -z))
        elif score == "sqrt_softplus":
            s = np.sqrt(np.logaddexp(0.0, z))
        else:
            s = np.exp(np.where(z == top, 0.0, z - top))
        return s / s.sum(axis=1, keepdims=True)  # type: ignore[no-any-return]


def token_entropy(logits: npt.ArrayLike, *, score: str = "softmax", mask: Mask = None) -> Floats:
    r"""How undecided the router is about each token: ``H(p_t) = -Σ_e p_te ln p_te`` in nats.

    Range 0 (certain)…ln E (all experts equal).  NaN for tokens outside `mask`: positions stay aligned.

    Parameters
    ----------
    logits : float array (T, E)
    score : {"softmax", "softmax_chosen", "sigmoid", "sqrt_softplus"}
        How logits become scores; p is the scores divided by their sum (both softmaxes: over all E).
    mask : bool array (T,), optional
        True for real tokens.

    Returns
    -------
    float64 array (T,)

    Examples
    --------
    >>> token_entropy(np.array([[0.0, 0.0], [9.0, -9.0]])).round(6)  # ln 2, and nearly certain
    array([0.693147, 0.      ])
    """
    z, real = _logits(logits, mask)
    return np.where(real, _entropy(_probabilities(z, score)), math.nan)


def batch_entropy(logits: npt.ArrayLike, *, score: str = "softmax", mask: Mask = None) -> float:
    r"""Entropy of the mean probability in nats, ``H(mean_t p_t)``: are all experts used by the tokens together.

    Range 0…ln E; balanced ln E; never below the mean `token_entropy`, and the difference is the information
    (in nats) that the router's choice carries about the token.  NaN without tokens.  Arguments as in
    `token_entropy`.

    Examples
    --------
    >>> round(batch_entropy(np.array([[50.0, 0.0], [0.0, 50.0]])), 6)  # each certain, together balanced: ln 2
    0.693147
    """
    z, real = _logits(logits, mask)
    return float(_entropy(_probabilities(z[real], score).mean(axis=0))) if real.any() else math.nan


def z_norm(logits: npt.ArrayLike, *, mask: Mask = None) -> float:
    r"""Size of the router's log partition function, ``sqrt(mean_t (ln Σ_e exp z_te)²)``.

    Range 0…; ln E for logits that are all 0.  Its square is the z-loss (ST-MoE, Zoph et al. 2022,
    arXiv:2202.08906); growth over training warns of logits running away.  NaN without tokens.

    Arguments as in `token_entropy`.

    Examples
    --------
    >>> round(z_norm(np.zeros((3, 4))), 6)  # ln 4
    1.386294
    """
    z, real = _logits(logits, mask)
    return float(np.sqrt(np.square(_log_sum_exp(z[real])).mean())) if real.any() else math.nan


# ------------------------------------------------------------------------------------------------ all at once


def summary(out: Any, *, score: str = "softmax") -> dict[str, float]:
    r"""Everything above for one forward pass, as one flat dict of floats ready for a log line.

    The keys are always the same; what cannot be measured is NaN (the entropies without logits, ratios without
    tokens).  Loads are counted before dropping, padding is left out.

    ==============================  =====================================================================
    ``tokens``, ``assignments``     real tokens, and choices made by them (T·K without -1)
    ``cv`` … ``jain``               balance of the load, as `load_summary`
    ``drop_fraction``               `drop_fraction`
    ``served_0`` … ``served_K``     `choices_per_token` after dropping
    ``capacity``                    C per expert and capacity group; inf if dropless
    ``token_entropy``               mean over the real tokens
    ``batch_entropy``               `batch_entropy`
    ``z_norm``                      `z_norm`
    ==============================  =====================================================================

    Parameters
    ----------
    out : MoEOutput
        Result of ``layer.forward(x)``; used are ``out.routing.indices``, ``.logits`` and ``.mask``, and
        ``out.dispatch.offsets``, ``.kept`` and ``.capacity``.
    score : str
        The layer's score function, for the entropies.

    Examples
    --------
    >>> from types import SimpleNamespace as Bag
    >>> routing = Bag(indices=np.array([[0, 1], [0, 2]]), logits=np.zeros((2, 4)), mask=None)
    >>> kept = np.array([[True, True], [False, True]])
    >>> dispatch = Bag(offsets=np.array([0, 1, 2, 3, 3]), kept=kept, capacity=1)
    >>> report = summary(Bag(routing=routing, dispatch=dispatch))
    >>> report["max_violation"], report["dead_experts"], report["drop_fraction"], report["served_1"]
    (1.0, 1.0, 0.25, 0.5)
    """
    routing, dispatch = out.routing, out.dispatch
    mask, experts = routing.mask, len(dispatch.offsets) - 1
    load = expert_load(routing.indices, experts, mask=mask)
    tokens = int(np.count_nonzero(_mask(mask, len(routing.indices))))
    result = {"tokens": float(tokens), "assignments": float(load.sum()), **load_summary(load)}
    result["drop_fraction"] = drop_fraction(routing.indices, dispatch.kept, mask=mask)
    served = choices_per_token(routing.indices, kept=dispatch.kept, mask=mask)
    result |= {f"served_{j}": float(share) for j, share in enumerate(served)}
    result["capacity"] = math.inf if dispatch.capacity is None else float(dispatch.capacity)
    logits = np.zeros((0, experts)) if routing.logits is None else routing.logits
    real = mask if routing.logits is not None else None
    decided = token_entropy(logits, score=score, mask=real)
    result["token_entropy"] = float(np.nanmean(decided)) if tokens and len(decided) else math.nan
    result["batch_entropy"] = batch_entropy(logits, score=score, mask=real)
    result["z_norm"] = z_norm(logits, mask=real)
    return result
