"""The second link of the chain of trust: `numoe.reference` backward against differences of its forward."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
from numoe.config import ACTIVATIONS, AUX_LOSSES, FORMS, PRIORITIES, SCORES, WEIGHT_ON
from numoe.testing import assert_bitwise_equal, check_gradients, random_problem
from reference_cases import NORMALIZATIONS, OPTIONS, Build, backward, forward, worst_error


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
