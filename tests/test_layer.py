"""The layer end to end: against `numoe.reference` over a covering sample of options, and the laws it must obey."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import pickle
from typing import Any

import numoe
import numpy as np
import pytest
from layers import layer_of
from numoe import reference
from numoe.config import ACTIVATIONS, PRIORITIES, MoEConfig
from numoe.testing import Problem, assert_bitwise_equal, assert_close, random_problem

Array = np.ndarray[Any, np.dtype[Any]]


def make(seed: int = 0, **options: Any) -> numoe.MoELayer:
    return layer_of(random_problem(seed, **({"dtype": "float32"} | options)))


def tokens(seed: int, *shape: int, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(seed).standard_normal(shape or (12, 8)).astype(dtype)


# ── against the reference

Options = dict[str, Any]
GLU_SHARED = numoe.SharedExpertConfig(d_ff=5, gate="sigmoid")
AXES: dict[str, list[Options]] = {
    "dtype": [{"dtype": "float32"}, {"dtype": "float64"}],
    "router": [
        {},
        {"normalize": "none"},
        {"score": "softmax_chosen"},
        {"score": "softmax_chosen", "normalize": "l2", "scale": 0.5},
        {"score": "sigmoid", "scale": 2.5},
        {"score": "sigmoid", "normalize_eps": 1e-3},
        {"score": "sigmoid", "normalize": "none"},
        {"score": "sqrt_softplus", "normalize": "l2"},
        {"score": "sqrt_softplus", "normalize_eps": 0.1, "eps_mode": "max"},
    ],
    "choice": [
        {},
        {"top_k": 1},
        {"top_k": 6},
        {"choice_bias": True, "linear_bias": True},
        {"num_groups": 3, "groups_kept": 2},
        {"num_groups": 2, "group_score": "max", "choice_bias": True},
    ],
    "experts": [
        {"form": form, "activation": name, "bias": bias}
        for (i, name), form in itertools.product(enumerate(ACTIVATIONS), ("glu", "mlp"))
        for bias in [(i + (form == "mlp")) % 2 == 0]
    ],
    "weight_on": [{}, {"weight_on": "input"}],
    "dispatch": [
        {},
        {"capacity_factor": 1.0, "renormalize_after_drop": True},
        *({"capacity_factor": 0.7, "drop_priority": priority} for priority in PRIORITIES),
        {"capacity": 1, "capacity_per": "sequence", "drop_priority": "choice"},
        {"capacity_factor": 0.5, "capacity_per": 5, "renormalize_after_drop": True, "drop_priority": "batch"},
    ],
    "shared": [{}, {"shared": GLU_SHARED}, {"shared": numoe.SharedExpertConfig(d_ff=7, form="mlp", activation="gelu")}],
    "losses": [
        {},
        {"aux_losses": {"switch": 0.1, "z": 0.01}},
        {"aux_losses": {"gshard": 0.5, "importance": 0.1}},
        {"aux_losses": {"megatron": 0.3, "hf": 0.2}},
        {"aux_losses": {"deepseek-sequence": 1.0}},
        {"aux_losses": {"load": 0.2}, "noise_std": 0.5, "jitter": 0.1},
    ],
    "input": [{"tokens": 11}, {"tokens": (3, 4), "mask": 0.7}, {"tokens": (2, 2, 3)}, {"tokens": 1}],
}


@functools.cache
def covering_sample() -> list[Options]:
    """Few combinations in which every two values of any two axes meet, unless the configuration refuses them."""
    rng = np.random.default_rng(0)
    sizes = [len(values) for values in AXES.values()]
    pairs = itertools.combinations(range(len(sizes)), 2)
    missing = {(i, a, j, b) for i, j in pairs for a in range(sizes[i]) for b in range(sizes[j])}
    sample = []
    while missing:
        i, a, j, b = min(missing)
        rows = [[int(rng.integers(n)) for n in sizes] for _ in range(20)]
        for row in rows:
            row[i], row[j] = a, b
        rows = [row for row in rows if is_valid(row)]
        met = [missing & {(p, r[p], q, r[q]) for p, q in itertools.combinations(range(len(r)), 2)} for r in rows]
        if not rows:
            missing.remove((i, a, j, b))  # refused whatever the rest is
            continue
        best = max(range(len(rows)), key=lambda n: len(met[n]))
        missing -= met[best]
        sample.append(merged(rows[best]))
    return sample


def merged(row: list[int]) -> Options:
    return {key: v for values, n in zip(AXES.values(), row, strict=True) for key, v in values[n].items()}


def is_valid(row: list[int]) -> bool:
    options = {key: value for key, value in merged(row).items() if key not in {"mask", "tokens"}}
    try:
        MoEConfig.from_options(**({"d_model": 8, "d_ff": 12, "num_experts": 6, "top_k": 2} | options))
    except ValueError:
        return False
    return True


def inputs_of(problem: Problem, share: float | None) -> Options:
    inputs: Options = {}
    if share is not None:
        inputs["mask"] = np.random.default_rng(1).random(problem.x.shape[:-1]) < share
    if problem.config.router.noise_std:
        inputs["rng"] = 7
    return inputs


def name_of(options: Options) -> str:
    def text(value: Any) -> str:
        return f"{value.form}-{value.gate}" if isinstance(value, numoe.SharedExpertConfig) else str(value)

    return ",".join(f"{key}={text(value)}".replace(" ", "") for key, value in options.items())


@pytest.mark.parametrize("options", covering_sample(), ids=name_of)
def test_forward_and_backward_agree_with_the_reference(options: Options) -> None:
    options = dict(options)
    share = options.pop("mask", None)
    problem = random_problem(3, **options)
    inputs = inputs_of(problem, share)
    layer = layer_of(problem)
    out = layer.forward(problem.x, **inputs)
    grads = layer.backward(problem.dy, out, d_aux_loss=0.7)

    exact = dataclasses.replace(problem.config, dtype="float64")
    expected = reference.forward(exact, problem.params, problem.x, buffers=problem.buffers, **inputs)
    expected_grads = reference.backward(exact, problem.params, problem.dy, expected, d_aux_loss=0.7)
    assert np.array_equal(out.routing.indices, expected.routing.indices)
    assert np.array_equal(out.dispatch.assignment_row, expected.dispatch.assignment_row)
    assert np.array_equal(out.dispatch.offsets, expected.dispatch.offsets)
    assert out.dispatch.capacity == expected.dispatch.capacity
    assert_close(out.routing.weights, expected.routing.weights, name="weights")
    assert_close(out.y, expected.y, name="y")
    assert out.losses.keys() == expected.losses.keys()
    eps = float(np.finfo(problem.config.dtype).eps)
    for name, term in expected.losses.items():
        assert out.losses[name].coefficient == term.coefficient
        assert out.losses[name].value == pytest.approx(term.value, rel=64 * eps, abs=64 * eps)
    assert out.aux_loss == sum(term.coefficient * term.value for term in out.losses.values())
    size = abs(expected_grads.x).max(initial=0)  # where a gradient is 0 by cancellation, of the terms that cancel
    assert_close(grads.x, expected_grads.x, name="dx")
    assert list(grads.params) == list(layer.params)
    for name, value in expected_grads.params.items():
        assert_close(grads.params[name], value, scale=max(size, abs(value).max()), name=f"d{name}")
    assert {v.dtype for v in (out.y, grads.x, *grads.params.values())} == {layer.dtype}
    assert_bitwise_equal(layer(problem.x, **inputs), out.y, name="inference")


def test_the_sample_covers_and_does_not_flatter() -> None:
    """Every value occurs, outputs are mostly not zero, and some assignments are dropped."""
    sample = covering_sample()
    for values in AXES.values():
        assert all(any(option.items() <= row.items() for row in sample) for option in values)
    dropped, zeros, total = 0, 0, 0
    for options in sample:
        problem = random_problem(3, **{key: value for key, value in options.items() if key != "mask"})
        out = layer_of(problem).forward(problem.x, **inputs_of(problem, None))
        dropped += int((~out.dispatch.kept).any())
        zeros, total = zeros + int((out.y == 0).sum()), total + out.y.size
    assert dropped > len(sample) / 3 and zeros < total / 3


# ── conservation

ROUTERS: list[Options] = [{}, {"score": "sigmoid"}, {"score": "sqrt_softplus"}, {"score": "softmax_chosen"}]


@pytest.mark.parametrize("options", ROUTERS)
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_normalised_weights_sum_to_the_scale(options: Options, scale: float) -> None:
    out = make(scale=scale, top_k=3, dtype="float64", **options).forward(tokens(0, dtype=np.float64))
    np.testing.assert_allclose(out.routing.weights.sum(axis=1), scale, rtol=1e-15)
    assert np.all(out.routing.weights > 0)


def test_every_assignment_is_kept_or_counted_as_dropped() -> None:
    out = make(capacity=3).forward(tokens(1, 40, 8))
    dropped = int((~out.dispatch.kept).sum())
    assert out.dispatch.num_rows + dropped == 40 * 2 and dropped == 80 - 6 * 3
    assert out.dispatch.load.max() == 3


def test_choices_are_sorted_and_distinct() -> None:
    routing = make(top_k=4).forward(tokens(2, 50, 8)).routing
    assert all(len(set(row)) == 4 for row in routing.indices.tolist())
    chosen = np.take_along_axis(routing.logits, routing.indices, axis=1)
    assert np.all(np.diff(chosen, axis=1) <= 0)


def test_experts_with_equal_weights_make_routing_irrelevant() -> None:
    layer = make(dtype="float64")
    for name in ("w_gate", "w_up", "w_down"):
        layer.params[name][...] = layer.params[name][:1]
    x = tokens(3, dtype=np.float64)
    alone = {name: layer.params[name][0] for name in ("w_gate", "w_up", "w_down")}
    expected, _ = reference.feed_forward("glu", "silu", alone, x)
    assert_close(layer(x), expected)  # the weights sum to 1


def test_one_expert_is_a_plain_network() -> None:
    layer = make(num_experts=1, top_k=1)
    out = layer.forward(x := tokens(4))
    assert np.all(out.routing.weights == 1)
    alone = {name: layer.params[name][0] for name in ("w_gate", "w_up", "w_down")}
    assert_close(out.y, reference.feed_forward("glu", "silu", alone, x)[0])
    grads = layer.backward(x, out)
    assert not grads.params["w_router"].any()  # the weight is 1 whatever the router says


# ── symmetries, bit for bit


def test_permuting_tokens_permutes_everything() -> None:
    layer, x, dy = make(), tokens(5, 37, 8), tokens(6, 37, 8)
    order = np.random.default_rng(7).permutation(37)
    out, permuted = layer.forward(x), layer.forward(x[order])
    assert_bitwise_equal(permuted.y, out.y[order])
    assert_bitwise_equal(permuted.routing.weights, out.routing.weights[order])
    grads, permuted_grads = layer.backward(dy, out), layer.backward(dy[order], permuted)
    assert_bitwise_equal(permuted_grads.x, grads.x[order])
    for name, value in grads.params.items():  # sums over tokens, in another order
        assert_close(permuted_grads.params[name], value, name=name)


def test_permuting_experts_changes_nothing() -> None:
    layer, x = make(top_k=3), tokens(8, 37, 8)
    order = np.random.default_rng(9).permutation(6)
    twin = make(top_k=3)
    twin.params["w_router"][...] = layer.params["w_router"][:, order]
    for name in ("w_gate", "w_up", "w_down"):
        twin.params[name][...] = layer.params[name][order]
    out, permuted = layer.forward(x), twin.forward(x)
    assert np.array_equal(order[permuted.routing.indices], out.routing.indices)
    assert_bitwise_equal(permuted.routing.weights, out.routing.weights)
    assert_close(permuted.y, out.y)  # a token's experts are added in another order


@pytest.mark.parametrize("p", [-40, -3, 1, 30])
@pytest.mark.parametrize(("activation", "degree"), [("relu", 1), ("relu2", 2)])
def test_powers_of_two_scale_exactly(activation: str, degree: int, p: int) -> None:
    layer, x = make(form="mlp", activation=activation, dtype="float64"), tokens(10, dtype=np.float64)
    routing = layer.forward(x).routing
    fixed = {"indices": routing.indices, "weights": routing.weights}
    y = layer.forward(x, **fixed).y
    assert_bitwise_equal(layer.forward(2.0**p * x, **fixed).y, 2.0 ** (p * degree) * y)
    layer.params["w_down"] *= 2.0**p
    assert_bitwise_equal(layer(x), 2.0**p * y)


def test_duplicated_tokens_give_identical_rows() -> None:
    layer, x, dy = make(), tokens(11, 5, 8), tokens(12, 5, 8)
    out, once = layer.forward(np.repeat(x, 7, axis=0)), layer.forward(x)
    assert_bitwise_equal(out.y, np.repeat(once.y, 7, axis=0))
    grads = layer.backward(np.repeat(dy, 7, axis=0), out)
    assert_bitwise_equal(grads.x, np.repeat(layer.backward(dy, once).x, 7, axis=0))


def test_backward_is_linear_in_dy() -> None:
    layer, x, dy = make(), tokens(13), tokens(14)
    out = layer.forward(x)
    once, twice = layer.backward(dy, out), layer.backward(2 * dy, out)
    for name, value in once.params.items():
        assert_bitwise_equal(twice.params[name], 2 * value, name=name)
    assert_bitwise_equal(twice.x, 2 * once.x)


def test_the_gradient_is_the_outputs_plus_the_losses() -> None:
    layer = make(aux_losses={"switch": 0.5, "z": 0.1, "importance": 0.2}, dtype="float64")
    x, dy = (tokens(seed, dtype=np.float64) for seed in (15, 16))
    out = layer.forward(x)
    both, plain = layer.backward(dy, out), layer.backward(dy, out, d_aux_loss=0)
    losses = layer.backward(np.zeros_like(dy), out, d_aux_loss=3)
    unbalanced = layer_of(dataclasses.replace(random_problem(0), config=make(dtype="float64").config))
    assert_bitwise_equal(plain.x, unbalanced.backward(dy, unbalanced.forward(x)).x)
    for name, value in both.params.items():
        assert_close(value - plain.params[name], losses.params[name] / 3, scale=abs(value).max(), name=name)


# ── shapes, masks, external routing


@pytest.mark.parametrize(
    "shape", [(8,), (1, 8), (2, 3, 8), (2, 1, 3, 8), (0, 8), (0, 5, 8), (5, 0, 8), (2, 0, 3, 8)], ids=str
)
@pytest.mark.parametrize(
    "options", [{}, {"capacity": 2, "capacity_per": "sequence", "aux_losses": {"deepseek-sequence": 1}}]
)
def test_leading_shapes_are_restored(shape: tuple[int, ...], options: Options) -> None:
    layer, x = make(shared=GLU_SHARED, **options), tokens(17, *shape)
    out = layer.forward(x)
    grads = layer.backward(x, out)
    assert out.y.shape == layer(x).shape == grads.x.shape == shape
    assert out.y.dtype == grads.x.dtype == np.float32
    assert np.isfinite(out.aux_loss) and all(np.isfinite(v).all() for v in grads.params.values())
    if x.size == 0:
        assert not any(v.any() for v in grads.params.values()) and out.dispatch.load.sum() == 0
    elif not options:
        assert_bitwise_equal(out.y.reshape(-1, 8), layer(x.reshape(-1, 8)))


@pytest.mark.parametrize("garbage", [0.0, 1e30, np.inf, np.nan])
def test_masked_tokens_count_nowhere(garbage: float) -> None:
    """As if they were not there: outputs, gradients, losses and capacity are those of the real tokens alone."""
    options = {"shared": GLU_SHARED, "aux_losses": {"switch": 0.3, "z": 0.1}, "capacity_factor": 1.0}
    layer, x, dy = make(**options), tokens(18, 20, 8), tokens(19, 20, 8)
    real = np.random.default_rng(20).random(20) < 0.6
    x[~real] = dy[~real] = garbage
    out, alone = layer.forward(x, mask=real), layer.forward(x[real])
    assert_bitwise_equal(out.y[real], alone.y)
    assert_bitwise_equal(out.y[~real], np.zeros_like(out.y[~real]))
    assert np.all(out.routing.indices[~real] == -1) and not out.routing.weights[~real].any()
    assert out.losses == alone.losses and out.dispatch.capacity == alone.dispatch.capacity
    grads, alone_grads = layer.backward(dy, out), layer.backward(dy[real], alone)
    assert_bitwise_equal(grads.x[real], alone_grads.x)
    assert not grads.x[~real].any()
    for name, value in alone_grads.params.items():
        assert_close(grads.params[name], value, name=name)
    assert_bitwise_equal(layer(x, mask=real), out.y)


def test_all_tokens_masked() -> None:
    layer = make(shared=GLU_SHARED, aux_losses={"switch": 1.0, "importance": 1.0}, capacity_factor=1.0)
    out = layer.forward(x := tokens(21), mask=np.zeros(12, bool))
    assert not out.y.any() and out.aux_loss == 0
    grads = layer.backward(x, out)
    assert not grads.x.any() and not any(v.any() for v in grads.params.values())


def test_external_logits_equal_the_layers_own() -> None:
    layer, x, dy = make(linear_bias=True, aux_losses={"z": 0.1}), tokens(22, 3, 4, 8), tokens(23, 3, 4, 8)
    own = layer.forward(x)
    given = layer.forward(x, logits=own.routing.logits.reshape(3, 4, 6))
    assert_bitwise_equal(given.y, own.y)
    grads, own_grads = layer.backward(dy, given), layer.backward(dy, own)
    assert grads.logits.shape == (3, 4, 6) and not grads.params["w_router"].any()
    dx_router = grads.logits.reshape(12, 6) @ layer.params["w_router"].T
    assert_close(grads.x.reshape(12, 8) + dx_router, own_grads.x.reshape(12, 8))
    assert_close(x.reshape(12, 8).T @ grads.logits.reshape(12, 6), own_grads.params["w_router"])
    assert_bitwise_equal(grads.params["w_down"], own_grads.params["w_down"])


def test_external_routing_equals_the_layers_own() -> None:
    layer, x, dy = make(), tokens(24), tokens(25)
    own = layer.forward(x)
    given = layer.forward(x, indices=own.routing.indices, weights=own.routing.weights)
    assert_bitwise_equal(given.y, own.y)
    grads, own_grads = layer.backward(dy, given), layer.backward(dy, own)
    assert_bitwise_equal(grads.params["w_up"], own_grads.params["w_up"])
    dlogits = numoe.route_backward(grads.weights, own.routing, layer.config.router)
    assert_close(x.T @ dlogits, own_grads.params["w_router"])


def test_minus_one_is_not_routed() -> None:
    layer, x = make(shared=GLU_SHARED), tokens(26)
    routing = layer.forward(x).routing
    indices, weights = routing.indices.copy(), routing.weights.copy()
    indices[3], weights[3] = -1, np.nan  # the weight of nobody does not matter
    out = layer.forward(x, indices=indices, weights=weights)
    own = layer.forward(x)
    assert_bitwise_equal(np.delete(out.y, 3, axis=0), np.delete(own.y, 3, axis=0))
    assert np.all(out.dispatch.assignment_row[3] == -1)
    assert np.isfinite(out.y[3]).all() and out.y[3].any()  # the shared expert takes every token
    grads = layer.backward(x, out)
    assert not grads.weights[3].any() and np.isfinite(grads.x).all()


# ── no hidden state


@pytest.mark.parametrize("name", list(random_problem(0, shared=GLU_SHARED, bias=True, linear_bias=True).params))
def test_a_weight_changed_in_place_is_seen_by_the_next_call(name: str) -> None:
    problem = random_problem(0, shared=GLU_SHARED, bias=True, linear_bias=True)
    layer = layer_of(problem)
    before = layer(problem.x)
    layer.params[name] *= 1.5
    fresh = layer_of(dataclasses.replace(problem, params=problem.params | {name: 1.5 * problem.params[name]}))
    assert_bitwise_equal(layer(problem.x), fresh(problem.x))
    assert not np.array_equal(layer(problem.x), before)


def test_the_choice_bias_changed_in_place_is_seen_by_the_next_call() -> None:
    layer, x = make(choice_bias=True), tokens(27)
    layer.buffers["choice_bias"][...] = [0, 0, 0, 0, 9, 8]
    assert np.all(layer.forward(x).routing.indices == [4, 5])
    weights = np.take_along_axis(layer.forward(x).routing.logits, np.full((12, 2), [4, 5]), axis=1)
    assert_close(layer.forward(x).routing.weights[:, 0], 1 / (1 + np.exp(weights[:, 1] - weights[:, 0])))


def test_the_choice_bias_moves_towards_idle_experts() -> None:
    layer, x = make(choice_bias=True, score="sigmoid", top_k=1), tokens(28, 400, 8)
    layer.buffers["choice_bias"][...] = [5, 0, 0, 0, 0, 0]
    for _ in range(200):
        layer.update_choice_bias(layer.forward(x), rate=0.05)
    assert layer.forward(x).dispatch.load.max() < 2 * 400 / 6


def test_results_are_equal_to_themselves_alone() -> None:
    """Comparing arrays gives arrays; and what can be compared without an error can be kept in sets."""
    layer, x = make(), tokens(32)
    out, again = layer.forward(x), layer.forward(x)
    config = layer.config.experts
    pairs = [(out, again), (out.routing, again.routing), (out.dispatch, again.dispatch)]
    pairs += [(layer.backward(x, out), layer.backward(x, again))]
    pairs += [tuple(numoe.experts_forward(x, out.dispatch, layer.params, config)[1] for _ in range(2))]
    for one, other in pairs:
        assert one == one and one != other and len({one, other}) == 2


def test_two_forwards_may_be_alive_at_once() -> None:
    layer, first, second, dy = make(aux_losses={"z": 0.1}), tokens(29), tokens(30), tokens(31)
    a, b = layer.forward(first), layer.forward(second)
    grads_b, grads_a, again = layer.backward(dy, b), layer.backward(dy, a), layer.backward(dy, b)
    alone = layer.backward(dy, layer.forward(first))
    for name, value in alone.params.items():
        assert_bitwise_equal(grads_a.params[name], value)
        assert_bitwise_equal(again.params[name], grads_b.params[name])
        assert not np.shares_memory(again.params[name], grads_b.params[name])


def test_x_may_be_reused_between_forward_and_backward() -> None:
    """The output does not keep the caller's array: a buffer that is filled again does not change gradients."""
    layer, x, dy = make(), tokens(32), tokens(33)
    expected = layer.backward(dy, layer.forward(x))
    buffer = x.copy()
    out = layer.forward(buffer)
    buffer[...] = 0
    assert_bitwise_equal(layer.backward(dy, out).params["w_up"], expected.params["w_up"])


