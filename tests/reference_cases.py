"""What the tests of `numoe.reference` share: options that cover it, its two calls, and its error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from numoe import reference
from numoe.config import ACTIVATIONS, FORMS, SharedExpertConfig
from numoe.testing import Problem

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


def sigma(v: Any) -> Any:
    return 1 / (1 + np.exp(-v))


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
