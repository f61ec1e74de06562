"""`numoe.reference` on ties, infinities, NaN, underflow, padding, and nothing at all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numoe import reference
from numoe.config import ACTIVATIONS, AUX_LOSSES, RouterConfig, SharedExpertConfig
from numoe.testing import assert_bitwise_equal, assert_close, random_problem
from reference_cases import NORMALIZATIONS, backward, forward, sigma

NAN, INF = np.nan, np.inf


def route(logits: Any, choice_bias: Any = None, **options: Any) -> reference.Routing:
    z = np.atleast_2d(np.asarray(logits, np.float64))
    return reference.route(z, RouterConfig(num_experts=z.shape[1], **options), choice_bias=choice_bias)


@pytest.mark.parametrize(
    ("logits", "indices", "weights"),
    [
        ([0.0, 0.0, 0.0], [0, 1], [0.5, 0.5]),
        ([-0.0, 0.0, -0.0], [0, 1], [0.5, 0.5]),
        ([1.0, 2.0, 2.0], [1, 2], [0.5, 0.5]),
        ([INF, 5.0, 1.0], [0, 1], [1.0, 0.0]),
        ([1.0, INF, INF], [1, 2], [0.5, 0.5]),
        ([-INF, -INF, 3.0], [2, 0], [1.0, 0.0]),
        ([NAN, -INF, 3.0], [2, 1], [1.0, 0.0]),
        ([NAN, 7.0, NAN], [1, 0], [NAN, NAN]),
        ([NAN, NAN, NAN], [0, 1], [NAN, NAN]),
        ([-1e4, 0.0, -2e4], [1, 0], [1.0, 0.0]),  # chosen by logits: both softmax weights underflow to 0
    ],
)
@pytest.mark.parametrize("score", ["softmax", "softmax_chosen"])
def test_ties_and_infinities(score: str, logits: list[float], indices: list[int], weights: list[float]) -> None:
    routing = route(logits, top_k=2, score=score)
    assert routing.indices.tolist() == [indices]
    assert_close(routing.weights, [weights])


def test_scores_that_underflow_are_normalised_in_log_space() -> None:
    # sigmoid(-800) = exp(-800) = 0 in float64, but the ratio of the two is exp(1): sigmoid(1) and 1 -
    # sigmoid(1).
    routing = route([-801.0, -800.0, -900.0], top_k=2, score="sigmoid")
    assert_close(routing.weights, [[sigma(1.0), sigma(-1.0)]])
    # sqrt(softplus(z)) → exp(z / 2): half the distance.
    routing = route([-1601.0, -1600.0, -1700.0], top_k=2, score="sqrt_softplus")
    assert_close(routing.weights, [[sigma(0.5), sigma(-0.5)]])
    dlogits = reference.route_backward(
        np.array([[1.0, 0.0]]), routing, RouterConfig(num_experts=3, top_k=2, score="sqrt_softplus")
    )
    slope = 0.5 * sigma(0.5) * sigma(-0.5)  # d sigma(v / 2) / dv
    assert_close(dlogits, [[-slope, slope, 0.0]])


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_chosen_scores_that_are_all_zero_give_no_weight(normalization: dict[str, Any]) -> None:
    options = {"top_k": 2, "score": "sigmoid", **normalization}
    routing = route([-INF, -INF, 0.0], [5.0, 5.0, 0.0], **options)  # the bias wants the two that cannot be had
    assert routing.indices.tolist() == [[0, 1]]
    assert routing.weights.tolist() == [[0.0, 0.0]]
    dlogits = reference.route_backward(np.ones((1, 2)), routing, RouterConfig(num_experts=3, **options))
    assert dlogits.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
def test_groups_with_nan_come_last_but_inside_a_kept_group_nan_comes_before_outsiders(group_score: str) -> None:
    options = {"score": "softmax_chosen", "num_groups": 3, "group_score": group_score}
    one_clean = [NAN, 5.0, 4.0, 1.0, 2.0, 1.0, 0.0, 0.0, 0.0]
    assert route(one_clean, top_k=3, **options).indices.tolist() == [[4, 3, 5]]
    all_nan = [NAN, -0.2, 0.0, 7.0, 8.0, NAN, NAN, 9.0, NAN]  # a tie: the lower group
    assert route(all_nan, top_k=3, **options).indices.tolist() == [[2, 1, 0]]


def test_no_expert_is_available() -> None:
    with pytest.raises(ValueError, match="no expert is available for token 1: all its logits are -inf"):
        route([[0.0, 1.0], [-INF, -INF]], top_k=1)
    mask = np.array([True, False])
    routing = reference.route(np.array([[0.0, 1.0], [-INF, -INF]]), RouterConfig(num_experts=2, top_k=1), mask=mask)
    assert routing.indices.tolist() == [[1], [-1]]
    assert routing.weights.tolist() == [[1.0], [0.0]]


def test_padding_changes_nothing() -> None:
    losses = dict.fromkeys(AUX_LOSSES, 0.1)
    options = {
        "noise_std": 0.3,
        "capacity_factor": 0.75,
        "shared": SharedExpertConfig(d_ff=3, gate="sigmoid"),
    }
    problem = random_problem(tokens=9, bias=True, linear_bias=True, aux_losses=losses, **options)
    mask = np.arange(9) % 3 != 1
    clean = forward(problem, mask=mask, rng=0)
    grads = backward(problem, clean)
    x = np.where(mask[:, None], problem.x, NAN)
    padded = forward(problem, x=x, mask=mask, rng=0)
    assert_bitwise_equal(padded.y, clean.y)
    assert padded.losses == clean.losses
    dy = np.where(mask[:, None], problem.dy, NAN)
    padded_grads = reference.backward(problem.config, problem.params, dy, padded)
    assert_bitwise_equal(padded_grads.x, grads.x)
    for name in problem.params:
        assert_bitwise_equal(padded_grads.params[name], grads.params[name], name=name)
    assert (clean.y[~mask] == 0).all()
    assert (grads.x[~mask] == 0).all()
    assert (clean.routing.indices[~mask] == -1).all()


def test_a_nan_token_stays_alone() -> None:
    problem = random_problem(tokens=7)
    x = problem.x.copy()
    x[3] = NAN
    out = forward(problem, x=x)
    others = np.arange(7) != 3
    assert np.isnan(out.y[3]).all()
    assert out.routing.indices[3].tolist() == [0, 1]
    assert_close(out.y[others], forward(problem).y[others])
    assert np.isnan(backward(problem, out).params["w_router"]).all()


@pytest.mark.parametrize("mask", [None, False])
def test_nothing_to_do(mask: bool | None) -> None:
    tokens, losses = (0, 3) if mask is None else (2, 3), dict.fromkeys(AUX_LOSSES, 0.1)
    shared = SharedExpertConfig(d_ff=3)
    problem = random_problem(tokens=tokens, aux_losses=losses, noise_std=0.1, capacity_factor=1.0, shared=shared)
    out = forward(problem, rng=0, mask=None if mask is None else np.zeros(tokens, bool))
    grads = backward(problem, out)
    assert out.y.shape == grads.x.shape == problem.x.shape
    assert not out.y.any()
    assert out.aux_loss == 0.0
    assert not any(gradient.any() for gradient in (grads.x, *grads.params.values()))


def test_an_idle_expert_has_gradients_of_zero() -> None:
    problem = random_problem(tokens=5, top_k=1, bias=True)
    out = forward(problem)
    idle = np.setdiff1d(np.arange(6), out.routing.indices)
    assert idle.size
    assert not any(backward(problem, out).params[name][idle].any() for name in ("w_gate", "w_up", "w_down", "b_down"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_limits_of_activations(activation: str) -> None:
    v = np.array([-INF, -1e30, 0.0, 1e30, INF])
    assert reference.activate(activation, v).tolist() == [
        0,
        0,
        0,
        1e30**2 if activation == "relu2" else 1e30,
        INF,
    ]
    slope = reference.activate_slope(activation, v)
    assert (slope[:2] == 0).all()
    assert slope[2] == (0.0 if "relu" in activation else 0.5)
    assert (slope[3:] == 1).all() or activation == "relu2"
