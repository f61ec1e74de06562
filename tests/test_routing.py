"""Choosing experts: a function of the logits alone, total on all floating-point numbers, ties to the lowest index."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numoe
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numoe import reference
from numoe.config import NORMALIZATIONS, SCORES
from numoe.testing import assert_bitwise_equal, assert_close

laws = settings(derandomize=True, max_examples=40, deadline=None)
Options = dict[str, Any]


def route(logits: Any, k: int, dtype: Any = np.float64, **options: Any) -> numoe.Routing:
    z = np.atleast_2d(np.asarray(logits, dtype))
    return numoe.route(z, numoe.RouterConfig(num_experts=z.shape[1], top_k=k, **options))


def best(keys: np.ndarray, k: int) -> np.ndarray:
    """The k largest keys of each row, NaN last, ties by index: Python's stable sort."""
    return np.array(
        [sorted(range(len(row)), key=lambda e: (row[e] != row[e], -row[e], e))[:k] for row in keys.tolist()]
    )


# ── any bits


@st.composite
def any_logits(draw: Any) -> np.ndarray:
    """(T, E): arbitrary bit patterns, many of them special or equal; no row is all -inf."""
    bits, kind = draw(st.sampled_from([(np.uint32, np.float32), (np.uint64, np.float64)]))
    shape = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    z = rng.integers(0, np.iinfo(bits).max, shape, bits, endpoint=True).view(kind)
    special = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, np.finfo(kind).max, 1e-40], kind)
    z = np.where(rng.random(shape) < draw(st.sampled_from([0.0, 0.5, 1.0])), rng.choice(special, shape), z)
    z[np.all(z == -np.inf, axis=1), -1] = 0.0
    return z


@pytest.mark.parametrize("score", SCORES)
@laws
@given(z=any_logits(), data=st.data())
def test_choices_are_the_largest_logits_for_any_bits(score: str, z: np.ndarray, data: Any) -> None:
    k = data.draw(st.integers(1, z.shape[1]))
    routing = route(z, k, z.dtype, score=score)
    assert np.array_equal(routing.indices, best(z, k))
    assert routing.indices.dtype == np.int32 and routing.weights.dtype == z.dtype


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("score", SCORES)
@laws
@given(z=any_logits(), data=st.data())
def test_weights_are_those_of_the_reference_for_any_bits(score: str, normalize: str, z: np.ndarray, data: Any) -> None:
    k = data.draw(st.integers(1, z.shape[1]))
    eps = data.draw(st.sampled_from([0.0, 1e-3]))
    config = numoe.RouterConfig(
        num_experts=z.shape[1], top_k=k, score=score, normalize=normalize, normalize_eps=eps, scale=1.5
    )
    actual, expected = numoe.route(z, config), reference.route(z, config)
    finite = expected.weights[np.isfinite(expected.weights)]
    assert_close(actual.weights, expected.weights, scale=max(1.0, abs(finite).max(initial=0)))