def test_inputs_are_never_written_and_outputs_never_alias_them() -> None:
    layer = make(shared=GLU_SHARED, linear_bias=True, jitter=0.1, noise_std=0.1, capacity=5, aux_losses={"z": 1})
    x, dy, logits, mask = tokens(34), tokens(35), tokens(36, 12, 6), np.arange(12) % 3 > 0
    routing = layer.forward(x).routing
    inputs = {"x": x, "dy": dy, "logits": logits, "mask": mask} | layer.params
    inputs |= {"indices": routing.indices, "weights": routing.weights}
    before = {name: value.tobytes() for name, value in inputs.items()}
    for value in inputs.values():
        value.setflags(write=False)  # a write that NumPy makes would raise; one of the core shows in the bytes
    external = make(shared=GLU_SHARED, capacity=5)
    outs = [(layer, layer.forward(x, mask=mask, rng=0)), (layer, layer.forward(x, logits=logits, mask=mask))]
    outs.append((external, external.forward(x, indices=routing.indices, weights=routing.weights, mask=mask)))
    for owner, out in outs:
        grads = owner.backward(dy, out)
        assert before == {name: value.tobytes() for name, value in inputs.items()}
        for result in (out.y, grads.x, *grads.params.values()):
            assert not any(np.shares_memory(result, value) for value in inputs.values())


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        {"bias": True, "linear_bias": True, "choice_bias": True, "score": "sigmoid"},
        {"form": "mlp", "activation": "relu", "weight_on": "input", "num_groups": 3, "groups_kept": 2},
        {"shared": GLU_SHARED},
    ],
)
def test_inference_in_one_call_of_the_core_has_the_bits_of_the_steps(options: Options, dtype: str) -> None:
    layer, x = make(dtype=dtype, **options), tokens(0, 3, 50, 8, dtype=dtype)
    layer = pickle.loads(pickle.dumps(layer))  # dtypes equal to NumPy's own without being it
    layer.params["w_router"] = np.asfortranarray(layer.params["w_router"])  # the user's to replace
    mask = tokens(1, 3, 50) > -1
    x[0, 0] = np.nan
    for given in (None, mask):
        assert_bitwise_equal(layer(x, mask=given), layer.forward(x, mask=given).y)
    assert layer(x[:0]).shape == (0, 50, 8)


