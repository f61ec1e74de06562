"""Gradients into arrays that exist already, added to them, and from activations computed again."""

import itertools
from typing import Any

import numoe
import numpy as np
import pytest
from numoe.testing import assert_bitwise_equal, random_problem

FORMS = [
    dict(form=form, bias=bias, shared=shared, dtype=dtype)
    for form, bias, shared, dtype in itertools.product(
        ("glu", "mlp"),
        (False, True),
        (None, numoe.SharedExpertConfig(d_ff=9, gate="sigmoid")),
        ("float32", "float64", "bfloat16"),
    )
]


def setup(tokens: int = 50, **options: Any) -> tuple[numoe.MoELayer, Any, numoe.MoEOutput]:
    problem = random_problem(3, tokens=tokens, d_model=37, d_ff=67, num_experts=8, **options)
    layer = numoe.MoELayer(config=problem.config, rng=0)
    for name, value in problem.params.items():
        layer.params[name][...] = value
    return layer, problem, layer.forward(problem.x)


def copies(grads: numoe.MoEGrads) -> dict[str, np.ndarray]:
    return {name: value.copy() for name, value in grads.params.items()}


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("tokens", [2, 50])  # 2: most experts are idle
def test_into_overwrites_and_accumulates(options: dict[str, Any], tokens: int) -> None:
    layer, problem, out = setup(tokens, linear_bias=True, aux_losses={"switch": 0.1}, **options)
    fresh = layer.backward(problem.dy, out)
    want, into = copies(fresh), layer.backward(problem.dy, out)
    for value in into.params.values():
        value[...] = np.nan  # whatever is there must not matter
    again = layer.backward(problem.dy, out, into=into)
    added = layer.backward(problem.dy, out, into=again, accumulate=True)
    for name, gradient in want.items():
        assert added.params[name] is into.params[name]
        assert_bitwise_equal(added.params[name], gradient + gradient, name=name)
    assert_bitwise_equal(added.x, fresh.x)


def test_parts_of_a_batch_add_up() -> None:
    layer, problem, _ = setup(60, dtype="float64")
    whole = layer.backward(problem.dy, layer.forward(problem.x))
    first = layer.backward(problem.dy[:25], layer.forward(problem.x[:25]))
    both = layer.backward(problem.dy[25:], layer.forward(problem.x[25:]), into=first, accumulate=True)
    for name, gradient in whole.params.items():
        numoe.testing.assert_close(both.params[name], gradient)


def test_idle_experts_stay_exactly_zero_in_used_arrays() -> None:
    layer, problem, out = setup(1)
    into = layer.backward(problem.dy, out)
    for value in into.params.values():
        value[...] = 7.0
    layer.backward(problem.dy, out, into=into)
    idle = np.setdiff1d(np.arange(8), out.routing.indices)
    assert len(idle)
    assert not into.params["w_up"][idle].any()


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_recomputed_activations_give_the_same_bits(options: dict[str, Any]) -> None:
    layer, problem, out = setup(50, **options)
    lean = layer.forward(problem.x, recompute=True)
    assert_bitwise_equal(lean.y, out.y)
    assert lean._cache.routed.cache.up is None
    want, got = layer.backward(problem.dy, out), layer.backward(problem.dy, lean)
    assert_bitwise_equal(got.x, want.x)
    for name, gradient in want.params.items():
        assert_bitwise_equal(got.params[name], gradient, name=name)


def test_many_rows_per_expert_in_several_blocks() -> None:
    """More rows than one pass over a panel, more k than one block, in every product."""
    problem = random_problem(5, tokens=700, d_model=40, d_ff=550, num_experts=2, top_k=1, dtype="float32")
    layer = numoe.MoELayer(config=problem.config, rng=0)
    wide = numoe.MoELayer(config=problem.config.replace(dtype="float64"), rng=0)
    for name, value in problem.params.items():
        layer.params[name][...] = wide.params[name][...] = value
    out, exact = layer.forward(problem.x), wide.forward(problem.x)
    numoe.testing.assert_close(out.y, exact.y, scale=np.abs(exact.y).max() * 10)
    grads = layer.backward(problem.dy, out)
    exact_grads = wide.backward(problem.dy, exact)
    for name, gradient in exact_grads.params.items():
        numoe.testing.assert_close(grads.params[name], gradient, scale=np.abs(gradient).max() * 10)


