"""Capacity in `numoe.reference`, by hand: who is dropped, where the rows are, what the survivors weigh."""

from __future__ import annotations

import numpy as np
import pytest
from numoe import reference
from numoe.config import DispatchConfig, RouterConfig
from numoe.testing import assert_close, random_problem
from reference_cases import forward

FOUR_TOKENS = reference.Routing(
    indices=np.array([[2, 1], [0, 2], [1, 0], [1, 0]], np.int32),
    weights=np.array([[0.6, 0.4], [0.9, 0.7], [0.75, 0.3], [0.8, 0.2]]),
)
THREE_EXPERTS = RouterConfig(num_experts=3, top_k=2)


@pytest.mark.parametrize(
    ("priority", "kept"),
    [
        # Expert 0 is wanted by t1 (.9), t2 (.3, second choice) and t3 (.2, second); expert 1 by t2 (.75), t3
        # (.8) and t0 (.4, second); expert 2 by t0 (.6) and t1 (.7, second).  Each takes one. t0 comes first
        # and gets 2 and 1, then t1 gets 0; everything is full.
        ("position", [[1, 1], [1, 0], [0, 0], [0, 0]]),
        # First choices: t0 gets 2, t1 gets 0, t2 gets 1, t3 finds 1 full; second choices find everything
        # full.
        ("choice", [[1, 0], [1, 0], [1, 0], [0, 0]]),
        # Expert 0: .9 of t1; expert 1: .8 of t3; expert 2: .7 of t1, although it is t1's second choice.
        ("probability", [[0, 0], [1, 1], [0, 0], [1, 0]]),
        # By largest weight t1 (.9), t3 (.8), t2 (.75), t0 (.6); first choices in this order: t1 gets 0, t3
        # gets 1, t2 finds 1 full, t0 gets 2; second choices find everything full.
        ("batch", [[1, 0], [1, 0], [0, 0], [1, 0]]),
    ],
)
def test_who_is_dropped(priority: str, kept: list[list[int]]) -> None:
    plan = reference.dispatch(FOUR_TOKENS, THREE_EXPERTS, DispatchConfig(capacity=1, drop_priority=priority))
    assert plan.kept.astype(int).tolist() == kept
    assert plan.capacity == 1


def test_rows_are_sorted_by_expert_then_token() -> None:
    # Expert 0: t1's first choice, t2's and t3's second; expert 1: t0's second, t2's and t3's first; expert 2:
    # t0, t1.
    plan = reference.dispatch(FOUR_TOKENS, THREE_EXPERTS)
    assert plan.offsets.tolist() == [0, 3, 6, 8]
    assert plan.row_token.tolist() == [1, 2, 3, 0, 2, 3, 0, 1]
    assert plan.row_assignment.tolist() == [2, 5, 7, 1, 4, 6, 0, 3]
    assert plan.assignment_row.tolist() == [[6, 3], [0, 7], [4, 1], [5, 2]]
    assert plan.capacity is None


def test_ties_go_to_the_earlier_token() -> None:
    routing = reference.Routing(indices=np.array([[1, 0], [0, 1], [0, 1]], np.int32), weights=np.full((3, 2), 0.5))
    router = RouterConfig(num_experts=2, top_k=2)
    for priority, kept in (
        ("position", [[1, 1], [0, 0], [0, 0]]),
        ("choice", [[1, 0], [1, 0], [0, 0]]),
        ("probability", [[1, 1], [0, 0], [0, 0]]),
        ("batch", [[1, 0], [1, 0], [0, 0]]),
    ):
        plan = reference.dispatch(routing, router, DispatchConfig(capacity=1, drop_priority=priority))
        assert plan.kept.astype(int).tolist() == kept, priority


def test_capacity_groups_and_masked_tokens() -> None:
    # Runs of 3 tokens, everyone wants expert 0.  Run 0 has 3 real tokens: C = ceil(1.0 * 1 * 3 / 2) = 2.  Run
    # 1 has 2 real tokens: C = 1.  Run 2 is one token: C = ceil(1 / 2) = 1.
    routing = reference.Routing(
        indices=np.array([[0], [0], [0], [-1], [0], [0], [0]], np.int32),
        weights=np.ones((7, 1)),
        mask=np.array([True, True, True, False, True, True, True]),
    )
    router = RouterConfig(num_experts=2, top_k=1)
    plan = reference.dispatch(routing, router, DispatchConfig(capacity_factor=1.0, capacity_per=3))
    assert plan.row_token.tolist() == [0, 1, 4, 6]
    assert plan.capacity == 2


def test_renormalised_survivors() -> None:
    config = DispatchConfig(capacity=1, drop_priority="probability", renormalize_after_drop=True)
    router = RouterConfig(num_experts=3, top_k=2, scale=3.0)
    plan = reference.dispatch(FOUR_TOKENS, router, config)
    # t1 keeps .9 and .7: 3 * .9 / 1.6 and 3 * .7 / 1.6; t3 keeps its first choice only: 3 * .8 / .8
    expected = np.array([[0, 0], [1.6875, 1.3125], [0, 0], [3, 0]])
    assert_close(reference.combine_weights(FOUR_TOKENS, plan, router, config), expected)


def test_a_sequence_is_a_capacity_group_of_its_own() -> None:
    options = {"capacity_factor": 0.75, "capacity_per": "sequence", "aux_losses": {"deepseek-sequence": 1.0}}
    problem = random_problem(tokens=(3, 5), **options)
    together = forward(problem)
    apart = [forward(problem, x=x) for x in problem.x]
    assert_close(together.y, np.stack([out.y for out in apart]))
    assert_close(together.aux_loss, np.mean([out.aux_loss for out in apart]))
    flat = forward(problem, x=problem.x.reshape(15, -1), sequence_lengths=[5, 5, 0, 5])
    assert_close(flat.y.reshape(problem.x.shape), together.y)
    assert_close(flat.aux_loss, together.aux_loss)  # the sequence of length 0 does not count
