"""The first links of the chain of trust: double loop → `numoe.reference` forward → differences → backward."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from numoe import reference
from numoe.config import (
    ACTIVATIONS,
    AUX_LOSSES,
    FORMS,
    PRIORITIES,
    SCORES,
    WEIGHT_ON,
    DispatchConfig,
    RouterConfig,
    SharedExpertConfig,
)
from numoe.testing import (
    TOLERANCES,
    Problem,
    assert_bitwise_equal,
    assert_close,
    check_gradients,
    random_problem,
)

Array = npt.NDArray[Any]
Build = Callable[..., Problem]

NORMALIZATIONS: list[dict[str, Any]] = [
    {"normalize": "none"},
    {"normalize": "sum"},
    {"normalize": "sum", "normalize_eps": 0.1},
    {"normalize": "sum", "normalize_eps": 0.6, "eps_mode": "max"},
    {"normalize": "l2"},
    {"normalize": "l2", "normalize_eps": 0.1},
    {"normalize": "l2", "normalize_eps": 0.6, "eps_mode": "max"},
]
OPTIONS: list[dict[str, Any]] = [
    {"linear_bias": True, "scale": 2.5, "bias": True},
    {"choice_bias": True, "score": "sigmoid", "bias": True, "form": "mlp"},
    {"num_experts": 6, "num_groups": 3, "groups_kept": 2, "score": "sigmoid", "choice_bias": True},
    {"num_experts": 6, "num_groups": 3, "groups_kept": 2, "group_score": "max"},
    {"top_k": 4},
    {"top_k": 1, "normalize": "none", "capacity_factor": 1.0},
    {"num_experts": 1, "top_k": 1},
    {"capacity_factor": 0.75, "renormalize_after_drop": True},
    {
        "capacity_factor": 0.75,
        "renormalize_after_drop": True,
        "drop_priority": "probability",
        "score": "sigmoid",
    },
    {"capacity_factor": 0.75, "capacity_per": 2, "drop_priority": "batch", "weight_on": "input"},
    {"capacity": 0},
    {"shared": SharedExpertConfig(d_ff=3)},
    {
        "shared": SharedExpertConfig(d_ff=3, gate="sigmoid", form="mlp", activation="gelu"),
        "weight_on": "input",
    },
    *({"activation": activation, "form": form} for activation in ACTIVATIONS for form in FORMS),
]


def forward(problem: Problem, **inputs: Any) -> reference.MoEOutput:
    x = inputs.pop("x", problem.x)
    buffers = inputs.pop("buffers", problem.buffers)
    return reference.forward(problem.config, problem.params, x, buffers=buffers, **inputs)


def backward(problem: Problem, out: reference.MoEOutput, d_aux_loss: float = 1.0) -> reference.MoEGrads:
    return reference.backward(problem.config, problem.params, problem.dy, out, d_aux_loss)


# ── forward against a double loop ───────────────────────────────────────────────────────────────────────────


def sigma(v: Any) -> Any:
    return 1 / (1 + np.exp(-v))


SCORE_OF: dict[str, Callable[[Array], Array]] = {
    "softmax": lambda z: np.exp(z) / np.exp(z).sum(),
    "softmax_chosen": lambda z: z,
    "sigmoid": sigma,
    "sqrt_softplus": lambda z: np.sqrt(np.log1p(np.exp(z))),
}
ACTIVATION_OF: dict[str, Callable[[float], float]] = {
    "silu": lambda v: v * sigma(v),
    "gelu": lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))),
    "gelu_tanh": lambda v: 0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))),
    "relu": lambda v: max(v, 0.0),
    "relu2": lambda v: max(v, 0.0) ** 2,
    "quick_gelu": lambda v: v * sigma(1.702 * v),
}


def one_expert(x: Array, e: Any, p: dict[str, Array], kind: str, prefix: str = "") -> Array:
    """f_e(x) of one token; e = ... and prefix = "shared_" for the shared expert."""
    w = {name: p[f"{name[:2]}{prefix}{name[2:]}"][e] for name in ("w_up", "w_down")}
    b = {name: p[name][e] if name in p and not prefix else 0.0 for name in ("b_gate", "b_up", "b_down")}
    up = x @ w["w_up"] + b["b_up"]
    if f"w_{prefix}gate" in p:
        gate = x @ p[f"w_{prefix}gate"][e] + b["b_gate"]
        hidden = np.array([ACTIVATION_OF[kind](float(v)) for v in gate]) * up
    else:
        hidden = np.array([ACTIVATION_OF[kind](float(v)) for v in up])
    return np.asarray(hidden @ w["w_down"] + b["b_down"])


def choices_of(x: Array, problem: Problem) -> list[tuple[int, float]]:
    """(expert, weight) of one token, best first."""
    r, p, E = problem.config.router, problem.params, problem.config.router.num_experts
    z = x @ p["w_router"] + p.get("b_router", 0.0)
    s = SCORE_OF[r.score](z)
    key = s + problem.buffers.get("choice_bias", 0.0)
    group, size = np.arange(E) // (E // r.num_groups), 1 if r.group_score == "max" else 2
    best = [sum(sorted(key[group == g])[-size:]) for g in range(r.num_groups)]
    allowed = sorted(range(r.num_groups), key=lambda g: -best[g])[: r.groups_kept]
    chosen = sorted((e for e in range(E) if group[e] in allowed), key=lambda e: -key[e])[: r.top_k]
    u = SCORE_OF["softmax"](z[chosen]) if r.score == "softmax_chosen" else s[chosen]
    norm = {"none": 1.0, "sum": sum(u), "l2": math.hypot(*u)}[r.normalize]
    if r.normalize != "none":
        norm = norm + r.normalize_eps if r.eps_mode == "add" else max(norm, r.normalize_eps)
    return [(e, float(r.scale * v / norm)) for e, v in zip(chosen, u, strict=True)]


def double_loop(problem: Problem, real: Array) -> Array:
    """y, one token and one expert at a time; real (T,) bool."""
    c, x, d = problem.config, problem.x, problem.config.dispatch
    tokens = [int(t) for t in np.flatnonzero(real)]
    routed = [(t, k, e, w) for t in tokens for k, (e, w) in enumerate(choices_of(x[t], problem))]
    largest = {t: max(w for s, _, _, w in routed if s == t) for t in tokens}
    queue: dict[str, Callable[[int, int, int, float], Any]] = {
        "position": lambda t, k, e, w: (t, k),
        "choice": lambda t, k, e, w: (k, t),
        "probability": lambda t, k, e, w: (-w, t),
        "batch": lambda t, k, e, w: (k, -largest[t], t),
    }
    run = d.capacity_per if isinstance(d.capacity_per, int) else len(x)
    people = Counter(t // run for t in tokens)
    seen: Counter[tuple[int, int]] = Counter()
    kept = []
    for t, k, e, w in sorted(routed, key=lambda a: queue[d.drop_priority](*a)):
        seen[t // run, e] += 1
        if d.dropless or seen[t // run, e] <= (d.group_capacity(people[t // run], c.router) or 0):
            kept.append((t, k, e, w))
    y = np.zeros_like(x)
    for t, _, e, w in kept:
        total = sum(v for s, _, _, v in kept if s == t)
        weight = w * c.router.scale / total if d.renormalize_after_drop else w
        if c.experts.weight_on == "input":
            y[t] += one_expert(weight * x[t], e, problem.params, c.experts.activation)
        else:
            y[t] += weight * one_expert(x[t], e, problem.params, c.experts.activation)
    if c.shared is not None:
        for t in tokens:
            gate = sigma(x[t] @ problem.params["w_shared_score"]) if c.shared.gate == "sigmoid" else 1.0
            y[t] += gate * one_expert(x[t], ..., problem.params, c.shared.activation, "shared_")
    return y


def assert_equals_double_loop(problem: Problem) -> None:
    real = np.arange(len(problem.x)) % 4 != 2
    for mask in (None, real):
        y = forward(problem, mask=mask).y
        expected = double_loop(problem, np.ones_like(real) if mask is None else mask)
        assert_close(y, expected, scale=max(np.abs(expected).max(), 1.0), name="y")


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("score", SCORES)
def test_forward_is_the_double_loop(score: str, normalization: dict[str, Any]) -> None:
    combinations = itertools.product(FORMS, WEIGHT_ON, PRIORITIES)
    for seed, (form, weight_on, priority) in enumerate(combinations):
        options = {"form": form, "weight_on": weight_on, "drop_priority": priority, "capacity_factor": 0.75}
        assert_equals_double_loop(random_problem(seed, score=score, d_ff=3, tokens=7, **options, **normalization))


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_is_the_double_loop(options: dict[str, Any]) -> None:
    assert_equals_double_loop(random_problem(tokens=9, d_ff=3, **({"num_experts": 4} | options)))


# ── backward against differences ────────────────────────────────────────────────────────────────────────────


def worst_error(problem: Problem, d_aux_loss: float = 1.0, **inputs: Any) -> float:
    r"""The largest error of `backward` along random unit directions v, relative to the gradient's size.

    Against :math:`(8 (L_1 - L_{-1}) - (L_2 - L_{-2})) / 12 h` with :math:`L_i = L(\theta + i h v)`.
    """
    given = {name: inputs[name] for name in ("logits", "weights") if name in inputs}
    arrays = problem.params | {"x": problem.x} | given
    base = forward(problem, **inputs)
    grads = backward(problem, base, d_aux_loss)
    gradients = grads.params | {name: getattr(grads, name) for name in arrays if name not in grads.params}
    rng, h = np.random.default_rng(0), 2e-4

    def change(array: Array, step: Array) -> float:
        original = array.copy()
        array += step
        out = forward(problem, **inputs)
        array[...] = original
        assert np.array_equal(out.routing.indices, base.routing.indices), "the step changed the routing"
        assert np.array_equal(out.dispatch.kept, base.dispatch.kept), "the step changed who is dropped"
        return float(np.vdot(problem.dy, out.y - base.y) + d_aux_loss * (out.aux_loss - base.aux_loss))

    worst = 0.0
    frozen = ("w_router", "b_router") if problem.config.router.frozen else ()
    for name in [name for name in arrays if name not in frozen]:
        v = rng.standard_normal(arrays[name].shape)
        v /= np.linalg.norm(v)
        one, two = (change(arrays[name], i * h * v) - change(arrays[name], -i * h * v) for i in (1, 2))
        error = abs((8 * one - two) / (12 * h) - np.vdot(gradients[name], v))
        size = float(np.sqrt(np.mean(gradients[name] ** 2)))
        worst = max(worst, float(error) / max(size, 1e-3))
    return worst


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("score", SCORES)
def test_backward_of_every_router(score: str, normalization: dict[str, Any], separated_problem: Build) -> None:
    for i, (form, weight_on) in enumerate(itertools.product(FORMS, WEIGHT_ON)):
        options = {
            "score": score,
            "form": form,
            "weight_on": weight_on,
            "activation": ACTIVATIONS[i],
            "scale": 1.5,
        }
        assert worst_error(separated_problem(**options, **normalization)) < 1e-9


@pytest.mark.parametrize("options", OPTIONS)
def test_backward_of_every_option(options: dict[str, Any], separated_problem: Build) -> None:
    problem = separated_problem(**options)
    assert worst_error(problem) < 1e-9
    assert worst_error(problem, mask=np.array([True, True, False, True, True, False])) < 1e-9


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", AUX_LOSSES)
def test_backward_of_every_loss(name: str, score: str, separated_problem: Build) -> None:
    inputs = {"rng": 3, "mask": np.array([[True, True, False], [True, True, True]])}
    options = {
        "score": score,
        "aux_losses": {name: 0.7},
        "noise_std": 0.5,
        "jitter": 0.1,
        "linear_bias": True,
    }
    problem = separated_problem(tokens=(2, 3), inputs=inputs, **options)
    for d_aux_loss in (1.0, -0.3, 0.0):
        assert worst_error(problem, d_aux_loss, **inputs) < 1e-9
    none = dataclasses.replace(problem, config=dataclasses.replace(problem.config, aux_losses={}))
    with_loss = backward(problem, forward(problem, **inputs), d_aux_loss=0.0)
    without = backward(none, forward(none, **inputs))
    assert_bitwise_equal(with_loss.params["w_router"], without.params["w_router"])


@pytest.mark.parametrize("priority", PRIORITIES)
@pytest.mark.parametrize("renormalize", [False, True])
def test_backward_of_external_routing(renormalize: bool, priority: str, separated_problem: Build) -> None:
    options = {"drop_priority": priority, "renormalize_after_drop": renormalize, "capacity_factor": 0.75}
    problem = separated_problem(aux_losses={"importance": 0.7}, **options)
    routing = forward(problem).routing
    logits = routing.logits
    assert worst_error(problem, logits=logits) < 1e-9
    indices = np.where(np.arange(12).reshape(6, 2) % 5 == 3, -1, routing.indices)
    given: dict[str, Any] = {"indices": indices, "weights": routing.weights.copy()}
    assert worst_error(problem, **given) < 1e-9
    grads = backward(problem, forward(problem, **given))
    assert grads.weights is not None
    assert (grads.weights[indices < 0] == 0).all()
    assert not grads.params["w_router"].any()


def test_backward_of_a_frozen_router(separated_problem: Build) -> None:
    free = separated_problem(linear_bias=True, aux_losses={"z": 1.0})
    frozen = separated_problem(linear_bias=True, aux_losses={"z": 1.0}, frozen=True)
    grads = backward(frozen, forward(frozen))
    assert worst_error(frozen) < 1e-9
    assert not grads.params["w_router"].any()
    assert not grads.params["b_router"].any()
    assert_bitwise_equal(grads.x, backward(free, forward(free)).x)


def test_every_coordinate_of_one_layer(reference_layer: Any, rng: np.random.Generator) -> None:
    config = random_problem(
        d_model=3, d_ff=2, num_experts=3, aux_losses={"switch": 0.5, "z": 0.1}, bias=True, linear_bias=True
    ).config
    report = check_gradients(reference_layer(config=config, rng=1), rng.standard_normal((4, 3)), num_coordinates=40)
    assert all(check.checked == math.prod(check.shape) + 1 for check in report.checks if check.rerouted == 0)
    assert report.ok, report


# ── capacity, by hand ───────────────────────────────────────────────────────────────────────────────────────

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


# ── special numbers ─────────────────────────────────────────────────────────────────────────────────────────


def route(logits: Any, choice_bias: Any = None, **options: Any) -> reference.Routing:
    z = np.atleast_2d(np.asarray(logits, np.float64))
    return reference.route(z, RouterConfig(num_experts=z.shape[1], **options), choice_bias=choice_bias)


NAN, INF = np.nan, np.inf


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


# ── losses ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_losses_by_hand() -> None:
    # p = (.6, .4), (.9, .1), (.3, .7), (.2, .8); choices in this order, K = E = 2, n = 4.  P = (2, 2) / 4 =
    # (.5, .5).
    p = np.array([[0.6, 0.4], [0.9, 0.1], [0.3, 0.7], [0.2, 0.8]])
    logits, first = np.log(p), np.array([[0], [0], [1], [1]])
    loss = reference.load_balance_loss
    assert_close(loss(logits[:3], first[:3]).value, 2 * (2 / 3 * 0.6 + 1 / 3 * 0.4))  # P = (1.8, 1.2) / 3
    assert_close(loss(logits[:3], first[:3], convention="gshard").value, (2 / 3 * 0.6 + 1 / 3 * 0.4) / 2)
    both = np.argsort(-p, axis=1)
    for convention, balanced in (("switch", 1.0), ("gshard", 1 / 4), ("megatron", 1.0), ("hf", 2.0)):
        assert_close(loss(logits, both, convention=convention).value, balanced)
    assert_close(loss(logits, both, convention="hf", score="sigmoid").value, 2.0)  # softmax all the same
    # Two sequences: c = (2, 0), P = (.75, .25): 2 / 2 * 2 * .75 = 1.5; c = (0, 2), P = (.25, .75): 1.5.
    sequences: dict[str, Any] = {"convention": "deepseek-sequence", "sequence_lengths": [2, 2]}
    assert_close(loss(logits, first, **sequences).value, 1.5)
    # The third token masked: c = (0, 1), P = (.2, .8): 2 / 1 * .8 = 1.6; the mean with 1.5 is 1.55.
    assert_close(loss(logits, first, mask=np.array([True, True, False, True]), **sequences).value, 1.55)
    # sigmoid(log 3) = 3/4, sigmoid(0) = 1/2: P = (.6, .4) of the one token, which chose expert 0: 2 * 1 * .6.
    assert_close(loss(np.array([[np.log(3), 0.0]]), np.array([[0]]), score="sigmoid").value, 1.2)


def test_load_is_the_probability_to_be_chosen(rng: np.random.Generator) -> None:
    # Draw one expert's noise again and again, the others' noise kept, and count how often it is in the top 2
    # of 5.
    z, std, draws = rng.standard_normal((3, 5)), 0.8, 20_000
    noisy = z + std * rng.standard_normal(z.shape)
    counts = np.zeros(5)
    for e in range(5):
        again = np.broadcast_to(noisy, (draws, 3, 5)).copy()
        again[..., e] = z[:, e] + std * rng.standard_normal((draws, 3))
        better = (again > again[..., [e]]).sum(axis=-1)
        counts[e] = (better < 2).sum() / draws
    value, _ = reference.losses.cv_squared(counts)
    assert abs(reference.load_loss(z, noisy, std, 2).value - value) < 0.01


def test_gradient_of_the_noise_std(rng: np.random.Generator) -> None:
    z, noisy = rng.standard_normal((2, 6, 4))
    for std in (np.array(0.7), rng.uniform(0.5, 1.0, 4), rng.uniform(0.5, 1.0, (6, 4))):
        gradient = reference.load_loss(z, noisy, std, 2).dnoise_std
        assert gradient is not None
        assert gradient.shape == std.shape
        v, h = rng.standard_normal(std.shape), 1e-5
        plus, minus = (reference.load_loss(z, noisy, std + i * h * v, 2).value for i in (1, -1))
        assert_close((plus - minus) / (2 * h), np.vdot(gradient, v), factor=1e-8 / np.finfo(float).eps)


def test_without_noise_the_load_is_a_count() -> None:
    problem = random_problem(tokens=9, noise_std=0.5, aux_losses={"load": 1.0})
    out = forward(problem)
    counts = np.bincount(out.routing.indices.ravel(), minlength=6).astype(float)
    assert_close(out.aux_loss, reference.losses.cv_squared(counts)[0])
    assert worst_error(problem) < 1e-9


# ── the layer ───────────────────────────────────────────────────────────────────────────────────────────────


def test_noise_is_drawn_in_the_documented_order() -> None:
    problem = random_problem(tokens=4, jitter=0.2, noise_std=0.3, dtype="float32")
    generator = np.random.default_rng(5)
    jitter = generator.uniform(0.8, 1.2, (4, 8)).astype(np.float32)
    noise = generator.standard_normal((4, 6)).astype(np.float32)
    logits = (problem.x * jitter) @ problem.params["w_router"] + np.float32(0.3) * noise
    assert np.array_equal(np.asarray(forward(problem, rng=5).routing.logits), logits)
    assert_bitwise_equal(forward(problem, rng=np.random.default_rng(5)).y, forward(problem, rng=5).y)
    clean = np.asarray(forward(problem).routing.logits)
    assert np.array_equal(clean, problem.x @ problem.params["w_router"])


@pytest.mark.parametrize("options", OPTIONS)
def test_float32_is_float64_rounded(options: dict[str, Any], separated_problem: Build) -> None:
    problem = separated_problem(aux_losses={"switch": 0.5, "importance": 0.5, "z": 0.1}, **options)
    config = dataclasses.replace(problem.config, dtype="float32")
    single = dataclasses.replace(problem, config=config)
    out, exact = forward(single), forward(problem)
    grads, exact_grads = backward(single, out), backward(problem, exact)
    assert out.y.dtype == grads.x.dtype == np.float32
    assert_close(out.y, exact.y, name="y")
    assert_close(grads.x, exact_grads.x, name="x")
    for name, gradient in grads.params.items():
        assert gradient.dtype == np.float32
        scale = max(np.abs(exact_grads.params[name]).max(), 1e-3)
        assert_close(gradient, exact_grads.params[name], name=name, scale=scale, factor=256)


def test_arguments_are_left_alone_and_shapes_restored() -> None:
    problem = random_problem(tokens=(2, 3, 2), shared=SharedExpertConfig(d_ff=2), choice_bias=True)
    for array in (problem.x, problem.dy, *problem.params.values(), *problem.buffers.values()):
        array.flags.writeable = False
    out = forward(problem)
    grads = backward(problem, out)
    assert out.y.shape == grads.x.shape == problem.x.shape
    assert {name: g.shape for name, g in grads.params.items()} == problem.config.param_shapes()
    assert_bitwise_equal(backward(problem, out).x, grads.x)
    assert forward(problem, x=problem.x[0, 0, 0]).y.shape == (8,)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"indices": np.zeros((12, 2), int)},
            "give logits, or indices and weights, or none of them; got indices",
        ),
        ({"logits": np.zeros((12, 6)), "weights": np.zeros((12, 2))}, "got logits and weights"),
        ({"buffers": None}, "choice_bias=True needs buffers="),
        ({"sequence_lengths": [5, 6]}, "sequence_lengths must sum to the number of tokens, 12; got 11"),
        ({"indices": np.zeros((12, 2), int), "weights": np.ones((12, 2))}, "aux_losses 'z' needs logits"),
    ],
)
def test_arguments_that_do_not_fit(inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forward(random_problem(aux_losses={"z": 1.0}, choice_bias=True), **inputs)


# ── other people's code ─────────────────────────────────────────────────────────────────────────────────────


def test_mixtral_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    problem = random_problem(tokens=(2, 7), aux_losses={"hf": 1.0})
    w = {name: torch.tensor(value) for name, value in problem.params.items()}
    config = mixtral.MixtralConfig(hidden_size=8, intermediate_size=12, num_local_experts=6, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    block = mixtral.MixtralSparseMoeBlock(config).to(torch.float64)
    with torch.no_grad():
        block.gate.weight.copy_(w["w_router"].T)
        block.experts.gate_up_proj.copy_(torch.cat([w["w_gate"], w["w_up"]], dim=2).transpose(1, 2))
        block.experts.down_proj.copy_(w["w_down"].transpose(1, 2))
    x = torch.tensor(problem.x, requires_grad=True)
    result = block(x)
    result = result[0] if isinstance(result, tuple) else result
    logits = (x @ block.gate.weight.T).reshape(-1, 6)
    aux = mixtral.load_balancing_loss_func((logits,), num_experts=6, top_k=2)
    ((result * torch.tensor(problem.dy)).sum() + aux).backward()

    out = forward(problem)
    grads = backward(problem, out)
    # transformers computes the router's softmax and the loss's means in float32 whatever the layer's dtype.
    loose = {"factor": TOLERANCES["float32"] * 2**29}
    assert_close(out.y, result.detach().numpy(), name="y", **loose)
    assert_close(out.aux_loss, aux.item(), name="aux_loss", **loose)
    assert_close(grads.x, x.grad.numpy(), name="x", **loose)
    assert_close(grads.params["w_router"], block.gate.weight.grad.numpy().T, name="w_router", **loose)
    dgate, dup = np.split(block.experts.gate_up_proj.grad.numpy().transpose(0, 2, 1), 2, axis=2)
    assert_close(grads.params["w_gate"], dgate, name="w_gate", **loose)
    assert_close(grads.params["w_up"], dup, name="w_up", **loose)
    assert_close(
        grads.params["w_down"],
        block.experts.down_proj.grad.numpy().transpose(0, 2, 1),
        name="w_down",
        **loose,
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_torch(activation: str) -> None:
    torch = pytest.importorskip("torch")
    v = np.linspace(-9, 9, 181)
    t = torch.tensor(v, requires_grad=True)
    functional = torch.nn.functional
    y = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda u: functional.gelu(u, approximate="tanh"),
        "relu": functional.relu,
        "relu2": lambda u: functional.relu(u) ** 2,
        "quick_gelu": lambda u: u * torch.sigmoid(1.702 * u),
    }[activation](t)
    y.sum().backward()
    assert_close(reference.activate(activation, v), y.detach().numpy())
    assert_close(reference.activate_slope(activation, v), t.grad.numpy())


# ── numoe.testing ───────────────────────────────────────────────────────────────────────────────────────────


def test_assert_close_names_the_worst_place() -> None:
    actual, expected = np.array([[1, 2], [3, 4]], np.float32), np.array([[1, 2.1], [3, 4.3]], np.float32)
    with pytest.raises(AssertionError, match=r"dx: 2 of 4 .*\n  worst at \[1, 1\]: actual 4.0, expected 4.3"):
        assert_close(actual, expected, name="dx")
    with pytest.raises(AssertionError, match=r"shapes differ: actual \(2, 2\), expected \(4,\)"):
        assert_close(actual, expected.ravel())
    with pytest.raises(AssertionError, match=r"worst at \[0\]: actual nan, expected 1.0"):
        assert_close([NAN, 1.0], [1.0, 1.0])
    with pytest.raises(AssertionError, match=r"worst at \[1\]: actual inf, expected -inf"):
        assert_close([1.0, INF], [1.0, -INF])
    with pytest.raises(AssertionError, match=r"worst at \[1\]: actual 2, expected 3"):
        assert_close([1, 2], [1, 3])
    assert assert_close([NAN, INF, -INF, 0.0], [NAN, INF, -INF, -0.0]) == 0.0
    assert assert_close(np.zeros(0), np.zeros(0)) == 0.0


def test_assert_close_scales_with_dtype_and_size() -> None:
    one_step = np.nextafter(np.float32(1), np.float32(2))
    assert assert_close([one_step], np.ones(1, np.float32)) == pytest.approx(1 / TOLERANCES["float32"])
    assert assert_close([1.0 + 2**-52], [1.0]) == pytest.approx(1 / TOLERANCES["float64"])
    assert_close([1.0 + 1e-13], [1.0], scale=1e4)
    with pytest.raises(AssertionError, match="worst at"):
        assert_close([1.0, 1.0 + 1e-12], [1.0, 1.0], scale=[1e4, 1.0])


def test_assert_bitwise_equal_sees_every_bit() -> None:
    quiet, other = np.array([0x7FF8000000000000, 0x7FF8000000000001], np.uint64).view(np.float64)
    assert_bitwise_equal([quiet, 1.0], [quiet, 1.0])
    for a, b, message in (
        ([1.0, 0.0], [1.0, -0.0], r"first at \[1\]: 0.0 \(0000000000000000\) and -0.0 \(8000000000000000\)"),
        ([quiet], [other], r"first at \[0\]: nan \(7ff8000000000000\) and nan \(7ff8000000000001\)"),
        ([1.0], np.ones(1, np.float32), "float64 array .* float32 array"),
        (np.zeros((1, 2)), np.zeros((2, 1)), r"\(1, 2\) .* \(2, 1\)"),
        (2.0, 3.0, r"first at \[\]"),
    ):
        with pytest.raises(AssertionError, match=message):
            assert_bitwise_equal(a, b)


def test_check_gradients_finds_a_fault(reference_layer: Any, rng: np.random.Generator) -> None:
    class Faulty(reference_layer):  # type: ignore[misc]
        def backward(self, dy: Array, out: Any, d_aux_loss: float = 1.0) -> Any:
            grads = super().backward(dy, out, d_aux_loss)
            grads.params["w_up"][...] *= 1 + 1e-5
            return grads

    layer = Faulty(config=random_problem(dtype="float32").config, rng=0)
    before = {name: value.copy() for name, value in layer.params.items()}
    report = check_gradients(layer, rng.standard_normal((9, 8)))
    assert not report.ok
    assert report.worst.name == "w_up"
    assert report.worst.error == pytest.approx(1e-5, rel=1e-3)
    with pytest.raises(AssertionError, match=r"gradients differ: w_up; worst relative error 1.0e-05 \(w_up\)"):
        report.assert_ok()
    assert check_gradients(layer, rng.standard_normal((9, 8)), tolerance=1e-4).ok
    for name, value in layer.params.items():
        assert_bitwise_equal(value, before[name])


def test_check_gradients_avoids_kinks_and_ties(reference_layer: Any, rng: np.random.Generator) -> None:
    options: dict[str, Any] = {
        "activation": "relu",
        "aux_losses": {"load": 0.1, "switch": 0.1},
        "noise_std": 0.1,
        "jitter": 0.1,
    }
    layer = reference_layer(config=random_problem(capacity_factor=0.75, **options).config, rng=0)
    x = rng.standard_normal((3, 12, 8))
    mask = rng.random((3, 12)) < 0.9
    report = check_gradients(layer, x, mask=mask)
    assert report.ok, report
    assert sum(check.rerouted for check in report.checks) < 5
    x[:] = 0  # every token at a tie of all experts, and at the kink of every relu
    report = check_gradients(layer, x, num_coordinates=2)
    assert {check.name: check.rerouted + check.kinks > 0 for check in report.checks}["x"]
    assert all(check.error < 1e-6 for check in report.checks)


def test_check_gradients_of_external_routing(reference_layer: Any, rng: np.random.Generator) -> None:
    layer = reference_layer(config=random_problem(aux_losses={"importance": 0.3}, frozen=True).config, rng=0)
    x = rng.standard_normal((9, 8))
    routing = layer.forward(x).routing
    assert check_gradients(layer, x, logits=routing.logits, d_aux_loss=2.0).ok
    report = check_gradients(layer, x, indices=routing.indices, weights=routing.weights)
    assert report.ok
    assert [check.name for check in report.checks] == ["x", "weights", "w_router", "w_gate", "w_up", "w_down"]
    assert [check.where for check in report.checks if check.name == "w_router"] == ["frozen"]
