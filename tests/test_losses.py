"""Auxiliary losses: values by hand, finite differences, invariances, Monte Carlo of the load's definition."""

from __future__ import annotations

import builtins
import math
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numoe import _core
from numoe.losses import (
    CONVENTIONS,
    Loss,
    compare_conventions,
    importance_loss,
    load_balance_loss,
    load_loss,
    update_choice_bias,
    z_loss,
)

if TYPE_CHECKING:
    from collections.abc import Callable

SCORES = ("softmax", "softmax_chosen", "sigmoid", "sqrt_softplus")
DTYPES = (np.float32, np.float64)
EPS = np.finfo(np.float64).eps

# T = 4, E = 3, K = 2.  First choices (2, 1, 1), all choices (3, 3, 2), P = (0.3375, 0.3, 0.3625).
PROBABILITIES = np.array([[0.5, 0.3, 0.2], [0.6, 0.1, 0.3], [0.2, 0.7, 0.1], [0.05, 0.1, 0.85]])
CHOICES = np.array([[0, 1], [0, 2], [1, 0], [2, 1]])


# ---------------------------------------------------------------------------------------------------- helpers


def top_k(logits: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-logits, axis=1, kind="stable")[:, :k]


def random_problem(seed: int, T: int = 12, E: int = 5, K: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Logits with a bias towards the last experts, and their top K."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((T, E)) + np.linspace(-1, 1, E)
    return logits, top_k(logits, K)


def random_noise(seed: int, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Noisy logits and their noise_std (T, E)."""
    rng = np.random.default_rng(seed)
    noise_std = rng.uniform(0.3, 1.5, logits.shape)
    return logits + noise_std * rng.standard_normal(logits.shape), noise_std


def random_arrays(seed: int, T: int = 12) -> dict[str, np.ndarray]:
    """The arguments of all losses: E = 5, K = 2; one choice is not routed."""
    logits, indices = random_problem(seed, T)
    indices[3, 1] = -1
    noisy, noise_std = random_noise(seed + 1, logits)
    weights = np.random.default_rng(seed + 2).random(indices.shape)
    names = ("logits", "indices", "noisy_logits", "noise_std", "weights")
    return dict(zip(names, (logits, indices, noisy, noise_std, weights), strict=True))


def balance(a: Any, mask: Any = None, lengths: Any = None, **options: Any) -> Loss:
    return load_balance_loss(a["logits"], a["indices"], mask=mask, sequence_lengths=lengths, **options)


def load(a: Any, mask: Any = None, lengths: Any = None, *, k: int) -> Loss:
    return load_loss(a["logits"], a["noisy_logits"], a["noise_std"], k, mask=mask)


# name -> loss(arrays, mask, sequence lengths)
LOSSES: dict[str, Callable[..., Loss]] = {
    f"{c} {s}": partial(balance, convention=c, score=s) for c in CONVENTIONS for s in SCORES
}
LOSSES |= {f"load {k}": partial(load, k=k) for k in (1, 2, 4, 5)}
LOSSES["importance"] = lambda a, mask=None, _=None: importance_loss(a["weights"], a["indices"], 5, mask=mask)
LOSSES["z"] = lambda a, mask=None, _=None: z_loss(a["logits"], mask=mask)

for_both_dtypes = pytest.mark.parametrize("dtype", DTYPES)
for_every_loss = pytest.mark.parametrize("name", LOSSES)
with_and_without_mask = pytest.mark.parametrize("masked", [False, True])


def gradients(loss: Loss) -> dict[str, np.ndarray]:
    """Argument name → its gradient."""
    return {name[1:]: g for name, g in vars(loss).items() if name != "value" and g is not None}


def assert_gradient(gradient: Any, value: Callable[[np.ndarray], float], x: np.ndarray) -> None:
    """Central differences: error step² f''' / 6 + eps |f| / step, both below 1e-9 of the scale of f here."""
    step, numeric = 1e-5, np.empty_like(x)
    for i in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[i] += step
        down[i] -= step
        numeric[i] = (value(up) - value(down)) / (up[i] - down[i])
    assert gradient.shape == x.shape
    scale = max(1.0, abs(value(x)), np.abs(numeric).max(initial=0))
    np.testing.assert_allclose(gradient, numeric, rtol=0, atol=1e-8 * scale)


def plain_probabilities(row: np.ndarray, score: str) -> list[float]:
    z = [float(v) for v in row]
    if score.startswith("softmax"):
        s, eps = [math.exp(v - max(z)) for v in z], 0.0
    elif score == "sigmoid":
        s, eps = [1 / (1 + math.exp(-v)) for v in z], 1e-20
    else:
        s, eps = [math.sqrt(math.log1p(math.exp(v))) for v in z], 1e-20
    return [v / (sum(s) + eps) for v in s]


def plain_balance(
    logits: np.ndarray, indices: np.ndarray, convention: str, score: str, mask: np.ndarray, lengths: list[int]
) -> float:
    """The definitions, token by token, as the table of numoe.losses writes them."""
    E, K = logits.shape[1], indices.shape[1]
    lengths = lengths if convention == "deepseek-sequence" else [logits.shape[0]]
    score = "softmax" if convention == "hf" else score
    values, start = [], 0
    for length in lengths:
        tokens = [t for t in range(start, start + length) if mask[t]]
        start += length
        if not tokens:
            continue
        n = len(tokens)
        P = np.mean([plain_probabilities(logits[t], score) for t in tokens], axis=0)
        c = np.array([sum(int(e) in indices[t] for t in tokens) for e in range(E)])
        first = np.array([sum(int(indices[t, 0]) == e for t in tokens) for e in range(E)])
        by_convention = {
            "switch": E * np.sum(first / n * P),
            "gshard": np.sum(first / n * P) / E,
            "megatron": E / (K * n) * np.sum(c * P),
            "hf": E * np.sum(c / n * P),
            "deepseek-sequence": np.sum(c * E / (K * n) * P),
        }
        values.append(by_convention[convention])
    return float(np.mean(values)) if values else 0.0


def cv_squared(v: np.ndarray) -> float:
    return float(np.var(v) / (np.mean(v) ** 2 + 1e-10))


def plain_load(logits: np.ndarray, noisy: np.ndarray, noise_std: np.ndarray, k: int) -> np.ndarray:
    """Shazeer's load (E,): the threshold is the k-th largest noisy logit of the *other* experts."""
    load = np.zeros(logits.shape[1])
    for t, e in np.ndindex(logits.shape):
        others = np.sort(np.delete(noisy[t], e))[::-1]
        u = (logits[t, e] - others[k - 1]) / noise_std[t, e]
        load[e] += 0.5 * (1 + math.erf(u / math.sqrt(2)))
    return load


# --------------------------------------------------------------------------------------------- values by hand


@for_both_dtypes
@pytest.mark.parametrize(
    ("convention", "expected"),
    [
        # 3 (2/4 0.3375 + 1/4 0.3 + 1/4 0.3625) = 3 * 0.334375
        ("switch", 1.003125),
        # 1/3 * 0.334375
        ("gshard", 0.334375 / 3),
        # 3 / 2 (3/4 0.3375 + 3/4 0.3 + 2/4 0.3625) = 1.5 * 0.659375
        ("megatron", 0.9890625),
        # 3 * 0.659375
        ("hf", 1.978125),
        # two sequences of two tokens, each E / (K S) = 3/4:
        #   counts (2, 1, 1), P (0.55, 0.2, 0.25):    3/4 (1.1 + 0.2 + 0.25)    = 1.1625
        #   counts (1, 2, 1), P (0.125, 0.4, 0.475):  3/4 (0.125 + 0.8 + 0.475) = 1.05
        ("deepseek-sequence", (1.1625 + 1.05) / 2),
    ],
)
def test_load_balance_by_hand(convention: str, expected: float, dtype: Any) -> None:
    logits = np.log(PROBABILITIES).astype(dtype)
    loss = load_balance_loss(logits, CHOICES, convention=convention, sequence_lengths=[2, 2])
    assert isinstance(loss.value, float)
    assert loss.value == pytest.approx(expected, rel=8 * float(np.finfo(dtype).eps))
    assert list(gradients(loss)) == ["logits"]
    assert gradients(loss)["logits"].dtype == dtype


def test_load_balance_gradient_by_hand() -> None:
    # One token, two experts, p = (3/4, 1/4), expert 0 chosen: value 2 * 1 * 3/4.
    # a = (2, 0), Σ a p = 3/2:  dz = (3/4 (2 - 3/2), 1/4 (0 - 3/2)) = (3/8, -3/8)
    loss = load_balance_loss(np.log([[3.0, 1.0]]), np.array([[0]]))
    assert loss.value == pytest.approx(1.5)
    np.testing.assert_allclose(loss.dlogits, [[0.375, -0.375]], rtol=1e-14)


def test_scores_by_hand() -> None:
    # sigmoids (0.8, 0.4, 0.4) and (0.5, 0.25, 0.75): p = (1/2, 1/4, 1/4) and (1/3, 1/6, 1/2), P_0 = 5/12,
    # P_2 = 3/8.  Experts 0 and 2 are chosen once each: 3 (1/2 5/12 + 1/2 3/8) = 19/16
    scores = np.array([[0.8, 0.4, 0.4], [0.5, 0.25, 0.75]])
    loss = load_balance_loss(np.log(scores / (1 - scores)), np.array([[0], [2]]), score="sigmoid")
    assert loss.value == pytest.approx(19 / 16, rel=1e-14)
    # square roots of softplus 1 and 4: p = (1/3, 2/3), expert 1 chosen: 2 * 1 * 2/3
    loss = load_balance_loss(np.log(np.expm1([[1.0, 4.0]])), np.array([[1]]), score="sqrt_softplus")
    assert loss.value == pytest.approx(4 / 3, rel=1e-14)


def test_unrouted_choices_are_not_counted() -> None:
    # Token 3 keeps its first choice only: all choices (3, 2, 2),
    # 3/2 (3/4 0.3375 + 2/4 0.3 + 2/4 0.3625) = 1.5 * 0.584375
    indices = CHOICES.copy()
    indices[3, 1] = -1
    loss = load_balance_loss(np.log(PROBABILITIES), indices, convention="megatron")
    assert loss.value == pytest.approx(0.8765625, rel=1e-14)
    nothing = load_balance_loss(np.log(PROBABILITIES), np.full((4, 2), -1))
    assert nothing.value == 0.0
    np.testing.assert_array_equal(nothing.dlogits, 0.0)


@for_both_dtypes
def test_importance_by_hand(dtype: Any) -> None:
    # I = (1.25, 0.75, 0): mean 2/3, variance (49 + 1 + 64) / 144 / 3 = 19/72; CV² = 19/72 9/4 = 19/32
    # dI_e = 2 (I_e - mean - CV² mean) / (E mean²) = 3/2 (I_e - 17/16): (9/32, -15/32, -51/32)
    weights = np.array([[0.75, 0.25], [0.5, 0.5]], dtype)
    loss = importance_loss(weights, np.array([[0, 1], [1, 0]]), 3)
    assert loss.value == pytest.approx(19 / 32, rel=1e-9)  # less 1e-10 in the divisor
    assert gradients(loss)["weights"].dtype == dtype
    np.testing.assert_allclose(loss.dweights, [[9 / 32, -15 / 32], [-15 / 32, 9 / 32]], rtol=1e-6)
    # one expert gets everything: I = (0, ..., 6, ..., 0) has CV² = E - 1
    assert importance_loss(np.ones((6, 1), dtype), np.full((6, 1), 2), 8).value == pytest.approx(7, rel=1e-9)
    # a choice -1 does not count: I = (1.25, 0.5), mean 7/8, variance (3/8)²
    loss = importance_loss(np.array([[0.75, 7], [0.5, 0.5]], dtype), np.array([[0, -1], [1, 0]]), 2)
    assert loss.value == pytest.approx(9 / 49, rel=1e-9)
    assert gradients(loss)["weights"][0, 1] == 0.0


def test_load_by_hand() -> None:
    # One token, K = 1: expert 0 leads, its threshold is the next noisy logit 0; the others must beat 1.
    # load (Φ(1), Φ(-1), Φ(-1)) = (0.8413447461, 0.1586552539, 0.1586552539): mean 0.3862184180, squared
    # deviations 0.2071399745, 0.0517849936 (twice): variance 0.1035699873; / mean² 0.1491646664
    logits = np.array([[1.0, 0.0, 0.0]])
    assert load_loss(logits, logits, 1, 1).value == pytest.approx(0.6943332477, rel=2e-9)


@for_both_dtypes
def test_z_by_hand(dtype: Any) -> None:
    # rows with Σ e^z = 4 and 1: (ln(4)² + 0) / 2; dz = 2/2 ln(4) (1/4, 3/4) and 0
    loss = z_loss(np.log(np.array([[1.0, 3.0], [0.5, 0.5]])).astype(dtype))
    eps = float(np.finfo(dtype).eps)
    assert loss.value == pytest.approx(math.log(4) ** 2 / 2, rel=8 * eps)
    assert gradients(loss)["logits"].dtype == dtype
    expected = [[math.log(4) / 4, 3 * math.log(4) / 4], [0, 0]]
    np.testing.assert_allclose(loss.dlogits, expected, rtol=8 * eps, atol=eps)


@for_both_dtypes
def test_update_choice_bias_by_hand(dtype: Any) -> None:
    bias = np.array([0.5, -0.25, 0.0], dtype)
    new = update_choice_bias(bias, np.array([4, 1, 7]), rate=0.125)  # mean 4: keep, raise, lower
    np.testing.assert_array_equal(new, np.array([0.5, -0.125, -0.125], dtype))
    assert new.dtype == dtype and new is not bias
    np.testing.assert_array_equal(bias, np.array([0.5, -0.25, 0.0], dtype))
    for counts, rate in (([4, 1, 7], 0), ([0, 0, 0], 1), ([0.1, 0.1, 0.1], 1)):
        np.testing.assert_array_equal(update_choice_bias(bias, counts, rate=rate), bias)


def test_update_choice_bias_compares_large_counts_exactly() -> None:
    # The sum does not fit 64 bits, the difference is lost in float64.
    counts = np.array([2**62, 2**62, 2**62 + 3])
    np.testing.assert_array_equal(update_choice_bias(np.zeros(3), counts, rate=1.0), [1.0, 1.0, -1.0])


# -------------------------------------------------------------------------------------------- balanced values


@pytest.mark.parametrize(("E", "K"), [(4, 1), (8, 2), (6, 3)])
def test_balanced_values(E: int, K: int) -> None:
    logits = np.zeros((2 * E, E))
    indices = (np.arange(2 * E)[:, None] + np.arange(K)) % E  # every expert equally often
    table = compare_conventions(logits, indices, sequence_lengths=[E, E])
    expected = {"switch": 1, "gshard": 1 / E**2, "megatron": 1, "hf": K, "deepseek-sequence": 1}
    assert list(table) == list(CONVENTIONS)
    for name, value in expected.items():
        assert table[name].value == pytest.approx(value, rel=1e-14)
        assert table[name].balanced == pytest.approx(value, rel=1e-15)
        assert table[name].relative == pytest.approx(1, rel=1e-14)
        loss = load_balance_loss(logits, indices, convention=name, sequence_lengths=[E, E])
        np.testing.assert_allclose(loss.dlogits, 0, atol=1e-16)
    assert importance_loss(np.full((2 * E, K), 1 / K), indices, E).value == pytest.approx(0, abs=1e-15)


def test_one_expert_gives_exact_constants() -> None:
    logits, first = random_problem(0, T=7)[0][:, :1], np.zeros((7, 1), int)
    for convention in CONVENTIONS:
        for score in SCORES:
            loss = load_balance_loss(logits, first, convention=convention, score=score)
            assert loss.value == pytest.approx(1.0, abs=4 * EPS)
            np.testing.assert_array_equal(loss.dlogits, 0.0)
    assert importance_loss(np.ones((7, 1)), first, 1).value == 0.0
    assert load_loss(logits, logits, 1.0, 1).value == 0.0
    assert z_loss(logits).value == pytest.approx(np.mean(logits**2), rel=1e-14)


MEASURED = {  # bias of the logits: the value under each convention
    0.0: {"switch": 1.000, "megatron": 1.000, "hf": 2.000, "gshard": 0.0156},
    0.5: {"switch": 1.140, "megatron": 1.116, "hf": 2.232, "gshard": 0.0178},
    1.5: {"switch": 1.976, "megatron": 1.783, "hf": 3.566, "gshard": 0.0309},
}


@pytest.mark.parametrize("bias", MEASURED)
def test_one_routing_under_each_convention(bias: float) -> None:
    # T = 4096, E = 8, K = 2, logits N(0, 1) + linspace(-bias, bias); the numbers are of another sample.  From
    # sample to sample the biased values move by about 1 %, the unbiased ones by less than the last digit.
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((4096, 8)) + np.linspace(-bias, bias, 8)
    table = compare_conventions(logits, top_k(logits, 2))
    for name, value in MEASURED[bias].items():
        assert table[name].value == pytest.approx(value, rel=0.02)
        if bias == 0:
            digits = 4 if name == "gshard" else 3
            assert round(table[name].value, digits) == value


def test_counting_after_dropping_hides_the_imbalance() -> None:
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((4096, 8)) + np.linspace(-1.5, 1.5, 8)
    indices = top_k(logits, 2)
    kept = np.zeros(indices.size, bool)  # capacity 1.25 K T / E, first come, first served
    for e in range(8):
        kept[np.flatnonzero(indices.ravel() == e)[:1280]] = True
    row = compare_conventions(logits, indices, kept=kept.reshape(indices.shape))["megatron"]
    assert row.value > 1.7
    assert row.after_drop == pytest.approx(1.02, abs=0.02)


# ------------------------------------------------------------------------------------------------ definitions


@with_and_without_mask
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_load_balance_matches_the_definition(convention: str, score: str, masked: bool) -> None:
    logits, indices = random_problem(7, T=30, E=6, K=3)
    real = np.random.default_rng(8).random(30) < 0.7 if masked else np.ones(30, bool)
    lengths = [4, 0, 11, 1, 14]
    real[15] &= not masked  # a sequence without a real token
    options: dict[str, Any] = {"convention": convention, "score": score, "mask": real if masked else None}
    found = load_balance_loss(logits, indices, sequence_lengths=lengths, **options).value
    assert found == pytest.approx(plain_balance(logits, indices, convention, score, real, lengths), rel=1e-14)


def test_deepseek_without_lengths_is_one_sequence() -> None:
    one = LOSSES["deepseek-sequence softmax"](random_arrays(9)).value
    assert one == LOSSES["deepseek-sequence softmax"](random_arrays(9), None, [12]).value
    assert one == pytest.approx(LOSSES["megatron softmax"](random_arrays(9)).value, rel=1e-14)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_load_matches_the_formula(k: int) -> None:
    logits, _ = random_problem(3, T=40)
    noisy, noise_std = random_noise(4, logits)
    expected = cv_squared(plain_load(logits, noisy, noise_std, k))
    assert load_loss(logits, noisy, noise_std, k).value == pytest.approx(expected, rel=1e-12)


def test_load_matches_monte_carlo_of_its_definition() -> None:
    # ℓ_e = Σ_t P(e is among the top k if the noise of e alone is drawn again).  With S draws the standard
    # error of ℓ_e is sqrt(Σ_t q (1 - q) / S), q the probability; that of CV² is |dCV²/dℓ| times it.
    T, E, k, S = 64, 8, 2, 4000
    rng = np.random.default_rng(2024)
    logits = rng.standard_normal((T, E)) + np.linspace(-1, 1, E)
    noisy, noise_std = random_noise(5, logits)
    order = np.sort(noisy, axis=1)[:, ::-1]
    inside = noisy >= order[:, k - 1 : k]
    rival = np.where(inside, order[:, k : k + 1], order[:, k - 1 : k])  # the k-th largest of the others
    wins = np.zeros((T, E))
    for _ in range(S):
        wins += logits + noise_std * rng.standard_normal((T, E)) > rival
    q = wins / S
    drawn, error = q.sum(axis=0), np.sqrt((q * (1 - q)).sum(axis=0) / S)

    exact = plain_load(logits, noisy, noise_std, k)
    assert np.all(np.abs(drawn - exact) < 4.5 * error)  # false alarm of one of 8 experts: 5e-5
    assert np.mean(np.abs(drawn / exact - 1)) < 3e-3
    mean, value = drawn.mean(), cv_squared(drawn)
    slope = 2 / (E * mean**2) * np.abs(drawn - mean - value * mean)
    tolerance = 4.5 * math.sqrt(np.sum((slope * error) ** 2)) + np.mean(error**2) / mean**2
    assert load_loss(logits, noisy, noise_std, k).value == pytest.approx(value, abs=tolerance)


# -------------------------------------------------------------------------------------------------- gradients


@with_and_without_mask
@for_every_loss
def test_gradient(name: str, masked: bool) -> None:
    arrays = random_arrays(11)
    mask = np.random.default_rng(12).random(12) < 0.6 if masked else None
    for of, gradient in gradients(LOSSES[name](arrays, mask, [5, 0, 1, 6])).items():
        assert_gradient(gradient, lambda x, of=of: LOSSES[name](arrays | {of: x}, mask, [5, 0, 1, 6]).value, arrays[of])


@pytest.mark.parametrize("shape", [(), (1,), (5,), (12, 1), (1, 5), (1, 1)])
def test_load_gradient_of_a_broadcast_noise_std(shape: tuple[int, ...]) -> None:
    logits, _ = random_problem(19)
    noisy, _ = random_noise(20, logits)
    noise_std = np.asarray(np.random.default_rng(21).uniform(0.5, 1.5, shape))
    loss = load_loss(logits, noisy, noise_std, 2)
    assert_gradient(loss.dnoise_std, lambda s: load_loss(logits, noisy, s, 2).value, noise_std)


def test_load_total_derivative() -> None:
    # noisy = z + σ noise: the documented chain rule, against differences of the whole.
    logits, _ = random_problem(22)
    rng = np.random.default_rng(23)
    noise, noise_std = rng.standard_normal(logits.shape), rng.uniform(0.3, 1.5, logits.shape)

    def loss(z: np.ndarray, s: np.ndarray) -> Loss:
        return load_loss(z, z + s * noise, s, 2)

    g = gradients(loss(logits, noise_std))
    assert_gradient(g["logits"] + g["noisy_logits"], lambda z: loss(z, noise_std).value, logits)
    assert_gradient(g["noise_std"] + g["noisy_logits"] * noise, lambda s: loss(logits, s).value, noise_std)
    # A constant added to all logits of a token changes nothing.
    np.testing.assert_allclose((g["logits"] + g["noisy_logits"]).sum(axis=1), 0, atol=1e-16)


def test_load_has_no_gradient_if_all_experts_are_chosen() -> None:
    loss = LOSSES["load 5"](random_arrays(24))
    assert loss.value == 0.0
    assert all(g.shape == (12, 5) and not g.any() for g in gradients(loss).values())


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_softmax_gradients_sum_to_zero_for_each_token(convention: str) -> None:
    # Σ_e p_e (a_e - Σ a p) = 0 but for rounding relative to Σ a p, the share of the token in the value.
    logits, indices = random_problem(28, T=50, E=9, K=3)
    loss = load_balance_loss(logits, indices, convention=convention, sequence_lengths=[20, 30])
    gradient = gradients(loss)["logits"]
    assert np.abs(gradient.sum(axis=1)).max() <= 8 * EPS * loss.value
    assert np.abs(gradient).max() > 1e-3 * loss.value


# ------------------------------------------------------------------------------------------------ invariances


@pytest.mark.parametrize("T", [40, 1000])
@for_every_loss
def test_mask_equals_removing_the_rows(name: str, T: int) -> None:
    # Bits are equal within one block of 256 tokens; beyond, sums are associated differently.
    rtol, atol = (0, 0) if T <= 256 else (1e-12, 1e-16)
    arrays, mask, half = random_arrays(31, T), np.random.default_rng(32).random(T) < 0.6, T // 2
    for array in arrays.values():  # what a masked token holds does not matter
        array[~mask] = -1 if array.dtype == int else np.nan
    masked = LOSSES[name](arrays, mask, [half, T - half])
    lengths = [mask[:half].sum(), mask[half:].sum()]
    removed = LOSSES[name]({of: array[mask] for of, array in arrays.items()}, None, lengths)
    assert masked.value == pytest.approx(removed.value, rel=rtol, abs=0)
    for of, gradient in gradients(masked).items():
        assert not gradient[~mask].any()
        np.testing.assert_allclose(gradient[mask], gradients(removed)[of], rtol=rtol, atol=atol)


@for_every_loss
def test_order_of_the_tokens_does_not_matter(name: str) -> None:
    arrays, order = random_arrays(34, 600), np.random.default_rng(35).permutation(600)
    straight = LOSSES[name](arrays)
    shuffled = LOSSES[name]({of: array[order] for of, array in arrays.items()})
    assert shuffled.value == pytest.approx(straight.value, rel=1e-13)
    for of, gradient in gradients(straight).items():
        np.testing.assert_allclose(gradients(shuffled)[of], gradient[order], rtol=1e-11, atol=1e-16)


@for_every_loss
def test_repeating_the_tokens_does_not_change_the_value(name: str) -> None:
    arrays = random_arrays(37)
    often = LOSSES[name]({of: np.tile(array, (40, 1)) for of, array in arrays.items()})
    assert often.value == pytest.approx(LOSSES[name](arrays).value, rel=1e-9)  # 1e-10 in the divisor of CV²


@pytest.mark.parametrize("score", SCORES)
def test_hf_uses_the_softmax_whatever_the_score(score: str) -> None:
    found, expected = LOSSES[f"hf {score}"](random_arrays(1)), LOSSES["hf softmax"](random_arrays(1))
    assert found.value == expected.value
    np.testing.assert_array_equal(found.dlogits, expected.dlogits)


@for_every_loss
def test_float32_data_are_computed_in_float64(name: str) -> None:
    # The same bits as for the widened data; the gradient is rounded once.
    single = {n: a if n == "indices" else a.astype(np.float32) for n, a in random_arrays(42, 700).items()}
    double = {n: a if n == "indices" else a.astype(np.float64) for n, a in single.items()}
    found, exact = LOSSES[name](single), LOSSES[name](double)
    assert found.value == exact.value
    for of, gradient in gradients(found).items():
        assert gradient.dtype == np.float32
        np.testing.assert_array_equal(gradient, gradients(exact)[of].astype(np.float32))


def test_error_does_not_grow_with_the_number_of_tokens() -> None:
    row = np.array([[0.1, 0.7, -0.3]], np.float32)
    many, first = np.repeat(row, 200_000, axis=0), np.ones((200_000, 1), np.int32)
    assert z_loss(many).value == pytest.approx(z_loss(row).value, rel=1e-13)
    one = load_balance_loss(row, first[:1])
    assert load_balance_loss(many, first).value == pytest.approx(one.value, rel=1e-13)


@for_every_loss
def test_bits_do_not_depend_on_threads(name: str) -> None:
    arrays, before, found = random_arrays(45, 2000), _core.num_threads(), []
    try:
        for threads in (1, 2, 5):
            _core.set_num_threads(threads)
            found.append(LOSSES[name](arrays, None, [700, 1300]))
    finally:
        _core.set_num_threads(before)
    for other in found[1:]:
        assert other.value == found[0].value
        for of, gradient in gradients(other).items():
            np.testing.assert_array_equal(gradient, gradients(found[0])[of])


# -------------------------------------------------------------------------------------------- extreme numbers


def assert_finite(*found: Loss) -> None:
    for loss in found:
        assert math.isfinite(loss.value)
        assert all(np.isfinite(g).all() for g in gradients(loss).values())


@for_both_dtypes
@pytest.mark.parametrize("size", [88.0, 1e4, 1e30])
def test_large_logits(dtype: Any, size: float) -> None:
    logits = np.array([[size, 0, -size], [-size, size, size]], dtype)
    indices = np.array([[0], [1]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        z, load = z_loss(logits), load_loss(logits, logits, 0.5, 1)
        balance = {score: load_balance_loss(logits, indices, score=score) for score in SCORES}
    assert_finite(z, load, *balance.values())
    assert z.value == pytest.approx(float(dtype(size)) ** 2, rel=0.01)  # + ln 2
    # p = (1, 0, 0) and (0, 1/2, 1/2), f = (1/2, 1/2, 0), P = (1/2, 1/4, 1/4)
    assert balance["softmax"].value == pytest.approx(3 * (1 / 2 * 1 / 2 + 1 / 2 * 1 / 4), rel=1e-6)


@for_both_dtypes
def test_minus_infinity_excludes_an_expert(dtype: Any) -> None:
    rng = np.random.default_rng(38)
    logits = rng.standard_normal((20, 6)).astype(dtype)
    noisy = logits + rng.standard_normal((20, 6)).astype(dtype)
    logits[:, 4] = noisy[:, 4] = -np.inf
    logits[3, 1:] = noisy[3, 1:] = -np.inf  # one expert left
    indices, others = top_k(logits, 1), [0, 1, 2, 3, 5]
    found = {score: load_balance_loss(logits, indices, score=score) for score in SCORES}
    for score, loss in found.items():
        smaller = load_balance_loss(logits[:, others], np.where(indices == 5, 4, indices), score=score)
        assert loss.value == pytest.approx(6 / 5 * smaller.value, rel=1e-6)
    z, load = z_loss(logits), load_loss(logits, noisy, 1.0, 2)
    assert z.value == z_loss(logits[:, others]).value
    assert_finite(z, load, *found.values())
    for loss in (z, load, *found.values()):
        assert not gradients(loss)["logits"][:, 4].any()


@pytest.mark.parametrize("score", SCORES)
def test_infinite_rows(score: str) -> None:
    # Nothing but -inf: no expert, no contribution; the other token is left with P = p / 2, f = 1/2.
    logits, indices = np.array([[1.0, 2.0], [-np.inf, -np.inf]]), np.array([[1], [-1]])
    loss = load_balance_loss(logits, indices, score=score)
    alone = load_balance_loss(logits[:1], indices[:1], score=score)
    assert loss.value == pytest.approx(alone.value / 4, rel=1e-14)
    assert not gradients(loss)["logits"][1].any()
    assert z_loss(logits).value == np.inf
    assert not gradients(z_loss(logits))["logits"][1].any()
    # +inf takes all and shares with others of its kind (a sigmoid is 1 there, and not 0 elsewhere).
    above = np.array([[np.inf, 1.0, np.inf]])
    loss = load_balance_loss(above, np.array([[0]]), score=score)
    assert_finite(loss)
    assert score == "sigmoid" or loss.value == pytest.approx(3 / 2, rel=1e-12)
    assert z_loss(above).value == np.inf


def test_nan_stays_in_its_row_of_the_gradient() -> None:
    logits, indices = random_problem(39)
    bad = logits.copy()
    bad[4, 2] = np.nan
    for loss in [z_loss, *(lambda z, s=s: load_balance_loss(z, indices, score=s) for s in SCORES)]:
        clean, found = gradients(loss(logits))["logits"], gradients(loss(bad))["logits"]
        assert math.isnan(loss(bad).value) and np.isnan(found[4]).all()
        np.testing.assert_array_equal(np.delete(found, 4, 0), np.delete(clean, 4, 0))


def test_nan_and_ties_in_noisy_logits_do_no_harm() -> None:
    arrays = random_arrays(40)
    arrays["noisy_logits"][2] = arrays["noisy_logits"][3, 1] = np.nan
    assert math.isnan(LOSSES["load 4"](arrays).value)
    loss = load_loss(np.zeros((4, 3)), np.zeros((4, 3)), 1.0, 1)  # all margins are 0, all loads 4 Φ(0)
    assert loss.value == 0.0
    assert_finite(loss)


@for_both_dtypes
@pytest.mark.parametrize("T", [0, 3])
@for_every_loss
def test_no_tokens_give_zero(name: str, T: int, dtype: Any) -> None:
    nothing = np.full((T, 5), np.nan, dtype)
    arrays = dict.fromkeys(("logits", "noisy_logits", "noise_std"), nothing)
    arrays |= {"indices": np.zeros((T, 2), int), "weights": nothing[:, :2]}
    for lengths in (None, [0, T], [T, 0, 0]):
        loss = LOSSES[name](arrays, np.zeros(T, bool), lengths)
        assert loss.value == 0.0
        assert all(g.shape[0] == T and g.dtype == dtype and not g.any() for g in gradients(loss).values())
    if T == 0:
        assert LOSSES[name](arrays, None, []).value == 0.0


# --------------------------------------------------------------------------------------- arguments and errors


def test_arguments_are_converted_and_never_written() -> None:
    logits, indices = random_problem(47)
    expected = load_balance_loss(logits, indices)
    for z, i in [
        (np.asfortranarray(logits), indices.astype(np.uint8)),
        (logits[:, ::-1][:, ::-1], np.repeat(indices, 2, axis=1)[:, ::2]),
        (logits.tolist(), indices.tolist()),
        (logits.astype(">f8"), indices.astype(">i8")),
    ]:
        assert load_balance_loss(z, i).value == expected.value
    arrays = random_arrays(48)
    for array in arrays.values():
        array.setflags(write=False)
    for loss in LOSSES.values():
        loss(arrays)


Z, I = np.zeros((3, 4)), np.zeros((3, 2), int)
W, F = Z[:, :2], Z.astype(np.float32)
ERRORS = {
    "ValueError: logits must have 2 dim": lambda: load_balance_loss(np.zeros(3), I),
    "TypeError: logits": lambda: load_balance_loss(np.zeros((3, 4), int), I),
    "ValueError: logits must have .* at least one expert": lambda: load_balance_loss(np.zeros((3, 0)), I),
    r"ValueError: indices must have shape \(T, K\).*T = 3": lambda: load_balance_loss(Z, I[:2]),
    "ValueError: indices must .* K >= 1": lambda: load_balance_loss(Z, I[:, :0]),
    "ValueError: indices": lambda: load_balance_loss(Z, I[0]),
    "TypeError: indices": lambda: load_balance_loss(Z, I + 0.5),
    r"IndexError: indices\[1, 1\] = 4": lambda: load_balance_loss(Z, [[0, 1], [2, 4], [9, 0]]),
    r"IndexError: indices\[1, 0\] = -2": lambda: load_balance_loss(Z, [[0, 1], [-2, 3], [0, 0]]),
    "ValueError: convention .* Did you mean 'switch'": lambda: load_balance_loss(Z, I, convention="swich"),
    "TypeError: convention must be one of 'switch'": lambda: load_balance_loss(Z, I, convention=None),
    "ValueError: score .* Did you mean 'softmax'": lambda: load_balance_loss(Z, I, score="softmx"),
    "ValueError: mask": lambda: load_balance_loss(Z, I, mask=np.ones(4, bool)),
    "TypeError: mask": lambda: load_balance_loss(Z, I, mask=np.ones(3)),
    "ValueError: .* sum to T = 3.*sum to 2": lambda: load_balance_loss(Z, I, sequence_lengths=[1, 1]),
    r"ValueError: .*lengths\[0\] must be in 0..T": lambda: load_balance_loss(Z, I, sequence_lengths=[4, -1]),
    r"ValueError: .*lengths\[1\]": lambda: load_balance_loss(Z, I, sequence_lengths=[3, -1, 1]),
    r"ValueError: .*got 9223": lambda: load_balance_loss(Z, I, sequence_lengths=np.uint64([2**63, 3])),
    "TypeError: sequence_lengths .*float64": lambda: load_balance_loss(Z, I, sequence_lengths=[1.5, 1.5]),
    r"TypeError: sequence_lengths .*shape \(\)": lambda: load_balance_loss(Z, I, sequence_lengths=3),
    r"ValueError: indices .* of weights \(T, K\) = \(3, 4\)": lambda: importance_loss(Z, I, 4),
    "ValueError: num_experts must be in 1": lambda: importance_loss(W, I, 0),
    "TypeError: num_experts must be an int": lambda: importance_loss(W, I, 4.0),
    r"IndexError: indices\[0, 0\]": lambda: importance_loss(W, I + 4, 4),
    "ValueError: noisy_logits must have the shape": lambda: load_loss(Z, Z[:2], 1.0, 1),
    r"ValueError: top_k must be in 1..E \(4\); got 0": lambda: load_loss(Z, Z, 1.0, 0),
    r"ValueError: top_k must be in 1..E \(4\); got 5": lambda: load_loss(Z, Z, 1.0, 5),
    "TypeError: top_k must be an int": lambda: load_loss(Z, Z, 1.0, 1.5),
    "ValueError: noise_std .*> 0 .*token 0, expert 0.*expert_load": lambda: load_loss(Z, Z, 0.0, 1),
    "ValueError: .*got nan for token 0, expert 2": lambda: load_loss(Z, Z, [1, 1, np.nan, -1], 1),
    "ValueError: noise_std must be finite": lambda: load_loss(Z, Z, np.inf, 1),
    "ValueError: noise_std .*in float32": lambda: load_loss(F, F, 1e-60, 1),
    r"ValueError: noise_std .* broadcasts .*\(3, 4\)": lambda: load_loss(Z, Z, np.ones(3), 1),
    "ValueError: noise_std .* broadcasts": lambda: load_loss(Z, Z, np.ones((1, 3, 4)), 1),
    r"ValueError: logits .*\(2, 3, 4\)": lambda: z_loss(np.zeros((2, 3, 4))),
    "TypeError: logits must be an array": lambda: z_loss("logits"),
    r"ValueError: counts .*\(E,\) = \(3,\)": lambda: update_choice_bias(np.zeros(3), [1, 2]),
    r"ValueError: counts\[1\] must be finite .* got -2": lambda: update_choice_bias(np.zeros(2), [1, -2]),
    r"ValueError: counts\[1\] must be finite .* got nan": lambda: update_choice_bias(np.zeros(2), [1, np.nan]),
    "TypeError: counts must be an array of numbers": lambda: update_choice_bias(np.zeros(1), ["a"]),
    "ValueError: rate must .* got -1": lambda: update_choice_bias(np.zeros(2), [1, 2], rate=-1),
    "ValueError: rate must .* got nan": lambda: update_choice_bias(np.zeros(2), [1, 2], rate=math.nan),
    "TypeError: choice_bias": lambda: update_choice_bias(np.zeros(2, int), [1, 2]),
    "TypeError: kept must be a bool array": lambda: compare_conventions(Z, I, kept=np.ones((3, 2))),
    "ValueError: kept must have the shape": lambda: compare_conventions(Z, I, kept=np.ones(3, bool)),
}


@pytest.mark.parametrize("sentence", ERRORS)
def test_errors_are_sentences(sentence: str) -> None:
    error, message = sentence.split(": ", 1)
    with pytest.raises(getattr(builtins, error), match="^" + message):
        ERRORS[sentence]()


def test_conventions_table_prints() -> None:
    logits, indices = random_problem(49)
    lines = str(compare_conventions(logits, indices)).splitlines()
    assert len(lines) == 1 + len(CONVENTIONS)
    assert lines[1].startswith("switch") and "after drop" not in lines[0]
    dropped = str(compare_conventions(logits, indices, kept=np.ones(indices.shape, bool))).splitlines()
    assert dropped[0].endswith("after drop") and len(set(map(len, dropped))) == 1