def test_inference_is_the_forward_and_may_go_into_an_array() -> None:
    layer, x = make(shared=GLU_SHARED, capacity=3, noise_std=0.5), tokens(37, 3, 4, 8)
    expected = layer.forward(x).y
    assert_bitwise_equal(layer(x), expected)
    result = np.full_like(x, np.nan)
    assert layer(x, out=result) is result
    assert_bitwise_equal(result, expected)
    assert_bitwise_equal(layer(x, rng=3), layer.forward(x, rng=3).y)


# ── who is touched


@pytest.mark.parametrize("options", [{}, {"form": "mlp", "bias": True, "weight_on": "input"}])
def test_idle_experts_have_exactly_zero_gradients(options: Options) -> None:
    layer, x = make(num_experts=40, **options), tokens(38)
    out = layer.forward(x)
    idle = out.dispatch.load == 0
    assert 5 < idle.sum() < 40
    grads = layer.backward(x, out)
    for name in numoe.config.EXPERT_PARAMS:
        if name in grads.params:
            assert not grads.params[name][idle].any() and not np.signbit(grads.params[name][idle]).any()
            assert all(expert.any() for expert in grads.params[name][~idle])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("options", [*ROUTERS, {"weight_on": "input"}, {"shared": GLU_SHARED}, {"top_k": 6}])