def misplaced(like: np.ndarray) -> np.ndarray:
    """Zeros that start in the middle of a cache line."""
    memory = np.zeros(like.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + 16
    return memory[start : start + like.nbytes].view(like.dtype).reshape(like.shape)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("tokens", [24, 300, 2300])  # rows per expert: few, some tiles, more than one block
def test_large_matrices_give_the_bits_of_small_steps(tokens: int, dtype: str) -> None:
    """Large gradients go past the caches, and tiles of large products carry what the next ones read.

    The same numbers take other ways where arrays start inside a cache line, are added to or are packed.
    """
    config = numoe.MoEConfig.from_options(d_model=528, d_ff=1040, num_experts=4, top_k=1, dtype=dtype)
    layer = numoe.MoELayer(config=config, rng=0)
    rng = np.random.default_rng(1)
    x, dy = (rng.standard_normal((tokens, 528)).astype(layer.dtype) for _ in range(2))
    out = layer.forward(x)
    assert_bitwise_equal(layer.pack()(x), out.y)
    grads = layer.backward(dy, out)
    elsewhere = numoe.MoEGrads(x=grads.x, params={name: misplaced(value) for name, value in grads.params.items()})
    added = layer.backward(dy, out, into=elsewhere, accumulate=True)
    for name, gradient in grads.params.items():
        assert_bitwise_equal(added.params[name], gradient, name=name)
    alone = layer.forward(x[:1])
    assert_bitwise_equal(alone.y, out.y[:1])
    assert_bitwise_equal(layer.backward(dy[:1], alone).x, grads.x[:1])


def test_new_gradients_start_on_cache_lines() -> None:
    layer, problem, out = setup(10, dtype="float32")
    grads = layer.backward(problem.dy, out).params
    assert [grads[name].ctypes.data % 64 for name in ("w_gate", "w_up", "w_down")] == [0, 0, 0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda g: dict(into=g.params), TypeError, "into must be the MoEGrads of an earlier backward; got dict"),
        (lambda _: dict(accumulate=True), ValueError, "accumulate=True adds to earlier gradients; pass them as into="),
        (lambda g: dict(into=g, accumulate=1), TypeError, "accumulate must be True or False; got 1"),
        (
            lambda g: dict(into=numoe.MoEGrads(x=g.x, params={**g.params, "w_up": g.params["w_up"][:, ::2]})),
            ValueError,
            r"into.params\['w_up'\] must be a float32 array of shape \(8, 37, 67\); got float32 \(8, 19, 67\)",
        ),
        (
            lambda g: dict(into=numoe.MoEGrads(x=g.x, params={**g.params, "w_up": np.zeros((8, 37, 67))})),
            ValueError,
            r"got float64 \(8, 37, 67\)",
        ),
        (
            lambda g: dict(into=numoe.MoEGrads(x=g.x, params={n: v for n, v in g.params.items() if n != "w_router"})),
            ValueError,
            r"into.params\['w_router'\] must be a float32 array of shape \(37, 8\); got nothing",
        ),
    ],
)
def test_unusable_arrays_are_refused(change: Any, error: type[Exception], message: str) -> None:
    layer, problem, out = setup(10, dtype="float32")
    grads = layer.backward(problem.dy, out)
    before = copies(grads)
    with pytest.raises(error, match=message):
        layer.backward(problem.dy, out, **change(grads))
    for name, value in before.items():
        assert_bitwise_equal(grads.params[name], value)


def place_of(grads: numoe.MoEGrads, **changed: Any) -> numoe.MoEGrads:
    return numoe.MoEGrads(x=grads.x, params={**grads.params, **changed})


@pytest.mark.parametrize("written", ["w_gate", "w_down"])
def test_a_gradient_has_a_place_of_its_own(written: str) -> None:
    layer, problem, out = setup(10, dtype="float32", shared=numoe.SharedExpertConfig(d_ff=9))
    params = layer.params
    one = np.zeros(2 * params["w_up"].size, np.float32)
    halves = one[: params["w_up"].size], one[100 : 100 + params["w_up"].size]
    before = copies(layer.backward(problem.dy, out)), {name: value.copy() for name, value in params.items()}
    grads = layer.backward(problem.dy, out)
    up, same = halves[0].reshape(params["w_up"].shape), halves[1].reshape(params[written].shape)
    dy = problem.dy.copy()
    inside = np.zeros(params[written].size + dy.size, np.float32)
    inside[-dy.size :] = dy.reshape(-1)
    tail = inside[: params[written].size], inside[-dy.size - 8 :][: dy.size].reshape(dy.shape)
    for changed, other, y in (
        ({"w_up": up, written: same}, "into.params", dy),
        ({"w_up": params[written].reshape(up.shape)}, "layer.params", dy),
        ({written: tail[0].reshape(params[written].shape)}, "dy", tail[1]),
    ):
        names = rf"^into\.params\['w_\w+'\] overlaps {other}(\['w_\w+'\])?; pass the arrays of an earlier backward"
        with pytest.raises(ValueError, match=names):
            layer.backward(y, out, into=place_of(grads, **changed))
    assert not one.any()
    for name, value in params.items():
        assert_bitwise_equal(value, before[1][name])
        assert_bitwise_equal(grads.params[name], before[0][name])


