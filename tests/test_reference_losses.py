"""The losses of `numoe.reference`: values by hand, and the load as the probability that it is."""

from __future__ import annotations

from typing import Any

import numpy as np
from numoe import reference
from numoe.testing import assert_close, random_problem
from reference_cases import forward, worst_error


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
        difference, scale = (plus - minus) / (2 * h), np.linalg.norm(gradient) * np.linalg.norm(v)
        assert_close(difference, np.vdot(gradient, v), scale=scale, factor=1e-7 / np.finfo(float).eps)


def test_without_noise_the_load_is_a_count() -> None:
    problem = random_problem(tokens=9, noise_std=0.5, aux_losses={"load": 1.0})
    out = forward(problem)
    counts = np.bincount(out.routing.indices.ravel(), minlength=6).astype(float)
    assert_close(out.aux_loss, reference.losses.cv_squared(counts)[0])
    assert worst_error(problem) < 1e-9
