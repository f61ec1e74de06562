"""Auxiliary losses: hand-computed values, finite differences, invariances, and Monte Carlo of the load's definition."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from numoe import _core, losses
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

SCORES = ("softmax", "softmax_chosen", "sigmoid", "sqrt_softplus")
DTYPES = (np.float32, np.float64)
EPS = np.finfo(np.float64).eps

# Four tokens, three experts, K = 2.  First choices (2, 1, 1), all choices (3, 3, 2), P = (0.3375, 0.3, 0.3625).
PROBABILITIES = np.array([[0.5, 0.3, 0.2], [0.6, 0.1, 0.3], [0.2, 0.7, 0.1], [0.05, 0.1, 0.85]])
CHOICES = np.array([[0, 1], [0, 2], [1, 0], [2, 1]])


# ------------------------------------------------------------------------------------------------------ helpers


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


def random_arrays(seed: int, T: int) -> dict[str, np.ndarray]:
    """One argument for every loss."""
    logits, indices = random_problem(seed, T)
    noisy, noise_std = random_noise(seed + 1, logits)
    weights = np.random.default_rng(seed + 2).random(indices.shape)
    return dict(logits=logits, indices=indices, noisy=noisy, noise_std=noise_std, weights=weights)


def every_loss(a: dict[str, np.ndarray], mask: Any = None, lengths: Any = None) -> dict[str, Loss]:
    E = a["logits"].shape[1]
    found = {
        f"{convention} {score}": load_balance_loss(
            a["logits"],
            a["indices"],
            convention=convention,
            score=score,
            mask=mask,
            sequence_lengths=lengths,
        )
        for convention in CONVENTIONS
        for score in SCORES
    }
    found["importance"] = importance_loss(a["weights"], a["indices"], E, mask=mask)
    found["load"] = load_loss(a["logits"], a["noisy"], a["noise_std"], 2, mask=mask)
    found["load, k = E"] = load_loss(a["logits"], a["noisy"], a["noise_std"], E, mask=mask)
    return found | {"z": z_loss(a["logits"], mask=mask)}


def gradients(loss: Loss) -> dict[str, np.ndarray]:
    return {name: g for name, g in vars(loss).items() if name != "value" and g is not None}


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


# -------------------------------------------------------------------------------------------- values by hand


@pytest.mark.parametrize("dtype", DTYPES)
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
    assert loss.value == pytest.approx(expected, rel=8 * np.finfo(dtype).eps)
    assert list(gradients(loss)) == ["logits"]
    assert gradients(loss)["logits"].dtype == dtype


def test_load_balance_gradient_by_hand() -> None:
    # One token, two experts, p = (3/4, 1/4), expert 0 chosen: value 2 * 1 * 3/4.
    # a = (2, 0), Σ a p = 3/2:  dz = (3/4 (2 - 3/2), 1/4 (0 - 3/2)) = (3/8, -3/8)
    loss = load_balance_loss(np.log([[3.0, 1.0]]), np.array([[0]]))
    assert loss.value == pytest.approx(1.5)
    np.testing.assert_allclose(loss.logits, [[0.375, -0.375]], rtol=1e-14)


def test_load_balance_sigmoid_by_hand() -> None:
    # scores (0.8, 0.4, 0.4) and (0.5, 0.25, 0.75): p = (1/2, 1/4, 1/4) and (1/3, 1/6, 1/2), P_0 = 5/12,
    # P_2 = 3/8.  Experts 0 and 2 are chosen once each: 3 (1/2 5/12 + 1/2 3/8) = 19/16
    scores = np.array([[0.8, 0.4, 0.4], [0.5, 0.25, 0.75]])
    loss = load_balance_loss(np.log(scores / (1 - scores)), np.array([[0], [2]]), score="sigmoid")
    assert loss.value == pytest.approx(19 / 16, rel=1e-14)


def test_load_balance_sqrt_softplus_by_hand() -> None:
    # scores 1 and 2 (softplus 1 and 4): p = (1/3, 2/3), expert 1 chosen: 2 * 1 * 2/3
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
    np.testing.assert_array_equal(nothing.logits, 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_importance_by_hand(dtype: Any) -> None:
    # I = (0.75 + 0.5, 0.25 + 0.5, 0): mean 2/3, variance (49 + 1 + 64) / 144 / 3 = 19/72; CV² = 19/72 9/4 = 19/32
    # dI_e = 2 (I_e - mean - CV² mean) / (E mean²) = 3/2 (I_e - 17/16): (9/32, -15/32, -51/32)
    weights = np.array([[0.75, 0.25], [0.5, 0.5]], dtype)
    loss = importance_loss(weights, np.array([[0, 1], [1, 0]]), 3)
    assert loss.value == pytest.approx(19 / 32, rel=1e-9)  # less 1e-10 in the divisor
    assert gradients(loss)["weights"].dtype == dtype
    np.testing.assert_allclose(loss.weights, [[9 / 32, -15 / 32], [-15 / 32, 9 / 32]], rtol=1e-6)
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_z_by_hand(dtype: Any) -> None:
    # rows with Σ e^z = 4 and 1: (ln(4)² + 0) / 2; dz = 2/2 ln(4) (1/4, 3/4) and 0
    loss, eps = z_loss(np.log(np.array([[1.0, 3.0], [0.5, 0.5]])).astype(dtype)), np.finfo(dtype).eps
    assert loss.value == pytest.approx(math.log(4) ** 2 / 2, rel=8 * eps)
    assert gradients(loss)["logits"].dtype == dtype
    expected = [[math.log(4) / 4, 3 * math.log(4) / 4], [0, 0]]
    np.testing.assert_allclose(loss.logits, expected, rtol=8 * eps, atol=eps)


@pytest.mark.parametrize("dtype", DTYPES)
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


# ----------------------------------------------------------------------------------------------- balanced values


@pytest.mark.parametrize(("E", "K"), [(4, 1), (8, 2), (6, 3)])
def test_balanced_values(E: int, K: int) -> None:
    logits = np.zeros((2 * E, E))
    indices = (
        np.arange(2 * E)[:, None] + np.arange(K)
    ) % E  # every expert equally often, first choice or not
    table = compare_conventions(logits, indices, sequence_lengths=[E, E])
    expected = {"switch": 1, "gshard": 1 / E**2, "megatron": 1, "hf": K, "deepseek-sequence": 1}
    assert list(table) == list(CONVENTIONS)
    for name, value in expected.items():
        assert table[name].value == pytest.approx(value, rel=1e-14)
        assert table[name].balanced == pytest.approx(value, rel=1e-15)
        assert table[name].relative == pytest.approx(1, rel=1e-14)
        loss = load_balance_loss(logits, indices, convention=name, sequence_lengths=[E, E])
        np.testing.assert_allclose(loss.logits, 0, atol=1e-16)
    assert importance_loss(np.full((2 * E, K), 1 / K), indices, E).value == pytest.approx(0, abs=1e-15)


def test_one_expert_gives_exact_constants() -> None:
    logits, first = random_problem(0, T=7)[0][:, :1], np.zeros((7, 1), int)
    for convention in CONVENTIONS:
        for score in SCORES:
            loss = load_balance_loss(logits, first, convention=convention, score=score)
            assert loss.value == pytest.approx(1.0, abs=4 * EPS)
            np.testing.assert_array_equal(loss.logits, 0.0)
    assert importance_loss(np.ones((7, 1)), first, 1).value == 0.0
    assert load_loss(logits, logits, 1.0, 1).value == 0.0
    assert z_loss(logits).value == pytest.approx(np.mean(logits**2), rel=1e-14)


@pytest.mark.parametrize(
    ("bias", "switch", "megatron", "hf", "gshard"),
    [
        (0.0, 1.000, 1.000, 2.000, 0.0156),
        (0.5, 1.140, 1.116, 2.232, 0.0178),
        (1.5, 1.976, 1.783, 3.566, 0.0309),
    ],
)
def test_one_routing_under_each_convention(
    bias: float, switch: float, megatron: float, hf: float, gshard: float
) -> None:
    # T = 4096, E = 8, K = 2, logits N(0, 1) + linspace(-bias, bias); the numbers are of another sample.  From
    # sample to sample the biased values move by about 1 %, the unbiased ones by less than the last digit.
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((4096, 8)) + np.linspace(-bias, bias, 8)
    table = compare_conventions(logits, top_k(logits, 2))
    for name, value in {"switch": switch, "megatron": megatron, "hf": hf, "gshard": gshard}.items():
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


# --------------------------------------------------------------------------------------------------- definitions


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_load_balance_matches_the_definition(convention: str, score: str, masked: bool) -> None:
    logits, indices = random_problem(7, T=30, E=6, K=3)
    mask = np.random.default_rng(8).random(30) < 0.7 if masked else np.ones(30, bool)
    lengths = [4, 0, 11, 1, 14]
    mask[15] &= not masked  # a sequence without a real token
    loss = load_balance_loss(
        logits,
        indices,
        convention=convention,
        score=score,
        mask=mask if masked else None,
        sequence_lengths=lengths,
    )
    assert loss.value == pytest.approx(
        plain_balance(logits, indices, convention, score, mask, lengths), rel=1e-14
    )


def test_deepseek_without_lengths_is_one_sequence() -> None:
    logits, indices = random_problem(9)
    one = load_balance_loss(logits, indices, convention="deepseek-sequence")
    same = load_balance_loss(logits, indices, convention="deepseek-sequence", sequence_lengths=[12])
    assert one.value == same.value
    assert one.value == pytest.approx(
        load_balance_loss(logits, indices, convention="megatron").value, rel=1e-14
    )


@pytest.mark.parametrize("k", [1, 2, 4])
def test_load_matches_the_formula(k: int) -> None:
    logits, _ = random_problem(3, T=40)
    noisy, noise_std = random_noise(4, logits)
    expected = cv_squared(plain_load(logits, noisy, noise_std, k))
    assert load_loss(logits, noisy, noise_std, k).value == pytest.approx(expected, rel=1e-12)


def test_load_matches_monte_carlo_of_its_definition() -> None:
    # ℓ_e = Σ_t P(e is among the top k if the noise of e alone is drawn again).  With S draws the standard error
    # of ℓ_e is sqrt(Σ_t q (1 - q) / S), q the probability; to first order that of CV² is |dCV²/dℓ| times it.
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


# ----------------------------------------------------------------------------------------------------- gradients


def some_mask(masked: bool) -> np.ndarray | None:
    return np.random.default_rng(12).random(12) < 0.6 if masked else None


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_load_balance_gradient(convention: str, score: str, masked: bool) -> None:
    logits, indices = random_problem(11)
    options: dict[str, Any] = {"convention": convention, "score": score, "mask": some_mask(masked)}
    options["sequence_lengths"] = [5, 0, 1, 6]
    loss = load_balance_loss(logits, indices, **options)
    assert_gradient(loss.logits, lambda z: load_balance_loss(z, indices, **options).value, logits)


@pytest.mark.parametrize("masked", [False, True])
def test_importance_gradient(masked: bool) -> None:
    _, indices = random_problem(13)
    indices[3, 1] = -1
    weights, mask = np.random.default_rng(14).random(indices.shape), some_mask(masked)
    loss = importance_loss(weights, indices, 5, mask=mask)
    assert_gradient(loss.weights, lambda w: importance_loss(w, indices, 5, mask=mask).value, weights)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_load_gradient(k: int, masked: bool) -> None:
    logits, _ = random_problem(16)
    noisy, noise_std = random_noise(17, logits)
    mask = some_mask(masked)
    loss = load_loss(logits, noisy, noise_std, k, mask=mask)
    assert_gradient(loss.logits, lambda z: load_loss(z, noisy, noise_std, k, mask=mask).value, logits)
    assert_gradient(loss.noisy_logits, lambda z: load_loss(logits, z, noise_std, k, mask=mask).value, noisy)
    assert_gradient(loss.noise_std, lambda s: load_loss(logits, noisy, s, k, mask=mask).value, noise_std)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (12, 1), (1, 5), (1, 1)])
def test_load_gradient_of_a_broadcast_noise_std(shape: tuple[int, ...]) -> None:
    logits, _ = random_problem(19)
    noisy, _ = random_noise(20, logits)
    noise_std = np.asarray(np.random.default_rng(21).uniform(0.5, 1.5, shape))
    loss = load_loss(logits, noisy, noise_std, 2)
    assert_gradient(loss.noise_std, lambda s: load_loss(logits, noisy, s, 2).value, noise_std)


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
    loss = every_loss(random_arrays(24, 12))["load, k = E"]
    assert loss.value == 0.0
    assert all(g.shape == (12, 5) and not g.any() for g in gradients(loss).values())


@pytest.mark.parametrize("masked", [False, True])
def test_z_gradient(masked: bool) -> None:
    logits, _ = random_problem(26)
    mask = some_mask(masked)
    assert_gradient(z_loss(logits, mask=mask).logits, lambda z: z_loss(z, mask=mask).value, logits)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_softmax_gradients_sum_to_zero_for_each_token(convention: str) -> None:
    # Σ_e p_e (a_e - Σ a p) = 0 but for rounding relative to Σ a p, the share of the token in the value.
    logits, indices = random_problem(28, T=50, E=9, K=3)
    loss = load_balance_loss(logits, indices, convention=convention, sequence_lengths=[20, 30])
    gradient = gradients(loss)["logits"]
    assert np.abs(gradient.sum(axis=1)).max() <= 8 * EPS * loss.value
    assert np.abs(gradient).max() > 1e-3 * loss.value


# --------------------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("T", [40, 1000])
def test_mask_equals_removing_the_rows(T: int) -> None:
    # Bits are equal within one block of 256 tokens; beyond, sums are associated differently.
    rtol, atol = (0, 0) if T <= 256 else (1e-12, 1e-16)
    arrays = random_arrays(31, T)
    mask = np.random.default_rng(32).random(T) < 0.6
    half = T // 2
    for array in arrays.values():  # what a masked token holds does not matter
        array[~mask] = -1 if array.dtype == int else np.nan
    masked = every_loss(arrays, mask, [half, T - half])
    removed = every_loss(
        {name: array[mask] for name, array in arrays.items()}, None, [mask[:half].sum(), mask[half:].sum()]
    )
    for name, loss in masked.items():
        assert loss.value == pytest.approx(removed[name].value, rel=rtol, abs=0), name
        for of, gradient in gradients(loss).items():
            assert not gradient[~mask].any(), (name, of)
            np.testing.assert_allclose(gradient[mask], gradients(removed[name])[of], rtol=rtol, atol=atol)


def test_order_of_the_tokens_does_not_matter() -> None:
    arrays = random_arrays(34, 600)
    order = np.random.default_rng(35).permutation(600)
    straight, shuffled = every_loss(arrays), every_loss({name: a[order] for name, a in arrays.items()})
    for name, loss in straight.items():
        assert shuffled[name].value == pytest.approx(loss.value, rel=1e-13), name
        for of, gradient in gradients(loss).items():
            np.testing.assert_allclose(gradients(shuffled[name])[of], gradient[order], rtol=1e-11, atol=1e-16)


def test_repeating_the_tokens_does_not_change_the_value() -> None:
    arrays = random_arrays(37, 12)
    once, often = every_loss(arrays), every_loss({k: np.tile(a, (40, 1)) for k, a in arrays.items()})
    for name, loss in once.items():
        assert often[name].value == pytest.approx(loss.value, rel=1e-9), name  # 1e-10 in the divisor of CV²


def test_hf_uses_the_softmax_whatever_the_score() -> None:
    found = every_loss(random_arrays(1, 12))
    for score in SCORES:
        assert found[f"hf {score}"].value == found["hf softmax"].value
        np.testing.assert_array_equal(found[f"hf {score}"].logits, found["hf softmax"].logits)


def test_float32_data_are_computed_in_float64() -> None:
    # The same bits as for the widened data; the gradient is rounded once.
    single = {n: a if n == "indices" else a.astype(np.float32) for n, a in random_arrays(42, 700).items()}
    double = {n: a if n == "indices" else a.astype(np.float64) for n, a in single.items()}
    exact = every_loss(double)
    for name, loss in every_loss(single).items():
        assert loss.value == exact[name].value, name
        for of, gradient in gradients(loss).items():
            assert gradient.dtype == np.float32
            np.testing.assert_array_equal(gradient, gradients(exact[name])[of].astype(np.float32))


def test_error_does_not_grow_with_the_number_of_tokens() -> None:
    row = np.array([[0.1, 0.7, -0.3]], np.float32)
    many, first = np.repeat(row, 200_000, axis=0), np.ones((200_000, 1), np.int32)
    assert z_loss(many).value == pytest.approx(z_loss(row).value, rel=1e-13)
    one = load_balance_loss(row, first[:1])
    assert load_balance_loss(many, first).value == pytest.approx(one.value, rel=1e-13)


def test_bits_do_not_depend_on_threads() -> None:
    arrays, before = random_arrays(45, 2000), _core.num_threads()
    try:
        _core.set_num_threads(1)
        expected = every_loss(arrays, lengths=[700, 1300])
        for threads in (2, 5):
            _core.set_num_threads(threads)
            for name, loss in every_loss(arrays, lengths=[700, 1300]).items():
                assert loss.value == expected[name].value
                for of, gradient in gradients(loss).items():
                    np.testing.assert_array_equal(gradient, gradients(expected[name])[of])
    finally:
        _core.set_num_threads(before)


# ----------------------------------------------------------------------------------------------- extreme numbers


def assert_finite(*found: Loss) -> None:
    for loss in found:
        assert math.isfinite(loss.value)
        assert all(np.isfinite(g).all() for g in gradients(loss).values())


@pytest.mark.parametrize("dtype", DTYPES)
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


@pytest.mark.parametrize("dtype", DTYPES)
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
    # Nothing but -inf: no expert, no contribution, so half of the value of the other token alone times its count 1/2.
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
    arrays = random_arrays(40, 12)
    arrays["noisy"][2] = arrays["noisy"][3, 1] = np.nan
    assert math.isnan(load_loss(arrays["logits"], arrays["noisy"], arrays["noise_std"], 4).value)
    loss = load_loss(np.zeros((4, 3)), np.zeros((4, 3)), 1.0, 1)  # all margins are 0, all loads 4 Φ(0)
    assert loss.value == 0.0
    assert_finite(loss)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [0, 3])
def test_no_tokens_give_zero(T: int, dtype: Any) -> None:
    nothing = np.full((T, 4), np.nan, dtype)
    arrays = dict.fromkeys(("logits", "noisy", "noise_std"), nothing)
    arrays |= {"indices": np.zeros((T, 2), int), "weights": nothing[:, :2]}
    for lengths in ([0, T], None):
        for name, loss in every_loss(arrays, np.zeros(T, bool), lengths).items():
            assert loss.value == 0.0, name
            assert all(g.shape[0] == T and g.dtype == dtype and not g.any() for g in gradients(loss).values())
    assert z_loss(nothing[:0]).value == 0.0
    options: dict[str, Any] = {"convention": "deepseek-sequence", "sequence_lengths": []}
    assert load_balance_loss(nothing[:0], arrays["indices"][:0], **options).value == 0.0


# ------------------------------------------------------------------------------------------- arguments and errors


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
    arrays = random_arrays(48, 12)
    for array in arrays.values():
        array.setflags(write=False)
    every_loss(arrays)


Z, I = np.zeros((3, 4)), np.zeros((3, 2), int)  # noqa: E741
W = Z[:, :2]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: load_balance_loss(np.zeros(3), I), ValueError, "logits"),
        (lambda: load_balance_loss(np.zeros((3, 4), int), I), TypeError, "logits"),
        (lambda: load_balance_loss(np.zeros((3, 0)), I), ValueError, "at least one expert"),
        (lambda: load_balance_loss(Z, I[:2]), ValueError, r"indices must have shape \(T, K\).*T = 3"),
        (lambda: load_balance_loss(Z, I[:, :0]), ValueError, "K >= 1"),
        (lambda: load_balance_loss(Z, I[0]), ValueError, "indices"),
        (lambda: load_balance_loss(Z, I + 0.5), TypeError, "indices"),
        (lambda: load_balance_loss(Z, [[0, 1], [2, 4], [9, 0]]), IndexError, r"indices\[1, 1\] = 4"),
        (lambda: load_balance_loss(Z, [[0, 1], [-2, 3], [0, 0]]), IndexError, r"indices\[1, 0\] = -2"),
        (lambda: load_balance_loss(Z, I, convention="swich"), ValueError, "Did you mean 'switch'"),
        (lambda: load_balance_loss(Z, I, convention=None), TypeError, "convention must be one of 'switch'"),
        (lambda: load_balance_loss(Z, I, score="softmx"), ValueError, "Did you mean 'softmax'"),
        (lambda: load_balance_loss(Z, I, mask=np.ones(4, bool)), ValueError, "mask"),
        (lambda: load_balance_loss(Z, I, mask=np.ones(3)), TypeError, "mask"),
        (lambda: load_balance_loss(Z, I, sequence_lengths=[1, 1]), ValueError, r"sum to T = 3.*sum to 2"),
        (lambda: load_balance_loss(Z, I, sequence_lengths=[4, -1]), ValueError, r"lengths\[0\] must be in 0"),
        (lambda: load_balance_loss(Z, I, sequence_lengths=[3, -1, 1]), ValueError, r"lengths\[1\]"),
        (
            lambda: load_balance_loss(Z, I, sequence_lengths=np.uint64([2**63, 3])),
            ValueError,
            r"lengths\[0\]",
        ),
        (lambda: load_balance_loss(Z, I, sequence_lengths=[1.5, 1.5]), TypeError, "sequence_lengths"),
        (lambda: load_balance_loss(Z, I, sequence_lengths=3), TypeError, "sequence_lengths"),
        (lambda: importance_loss(Z, I, 4), ValueError, r"shape of weights \(T, K\) = \(3, 4\)"),
        (lambda: importance_loss(W, I, 0), ValueError, "num_experts must be in 1"),
        (lambda: importance_loss(W, I, 4.0), TypeError, "num_experts must be an int"),
        (lambda: importance_loss(W, I + 4, 4), IndexError, r"indices\[0, 0\]"),
        (lambda: load_loss(Z, Z[:2], 1.0, 1), ValueError, "noisy_logits must have the shape of logits"),
        (lambda: load_loss(Z, Z, 1.0, 0), ValueError, r"top_k must be in 1..E \(4\); got 0"),
        (lambda: load_loss(Z, Z, 1.0, 5), ValueError, r"top_k must be in 1..E \(4\); got 5"),
        (lambda: load_loss(Z, Z, 1.0, 1.5), TypeError, "top_k must be an int"),
        (lambda: load_loss(Z, Z, 0.0, 1), ValueError, "> 0 .*token 0, expert 0.*expert_load"),
        (lambda: load_loss(Z, Z, [1, 1, np.nan, -1], 1), ValueError, "got nan for token 0, expert 2"),
        (lambda: load_loss(Z, Z, np.inf, 1), ValueError, "noise_std must be finite"),
        (lambda: load_loss(Z.astype("f4"), Z.astype("f4"), 1e-60, 1), ValueError, "in float32"),
        (lambda: load_loss(Z, Z, np.ones(3), 1), ValueError, r"broadcasts to the shape of logits.*\(3, 4\)"),
        (lambda: load_loss(Z, Z, np.ones((1, 3, 4)), 1), ValueError, "broadcasts to the shape of logits"),
        (lambda: z_loss(np.zeros((2, 3, 4))), ValueError, "logits"),
        (lambda: z_loss("logits"), TypeError, "logits"),
        (
            lambda: update_choice_bias(np.zeros(3), [1, 2]),
            ValueError,
            r"shape of choice_bias \(E,\) = \(3,\)",
        ),
        (
            lambda: update_choice_bias(np.zeros(2), [1, -2]),
            ValueError,
            r"counts\[1\] must be finite and >= 0",
        ),
        (lambda: update_choice_bias(np.zeros(2), [1, np.nan]), ValueError, r"counts\[1\] must be finite"),
        (
            lambda: update_choice_bias(np.zeros(2), ["a", "b"]),
            TypeError,
            "counts must be an array of numbers",
        ),
        (
            lambda: update_choice_bias(np.zeros(2), [1, 2], rate=-1),
            ValueError,
            "rate must be finite and >= 0",
        ),
        (lambda: update_choice_bias(np.zeros(2), [1, 2], rate=math.nan), ValueError, "rate must be finite"),
        (lambda: update_choice_bias(np.zeros(2, int), [1, 2]), TypeError, "choice_bias"),
        (lambda: compare_conventions(Z, I, kept=np.ones((3, 2))), TypeError, "kept must be a bool array"),
        (lambda: compare_conventions(Z, I, kept=np.ones(3, bool)), ValueError, "kept must have the shape"),
    ],
)
def test_errors_are_sentences(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_conventions_table_prints() -> None:
    logits, indices = random_problem(49)
    lines = str(compare_conventions(logits, indices)).splitlines()
    assert len(lines) == 1 + len(CONVENTIONS)
    assert lines[1].startswith("switch") and "after drop" not in lines[0]
    dropped = str(compare_conventions(logits, indices, kept=np.ones(indices.shape, bool))).splitlines()
    assert dropped[0].endswith("after drop") and len(set(map(len, dropped))) == 1


def test_public_names_are_documented() -> None:
    for name in losses.__all__:
        assert name == "CONVENTIONS" or (getattr(losses, name).__doc__ or "").strip()
