"""bfloat16 layers are float32 layers on rounded numbers: bit for bit, forward and backward, packed or not.

On targets that multiply bfloat16 pairs both factors of every product are rounded; what that may change is bounded.
"""

import itertools
from typing import Any

import ml_dtypes
import numoe
import numpy as np
import pairs
import pytest
import safetensors.numpy
from numoe._arrays import FLOAT32, converted
from numoe.testing import assert_bitwise_equal, assert_close, random_problem

BF16 = np.dtype(ml_dtypes.bfloat16)
FORMS = [
    dict(form=form, bias=bias, shared=shared, weight_on=weight_on)
    for form, bias, shared, weight_on in itertools.product(
        ("glu", "mlp"),
        (False, True),
        (None, numoe.SharedExpertConfig(d_ff=9), numoe.SharedExpertConfig(d_ff=9, gate="sigmoid")),
        ("output", "input"),
    )
]


def twins(tokens: int = 40, **options: Any) -> tuple[numoe.MoELayer, numoe.MoELayer, Any]:
    """A bfloat16 layer, the float32 layer with the same numbers, and a problem."""
    problem = random_problem(1, tokens=tokens, d_model=37, d_ff=67, dtype="bfloat16", **options)
    narrow = numoe.MoELayer(config=problem.config, rng=0)
    wide = numoe.MoELayer(config=problem.config.replace(dtype="float32"), rng=0)
    for name, value in problem.params.items():
        narrow.params[name][...] = value
        wide.params[name][...] = value.astype(np.float32)
    return narrow, wide, problem


def test_numbers_are_converted_as_by_ml_dtypes(rng: np.random.Generator) -> None:
    """Every bfloat16 number, and float32 numbers at and around every boundary between two of them."""
    every = np.arange(2**16, dtype=np.uint32)
    wide = (every << 16).view(np.float32)
    narrow = every.astype(np.uint16).view(BF16)
    np.testing.assert_array_equal(converted(narrow, FLOAT32).view(np.uint32), every << 16)
    ends = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    bits = np.append((every[:, None] << 16 | ends).ravel(), rng.integers(2**32, size=100_003, dtype=np.uint32))
    x = bits.view(np.float32)
    nan = np.isnan(x)
    found = converted(x, BF16)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(found[~nan].view(np.uint16), x[~nan].astype(BF16).view(np.uint16))
    assert np.isnan(found[nan]).all()
    strided = wide[::-3][~np.isnan(wide[::-3])][::2]
    np.testing.assert_array_equal(converted(strided, BF16).astype(np.float32), strided)
    assert converted(np.zeros((0, 3), BF16), FLOAT32).shape == (0, 3)


@pytest.mark.skipif(pairs.USED, reason="this target rounds both factors")
@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 200])
def test_equals_float32_on_rounded_numbers(options: dict[str, Any], tokens: int) -> None:
    narrow, wide, problem = twins(tokens, **options)
    x = problem.x.astype(np.float32)
    out, exact = narrow.forward(problem.x), wide.forward(x)
    assert out.y.dtype == BF16
    assert_bitwise_equal(out.y, exact.y.astype(BF16))
    dy = problem.dy.astype(np.float32)
    grads, exact_grads = narrow.backward(dy, out), wide.backward(dy, exact)
    assert_bitwise_equal(grads.x, exact_grads.x.astype(BF16))
    for name, gradient in exact_grads.params.items():
        assert_bitwise_equal(grads.params[name], gradient, name=name)


@pytest.mark.skipif(not pairs.USED, reason="this target multiplies in float32")
@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 200])
def test_is_as_near_to_rounded_factors_as_float32_sums_are(options: dict[str, Any], tokens: int) -> None:
    narrow, wide, problem = twins(tokens, **options)
    x = problem.x.astype(np.float32)
    pairs.assert_within(narrow.pack()(x), pairs.layer_on_rounded_rows(narrow, x))
    grads, exact = (layer.backward(problem.dy, layer.forward(problem.x)) for layer in (narrow, wide))
    for name, gradient in exact.params.items():
        if name in ("w_router", "b_router", "w_shared_score"):
            continue  # differences of dweights, of which the next test knows more
        error = grads.params[name].astype(np.float64) - gradient
        assert np.linalg.norm(error) <= 8 * 2.0**-9 * np.linalg.norm(gradient), name  # a few roundings in a row


