"""Dispatch and combine: laws for any routing, an oracle of a few lines of Python, and exact adjoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numoe
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numoe.config import PRIORITIES
from numoe.testing import assert_bitwise_equal

laws = settings(derandomize=True, max_examples=40, deadline=None)
few = settings(derandomize=True, max_examples=15, deadline=None)


# ── problems


@dataclass(frozen=True)
class Case:
    """T tokens, E experts, and who chose whom with which weight."""

    E: int
    indices: np.ndarray  # (T, K)
    weights: np.ndarray  # (T, K)

    @property
    def routing(self) -> numoe.Routing:
        return numoe.Routing(indices=self.indices, weights=self.weights)

    @property
    def router(self) -> numoe.RouterConfig:
        return numoe.RouterConfig(num_experts=self.E, top_k=self.indices.shape[1])

    def plan(self, lengths: Any = None, **options: Any) -> numoe.Dispatch:
        config = numoe.DispatchConfig(**options)
        return numoe.dispatch(self.routing, self.router, config, sequence_lengths=lengths)


@st.composite
def cases(draw: Any, max_experts: int = 9, nan: bool = True) -> Case:
    """Distinct choices per token, some not routed (-1); weights from a small set, so that ties abound."""
    E = draw(st.integers(1, max_experts))
    K = draw(st.integers(1, min(E, 4)))
    T = draw(st.integers(0, 25))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    chosen = np.argsort(rng.random((T, E)), axis=1)[:, :K].astype(np.int32)
    if draw(st.booleans()):  # everybody wants expert 0 first
        chosen[:, 0], chosen[:, 1:] = 0, np.where(chosen[:, 1:] == 0, chosen[:, :1], chosen[:, 1:])
    chosen[rng.random(chosen.shape) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -1
    values = [0.0, 0.25, 0.5, 1.0, -1.0] + ([np.nan] if nan else [])
    weights = rng.choice(values, chosen.shape).astype(draw(st.sampled_from([np.float32, np.float64])))
    return Case(E, chosen, weights)


def oracle_kept(case: Case, capacity: int, priority: str, begin: int, end: int) -> set[tuple[int, int]]:
    """Admit the assignments of tokens [begin, end) one by one in the documented order; NaN comes last."""
    experts = case.indices.tolist()
    w = np.where(np.isnan(case.weights), -np.inf, case.weights).tolist()
    wanted = [(t, k) for t in range(begin, end) for k, expert in enumerate(experts[t]) if expert >= 0]
    order = {
        "position": lambda t, k: (t, k),
        "choice": lambda t, k: (k, t),
        "probability": lambda t, k: (-w[t][k], t, k),
        "batch": lambda t, k: (k, -max(w[t]), t),
    }[priority]
    free = [capacity] * case.E
    kept = set()
    for t, k in sorted(wanted, key=lambda a: order(*a)):
        expert = experts[t][k]
        if free[expert] > 0:
            free[expert] -= 1
            kept.add((t, k))
    return kept


def kept_set(plan: numoe.Dispatch) -> set[tuple[int, int]]:
    return set(map(tuple, np.argwhere(plan.kept).tolist()))


# ── laws of the order of rows


def assert_valid(case: Case, plan: numoe.Dispatch) -> None:
    """The plan is a stable sort of the kept assignments: a permutation, experts and tokens ascending."""
    K = case.indices.shape[1]
    experts = case.indices.tolist()
    rows = sorted((experts[t][k], t, t * K + k) for t, k in kept_set(plan))
    assert plan.row_token.tolist() == [t for _, t, _ in rows]
    assert plan.row_assignment.tolist() == [a for _, _, a in rows]
    load = [0] * case.E
    for e, _, _ in rows:
        load[e] += 1
    assert plan.load.tolist() == load
    assert plan.offsets[0] == 0 and plan.offsets[-1] == plan.num_rows == len(rows)
    # assignment → row is the inverse of row → assignment
    assert plan.assignment_row.reshape(-1)[plan.row_assignment].tolist() == list(range(len(rows)))
    assert (plan.num_experts, plan.num_tokens, plan.top_k) == (case.E, len(case.indices), K)


@laws
@given(cases())
def test_dropless_keeps_every_choice(case: Case) -> None:
    plan = case.plan()
    assert_valid(case, plan)
    assert np.array_equal(plan.kept, case.indices >= 0)
    assert plan.capacity is None


@pytest.mark.parametrize("priority", PRIORITIES)
@laws
@given(case=cases(), capacity=st.integers(0, 6))
def test_capacity_admits_whom_the_oracle_admits(priority: str, case: Case, capacity: int) -> None:
    plan = case.plan(capacity=capacity, drop_priority=priority)
    assert_valid(case, plan)
    assert plan.load.max(initial=0) <= capacity
    assert kept_set(plan) == oracle_kept(case, capacity, priority, 0, len(case.indices))


@pytest.mark.parametrize("priority", PRIORITIES)
@laws
@given(case=cases(), capacity=st.integers(0, 3), size=st.integers(1, 9))
def test_capacity_per_run_of_tokens(priority: str, case: Case, capacity: int, size: int) -> None:
    plan = case.plan(capacity=capacity, drop_priority=priority, capacity_per=size)
    assert_valid(case, plan)
    T = len(case.indices)
    runs = [(begin, min(begin + size, T)) for begin in range(0, T, size)]
    expected = [oracle_kept(case, capacity, priority, begin, end) for begin, end in runs]
    assert kept_set(plan) == set().union(*expected)


@few
@given(case=cases(), capacity=st.integers(0, 3), cut=st.floats(0, 1))
def test_capacity_per_sequence(case: Case, capacity: int, cut: float) -> None:
    T = len(case.indices)
    first = int(cut * T)
    plan = case.plan([first, 0, T - first], capacity=capacity, capacity_per="sequence")
    halves = [
        oracle_kept(case, capacity, "position", 0, first),
        oracle_kept(case, capacity, "position", first, T),
    ]
    assert kept_set(plan) == halves[0] | halves[1]


@pytest.mark.parametrize("priority", PRIORITIES)
@few
@given(case=cases())
def test_a_large_capacity_is_no_capacity(priority: str, case: Case) -> None:
    limited, free = case.plan(capacity=len(case.indices), drop_priority=priority), case.plan()
    for name in ("offsets", "row_token", "row_assignment", "assignment_row"):
        assert_bitwise_equal(getattr(limited, name), getattr(free, name), name=name)


@few
@given(case=cases())
def test_capacity_zero_drops_everything(case: Case) -> None:
    plan = case.plan(capacity=0)
    assert plan.num_rows == 0 and not plan.kept.any()
    assert not numoe.combine(np.empty((0, 3)), plan).any()


@few
@given(case=cases(), data=st.data())
def test_more_capacity_never_drops_more(case: Case, data: Any) -> None:
    capacity, priority = data.draw(st.integers(0, 5)), data.draw(st.sampled_from(PRIORITIES))
    less = case.plan(capacity=capacity, drop_priority=priority)
    more = case.plan(capacity=capacity + 1, drop_priority=priority)
    assert kept_set(less) <= kept_set(more)


@few
@given(cases())
def test_float32_and_float64_weights_drop_the_same(case: Case) -> None:
    other = Case(case.E, case.indices, case.weights.astype(np.float64))  # the values are exact in both
    for priority in PRIORITIES:
        options = {"capacity": 2, "drop_priority": priority}
        assert kept_set(case.plan(**options)) == kept_set(other.plan(**options))


# ── capacity arithmetic


@pytest.mark.parametrize(
    ("options", "tokens", "expected"),
    [
        pytest.param({"capacity_factor": 1.0}, 64, 16, id="K T / E"),
        pytest.param({"capacity_factor": 1.25}, 64, 20, id="factor"),
        pytest.param({"capacity_factor": 1.0}, 9, 3, id="2.25 rounds up"),
        pytest.param({"capacity_factor": 1.0, "capacity_rounding": "floor"}, 9, 2, id="2.25 rounds down"),
        pytest.param({"capacity_factor": 1.0, "capacity_rounding": "nearest"}, 9, 2, id="2.25 to the nearest"),
        pytest.param({"capacity_factor": 1.0, "capacity_rounding": "nearest"}, 11, 3, id="2.75 to the nearest"),
        pytest.param({"capacity_factor": 1.0, "capacity_times_k": False}, 64, 8, id="T / E"),
        pytest.param({"capacity_factor": 1.0, "min_capacity": 30}, 64, 30, id="minimum"),
        pytest.param({"capacity_factor": 1.0, "capacity_multiple_of": 12}, 64, 24, id="rounded up to a multiple"),
        pytest.param({"capacity": 7}, 64, 7, id="fixed"),
        pytest.param({"capacity_factor": 1.0}, 0, 0, id="no tokens"),
    ],
)
def test_capacity_formula(options: dict[str, Any], tokens: int, expected: int) -> None:
    router = numoe.RouterConfig(num_experts=8, top_k=2)
    assert numoe.DispatchConfig(**options).group_capacity(tokens, router) == expected


def test_a_huge_factor_is_no_limit() -> None:
    case = Case(2, np.zeros((9, 1), np.int32), np.ones((9, 1)))
    assert case.plan(capacity_factor=1e308).num_rows == 9


def test_masked_tokens_do_not_count_for_capacity() -> None:
    router = numoe.RouterConfig(num_experts=2, top_k=1)
    mask = np.arange(8) < 4  # 4 real tokens: C = 1 * 4 / 2 = 2
    routing = numoe.Routing(indices=np.where(mask, 0, -1)[:, None].astype(np.int32), weights=np.ones((8, 1)), mask=mask)
    plan = numoe.dispatch(routing, router, numoe.DispatchConfig(capacity_factor=1.0))
    assert plan.capacity == 2 and plan.load.tolist() == [2, 0]


# ── sizes


@pytest.mark.parametrize("priority", ["probability", "batch"])
def test_many_tokens_are_admitted_by_weight(priority: str) -> None:
    """So many that they are sorted in pieces, with many equal weights, whose order is that of their places."""
    rng = np.random.default_rng(0)
    indices = np.stack([rng.integers(0, 3, 150_001), rng.integers(3, 6, 150_001)], axis=1).astype(np.int32)
    case = Case(6, indices, rng.integers(0, 50, indices.shape) / 50)
    plan = case.plan(capacity=20_000, drop_priority=priority)
    assert kept_set(plan) == oracle_kept(case, 20_000, priority, 0, len(indices))


@pytest.mark.parametrize("E", [1, 255, 256, 257, 2048, 100_000])
def test_many_experts(E: int) -> None:
    rng = np.random.default_rng(E)
    K = min(E, 3)
    indices = ((rng.integers(0, E, (500, 1)) + np.arange(K) * 17) % E).astype(np.int32)
    case = Case(E, indices, rng.random(indices.shape))
    plan = case.plan(capacity=2, drop_priority="choice")
    experts = indices.reshape(-1)[plan.row_assignment]
    assert np.all(np.diff(experts) >= 0) and np.bincount(experts, minlength=E).tolist() == plan.load.tolist()
    assert kept_set(plan) == oracle_kept(case, 2, "choice", 0, 500)


@pytest.mark.parametrize("priority", PRIORITIES)
@pytest.mark.parametrize("capacity", [None, 0, 1])
def test_no_tokens(priority: str, capacity: int | None) -> None:
    case = Case(3, np.empty((0, 2), np.int32), np.empty((0, 2)))
    plan = case.plan(capacity=capacity, drop_priority=priority)
    assert plan.offsets.tolist() == [0, 0, 0, 0] and plan.assignment_row.shape == (0, 2)
    assert numoe.combine(np.empty((0, 5)), plan, case.weights).shape == (0, 5)


# ── combine and its adjoint, in small integers: every sum is exact, so equality is exact


def integers(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-8, 9, shape).astype(np.float32)


@laws
@given(
    case=cases(nan=False),
    D=st.integers(1, 70),
    capacity=st.sampled_from([None, 0, 1, 2]),
    seed=st.integers(0, 99),
)
@example(case=Case(2, np.zeros((0, 1), np.int32), np.zeros((0, 1))), D=1, capacity=None, seed=0)
def test_combine_and_gather_are_adjoint(case: Case, D: int, capacity: int | None, seed: int) -> None:
    rng = np.random.default_rng(seed)
    plan = case.plan(capacity=capacity)
    rows, y = integers(rng, plan.num_rows, D), integers(rng, plan.num_tokens, D)
    weights = (4 * case.weights).astype(np.float32)  # -4, 0, 1, 2, 4
    ones = np.ones_like(weights)
    for w in (None, weights):
        drows, dweights = numoe.combine_backward(y, rows, plan, w)
        combined = numoe.combine(rows, plan, w)
        assert np.vdot(combined, y) == np.vdot(rows, drows)  # <A rows, y> = <rows, A' y>
        used = ones if w is None else w
        assert np.vdot(combined, y) == np.vdot(used, dweights)  # bilinear: also linear in the weights
        assert not dweights[~plan.kept].any()


@laws
@given(case=cases(nan=False), D=st.integers(1, 70), capacity=st.sampled_from([None, 1]))
def test_combine_is_a_sum_over_the_choices(case: Case, D: int, capacity: int | None) -> None:
    rng = np.random.default_rng(D)
    plan = case.plan(capacity=capacity)
    rows = integers(rng, plan.num_rows, D)
    expected = np.zeros((plan.num_tokens, D), np.float32)
    for t, k in kept_set(plan):
        expected[t] += case.weights[t, k] * rows[plan.assignment_row[t, k]]
    assert np.array_equal(numoe.combine(rows, plan, case.weights.astype(np.float32)), expected)


@few
@given(case=cases(nan=False), capacity=st.sampled_from([None, 1]))
def test_gather_is_a_copy(case: Case, capacity: int | None) -> None:
    plan = case.plan(capacity=capacity)
    x = integers(np.random.default_rng(1), plan.num_tokens, 7)
    drows, _ = numoe.combine_backward(x, integers(np.random.default_rng(2), plan.num_rows, 7), plan)
    assert_bitwise_equal(drows, x[plan.row_token])


def test_combine_order_is_ascending_by_expert() -> None:
    """1 + 1e8 - 1e8 in float32 is 0 in that order, 1 in the reverse: the sum goes by expert."""
    indices = np.array([[2, 1, 0]], np.int32)
    plan = Case(3, indices, np.ones((1, 3), np.float32)).plan()
    rows = np.array([[1.0], [1e8], [-1e8]], np.float32)  # of experts 0, 1, 2
    assert numoe.combine(rows, plan)[0, 0] == 0.0


# ── weights of the survivors


@laws
@given(case=cases(nan=False), capacity=st.integers(0, 3), scale=st.sampled_from([1.0, 2.5]))
def test_renormalised_weights(case: Case, capacity: int, scale: float) -> None:
    case = Case(case.E, case.indices, np.abs(case.weights).astype(np.float64))
    router = numoe.RouterConfig(num_experts=case.E, top_k=case.indices.shape[1], scale=scale)
    config = numoe.DispatchConfig(capacity=capacity, renormalize_after_drop=True)
    plan = numoe.dispatch(case.routing, router, config)
    used = numoe.combine_weights(case.routing, plan, router, config)
    live = np.where(plan.kept, case.weights, 0.0)
    total = live.sum(axis=1, keepdims=True)
    expected = np.divide(scale * live, total, out=np.zeros_like(live), where=total > 0)
    np.testing.assert_allclose(used, expected, rtol=4 * np.finfo(np.float64).eps, atol=0)
    assert np.all(used[~plan.kept] == 0)


@few
@given(case=cases(nan=False), capacity=st.integers(1, 3))
def test_renormalised_weights_have_degree_zero(case: Case, capacity: int) -> None:
    """w' stays when a token's weights are scaled, so its gradient is orthogonal to them (Euler)."""
    weights = np.abs(case.weights).astype(np.float64) + 0.5
    case = Case(case.E, case.indices, weights)
    config = numoe.DispatchConfig(capacity=capacity, renormalize_after_drop=True)
    plan = numoe.dispatch(case.routing, case.router, config)
    dused = np.random.default_rng(3).standard_normal(weights.shape)
    dweights = numoe.combine_weights_backward(dused, case.routing, plan, case.router, config)
    np.testing.assert_allclose((dweights * weights).sum(axis=1), 0, atol=1e-14)
    alone = plan.kept.sum(axis=1) == 1  # one survivor weighs `scale` whatever its weight was
    assert np.all(dweights[~plan.kept] == 0) and np.all(np.abs(dweights[alone]) < 1e-15)


def test_weights_pass_through_without_renormalisation() -> None:
    case = Case(2, np.array([[0, 1], [0, 1]], np.int32), np.array([[0.75, 0.25], [0.5, 0.5]]))
    config = numoe.DispatchConfig(capacity=1)
    plan = case.plan(capacity=1)
    assert_bitwise_equal(numoe.combine_weights(case.routing, plan, case.router, config), case.weights)
