"""Metrics against numbers worked out by hand, their ranges, and their refusals."""

import math
from types import SimpleNamespace

import numoe
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numoe import metrics

BALANCED = np.arange(12).reshape(6, 2) % 4  # T=6, K=2, E=4: every expert three times
ONE = np.zeros((5, 1), int)  # everything to expert 0

loads = st.lists(st.integers(0, 1000), min_size=1, max_size=40).filter(any)


def test_balanced_routing_has_the_documented_values():
    assert metrics.expert_load(BALANCED, 4).tolist() == [3, 3, 3, 3]
    assert metrics.load_fraction(BALANCED, 4).tolist() == [0.25] * 4
    assert metrics.cv(BALANCED, 4) == 0.0
    assert metrics.max_violation(BALANCED, 4) == 0.0
    assert metrics.dead_experts(BALANCED, 4) == 0
    assert metrics.routing_entropy(BALANCED, 4) == pytest.approx(math.log(4), rel=1e-15)
    assert metrics.effective_experts(BALANCED, 4) == pytest.approx(4, rel=1e-15)
    assert metrics.gini(BALANCED, 4) == 0.0
    assert metrics.jain(BALANCED, 4) == 1.0


def test_collapsed_routing_has_the_other_end_of_each_range():
    assert metrics.cv(ONE, 5) == pytest.approx(2.0)  # sqrt(E - 1)
    assert metrics.max_violation(ONE, 5) == 4.0  # E - 1
    assert metrics.dead_experts(ONE, 5) == 4
    assert metrics.routing_entropy(ONE, 5) == 0.0
    assert metrics.effective_experts(ONE, 5) == 1.0
    assert metrics.gini(ONE, 5) == pytest.approx(0.8)  # 1 - 1/E
    assert metrics.jain(ONE, 5) == pytest.approx(0.2)  # 1/E


def test_balance_of_a_load_by_hand():
    # n = 6 2 0 0: mean 2, deviations 4 0 -2 -2, variance 24/4 = 6, cv = sqrt(6)/2
    # f = 3/4 1/4: H = -(.75 ln .75 + .25 ln .25);  gini: (2e - 5) f_(e)/4 = (1*.25 + 3*.75)/4 = .625
    # jain = 64 / (4 * 40) = .4
    got = metrics.load_summary([6, 2, 0, 0], 4)
    assert got == pytest.approx(
        {
            "cv": math.sqrt(6) / 2,
            "max_violation": 2.0,
            "dead_experts": 2.0,
            "routing_entropy": -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)),
            "effective_experts": math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))),
            "gini": 0.625,
            "jain": 0.4,
        },
        rel=1e-14,
    )


@given(loads)
def test_balance_stays_in_range_and_jain_is_cv(load):
    got, experts = metrics.load_summary(load), len(load)
    slack = 1e-9
    assert -slack <= got["cv"] <= math.sqrt(experts - 1) + slack
    assert -slack <= got["max_violation"] <= experts - 1 + slack
    assert 1 - slack <= got["effective_experts"] <= experts + slack
    assert -slack <= got["gini"] <= 1 - 1 / experts + slack
    assert got["jain"] == pytest.approx(1 / (1 + got["cv"] ** 2), rel=1e-9)


@pytest.mark.parametrize("unit", [1e-320, 1e-200, 1e200, 1.7e308 / 6])
def test_balance_of_extreme_amounts(unit):
    """Whose sum or squares leave float64."""
    got, expected = metrics.load_summary(unit * np.array([6.0, 2, 0, 6])), metrics.load_summary([6, 2, 0, 6])
    assert got == pytest.approx(expected, rel=1e-3 if unit < 1e-300 else 1e-12)


@given(loads, st.randoms(use_true_random=False))
def test_balance_does_not_know_the_order_or_the_unit(load, random):
    shuffled = [7.0 * n for n in random.sample(load, len(load))]
    assert metrics.load_summary(shuffled) == pytest.approx(metrics.load_summary(load), rel=1e-9, abs=1e-9)


def test_padding_and_unrouted_choices_are_not_counted():
    indices = np.array([[0, 1], [2, 3], [0, -1], [-1, -1]])
    mask = np.array([True, False, True, True])
    assert metrics.expert_load(indices, 4, mask=mask).tolist() == [2, 1, 0, 0]
    assert metrics.choices_per_token(indices, mask=mask) == pytest.approx([1 / 3, 1 / 3, 1 / 3])


def test_nothing_routed_is_nan_not_perfect():
    nothing = np.full((3, 2), -1)
    for indices in (nothing, np.zeros((0, 2), int)):
        assert metrics.expert_load(indices, 4).tolist() == [0, 0, 0, 0]
        assert metrics.dead_experts(indices, 4) == 4
        ratios = (metrics.cv, metrics.max_violation, metrics.gini, metrics.jain, metrics.effective_experts)
        assert all(math.isnan(ratio(indices, 4)) for ratio in ratios)
        assert np.isnan(metrics.load_fraction(indices, 4)).all()
        assert math.isnan(metrics.drop_fraction(indices, np.zeros(indices.shape, bool)))
        assert math.isnan(metrics.routing_drift(indices, indices))
    assert np.isnan(metrics.choices_per_token(np.zeros((0, 2), int))).all()