def test_parameters_may_share_memory_where_gradients_do_not() -> None:
    layer, problem, _ = setup(10, dtype="float32")
    layer.params["w_gate"] = layer.params["w_up"]
    grads = layer.backward(problem.dy, layer.forward(problem.x))
    layer.backward(problem.dy, layer.forward(problem.x), into=grads)


@pytest.mark.parametrize(
    ("value", "got"), [(None, "nothing"), ([1.0], "list"), (np.ma.zeros((37, 8), np.float32), "MaskedArray")]
)
def test_places_are_arrays(value: Any, got: str) -> None:
    layer, problem, out = setup(10, dtype="float32")
    grads = layer.backward(problem.dy, out)
    with pytest.raises(ValueError, match=rf"into.params\['w_router'\] must be a float32 array .*; got {got}"):
        layer.backward(problem.dy, out, into=place_of(grads, w_router=value))
    with pytest.raises(TypeError, match=r"into\.params must map names to arrays; got list"):
        layer.backward(problem.dy, out, into=numoe.MoEGrads(x=grads.x, params=[1]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("into", "error", "match"),
    [
        ({}, ValueError, "into must hold an array for every gradient; missing: w_gate, w_up, w_down"),
        ([], TypeError, "into must map names to arrays; got list"),
    ],
)
def test_experts_backward_says_what_into_lacks(into: Any, error: type[Exception], match: str) -> None:
    layer, problem, out = setup(10, dtype="float32")
    config, plan, weights = layer.config.experts, out.dispatch, out.routing.weights
    y, cache = numoe.experts_forward(problem.x, plan, layer.params, config, weights=weights, combined=True)
    arguments = (y, problem.x, plan, layer.params, config, cache)
    with pytest.raises(error, match=match):
        numoe.experts_backward(*arguments, weights=weights, combined=True, into=into)


def test_parameters_and_read_only_arrays_are_no_place_for_gradients() -> None:
    layer, problem, out = setup(10, dtype="float32")
    grads = layer.backward(problem.dy, out)
    with pytest.raises(ValueError, match=r"into.params\['(\w+)'\] overlaps layer.params\['\1'\]"):
        layer.backward(problem.dy, out, into=numoe.MoEGrads(x=grads.x, params=layer.params))
    grads.params["w_up"].flags.writeable = False
    with pytest.raises(ValueError, match=r"into.params\['w_up'\] must be C-contiguous, aligned and writable"):
        layer.backward(problem.dy, out, into=grads)
    misaligned = np.zeros(layer.params["w_up"].nbytes + 1, np.uint8)[1:].view(np.float32)
    grads.params["w_up"] = misaligned.reshape(layer.params["w_up"].shape)
    with pytest.raises(ValueError, match=r"into.params\['w_up'\] must be C-contiguous, aligned and writable"):
        layer.backward(problem.dy, out, into=grads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, g: p, r"into\['w_gate'\] shares memory with params\['w_gate'\]"),
        (lambda p, g: g | {"w_down": p["w_up"].reshape(8, 67, 37)}, r"into\['w_down'\] .* params\['w_up'\]"),
        (lambda p, g: g | {"w_up": g["w_gate"]}, r"into\['w_up'\] shares memory with into\['w_gate'\]"),
    ],
)
def test_experts_backward_overwrites_nothing_else(change: Any, message: str) -> None:
    layer, problem, out = setup(10, dtype="float32")
    params, plan, config = layer.params, out.dispatch, layer.config.experts
    x, dy = problem.x.astype(np.float32), problem.dy.astype(np.float32)
    _, cache = numoe.experts_forward(x, plan, params, config, combined=True)
    _, _, grads = numoe.experts_backward(dy, x, plan, params, config, cache, combined=True)
    before = {name: value.copy() for name, value in params.items()}
    with pytest.raises(ValueError, match=message):
        numoe.experts_backward(dy, x, plan, params, config, cache, combined=True, into=change(params, grads))
    for name, value in before.items():
        assert_bitwise_equal(params[name], value, name=name)