def test_a_bad_token_changes_no_other_token(options: Options, bad: float) -> None:
    layer, x, dy = make(**options), tokens(39, 20, 8), tokens(40, 20, 8)
    out = layer.forward(x)
    grads = layer.backward(dy, out)
    x[7] = bad
    soiled = layer.forward(x)
    others = np.arange(20) != 7
    assert_bitwise_equal(soiled.y[others], out.y[others])
    assert not np.isfinite(soiled.y[7]).all()
    assert sorted(set(soiled.routing.indices[7])) == sorted(soiled.routing.indices[7])  # distinct
    assert_bitwise_equal(layer.backward(dy, soiled).x[others], grads.x[others])


def test_a_bad_output_gradient_reaches_its_own_experts_only() -> None:
    layer, x, dy = make(), tokens(41, 20, 8), tokens(42, 20, 8)
    out = layer.forward(x)
    dy[7] = np.nan
    grads = layer.backward(dy, out)
    mine = np.isin(np.arange(6), out.routing.indices[7])
    assert np.isfinite(np.delete(grads.x, 7, axis=0)).all()
    for name in ("w_gate", "w_up", "w_down"):
        assert np.isnan(grads.params[name][mine]).all() and np.isfinite(grads.params[name][~mine]).all()


# ── randomness and learning


