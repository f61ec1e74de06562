"""Auxiliary losses whose values and gradients can be computed by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from loss_cases import EPS, SCORES, for_both_dtypes, gradients, random_problem, top_k
from numoe.losses import (
    CONVENTIONS,
    compare_conventions,
    importance_loss,
    load_balance_loss,
    load_loss,
    update_choice_bias,
    z_loss,
)

# T = 4, E = 3, K = 2.  First choices (2, 1, 1), all choices (3, 3, 2), P = (0.3375, 0.3, 0.3625).
PROBABILITIES = np.array([[0.5, 0.3, 0.2], [0.6, 0.1, 0.3], [0.2, 0.7, 0.1], [0.05, 0.1, 0.85]])
CHOICES = np.array([[0, 1], [0, 2], [1, 0], [2, 1]])


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


# ── balanced values


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
