"""bfloat16 layers are float32 layers on rounded numbers: bit for bit, forward and backward, packed or not.

Packed layers on a target with dot products of bfloat16 pairs round more: x with its weight, and hidden rows.
"""

import itertools
from typing import Any

import dots
import ml_dtypes
import numoe
import numpy as np
import pytest
import safetensors.numpy
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
    assert_bitwise_equal(narrow(problem.x), out.y)
    packed = narrow.pack()
    if dots.USED:
        dots.assert_within(packed(x), dots.layer_on_rounded_rows(narrow, x))
        assert_bitwise_equal(packed(problem.x), packed(x).astype(BF16))
    else:
        assert_bitwise_equal(packed(problem.x), out.y)


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
    with pytest.raises(ValueError, match=f"a bfloat16 layer packs to bfloat16; got '{dtype}'"):
        narrow.pack(dtype)