def test_noise_and_jitter_are_reproducible_and_documented() -> None:
    layer, x = make(noise_std=0.5, jitter=0.1, dtype="float64"), tokens(43, dtype=np.float64)
    logits = layer.forward(x, rng=11).routing.logits
    assert_bitwise_equal(logits, layer.forward(x, rng=np.random.default_rng(11)).routing.logits)
    assert not np.array_equal(logits, layer.forward(x, rng=12).routing.logits)
    generator = np.random.default_rng(11)
    jitter, noise = generator.uniform(0.9, 1.1, x.shape), generator.standard_normal((12, 6))
    assert_close(logits, (x * jitter) @ layer.params["w_router"] + 0.5 * noise)
    assert_close(layer.forward(x).routing.logits, x @ layer.params["w_router"])  # without rng: none


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_fifty_steps_reduce_the_loss(score: str) -> None:
    layer, teacher, x = make(1, score=score), make(2), tokens(44, 200, 8)
    target, losses = teacher(x), []
    for _ in range(50):
        out = layer.forward(x)
        error = out.y - target
        losses.append(float((error**2).mean()))
        for name, gradient in layer.backward(2 * error / error.size, out).params.items():
            layer.params[name] -= 0.5 * gradient
    assert losses[-1] < 0.5 * losses[0]
    assert sum(b < a for a, b in itertools.pairwise(losses)) > 40


