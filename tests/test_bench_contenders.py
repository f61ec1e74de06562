"""The benchmark's contenders agree with the reference, and one that does not is noticed."""

import dataclasses

import numoe
import numpy as np
import pytest
from bench_cases import TINY
from numoe.bench import accuracy, contenders
from numoe.bench.accuracy import error_against_reference
from numoe.bench.contenders import Task
from numoe.bench.workloads import LAYERS, make_routings

SHAPES = {
    "glu": TINY,
    "relu": dataclasses.replace(TINY, form="mlp", activation="relu", top_k=1),
    "bias": dataclasses.replace(TINY, bias=True),
    "mlp-bias-gelu": dataclasses.replace(TINY, form="mlp", activation="gelu", bias=True),
    "shared": dataclasses.replace(TINY, shared_d_ff=24),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", contenders.CONTENDERS)
def test_contenders_agree_with_the_reference(name, shape, rng):
    layer = numoe.MoELayer(config=shape.config("float64"), rng=0)
    for value in layer.params.values():
        value[...] = rng.standard_normal(value.shape) / 4
    runner = contenders.CONTENDERS[name](Task(layer=layer, dtype="float64"))
    x, dy = rng.standard_normal((2, 5, 16))
    for kind in ("uniform", "one"):
        indices, weights = make_routings(kind, 5, shape, "float64")[3]
        for gradient in (None,) if name == "packed" else (None, dy):
            assert error_against_reference(runner, layer, x, indices, weights, gradient) < 1e-12


def tiny_example(tokens, rng):
    """A layer, x and dy (T, D), indices and weights (T, K)."""
    layer = numoe.MoELayer(config=TINY.config("float32"), rng=0)
    x, dy = rng.standard_normal((2, tokens, 16)).astype(np.float32)
    return layer, x, dy, *make_routings("uniform", tokens, TINY, "float32")[0]


def test_a_wrong_contender_is_noticed(rng):
    class Wrong(contenders.NumpyLoop):
        def forward(self, x, indices, weights):
            return super().forward(x, indices, weights) * 1.01

        def forward_backward(self, x, indices, weights, dy):
            step = super().forward_backward(x, indices, weights, dy)
            step.dparams()["w_down"][indices[0, 0]] = np.nan
            return step

    layer, x, dy, indices, weights = tiny_example(5, rng)
    wrong = Wrong(Task(layer=layer))
    assert error_against_reference(wrong, layer, x, indices, weights) == pytest.approx(0.01, rel=1e-3)
    assert error_against_reference(wrong, layer, x, indices, weights, dy) == np.inf


def test_some_rows_of_a_large_call_are_checked(rng):
    class WrongAtTheEnd(contenders.NumpyLoop):
        def forward(self, x, indices, weights):
            y = super().forward(x, indices, weights)
            y[len(y) // 2 :] = 0
            return y

    layer, x, dy, indices, weights = tiny_example(100, rng)
    wanted = accuracy.sample(layer, x, indices, weights, dy, 3)
    assert wanted.tokens.tolist() == [0, 49, 99]
    numpy, wrong = contenders.NumpyLoop(Task(layer=layer)), WrongAtTheEnd(Task(layer=layer))
    assert accuracy.error_of_sample(numpy, wanted, x, indices, weights, dy) < 1e-5
    assert accuracy.error_of_sample(numpy, wanted, x, indices, weights) < 1e-5
    assert accuracy.error_of_sample(wrong, wanted, x, indices, weights) > 0.1


def test_as_many_tokens_are_checked_as_fit():
    assert accuracy.checked_tokens(LAYERS["tiny"]) == 8
    assert accuracy.checked_tokens(LAYERS["tiny"], 3) == 3
    assert accuracy.checked_tokens(LAYERS["mixtral-8x7b"]) == 1  # 2 experts in float64: 2.8 GB
