"""Auxiliary losses: value and gradient.

Token fractions are counted from the choices before anything is dropped, and are constants to the gradient.
Masked tokens count nowhere; without any real token a loss is 0 and so is its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from numoe.reference.functions import Array, normal_cdf, normal_pdf, quiet, softmax, softmax_backward
from numoe.reference.routing import log_score_slope
from numoe.reference.routing import score as score_of


@dataclass(frozen=True, kw_only=True, eq=False)
class Loss:
    """A value and its gradients: ``d`` + the name of the argument, and of its shape; None if it has no part."""

    value: float
    dlogits: Array | None = None
    dweights: Array | None = None
    dnoisy_logits: Array | None = None
    dnoise_std: Array | None = None


@quiet
def load_balance_loss(
    logits: Array,
    indices: Array,
    *,
    convention: str = "switch",
    score: str = "softmax",
    mask: Array | None = None,
    sequence_lengths: npt.ArrayLike | None = None,
) -> Loss:
    r"""Counts c times mean probabilities P; smallest when both are uniform.

    ===================  ===============================================================  ========
    convention           value                                                            balanced
    ===================  ===============================================================  ========
    "switch"             :math:`E \sum_e (c_e / n) P_e`, c counts first choices           1
    "gshard"             :math:`(1/E) \sum_e (c_e / n) P_e`, c counts first choices       1/E²
    "megatron"           :math:`E / (K n) \sum_e c_e P_e`, c counts all choices           1
    "hf"                 :math:`(E / n) \sum_e c_e P_e`, all choices, P always softmax    K
    "deepseek-sequence"  mean over sequences of :math:`E/(K S_b) \sum_e c_{be} P_{be}`    1
    ===================  ===============================================================  ========

    with n real tokens, :math:`S_b` of them in sequence b.  Sources: Fedus et al. 2021 (arXiv:2101.03961),
    Lepikhin et al. 2020 (2006.16668), Megatron-LM, Hugging Face transformers, DeepSeek-AI 2024 (2412.19437).

    Parameters
    ----------
    logits : array (T, E)
    indices : int array (T, K)
        -1 is not counted.
    convention : str
    score : str
        P is the mean of the softmax; for "sigmoid" and "sqrt_softplus", of the scores over their sum.
    mask : bool array (T,), optional
    sequence_lengths : ints (B,), optional
        Summing to T; used by "deepseek-sequence" only.  Sequences without a real token do not count.

    Examples
    --------
    Both tokens choose expert 0 with probability 3/4: 2 * (2/2 * 3/4 + 0/2 * 1/4).

    >>> load_balance_loss(np.log([[3.0, 1.0], [3.0, 1.0]]), np.array([[0], [0]])).value
    1.5
    """
    (T, E), K = logits.shape, indices.shape[1]
    real = np.ones(T, bool) if mask is None else mask
    lengths = [T]
    if convention == "deepseek-sequence" and sequence_lengths is not None:
        lengths = list(np.asarray(sequence_lengths))
    sequence = np.repeat(np.arange(len(lengths)), lengths)  # (T,) b of each token
    n = np.bincount(sequence[real], minlength=len(lengths))[:, None].astype(logits.dtype)  # (B, 1) real tokens
    choices = indices[:, :1] if convention in ("switch", "gshard") else indices
    token, choice = np.nonzero((choices >= 0) & real[:, None])
    counts = np.zeros((len(lengths), E), logits.dtype)
    np.add.at(counts, (sequence[token], choices[token, choice]), 1)
    factor = {"switch": E, "gshard": 1 / E, "megatron": E / K, "hf": E, "deepseek-sequence": E / K}[convention]
    factor /= max(int(np.count_nonzero(n)), 1)  # the mean over the sequences; 1 unless "deepseek-sequence"
    # Every convention is Σ dp * p with a constant dp (T, E): one 1/n makes fractions, the other the mean P.
    dp = np.where(real[:, None], (factor * counts / np.maximum(n, 1) ** 2)[sequence], 0)
    z = np.where(real[:, None], logits, 0)
    p, p_backward = _probabilities("softmax" if convention == "hf" else score, z)
    return Loss(value=float((dp * p).sum()), dlogits=p_backward(dp))


def _probabilities(kind: str, z: Array) -> tuple[Array, Callable[[Array], Array]]:
    """Give p (T, E) with rows of sum 1, and the function that turns ∂L/∂p into ∂L/∂z."""
    if kind in ("softmax", "softmax_chosen"):
        p = softmax(z)
        return p, lambda dp: softmax_backward(p, dp)
    s = score_of(kind, z)
    total = s.sum(axis=-1, keepdims=True) + 1e-20
    p = s / total
    # ds = (dp - Σ p dp) / total; dz = ds * s * (log s)'
    return p, lambda dp: softmax_backward(p, dp) * log_score_slope(kind, z)


def cv_squared(v: Array) -> tuple[float, Array]:
    """CV² = Var(v) / mean(v)², with the population variance, and its gradient; 1e-10 as in tensor2tensor."""
    mean, var = v.mean(), v.var()
    divisor = mean**2 + 1e-10
    cv = var / divisor
    # var = mean((v - mean)²); divisor = mean² + 1e-10
    return float(cv), 2 / (v.size * divisor) * (v - mean - cv * mean)


@quiet
def importance_loss(weights: Array, indices: Array, num_experts: int, *, mask: Array | None = None) -> Loss:
    r"""CV² of the importances :math:`I_e = \sum_t w_{te}` (Shazeer et al. 2017, arXiv:1701.06538).

    Balanced: 0.

    Importances 3 and 1: mean 2, variance 1.

    >>> round(importance_loss(np.array([[1.0], [2.0], [1.0]]), np.array([[0], [0], [1]]), 2).value, 6)
    0.25
    """
    counted = indices >= 0 if mask is None else (indices >= 0) & mask[:, None]
    importance = np.zeros(num_experts, weights.dtype)
    np.add.at(importance, indices[counted], weights[counted])
    value, dimportance = cv_squared(importance)
    # importance[indices] += weights
    return Loss(value=value, dweights=np.where(counted, dimportance[np.maximum(indices, 0)], 0))


@quiet
def load_loss(
    logits: Array, noisy_logits: Array, noise_std: npt.ArrayLike, top_k: int, *, mask: Array | None = None
) -> Loss:
    r"""CV² of the experts' smooth load (Shazeer et al. 2017, appendix A); balanced 0.

    .. math:: \ell_e = \sum_t \Phi((z_{te} - \theta_{te}) / \sigma_{te})

    is the expected number of tokens of expert e if only its own noise were drawn again: :math:`\theta_{te}`
    is the noisy logit that e has to beat, the K-th largest of the others.  That expert gets a gradient too.
    Where σ = 0, and everywhere if K = E, tokens are counted (1 or 0), without gradient.

    Parameters
    ----------
    logits, noisy_logits : array (T, E)
        Without and with noise.
    noise_std : float or array broadcastable to (T, E)
        σ.
    top_k : int
    mask : bool array (T,), optional

    Examples
    --------
    Without noise these are hard counts, 3 and 1: mean 2, variance 1.

    >>> z = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> round(load_loss(z, z, 0.0, top_k=1).value, 6)
    0.25
    """
    T, E = logits.shape
    real = np.ones((T, 1), bool) if mask is None else mask[:, None]
    z, noisy = np.where(real, logits, 0), np.where(real, noisy_logits, 0)
    order = np.argsort(-noisy, axis=-1, kind="stable")  # experts, best first
    inside = np.argsort(order, axis=-1) < top_k  # (T, E) is e chosen?
    rival = np.where(inside, order[:, [min(top_k, E - 1)]], order[:, [top_k - 1]])  # (T, E) whose logit is θ
    sigma = np.broadcast_to(np.asarray(noise_std, z.dtype), z.shape)
    smooth = real & (sigma > 0) & (top_k < E)
    u = np.where(smooth, (z - np.take_along_axis(noisy, rival, axis=-1)) / sigma, 0)
    value, dload = cv_squared(np.where(real, np.where(smooth, normal_cdf(u), inside), 0).sum(axis=0))
    # load = normal_cdf(u).sum(axis=0)
    du = np.where(smooth, dload * normal_pdf(u), 0)
    # u = (z - θ) / sigma
    dz = np.where(smooth, du / sigma, 0)
    dsigma = np.where(smooth, -u * dz, 0)
    # θ = noisy[rival]
    dnoisy = np.zeros_like(noisy)
    np.add.at(dnoisy, (np.arange(T)[:, None], rival), -dz)
    return Loss(value=value, dlogits=dz, dnoisy_logits=dnoisy, dnoise_std=_sum_to(np.shape(noise_std), dsigma))


def _sum_to(shape: tuple[int, ...], gradient: Array) -> Array:
    """The adjoint of broadcasting `shape` to the shape of `gradient`."""
    full = (1,) * (gradient.ndim - len(shape)) + shape
    axes = tuple(i for i, (have, want) in enumerate(zip(gradient.shape, full, strict=True)) if want != have)
    total: Array = gradient.sum(axis=axes, keepdims=True).reshape(shape)
    return total


@quiet
def z_loss(logits: Array, *, mask: Array | None = None) -> Loss:
    r"""Mean over the tokens of :math:`(\log \sum_e e^{z_{te}})^2` (Zoph et al. 2022, arXiv:2202.08906).

    It keeps logits small; all-zero logits give log(E)².

    >>> z_loss(np.array([[0.0, 0.0], [np.log(3), 0.0]])).value  # (log(2)² + log(4)²) / 2
    1.2011325347955035
    """
    real = np.ones((len(logits), 1), bool) if mask is None else mask[:, None]
    n = max(int(real.sum()), 1)
    z = np.where(real, logits, 0)
    top = z.max(axis=-1, keepdims=True)
    lse = top + np.log(np.exp(np.where(z == top, 0, z - top)).sum(axis=-1, keepdims=True))
    # value = (lse**2).sum() / n
    return Loss(value=float(np.where(real, lse**2, 0).sum() / n), dlogits=np.where(real, 2 * lse * softmax(z) / n, 0))


def update_choice_bias(choice_bias: Array, counts: npt.ArrayLike, rate: float = 1e-3) -> Array:
    """The next choice bias: up for experts below the mean load, down for those above (Wang et al. 2024).

    >>> update_choice_bias(np.zeros(3), [1, 2, 3], rate=0.5)
    array([ 0.5,  0. , -0.5])
    """
    load = np.asarray(counts, np.float64)
    bias: Array = choice_bias + rate * np.sign(load.mean() - load)
    return bias.astype(choice_bias.dtype)