def test_drop_fraction_and_choices_per_token():
    indices = np.array([[0, 1], [0, 2], [0, -1]])
    kept = np.array([[True, True], [False, True], [False, False]])
    assert metrics.drop_fraction(indices, kept) == 2 / 5
    assert metrics.choices_per_token(indices, kept=kept) == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    only_first = np.array([True, False, False])
    assert metrics.drop_fraction(indices, kept, mask=only_first) == 0.0


def test_coactivation_counts_pairs():
    rng = np.random.default_rng(0)
    indices = np.argsort(rng.random((50, 6)), axis=1)[:, :3]
    indices[::7, 1] = -1
    member = np.zeros((50, 6), int)
    for t, row in enumerate(indices):
        member[t, row[row >= 0]] = 1
    assert (metrics.coactivation(indices, 6) == member.T @ member).all()
    assert (np.diag(metrics.coactivation(indices, 6)) == metrics.expert_load(indices, 6)).all()


def test_routing_drift():
    before = np.array([[0, 1], [2, 3], [4, -1]])
    assert metrics.routing_drift(before, before[:, ::-1]) == 0.0
    assert metrics.routing_drift(before, np.array([[5, 6], [0, 1], [2, -1]])) == 1.0
    # common 1 + 2 + 1, sizes max(2,2) + max(2,2) + max(1,2) = 6
    assert metrics.routing_drift(before, np.array([[0, 7], [3, 2], [4, 5]])) == pytest.approx(1 - 4 / 6)
    assert metrics.routing_drift(before, before[:, :1]) == pytest.approx(1 - 3 / 5)  # K may differ


def test_entropies_of_logits():
    even, sure = np.zeros((2, 8)), np.eye(8)[:8] * 800.0
    assert metrics.token_entropy(even) == pytest.approx([math.log(8)] * 2)
    assert metrics.token_entropy(sure) == pytest.approx(np.zeros(8))
    assert metrics.batch_entropy(sure) == pytest.approx(math.log(8))  # each certain, together balanced
    assert metrics.batch_entropy(sure[:1]) == pytest.approx(0.0)
    masked = metrics.token_entropy(even, mask=[True, False])
    assert masked[0] == pytest.approx(math.log(8)) and math.isnan(masked[1])
    assert math.isnan(metrics.batch_entropy(even, mask=[False, False]))


@pytest.mark.parametrize("score", ["softmax", "softmax_chosen", "sigmoid", "sqrt_softplus"])
def test_entropy_follows_the_score(score):
    z = np.random.default_rng(1).normal(size=(5, 6))
    s = {
        "sigmoid": 1 / (1 + np.exp(-z)),
        "sqrt_softplus": np.sqrt(np.log1p(np.exp(z))),
    }.get(score, np.exp(z))
    p = s / s.sum(axis=1, keepdims=True)
    assert metrics.token_entropy(z, score=score) == pytest.approx(-(p * np.log(p)).sum(axis=1), rel=1e-12)
    assert metrics.batch_entropy(z, score=score) == pytest.approx(-(p.mean(0) * np.log(p.mean(0))).sum())


def test_extreme_logits():
    z = np.array([[np.inf, np.inf, 0.0], [-np.inf, 0.0, 0.0], [1e300, -1e300, 0.0]])
    assert metrics.token_entropy(z) == pytest.approx([math.log(2), math.log(2), 0.0])
    assert metrics.z_norm(np.full((3, 4), 1000.0)) == pytest.approx(1000 + math.log(4))
    assert metrics.z_norm(np.zeros((3, 4), np.float32)) == pytest.approx(math.log(4))
    assert math.isnan(metrics.z_norm(np.full((1, 2), np.nan)))
    assert math.isnan(metrics.z_norm(np.zeros((0, 4))))


def output(**changes):
    routing = dict(indices=np.array([[0, 1], [0, 2], [-1, -1]]), logits=np.zeros((3, 4)), mask=None)
    kept = np.array([[True, True], [False, True], [False, False]])
    dispatch = dict(offsets=np.array([0, 1, 2, 3, 3]), kept=kept, capacity=1)
    for name, value in changes.items():
        (routing if name in routing else dispatch)[name] = value
    return SimpleNamespace(routing=SimpleNamespace(**routing), dispatch=SimpleNamespace(**dispatch))