def test_parameters_are_counted_and_shown() -> None:
    layer = make(shared=GLU_SHARED)
    assert layer.num_params == sum(value.size for value in layer.params.values())
    idle = sum(layer.params[name][0].size for name in ("w_gate", "w_up", "w_down")) * (6 - 2)
    assert layer.num_active_params == layer.num_params - idle
    assert f"{layer.num_params:,} parameters" in repr(layer) and f"{layer.num_params:,}" in layer._repr_html_()


def test_help_and_completion_show_the_options_by_name() -> None:
    class WithOneMore(numoe.MoELayer):
        def __init__(self, depth: int) -> None:
            super().__init__(d_model=depth, d_ff=2, num_experts=2, top_k=1)

    shown = inspect.signature(numoe.MoELayer).parameters
    required = [name for name, parameter in shown.items() if parameter.default is parameter.empty]
    assert required == ["d_model", "num_experts", "top_k", "d_ff"]
    config = MoEConfig.from_options(d_model=3, d_ff=2, num_experts=2, top_k=1)
    defaults = {name: shown[name].default for name in shown if name not in {*required, "config", "rng"}}
    assert config.replace(**defaults) == config
    assert set(shown) == {option.name for option in MoEConfig.option_fields()} | {"config", "rng"}
    assert list(inspect.signature(WithOneMore).parameters) == ["depth"]
