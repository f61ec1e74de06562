r"""Auxiliary losses: numbers that make a router balance its experts, each with its gradient.

Every loss is a function of arrays and returns a `Loss`: the value and the derivative by each array it depends
on. Nothing is stored and nothing is injected behind your back; multiply by a coefficient and add.

**Load balance has several conventions**, and the same routing scores differently under each, so a coefficient
from a paper means nothing without the convention it was used with.  With T tokens of which n are not masked,
E experts, K choices per token, ``c_e`` the number of choices of expert e, ``c¹_e`` the number of first
choices, ``p_te`` the probability of expert e for token t and ``P_e = mean_t p_te``:

===================  =================================  ========  ===========================================
convention           equation                           balanced  used by
===================  =================================  ========  ===========================================
"switch"             ``E Σ_e (c¹_e / n) P_e``           1         Switch Transformer, Mesh-TensorFlow, V-MoE,
                                                                  Tutel; the *code* of GShard
"gshard"             ``1/E Σ_e (c¹_e / n) P_e``         1/E²      the *paper* of GShard
"megatron"           ``E / (K n²) Σ_e c_e Σ_t p_te``    1         Megatron-LM, MegaBlocks, OLMo-core
"hf"                 ``E Σ_e (c_e / n) P_e``            K         Hugging Face (Mixtral and others), per layer
"deepseek-sequence"  mean over sequences of "megatron"  1         DeepSeek-V2/V3, sequence-wise loss
===================  =================================  ========  ===========================================

The counts are constants for the gradient, and belong to the choices *before* any are dropped for lack of
capacity: counts after dropping are clipped at the capacity and hide the imbalance they should report.

`importance_loss` and `load_loss` are 0 when balanced, `z_loss` does not balance but keeps the logits small,
and `update_choice_bias` balances without any loss.  `compare_conventions` shows all conventions for one
routing.

Common to all: float32 or float64 data, sums in float64 whatever the data; a `mask` (T,) that is True for real
tokens, so that padding contributes neither value nor gradient; no tokens at all give 0.  A NaN makes the
value NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from numoe import _core
from numoe._arrays import BoolArray, FloatArray, IntArray, as_float, as_indices, as_lengths, as_mask
from numoe.config import SCORES, checked_choice, checked_int, checked_real
from numoe.routing import checked_choice_bias

__all__ = [
    "CONVENTIONS",
    "ConventionTable",
    "ConventionValue",
    "Loss",
    "compare_conventions",
    "importance_loss",
    "load_balance_loss",
    "load_loss",
    "update_choice_bias",
    "z_loss",
]

CONVENTIONS = ("switch", "gshard", "megatron", "hf", "deepseek-sequence")


@dataclass(frozen=True, kw_only=True, eq=False)
class Loss:
    """A value and its gradients: ``d`` + the name of the argument, and of its shape; None if there is none.

    Attributes
    ----------
    value : float
    dlogits : ndarray (T, E), optional
    dweights : ndarray (T, K), optional
    dnoisy_logits : ndarray (T, E), optional
    dnoise_std : ndarray, optional
        0-d for a number.
    """

    value: float
    dlogits: FloatArray | None = None
    dweights: FloatArray | None = None
    dnoisy_logits: FloatArray | None = None
    dnoise_std: FloatArray | None = None


# ----------------------------------------------------------------------------------------------------- checks


def _as_logits(logits: npt.ArrayLike) -> FloatArray:
    """`logits` as a contiguous (T, E) array with E >= 1."""
    array = as_float(logits, "logits", ndim=2)
    if array.shape[1] == 0:
        raise ValueError(f"logits must have shape (T, E) with at least one expert; got {array.shape}.")
    return array


def _as_choices(indices: npt.ArrayLike, num_tokens: int, num_experts: int, like: str) -> IntArray:
    """`indices` as (T, K), each -1 or an expert, K >= 1, with the T of the array called `like`."""
    array = as_indices(indices, num_experts)
    if array.shape[0] != num_tokens or array.shape[1] == 0:
        raise ValueError(
            f"indices must have shape (T, K), K >= 1, with T = {num_tokens} from {like}; got {array.shape}."
        )
    return array


def _as_mask(mask: npt.ArrayLike | None, num_tokens: int) -> BoolArray | None:
    return None if mask is None else as_mask(mask, num_tokens)


def _as_noise_std(noise_std: Any, logits: FloatArray, mask: BoolArray | None) -> FloatArray:
    """`noise_std` broadcast to (T, E); finite and positive where the token is real."""
    if isinstance(noise_std, int) and not isinstance(noise_std, bool):
        noise_std = float(noise_std)
    array = as_float(noise_std, "noise_std", dtype=logits.dtype)
    try:
        full = np.broadcast_to(array, logits.shape)
    except ValueError:
        raise ValueError(
            "noise_std must be a number or an array that broadcasts to the shape of logits (T, E) = "
            f"{logits.shape}; got shape {array.shape}."
        ) from None
    good = np.isfinite(full) & (full > 0)
    if mask is not None:
        good |= ~mask[:, None]
    if not good.all():
        t, e = np.argwhere(~good)[0]
        raise ValueError(
            f"noise_std must be finite and > 0 (in {logits.dtype}); got {full[t, e]} for token {t}, "
            f"expert {e}.  Without noise the load is a count: numoe.metrics.expert_load."
        )
    return np.ascontiguousarray(full)


def _sum_to_shape(array: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """The adjoint of broadcasting `shape` to that of `array`: sums, in float64, over the repeated axes."""
    added = array.ndim - len(shape)
    stretched = tuple(added + i for i, size in enumerate(shape) if size == 1 != array.shape[added + i])
    total = array.sum(axis=(*range(added), *stretched), dtype=np.float64)
    return np.asarray(total, dtype=array.dtype).reshape(shape)


# ----------------------------------------------------------------------------------------------------- losses


def load_balance_loss(
    logits: npt.ArrayLike,
    indices: npt.ArrayLike,
    *,
    convention: str = "switch",
    score: str = "softmax",
    mask: npt.ArrayLike | None = None,
    sequence_lengths: npt.ArrayLike | None = None,
) -> Loss:
    r"""How unevenly the experts are used: the product of how often each is chosen and how likely it was.

    Every convention (see the table of this module) is linear in the probabilities, with constant coefficients
    :math:`a_{te}` made of the counts:

    .. math::

        L = \sum_{te} a_{te}\, p_{te}, \qquad
        \frac{\partial L}{\partial z_{te}} = p_{te} \Big(a_{te} - \sum_j a_{tj} p_{tj}\Big)
        \frac{d \ln s(z_{te})}{dz_{te}}

    where the last factor is 1 for the softmax.

    Parameters
    ----------
    logits : array (T, E)
        Router logits z: without choice bias, as the losses of the literature use them.
    indices : int array (T, K)
        Chosen experts, best first, before dropping; -1 for a choice that was not routed, which is not
        counted.
    convention : {"switch", "gshard", "megatron", "hf", "deepseek-sequence"}
        Value under perfect balance: 1, 1/E², 1, K and 1.  "switch" and "gshard" look at first choices only; for
        K > 1 the load itself is what "megatron" measures.
    score : {"softmax", "softmax_chosen", "sigmoid", "sqrt_softplus"}
        How probabilities come from logits: a softmax over all E (also for "softmax_chosen"), or the scores
        divided by their sum plus 1e-20 (Megatron-LM, DeepSeek-V3).  "hf" uses the softmax whatever the score.
    mask : bool array (T,), optional
        True for real tokens.
    sequence_lengths : int array (B,), optional
        Rows of each sequence, one after the other, with sum T; one sequence if None.  Read by
        "deepseek-sequence": sequences without a real token do not count.  Checked, but of no effect, for the
        other conventions.

    Returns
    -------
    Loss
        `value` and `dlogits` (T, E).

    Raises
    ------
    TypeError
        Dtypes: logits not floating, indices or sequence_lengths not integer, mask not bool.
    IndexError
        An index outside -1..E-1.
    ValueError
        Shapes that do not fit, an unknown convention or score, lengths that are
        negative or do not sum to T.

    Notes
    -----
    A logit of -inf has probability 0 and gradient 0; a token with nothing but -inf adds nothing.
    For the softmax the gradient of each token sums to 0.

    References
    ----------
    Fedus et al. 2021 (Switch Transformer), eq. 4; Lepikhin et al. 2020 (GShard),
    algorithm 1; DeepSeek-AI 2024 (DeepSeek-V3), eq. 17-20.

    Examples
    --------
    Three tokens, two experts; expert 0 is chosen twice:

    >>> logits = np.log([[0.6, 0.4], [0.9, 0.1], [0.3, 0.7]])
    >>> loss = load_balance_loss(logits, np.array([[0], [0], [1]]))
    >>> round(loss.value, 6)  # 2 * (2/3 * 0.6 + 1/3 * 0.4)
    1.066667
    >>> loss.dlogits.round(4)
    array([[ 0.0533, -0.0533],
           [ 0.02  , -0.02  ],
           [ 0.0467, -0.0467]])
    """
    convention = checked_choice("convention", convention, CONVENTIONS)
    score = checked_choice("score", score, SCORES)
    z = _as_logits(logits)
    chosen = _as_choices(indices, z.shape[0], z.shape[1], "logits")
    real = _as_mask(mask, z.shape[0])
    lengths = as_lengths(sequence_lengths, z.shape[0])
    value, dlogits = _core.load_balance_loss(z, chosen, convention, score, real, lengths)
    return Loss(value=value, dlogits=dlogits)


def importance_loss(
    weights: npt.ArrayLike, indices: npt.ArrayLike, num_experts: int, *, mask: npt.ArrayLike | None = None
) -> Loss:
    r"""Squared coefficient of variation of the importance, the total weight that each expert receives.

    .. math::

        I_e = \sum_t weight_{te}, \qquad
        L = CV^2(I) = \frac{\mathrm{var}(I)}{\mathrm{mean}(I)^2 + 10^{-10}}, \qquad
        \frac{\partial L}{\partial I_e} = \frac{2\,(I_e - \mathrm{mean} - L\,\mathrm{mean})}
        {E\,(\mathrm{mean}^2 + 10^{-10})}

    with the population variance.  0 when balanced, E - 1 when one expert receives everything.

    Parameters
    ----------
    weights : array (T, K)
        Routing weights, before dropping.
    indices : int array (T, K)
        The experts they go to; the weight of a choice -1 is ignored and its gradient is 0.
    num_experts : int
        E.
    mask : bool array (T,), optional
        True for real tokens.

    Returns
    -------
    Loss
        `value` and `dweights` (T, K).  To reach the logits, add ``coefficient * loss.dweights`` to the gradient
        of the routing weights.

    Raises
    ------
    TypeError
        weights not floating, indices or num_experts not integer, mask not bool.
    IndexError
        An index outside -1..E-1.
    ValueError
        Shapes that do not fit.

    References
    ----------
    Shazeer et al. 2017, eq. 6-7.  Population variance as in tensor2tensor and V-MoE
    (FastMoE and Tutel use the sample variance, E / (E - 1) times as much).

    Examples
    --------
    >>> loss = importance_loss(np.array([[0.75, 0.25], [0.5, 0.5]]), np.array([[0, 1], [0, 1]]), 2)
    >>> round(loss.value, 6)  # I = (1.25, 0.75): variance 0.0625, mean 1
    0.0625
    >>> loss.dweights.round(4)
    array([[ 0.1875, -0.3125],
           [ 0.1875, -0.3125]])
    """
    experts = checked_int("num_experts", num_experts, 1, 2**31 - 1)
    w = as_float(weights, "weights", ndim=2)
    chosen = _as_choices(indices, w.shape[0], experts, "weights")
    if chosen.shape != w.shape:
        raise ValueError(f"indices must have the shape of weights (T, K) = {w.shape}; got {chosen.shape}.")
    value, dweights = _core.importance_loss(w, chosen, experts, _as_mask(mask, w.shape[0]))
    return Loss(value=value, dweights=dweights)


def load_loss(
    logits: npt.ArrayLike,
    noisy_logits: npt.ArrayLike,
    noise_std: npt.ArrayLike,
    top_k: int,
    *,
    mask: npt.ArrayLike | None = None,
) -> Loss:
    r"""Squared coefficient of variation of the expected load of noisy top-K routing: a count with a gradient.

    The load of expert e sums, over the tokens, the probability that e is among the top K if its own noise is
    drawn again while that of the others stays:

    .. math::

        \ell_e = \sum_t \Phi\Big(\frac{z_{te} - \theta_{te}}{\sigma_{te}}\Big), \qquad
        L = CV^2(\ell) = \frac{\mathrm{var}(\ell)}{\mathrm{mean}(\ell)^2 + 10^{-10}}

    where the threshold :math:`\theta_{te}` is the K-th largest noisy logit of the *other* experts, and
    :math:`\Phi` the normal distribution function.  0 when balanced, and 0 without gradient for K = E.

    Parameters
    ----------
    logits : array (T, E)
        z, without noise.
    noisy_logits : array (T, E)
        ``z + noise_std * normal noise``: what the choice was made from.
    noise_std : number or array that broadcasts to (T, E)
        σ > 0: 1/E in V-MoE, a learned ``softplus(x @ w_noise)`` in Shazeer et al.
    top_k : int
        K.
    mask : bool array (T,), optional
        True for real tokens.

    Returns
    -------
    Loss
        `value`, and *partial* derivatives `dlogits` (T, E), `dnoisy_logits` (T, E), through the thresholds, and
        `dnoise_std` (shape of the argument).  Since noisy logits are made of logits, the total derivatives are
        ``dlogits + dnoisy_logits`` and, per element, ``dnoise_std + dnoisy_logits * normal noise``.

    Raises
    ------
    TypeError
        An array that is not floating, top_k not an int, mask not bool.
    ValueError
        Shapes that do not fit, top_k outside 1..E, a noise_std that is not finite and > 0.

    Notes
    -----
    Ties are broken like everywhere: the lower index is inside.  A logit of -inf has load 0 and gradient 0.

    References
    ----------
    Shazeer et al. 2017, eq. 8-11 (appendix A); thresholds and population variance as in tensor2tensor.

    Examples
    --------
    >>> z = np.array([[1.0, 0.0, 0.0]])
    >>> loss = load_loss(z, z, 1.0, top_k=1)
    >>> round(loss.value, 4)  # load = (Φ(1), Φ(-1), Φ(-1)) = (0.8413, 0.1587, 0.1587)
    0.6943
    """
    z = _as_logits(logits)
    noisy = as_float(noisy_logits, "noisy_logits", dtype=z.dtype, ndim=2)
    if noisy.shape != z.shape:
        raise ValueError(f"noisy_logits must have the shape of logits (T, E) = {z.shape}; got {noisy.shape}.")
    if checked_int("top_k", top_k, -(2**62)) not in range(1, z.shape[1] + 1):
        raise ValueError(f"top_k must be in 1..E ({z.shape[1]}); got {top_k}.")
    real = _as_mask(mask, z.shape[0])
    sigma = _as_noise_std(noise_std, z, real)
    value, dlogits, dnoisy, dsigma = _core.load_loss(z, noisy, sigma, int(top_k), real)
    shape = np.shape(noise_std)
    return Loss(value=value, dlogits=dlogits, dnoisy_logits=dnoisy, dnoise_std=_sum_to_shape(dsigma, shape))


def z_loss(logits: npt.ArrayLike, *, mask: npt.ArrayLike | None = None) -> Loss:
    r"""Mean square of the logarithm of the partition function: keeps router logits small.

    .. math::

        L = \frac1n \sum_t \Big(\ln \sum_e e^{z_{te}}\Big)^2, \qquad
        \frac{\partial L}{\partial z_{te}} = \frac2n\, \mathrm{softmax}(z_t)_e \ln \sum_j e^{z_{tj}}

    Parameters
    ----------
    logits : array (T, E)
        Router logits.
    mask : bool array (T,), optional
        True for real tokens.

    Returns
    -------
    Loss
        `value` and `dlogits` (T, E).

    Raises
    ------
    TypeError
        logits not floating, mask not bool.
    ValueError
        Shapes that do not fit.

    Notes
    -----
    Safe for any size of the logits: 1e4 gives 1e8, and 1e30 gives 1e60 also for float32 data.  A
    logit of -inf has gradient 0; a token whose logits are all -inf, or one of them +inf, makes the value inf.

    References
    ----------
    Zoph et al. 2022 (ST-MoE), eq. 5, with coefficient 1e-3.

    Examples
    --------
    >>> loss = z_loss(np.log([[1.0, 3.0]]))
    >>> round(loss.value, 6)  # ln(4)²
    1.921812
    >>> loss.dlogits.round(4)
    array([[0.6931, 2.0794]])
    """
    z = _as_logits(logits)
    value, dlogits = _core.z_loss(z, _as_mask(mask, z.shape[0]))
    return Loss(value=value, dlogits=dlogits)


def update_choice_bias(choice_bias: npt.ArrayLike, counts: npt.ArrayLike, rate: float = 1e-3) -> FloatArray:
    r"""Loss-free balancing: raises the choice bias of experts with less than the mean load, lowers it above.

    .. math:: b_e \leftarrow b_e + rate \cdot \mathrm{sign}\big(\mathrm{mean}(c) - c_e\big)

    Parameters
    ----------
    choice_bias : array (E,)
        b, added to the scores for choosing only.
    counts : array (E,)
        c, tokens of each expert in the step (`numoe.metrics.expert_load`); integers are compared exactly.
        With several processes: of the global batch.
    rate : float
        Step, >= 0; DeepSeek-V3 uses 1e-3 and ends with 0.

    Returns
    -------
    ndarray (E,)
        A new bias of the dtype of `choice_bias`.

    Raises
    ------
    TypeError
        choice_bias not floating, counts not numbers, rate not a number.
    ValueError
        Shapes that do not fit, a bias that is not finite or would not stay so, a count that is negative or not
        finite, a rate that is negative or not finite in the dtype of `choice_bias`.

    References
    ----------
    Wang et al. 2024 (auxiliary-loss-free load balancing), algorithm 1; DeepSeek-V3, section 2.1.2.

    Examples
    --------
    >>> update_choice_bias(np.zeros(3), np.array([5, 1, 3]), rate=0.01)
    array([-0.01,  0.01,  0.  ])
    """
    bias = as_float(choice_bias, "choice_bias", ndim=1)
    checked_choice_bias(bias, bias.dtype)
    step = checked_real("rate", rate, high=float(np.finfo(bias.dtype).max))
    load = np.asarray(counts)
    if load.dtype.kind not in "iuf":
        raise TypeError(f"counts must be an array of numbers (E,); got dtype {load.dtype}.")
    if load.shape != bias.shape:
        raise ValueError(f"counts must have the shape of choice_bias (E,) = {bias.shape}; got {load.shape}.")
    bad = np.flatnonzero(~(np.isfinite(load) & (load >= 0)))
    if bad.size:
        raise ValueError(f"counts[{bad[0]}] must be finite and >= 0; got {load[bad[0]]}.")
    # mean(c) > c_e as  Σ c > E c_e, without rounding
    load = load.astype(np.float64 if load.dtype.kind == "f" else object)
    direction = np.sign(load.sum() - load.size * load).astype(bias.dtype)
    with np.errstate(all="ignore"):
        moved = np.asarray(bias + bias.dtype.type(step) * direction)
    if not np.isfinite(moved).all():
        raise ValueError(f"choice_bias would become infinite; give a smaller rate than {step:g}.")
    return moved


# ------------------------------------------------------------------------------------------------------ audit


class ConventionValue(NamedTuple):
    """One row of a `ConventionTable`."""

    value: float
    balanced: float  # the value a perfectly balanced routing has
    after_drop: float | None = None  # the value if only surviving choices were counted

    @property
    def relative(self) -> float:
        """`value` / `balanced`: 1 for perfect balance under every convention."""
        return self.value / self.balanced


class ConventionTable(dict[str, ConventionValue]):
    """Convention → `ConventionValue`; prints as a table."""

    def __str__(self) -> str:
        dropped = any(row.after_drop is not None for row in self.values())
        head = f"{'convention':<18}{'value':>10}{'balanced':>10}{'relative':>10}"
        lines = [head + "  after drop" * dropped]
        for name, row in self.items():
            line = f"{name:<18}{row.value:>10.4g}{row.balanced:>10.4g}{row.relative:>10.4f}"
            lines.append(line + ("" if row.after_drop is None else f"{row.after_drop:>12.4g}"))
        return "\n".join(lines)


def compare_conventions(
    logits: npt.ArrayLike,
    indices: npt.ArrayLike,
    *,
    score: str = "softmax",
    mask: npt.ArrayLike | None = None,
    sequence_lengths: npt.ArrayLike | None = None,
    kept: npt.ArrayLike | None = None,
) -> ConventionTable:
    """All conventions of `load_balance_loss` for one routing, to state which one a number belongs to.

    Parameters
    ----------
    logits, indices, score, mask, sequence_lengths
        As for `load_balance_loss`.
    kept : bool array (T, K), optional
        True where a choice survived the capacity (``out.dispatch.kept``): adds the value that counting after
        dropping would report.

    Returns
    -------
    ConventionTable
        A dict convention → (value, balanced, after_drop), which prints as a table.

    Raises
    ------
    TypeError, IndexError, ValueError
        As `load_balance_loss`; `kept` not bool or not of the shape of `indices`.

    Examples
    --------
    >>> logits = np.log([[0.6, 0.4], [0.9, 0.1], [0.3, 0.7]])
    >>> print(compare_conventions(logits, np.array([[0, 1], [0, 1], [1, 0]])))
    convention             value  balanced  relative
    switch                 1.067         1    1.0667
    gshard                0.2667      0.25    1.0667
    megatron                   1         1    1.0000
    hf                         2         2    1.0000
    deepseek-sequence          1         1    1.0000
    """
    z = _as_logits(logits)
    chosen = _as_choices(indices, z.shape[0], z.shape[1], "logits")
    experts, top_k = z.shape[1], chosen.shape[1]
    balanced = {"gshard": 1 / experts**2, "hf": float(top_k)}
    surviving = None
    if kept is not None:
        survived = np.asarray(kept)
        if survived.dtype != np.bool_:
            raise TypeError(f"kept must be a bool array (T, K); got dtype {survived.dtype}.")
        if survived.shape != chosen.shape:
            raise ValueError(f"kept must have the shape of indices (T, K) = {chosen.shape}; got {survived.shape}.")
        surviving = np.where(survived, chosen, np.int32(-1))

    table = ConventionTable()
    for name in CONVENTIONS:

        def value_of(counted: IntArray, convention: str = name) -> float:
            return load_balance_loss(
                z, counted, convention=convention, score=score, mask=mask, sequence_lengths=sequence_lengths
            ).value

        after = None if surviving is None else value_of(surviving)
        table[name] = ConventionValue(value_of(chosen), balanced.get(name, 1.0), after)
    return table
