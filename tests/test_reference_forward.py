"""The first link of the chain of trust: `numoe.reference` forward against a loop over tokens and experts."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numoe.config import FORMS, PRIORITIES, SCORES, WEIGHT_ON
from numoe.testing import Problem, assert_close, random_problem
from reference_cases import NORMALIZATIONS, OPTIONS, Array, forward, sigma

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
