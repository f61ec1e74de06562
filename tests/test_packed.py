"""Packed layers give the bits of the layer they were made from, in every form, for any number of tokens."""

import itertools

import ml_dtypes
import numoe
import numpy as np
import pytest
from numoe.testing import assert_bitwise_equal

D, F, E, K = 37, 53, 6, 3  # no multiple of any vector width
FORMS = list(itertools.product(["softmax", "sigmoid"], ["glu", "mlp"], [False, True], [None, "none", "sigmoid"]))


def make(score, form, bias, gate, dtype="float32"):
    shared = None if gate is None else numoe.SharedExpertConfig(d_ff=19, gate=gate)
    options = {"score": score, "form": form, "bias": bias, "linear_bias": bias, "shared": shared, "dtype": dtype}
    layer = numoe.MoELayer(d_model=D, d_ff=F, num_experts=E, top_k=K, rng=1, **options)
    rng = np.random.default_rng(2)
    for value in layer.params.values():
        value[...] = 0.3 * rng.standard_normal(value.shape)
    return layer


def tokens(count, dtype):
    return np.random.default_rng(count).standard_normal((count, D)).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("score", "form", "bias", "gate"), FORMS)
def test_packing_changes_no_bit(score, form, bias, gate, dtype):
    layer = make(score, form, bias, gate, dtype)
    packed = layer.pack()
    for count in (0, 1, 2, 5, 50, 300):
        x = tokens(count, dtype)
        assert_bitwise_equal(packed(x), layer(x))


@pytest.mark.parametrize(("score", "form", "bias", "gate"), FORMS)
def test_bfloat16_is_the_layer_with_rounded_expert_weights(score, form, bias, gate):
    layer, rounded = make(score, form, bias, gate), make(score, form, bias, gate)
    for name, value in rounded.params.items():
        if name.startswith("w_") and name not in ("w_router", "w_shared_score"):
            value[...] = value.astype(ml_dtypes.bfloat16)
    packed = layer.pack("bfloat16")
    for count in (1, 2, 5, 50, 300):
        x = tokens(count, "float32")
        assert_bitwise_equal(packed(x), rounded(x))


def test_a_packed_layer_is_a_copy():
    layer = make("softmax", "glu", False, None)
    packed, x = layer.pack(), tokens(4, "float32")
    before = packed(x)
    layer.params["w_up"][...] = 0
    assert_bitwise_equal(packed(x), before)


def test_outside_routing_and_shapes():
    layer = make("softmax", "glu", True, None)
    packed, x = layer.pack(), tokens(6, "float32")
    out = layer.forward(x)
    assert_bitwise_equal(packed.experts(x, out.dispatch, out.routing.weights), out.y)
    assert packed(x.reshape(2, 3, D)).shape == (2, 3, D)
    assert packed(x.astype(ml_dtypes.bfloat16)).dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("gate", [None, "none", "sigmoid"])
def test_a_routing_from_outside_gives_the_bits_of_the_layer(gate):
    layer = make("softmax", "glu", True, gate)
    packed = layer.pack()
    for count in (0, 1, 5, 50):
        x = tokens(count, "float32")
        out = layer.forward(x)
        assert_bitwise_equal(packed.forward_routed(x, out.routing.indices, out.routing.weights), out.y)
    indices = np.where(np.arange(K) > 0, -1, out.routing.indices)  # second and third choices go nowhere
    want = layer.forward(x, indices=indices, weights=out.routing.weights).y
    assert_bitwise_equal(packed.forward_routed(x, indices.astype(np.int64), out.routing.weights), want)


@pytest.mark.parametrize(
    ("indices", "weights", "error", "match"),
    [
        ([[0, 6]], [[1.0, 1.0]], IndexError, r"indices\[0, 1\] = 6 is out of range for num_experts = 6"),
        ([[0, -2]], [[1.0, 1.0]], IndexError, r"indices\[0, 1\] = -2 is out of range"),
        ([[2, 1, 2]], [[1.0, 1.0, 1.0]], ValueError, r"indices\[0\] chooses expert 2 twice"),
        ([[0], [1]], [[1.0], [1.0]], ValueError, "indices"),
        ([[0, 1]], [[1.0]], ValueError, "weights"),
        ([[0.0]], [[1.0]], TypeError, "indices must be an array of ints"),
    ],
)
def test_wrong_routings_are_explained(indices, weights, error, match):
    packed = make("softmax", "glu", False, None).pack()
    with pytest.raises(error, match=match):
        packed.forward_routed(tokens(1, "float32"), indices, weights)


def test_arrays_of_every_kind_give_the_same_numbers():
    """Ready arrays go straight to the core, others are converted first."""
    packed, x = make("softmax", "glu", True, None).pack(), tokens(6, "float32")
    y = packed(x)
    swapped = x.astype(">f4")
    read_only = x.copy()
    read_only.flags.writeable = False
    unaligned = np.frombuffer(b"x" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    for same in (x.T.copy().T, x.astype(np.float64), swapped, read_only, unaligned, x[::-1].copy()[::-1]):
        assert_bitwise_equal(packed(same), y)
    assert_bitwise_equal(packed(x[0]), y[0])
    assert packed(x[:0]).shape == (0, D) and packed(x.reshape(3, 1, 2, D)).shape == (3, 1, 2, D)


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (np.float32(1), ValueError, r"x must have shape \(..., d_model\)"),
        (np.ones((2, D), np.int32), TypeError, "x has dtype int32"),
        (np.ma.ones((2, D), np.float32), TypeError, "x is a masked array"),
        (None, TypeError, "x must be an array of numbers"),
    ],
)
def test_what_is_no_array_of_tokens_is_said(x, error, match):
    packed = make("softmax", "glu", False, None).pack()
    with pytest.raises(error, match=match):
        packed(x)


def test_memory_is_that_of_the_weights():
    layer = numoe.MoELayer(d_model=128, d_ff=256, num_experts=4, top_k=2, rng=0)
    weights = sum(value.nbytes for value in layer.params.values())
    assert layer.pack().nbytes <= 1.05 * weights  # the router's last panel is padded
    assert layer.pack("bfloat16").nbytes <= 0.55 * weights


@pytest.mark.parametrize(
    ("options", "dtype", "match"),
    [
        ({}, "int8", "pack takes one of 'float32', 'float64', 'bfloat16'; got 'int8'"),
        ({"dtype": "float64"}, "float32", "a float64 layer packs to float64; got 'float32'"),
        ({}, "float64", "a float32 layer packs to float32 or bfloat16; got 'float64'"),
        ({"capacity_factor": 1.0}, "float32", "pack serves dropless layers"),
    ],
)
def test_what_cannot_be_packed_is_said(options, dtype, match):
    layer = numoe.MoELayer(d_model=4, d_ff=4, num_experts=2, top_k=1, rng=0, **options)
    with pytest.raises(ValueError, match=match):
        layer.pack(dtype)


def test_wrong_width_is_said():
    packed = make("softmax", "glu", False, None).pack()
    with pytest.raises(ValueError, match=r"x must have shape .*37\); got \(2, 7\)"):
        packed(np.ones((2, 7), np.float32))
