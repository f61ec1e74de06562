"""Packed layers give the bits of the layer they were made from, in every form, for any number of tokens.

float32 layers packed as bfloat16 are the exception on targets that multiply bfloat16 pairs: rounding has its own laws.
"""

import itertools

import ml_dtypes
import numoe
import numpy as np
import pairs
import pytest
from numoe.testing import assert_bitwise_equal

D, F, E, K = 37, 53, 6, 3  # no multiple of any vector width
SHARED = numoe.SharedExpertConfig(d_ff=19, gate="sigmoid")
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


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize(("d_model", "d_ff"), [(301, 333), (300, 1100), (1030, 67)])
def test_packing_changes_no_bit_of_products_in_several_blocks(d_model, d_ff, dtype):
    """Odd and even depths, whole panels and not; few rows that sweep over a matrix, many that fill stages."""
    layer = numoe.MoELayer(d_model=d_model, d_ff=d_ff, num_experts=2, top_k=1, dtype=dtype, rng=0)
    packed, rng = layer.pack(), np.random.default_rng(0)
    for count in (3, 13, 30, 100, 400):
        x = rng.standard_normal((count, d_model)).astype(layer.dtype)
        assert_bitwise_equal(packed(x), layer(x), name=f"y of {count} tokens")


@pytest.mark.parametrize(("score", "form", "bias", "gate"), FORMS)
def test_bfloat16_is_the_layer_with_rounded_expert_weights(score, form, bias, gate):
    layer, rounded = make(score, form, bias, gate), make(score, form, bias, gate)
    for name, value in rounded.params.items():
        if name.startswith("w_") and name not in ("w_router", "w_shared_score"):
            value[...] = value.astype(ml_dtypes.bfloat16)
    packed = layer.pack("bfloat16")
    for count in (1, 2, 5, 50, 300):
        x = tokens(count, "float32")
        if pairs.USED:
            pairs.assert_within(packed(x), pairs.layer_on_rounded_rows(layer, x))
        else:
            assert_bitwise_equal(packed(x), rounded(x))


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_depend_neither_on_threads_nor_on_neighbours(dtype, weight_on):
    layer = numoe.MoELayer(d_model=D, d_ff=F, num_experts=E, top_k=K, weight_on=weight_on, shared=SHARED, rng=0)
    packed, x, threads = layer.pack(dtype), tokens(90, "float32"), numoe.num_threads()
    try:
        numoe.set_num_threads(1)
        whole = packed(x)
        assert_bitwise_equal(np.stack([packed(token) for token in x]), whole)
        for size in (2, 7, 31, 64):
            pieces = [packed(x[begin : begin + size]) for begin in range(0, len(x), size)]
            assert_bitwise_equal(np.concatenate(pieces), whole)
        for count in (2, 3, 5):
            numoe.set_num_threads(count)
            assert_bitwise_equal(packed(x), whole)
            assert_bitwise_equal(np.stack([packed(token) for token in x[:5]]), whole[:5])
    finally:
        numoe.set_num_threads(threads)


@pytest.mark.parametrize("form", ["glu", "mlp"])
@pytest.mark.parametrize("axis", ["T", "D", "F"])
@pytest.mark.parametrize("size", [*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 128, 129, 1023, 1024, 1025, 2051])
def test_bfloat16_is_exact_on_small_integers(size, axis, form):
    """Hidden numbers are at most 256, so bfloat16 has them all: no place is lost, doubled or confused with another."""
    sizes = {"T": 13, "D": 7, "F": 11} | {axis: size}
    layer = numoe.MoELayer(
        d_model=sizes["D"], d_ff=sizes["F"], num_experts=3, top_k=1, form=form, activation="relu", bias=True, rng=0
    )
    rng = np.random.default_rng(size)
    for name, value in layer.params.items():
        value[...] = rng.integers(-1, 2, value.shape)
        if form == "glu" and name in ("w_gate", "w_up"):  # few enough that products of their sums stay small
            value *= rng.random(value.shape) < 16 / sizes["D"]
    x = rng.integers(-1, 2, (sizes["T"], sizes["D"])).astype(np.float32)
    indices, weights = rng.integers(0, 3, (sizes["T"], 1)), np.full((sizes["T"], 1), 2, np.float32)
    out = layer.forward(x, indices=indices, weights=weights)
    _, cache = numoe.experts_forward(x, out.dispatch, layer.params, layer.config.experts)
    hidden = np.maximum(cache.gate, 0) * cache.up if form == "glu" else np.maximum(cache.up, 0)
    assert 0 < abs(hidden).max() <= 256
    packed = layer.pack("bfloat16")
    assert np.array_equal(packed.forward_routed(x, indices, weights), out.y)
    for t in range(0, sizes["T"], 5):
        assert np.array_equal(packed.forward_routed(x[t : t + 1], indices[t : t + 1], weights[t : t + 1])[0], out.y[t])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [1, 2, 3, 31, 33])