def test_summary_is_a_flat_dict_of_floats_with_fixed_keys():
    got = metrics.summary(output(mask=np.array([True, True, False])))
    assert all(type(value) is float for value in got.values())
    assert got["tokens"] == 2 and got["assignments"] == 4 and got["capacity"] == 1
    assert got["drop_fraction"] == 0.25 and got["served_1"] == 0.5 and got["served_2"] == 0.5
    assert got["cv"] == metrics.cv([[0, 1], [0, 2]], 4)
    assert got["token_entropy"] == got["batch_entropy"] == got["z_norm"] == pytest.approx(math.log(4))
    bare = metrics.summary(output(logits=None, capacity=None))
    assert bare.keys() == got.keys()
    assert math.isnan(bare["token_entropy"]) and math.isnan(bare["z_norm"]) and bare["capacity"] == math.inf
    empty = metrics.summary(output(mask=np.zeros(3, bool), indices=np.full((3, 2), -1), kept=np.zeros((3, 2), bool)))
    assert empty["tokens"] == 0 and math.isnan(empty["cv"]) and math.isnan(empty["token_entropy"])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: metrics.expert_load([[0.5]], 4), TypeError, "indices must be an array of ints; got dtype float64"),
        (lambda: metrics.expert_load([[True]], 4), TypeError, "got dtype bool"),
        (lambda: metrics.expert_load(np.ma.masked_array([[0]], True), 4), TypeError, "indices is a masked array"),
        (lambda: metrics.load_summary(np.ma.masked_array([1], True)), TypeError, "load is a masked array"),
        (lambda: metrics.drop_fraction([[0]], np.ma.ones((1, 1), bool)), TypeError, "kept is a masked array"),
        (lambda: metrics.z_norm(np.ma.ones((1, 1))), TypeError, "logits is a masked array"),
        (lambda: metrics.cv([[0]], 4, mask=np.ma.ones(1, bool)), TypeError, "mask is a masked array"),
        (
            lambda: metrics.expert_load([0, 1], 4),
            ValueError,
            r"shape \(T, K\); got \(2,\).*indices\[:, None\]",
        ),
        (lambda: metrics.expert_load([[0], [4]], 4), IndexError, r"indices\[1, 0\] = 4 is out of range .* = 4"),
        (lambda: metrics.cv([[-2]], 4), IndexError, r"indices\[0, 0\] = -2 is out of range"),
        (lambda: metrics.expert_load([[0]], 0), ValueError, "num_experts must be >= 1; got 0"),
        (lambda: metrics.expert_load([[0]], 4.0), TypeError, "num_experts must be an int"),
        (lambda: metrics.expert_load([[0]], True), TypeError, "num_experts must be an int"),
        (lambda: metrics.expert_load([[0]], 4, mask=[1]), TypeError, "mask must be an array of bools"),
        (lambda: metrics.expert_load([[0]], 4, mask=[True] * 2), ValueError, r"shape \(1,\); got \(2,\)"),
        (
            lambda: metrics.load_summary([1, 2, 3], 4),
            ValueError,
            "one entry per expert, num_experts = 4; got 3",
        ),
        (lambda: metrics.load_summary([[1]]), ValueError, r"shape \(E,\)"),
        (lambda: metrics.load_summary([]), ValueError, r"shape \(E,\)"),
        (lambda: metrics.load_summary([1, -1]), ValueError, r"load\[1\] = -1"),
        (lambda: metrics.load_summary([1.0, math.nan]), ValueError, r"load\[1\] = nan"),
        (lambda: metrics.load_summary(["1"]), TypeError, "load must be a real array"),
        (lambda: metrics.drop_fraction([[0]], [[1]]), TypeError, "kept must be a bool array"),
        (lambda: metrics.drop_fraction([[0]], [True]), ValueError, r"shape of indices, \(1, 1\); got \(1,\)"),
        (lambda: metrics.drop_fraction([[-1]], [[True]]), ValueError, r"kept\[0, 0\] is True but"),
        (lambda: metrics.coactivation([[2, 2]], 4), ValueError, r"indices\[0\] chooses expert 2 twice"),
        (
            lambda: metrics.coactivation([[1, 1], [2, 2]], 4, mask=[False, True]),
            ValueError,
            r"indices\[1\] chooses expert 2 twice",
        ),
        (lambda: metrics.routing_drift([[0]], [[0], [1]]), ValueError, "T = 1 and 2"),
        (lambda: metrics.routing_drift([[0]], [[0.0]]), TypeError, "after must be an array of ints"),
        (lambda: metrics.z_norm([[1, 2]]), TypeError, "logits has dtype int64"),
        (lambda: metrics.z_norm([1.0]), ValueError, "logits must have 2 dimensions"),
        (lambda: metrics.token_entropy([[1.0]], score="sofmax"), ValueError, "Did you mean 'softmax'"),
    ],
)
def test_wrong_input_gets_a_sentence(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_summary_of_a_real_layer():
    layer = numoe.MoELayer(d_model=4, d_ff=8, num_experts=4, top_k=2, capacity_factor=1.0, rng=0)
    x = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
    mask = np.arange(15).reshape(3, 5) % 5 < 4  # 12 real tokens, 24 choices, C = 1.0 * 2 * 12 / 4 = 6
    got = metrics.summary(layer.forward(x, mask=mask))
    assert (got["tokens"], got["assignments"], got["capacity"]) == (12, 24, 6)
    assert sum(got[f"served_{j}"] for j in range(3)) == pytest.approx(1)
    # choices kept = what was served: the two ways to count agree
    assert 2 * 12 * (1 - got["drop_fraction"]) == pytest.approx(12 * (got["served_1"] + 2 * got["served_2"]))
    assert 0 < got["token_entropy"] <= got["batch_entropy"] <= math.log(4)
