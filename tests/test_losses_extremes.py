"""Auxiliary losses of large, infinite and missing numbers, and of no tokens."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
from loss_cases import LOSSES, SCORES, for_both_dtypes, for_every_loss, gradients, random_arrays, random_problem, top_k
from numoe.losses import Loss, load_balance_loss, load_loss, z_loss


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
