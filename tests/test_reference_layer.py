"""The layer of `numoe.reference`: order of random numbers, dtypes, shapes, arguments that do not fit."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from numoe.config import SharedExpertConfig
from numoe.testing import assert_bitwise_equal, assert_close, random_problem
from reference_cases import OPTIONS, Build, backward, forward


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