def test_padding_stays_out_of_the_sums(width, dtype):
    """An infinite x times a column of zeros that only pads would be NaN; times -1 and clipped it is 0."""
    layer = numoe.MoELayer(d_model=width, d_ff=width, num_experts=1, top_k=1, form="mlp", activation="relu", rng=0)
    layer.params["w_up"][...] = -1
    x = np.full((5, width), np.inf, np.float32)
    y = layer.pack(dtype).forward_routed(x, np.zeros((5, 1), int), np.ones((5, 1), np.float32))
    assert np.array_equal(y, np.zeros_like(x))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_nan_token_disturbs_no_other(dtype):
    packed, x = make("softmax", "glu", True, None).pack(dtype), tokens(40, "float32")
    indices, weights = np.tile([0, 1, 2], (40, 1)), np.full((40, 3), 0.5, np.float32)
    clean = packed.forward_routed(x, indices, weights)
    x[17] = np.nan
    y = packed.forward_routed(x, indices, weights)
    assert np.isnan(y[17]).all()
    assert_bitwise_equal(np.delete(y, 17, axis=0), np.delete(clean, 17, axis=0))


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


@pytest.mark.parametrize("x_dtype", ["float16", "float32", "bfloat16", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_x_is_not_rounded_and_the_result_is_bfloat16_only_if_x_is(dtype, x_dtype):
    """What the functions give in the dtype of the arithmetic; `MoELayer` rounds x and y to its own."""
    layer, x = make("softmax", "glu", True, None, dtype), tokens(20, x_dtype)
    y, wide, params = layer.pack()(x), x.astype(layer.config.compute_dtype), layer.params
    logits = numoe.router_logits(wide, params["w_router"], params["b_router"])
    routing = numoe.route(logits, layer.config.router)
    parts = {"weights": routing.weights, "combined": True}
    plan = numoe.dispatch(routing, layer.config.router)
    expected, _ = numoe.experts_forward(wide, plan, params, layer.config.experts, **parts)
    assert y.dtype == ("bfloat16" if x_dtype == "bfloat16" else wide.dtype)
    assert_bitwise_equal(y, expected.astype(y.dtype))
    if dtype in (x_dtype, "float32", "float64"):
        assert_bitwise_equal(y, layer(x).astype(y.dtype))


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


@pytest.mark.parametrize("kind", [np.float32, np.dtype("float32"), "f4", ml_dtypes.bfloat16, np.dtype("bfloat16")])
def test_a_dtype_may_come_in_every_form_that_a_layer_takes(kind):
    layer, x = make("softmax", "glu", False, None), tokens(3, "float32")
    packed = layer.pack(kind)
    assert packed.dtype == np.dtype(kind).name
    assert_bitwise_equal(packed(x), layer.pack(packed.dtype)(x))
    assert layer.pack(layer.dtype).dtype == "float32"


@pytest.mark.parametrize(
    ("options", "dtype", "error", "match"),
    [
        ({}, "int8", TypeError, "dtype must be one of float32, float64, bfloat16; got 'int8'"),
        ({}, np.int8, TypeError, "dtype must be one of float32, float64, bfloat16; got <class 'numpy.int8'>"),
        ({"dtype": "float64"}, "float32", ValueError, "a float64 layer packs to float64; got float32"),
        ({}, np.float64, ValueError, "a float32 layer packs to float32 or bfloat16; got float64"),
        ({"capacity_factor": 1.0}, "float32", ValueError, "pack serves dropless layers"),
    ],
)
def test_what_cannot_be_packed_is_said(options, dtype, error, match):
    layer = numoe.MoELayer(d_model=4, d_ff=4, num_experts=2, top_k=1, rng=0, **options)
    with pytest.raises(error, match=match):
        layer.pack(dtype)


def test_wrong_width_is_said():
    packed = make("softmax", "glu", False, None).pack()
    with pytest.raises(ValueError, match=r"x must have shape .*37\); got \(2, 7\)"):
        packed(np.ones((2, 7), np.float32))