@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
@pytest.mark.parametrize("score", SCORES)
@laws
@given(seed=st.integers(0, 2**32 - 1), biased=st.booleans(), kept=st.integers(1, 4))
def test_groups_and_choice_bias(score: str, group_score: str, seed: int, biased: bool, kept: int) -> None:
    """Logits and bias on grids whose sums are either equal or clearly different in any score.

    Two groups whose sums are equal, but of different numbers, are ordered by rounding: tokens with such are left out.
    """
    rng = np.random.default_rng(seed)
    z = rng.choice([-1.5, -0.5, 0.0, 0.75, 2.0], (5, 12))
    bias = rng.choice([0.0, 0.013, -0.21], 12) if biased else None
    config = numoe.RouterConfig(
        num_experts=12, top_k=3, score=score, num_groups=4, groups_kept=kept, group_score=group_score
    )
    routing = numoe.route(z, config, choice_bias=bias)
    keys = reference.routing.score(score, z) + (0.0 if bias is None else bias)
    parts = np.sort(keys.reshape(5, 4, 3), axis=2)[..., -(1 if group_score == "max" else 2) :]
    groups = parts.sum(axis=2)
    order = np.argsort(groups, axis=1)
    gaps = np.diff(np.take_along_axis(groups, order, axis=1), axis=1)
    alike = (np.diff(np.take_along_axis(parts, order[..., None], axis=1), axis=1) == 0).all(axis=2)
    clear = (alike | (gaps > 1e-9)).all(axis=1)
    allowed = np.zeros((5, 12), bool)
    for t, chosen in enumerate(best(groups.round(12), kept)):
        allowed[t] = np.isin(np.arange(12) // 3, chosen)
    expected = best(np.where(allowed, keys.round(12), -np.inf), 3)
    assert np.array_equal(routing.indices[clear], expected[clear])


# ── every number of experts and of choices


def hard_rows(E: int, dtype: Any) -> np.ndarray:
    """Logits (T, E) of every kind that a selection may stumble over: equal, ordered, special, without order."""
    rng = np.random.default_rng(E)
    bits = np.uint32 if dtype == np.float32 else np.uint64
    random_bits = rng.integers(0, np.iinfo(bits).max, (4, E), bits, endpoint=True).view(dtype)
    info, place = np.finfo(dtype), np.arange(E)
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, info.max, info.tiny, info.smallest_subnormal], dtype)
    rows = [
        rng.standard_normal((4, E)),
        rng.integers(-3, 4, (4, E)),  # many ties
        rng.choice(special, (6, E)),
        rng.choice(special[[0, 2]], (3, E)),  # nothing but NaN and -inf
        rng.choice(special[[3, 4]], (2, E)),
        rng.choice([-1.0, 1.0], (3, E)) * rng.integers(0, 5, (3, E)) * float(info.smallest_subnormal),
        np.where(place == rng.integers(E), 1.0, special[:4, None]),  # one among equals
        np.stack([place, -place, place % 7, -(place // 3), place[::-1] ^ 5, np.where(place % 2, np.nan, place)]),
    ]
    z = np.concatenate([random_bits, *(np.asarray(row).astype(dtype) for row in rows)])
    z[np.all(z == -np.inf, axis=1), 0] = np.nan  # refused otherwise
    return z


def choices_of(E: int) -> list[int]:
    return sorted({k for k in (1, 2, 3, 7, 8, E // 3, E // 2, E - 1, E, 22, 63, 64, 65, 100) if 1 <= k <= E})


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("E", [*range(1, 71), 127, 128, 129, 512, 1000, 2048])
def test_choices_are_a_stable_sort(E: int, dtype: Any) -> None:
    z = hard_rows(E, dtype)
    with np.errstate(all="ignore"):
        expected = np.argsort(-z, axis=1, kind="stable")  # NaN last, ties by index
    for k in choices_of(E):
        assert np.array_equal(route(z, k, dtype).indices, expected[:, :k]), k


def digest_of_choices() -> str:
    digest = hashlib.sha256()
    for E in (1, 5, 8, 17, 64, 130, 512):
        for dtype in (np.float32, np.float64):
            for k in choices_of(E):
                digest.update(route(hard_rows(E, dtype), k, dtype).indices.tobytes())
    return digest.hexdigest()


def test_every_target_chooses_the_same() -> None:
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_routing as t; "
    found = {
        target["name"]: subprocess.run(
            [sys.executable, "-c", code + "print(t.digest_of_choices())"],
            env=os.environ | {"NUMOE_TARGET": target["name"]},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for target in numoe._core.targets()
        if target["supported"]
    }
    assert set(found.values()) == {digest_of_choices()}, found


GROUPED: Options = {"num_groups": 8, "groups_kept": 3}


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("options", [{}, GROUPED, GROUPED | {"group_score": "max"}, {"normalize": "none"}])
@pytest.mark.parametrize("score", SCORES)
def test_a_token_is_routed_alike_alone_and_on_any_number_of_threads(score: str, options: Options) -> None:
    rng = np.random.default_rng(5)
    z = rng.standard_normal((3000, 40)).astype(np.float32)
    z[::7, ::5] = np.nan
    config = numoe.RouterConfig(num_experts=40, top_k=5, score=score, **options)
    bias = rng.standard_normal(40).astype(np.float32) if options else None
    numoe.set_num_threads(1)
    serial = numoe.route(z, config, choice_bias=bias)
    numoe.set_num_threads(3)
    parallel = numoe.route(z, config, choice_bias=bias)
    assert_bitwise_equal(parallel.indices, serial.indices)
    assert_bitwise_equal(parallel.weights, serial.weights)
    for t in range(0, len(z), 131):
        alone = numoe.route(z[t : t + 1], config, choice_bias=bias)
        assert_bitwise_equal(alone.indices[0], serial.indices[t])
        assert_bitwise_equal(alone.weights[0], serial.weights[t])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("E", [*range(1, 19), 31, 32, 33, 63, 64, 65, 129])
def test_scores_at_every_size(E: int, score: str, dtype: Any) -> None:
    """Relative to each score, not to the largest: K = E shows them all, tiny ones included."""
    z = (60 * np.random.default_rng(E).uniform(-1, 1, (9, E))).astype(dtype)
    routing = route(z, E, dtype, score=score, normalize="none")
    kind = "softmax" if score == "softmax_chosen" else score
    exact = np.take_along_axis(reference.routing.score(kind, z.astype(np.float64)), routing.indices, axis=1)
    seen = exact > 2 * np.finfo(dtype).tiny  # 0 at about the smallest normal number
    assert_close(routing.weights[seen] / exact[seen], np.ones(seen.sum()), factor=64 * np.finfo(dtype).eps / 2.0**-52)


@pytest.mark.parametrize("score", SCORES)
def test_scores_of_special_logits(score: str) -> None:
    """One expert per token, so that each score stands for itself."""
    z = np.array([[np.inf], [-1e30], [-90.0], [0.0], [90.0], [1e30], [np.nan]])
    weights = route(z, 1, score=score, normalize="none").weights[:, 0]
    own = {
        "sigmoid": [1, 0, 1 / (1 + np.exp(90.0)), 0.5, 1, 1, np.nan],
        "sqrt_softplus": [np.inf, 0, np.exp(-45.0), np.sqrt(np.log(2.0)), np.sqrt(90.0), 1e15, np.nan],
    }
    assert_close(weights, np.array(own.get(score, [1, 1, 1, 1, 1, 1, np.nan])))


# ── special rows


@pytest.mark.parametrize("score", SCORES)
def test_b56_nan_rows_choose_distinct_experts(score: str) -> None:
    routing = route([[np.nan] * 5, [1, np.nan, 3, np.nan, np.nan]], 3, score=score)
    assert routing.indices.tolist() == [[0, 1, 2], [2, 0, 1]]
    assert np.isnan(routing.weights[0]).all()


def test_b57_minus_infinity_excludes() -> None:
    routing = route([-np.inf, 2.0, -np.inf, 1.0], 2)
    assert routing.indices.tolist() == [[1, 3]]
    fewer = route([-np.inf, 2.0, -np.inf, -np.inf], 3)  # fewer finite logits than choices
    assert fewer.indices.tolist() == [[1, 0, 2]] and fewer.weights.tolist() == [[1.0, 0.0, 0.0]]


def test_b58_plus_infinity_takes_all_or_shares() -> None:
    assert route([1.0, np.inf, 3.0], 2).weights.tolist() == [[1.0, 0.0]]
    shared = route([np.inf, 1.0, np.inf], 3)
    assert shared.indices.tolist() == [[0, 2, 1]] and shared.weights.tolist() == [[0.5, 0.5, 0.0]]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("k", [1, 2, 3, 5, 7])
def test_b59_equal_logits_share_equally(k: int, dtype: Any, score: str) -> None:
    for value in (0.0, -30.0, 1e4, -1e30):
        routing = route([value] * 7, k, dtype, score=score)
        assert routing.indices.tolist() == [list(range(k))]
        assert np.all(routing.weights == dtype(1) / dtype(k))


def test_b60_signed_zeros_tie() -> None:
    assert route([-0.0, 0.0, -0.0], 3).indices.tolist() == [[0, 1, 2]]
    assert route([0.0, -0.0, 0.0], 3).indices.tolist() == [[0, 1, 2]]


def test_b61_all_experts_and_b62_one_expert() -> None:
    z = np.random.default_rng(0).standard_normal((9, 6))
    routing = route(z, 6)
    dense = np.take_along_axis(np.exp(z) / np.exp(z).sum(axis=1, keepdims=True), routing.indices, axis=1)
    assert_close(routing.weights, dense)
    assert all(sorted(row) == list(range(6)) for row in routing.indices.tolist())
    assert np.all(route(z[:, :1], 1).weights == 1.0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_ulp_decides(dtype: Any) -> None:
    for value in (1.0, -1.0, 1e-40, 1e30):
        z = np.array([value, np.nextafter(dtype(value), dtype(np.inf)), value], dtype)
        assert route(z, 3, dtype).indices.tolist() == [[1, 0, 2]]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_far_apart_and_huge_logits(score: str, dtype: Any) -> None:
    """Weights underflow to exact zeros, but the choice goes by the logits, and nothing is 0/0."""
    with np.errstate(all="raise"):
        for z in ([-1e4, -2e4, -3e4, -4e4], [3e38, -3e38, 1e4, -1e4], [-3e38, -2e38, -1e38, -3.3e38]):
            routing = route(z, 3, dtype, score=score)
            assert np.array_equal(routing.indices, best(np.array([z]), 3))
            assert np.isfinite(routing.weights).all()
            assert routing.weights.sum() == pytest.approx(1, rel=1e-6)


def test_the_choice_bias_never_enters_the_weight() -> None:
    z = np.random.default_rng(1).standard_normal((20, 4))
    config = numoe.RouterConfig(num_experts=4, top_k=4, score="sigmoid")
    plain, biased = numoe.route(z, config), numoe.route(z, config, choice_bias=np.array([3.0, -1.0, 0.5, 0.0]))
    for routing, other in ((plain, biased), (biased, plain)):
        order = np.argsort(routing.indices, axis=1)
        assert_close(
            np.take_along_axis(routing.weights, order, 1),
            np.take_along_axis(other.weights, np.argsort(other.indices, axis=1), 1),
        )
    assert np.all(biased.indices[:, 0] == 0)


def test_masked_tokens_are_not_looked_at() -> None:
    z = np.random.default_rng(2).standard_normal((6, 4))
    mask = np.array([True, False, True, True, False, True])
    config = numoe.RouterConfig(num_experts=4, top_k=2)
    clean = numoe.route(z, config)
    z[~mask] = [[-np.inf] * 4, [np.nan] * 4]
    routing = numoe.route(z, config, mask=mask)
    assert_bitwise_equal(routing.indices[mask], clean.indices[mask])
    assert_bitwise_equal(routing.weights[mask], clean.weights[mask])
    assert np.all(routing.indices[~mask] == -1) and np.all(routing.weights[~mask] == 0)
    assert not numoe.route_backward(np.ones((6, 2)), routing, config)[~mask].any()
