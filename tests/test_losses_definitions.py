"""Auxiliary losses against their definitions: token by token, by Monte Carlo, and their gradients by differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from loss_cases import (
    EPS,
    LOSSES,
    SCORES,
    for_every_loss,
    gradients,
    random_arrays,
    random_noise,
    random_problem,
    with_and_without_mask,
)
from numoe.losses import CONVENTIONS, Loss, load_balance_loss, load_loss


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


# ── values


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


# ── gradients


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