@pytest.mark.skipif(not pairs.USED, reason="this target multiplies in float32")
@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", ["glu", "mlp"])
@pytest.mark.parametrize("tokens", [1, 2, 5, 70, 301])
def test_gradients_are_as_near_as_float32_sums_are(form: str, bias: bool, weight_on: str, tokens: int) -> None:
    narrow, _, problem = twins(tokens, form=form, bias=bias, weight_on=weight_on)
    config, out = narrow.config.experts, narrow.forward(problem.x)
    plan, weights = out.dispatch, out.routing.weights.astype(np.float32)
    params = {n: v for n, v in narrow.params.items() if n in ("w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down")}
    rng = np.random.default_rng(tokens)
    x, dy = (rng.standard_normal(problem.x.shape).astype(np.float32) for _ in range(2))
    y, cache = numoe.experts_forward(x, plan, params, config, weights=weights, combined=True)
    dx, dweights, dparams = numoe.experts_backward(dy, x, plan, params, config, cache, weights=weights, combined=True)
    expected = pairs.experts_on_rounded_rows(x, dy, plan, weights, params, config)
    for name, found, bound in zip(("y", "dx", "dweights"), (y, dx, dweights), expected[:3], strict=True):
        pairs.assert_within(found, bound, name)
    assert dparams.keys() == expected[3].keys()
    for name, bound in expected[3].items():
        pairs.assert_within(dparams[name], bound, name)


@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 200])
def test_packing_changes_no_bit(options: dict[str, Any], tokens: int) -> None:
    narrow, _, problem = twins(tokens, **options)
    y = narrow.forward(problem.x).y
    assert_bitwise_equal(narrow(problem.x), y)
    assert_bitwise_equal(narrow.pack()(problem.x), y)


def test_dtypes() -> None:
    narrow, _, problem = twins(bias=True, linear_bias=True, choice_bias=True)
    assert narrow.dtype == BF16
    for name, value in narrow.params.items():
        assert value.dtype == (BF16 if name in ("w_gate", "w_up", "w_down") else np.float32), name
    assert narrow.buffers["choice_bias"].dtype == np.float32
    out = narrow.forward(problem.x)
    assert out.routing.weights.dtype == out.routing.logits.dtype == np.float32
    grads = narrow.backward(problem.dy, out)
    assert grads.x.dtype == BF16
    assert {g.dtype for g in grads.params.values()} == {np.dtype(np.float32)}
    assert narrow.pack().nbytes < narrow.pack().config.num_params() * 2 * 2


def test_close_to_float64() -> None:
    narrow, _, problem = twins(tokens=100)
    config = problem.config.replace(dtype="float64")
    params = {name: value.astype(np.float64) for name, value in problem.params.items()}
    exact = numoe.reference.forward(config, params, problem.x.astype(np.float64))
    out = narrow.forward(problem.x)
    assert np.array_equal(out.routing.indices, exact.routing.indices)
    assert_close(out.y, exact.y.astype(BF16))


def test_rounds_x_like_its_parameters() -> None:
    narrow, _, problem = twins()
    x = np.random.default_rng(0).standard_normal(problem.x.shape)
    assert_bitwise_equal(narrow(x), narrow(x.astype(BF16)))


def test_saves_and_loads(tmp_path: Any) -> None:
    narrow, _, problem = twins(shared=numoe.SharedExpertConfig(d_ff=9, gate="sigmoid"))
    narrow.save(tmp_path / "layer.safetensors")
    again = numoe.MoELayer.load(tmp_path / "layer.safetensors")
    assert again.config == narrow.config
    assert_bitwise_equal(again(problem.x), narrow(problem.x))
    assert safetensors.numpy.load_file(tmp_path / "layer.safetensors")["w_up"].dtype == BF16


def test_functions_take_bfloat16_matrices_with_float32_rows() -> None:
    narrow, wide, problem = twins()
    x = problem.x.astype(np.float32)
    out = wide.forward(x)
    experts = narrow.config.experts
    rows, cache = numoe.experts_forward(x, out.dispatch, narrow.params, experts)
    if not pairs.USED:
        assert_bitwise_equal(rows, numoe.experts_forward(x, out.dispatch, wide.params, experts)[0])
    _, _, dparams = numoe.experts_backward(rows, x, out.dispatch, narrow.params, experts, cache)
    assert dparams["w_up"].dtype == np.float32
    mixed = {**narrow.params, "w_gate": wide.params["w_gate"]}
    with pytest.raises(TypeError, match=r"params\['w_gate'\] must be a bfloat16 array like w_up; got float32"):
        numoe.experts_forward(x, out.dispatch, mixed, experts)
    with pytest.raises(TypeError, match=r"params\['w_gate'\] must be a float64 array like x; got bfloat16"):
        numoe.experts_forward(x.astype(np.float64), out.dispatch, narrow.params, experts)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_packs_as_itself_only(dtype: str) -> None:
    narrow, _, _ = twins()
    with pytest.raises(ValueError, match=f"a bfloat16 layer packs to bfloat16; got {dtype}"):
        narrow.pack(dtype)
