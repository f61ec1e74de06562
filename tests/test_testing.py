"""`numoe.testing`: what its assertions see, say and let pass; what `check_gradients` finds and avoids."""

from __future__ import annotations

from typing import Any

import numoe
import numpy as np
import pytest
from numoe.testing import TOLERANCES, assert_bitwise_equal, assert_close, check_gradients, random_problem
from reference_cases import Array

NAN, INF = np.nan, np.inf


def test_assert_close_names_the_worst_place() -> None:
    actual, expected = np.array([[1, 2], [3, 4]], np.float32), np.array([[1, 2.1], [3, 4.3]], np.float32)
    with pytest.raises(AssertionError, match=r"dx: 2 of 4 .*\n  worst at \[1, 1\]: actual 4.0, expected 4.3"):
        assert_close(actual, expected, name="dx")
    with pytest.raises(AssertionError, match=r"shapes differ: actual \(2, 2\), expected \(4,\)"):
        assert_close(actual, expected.ravel())
    with pytest.raises(AssertionError, match=r"worst at \[0\]: actual nan, expected 1.0"):
        assert_close([NAN, 1.0], [1.0, 1.0])
    with pytest.raises(AssertionError, match=r"worst at \[1\]: actual inf, expected -inf"):
        assert_close([1.0, INF], [1.0, -INF])
    with pytest.raises(AssertionError, match=r"worst at \[1\]: actual 2, expected 3"):
        assert_close([1, 2], [1, 3])
    assert assert_close([NAN, INF, -INF, 0.0], [NAN, INF, -INF, -0.0]) == 0.0
    assert assert_close(np.zeros(0), np.zeros(0)) == 0.0


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_integers_must_be_equal(dtype: Any) -> None:
    """Those, too, that float64 cannot tell apart."""
    assert assert_close([True, False], np.array([1, 0], dtype)) == 0.0
    for one, other in ((2**53, 2**53 + 1), (2**63 - 1, 2**63 - 2)):
        assert assert_close(np.array([one], dtype), np.array([one], np.int64)) == 0.0
        with pytest.raises(AssertionError, match=rf"at \[0\]: actual {one}, expected {other}; difference 1 is inf"):
            assert_close(np.array([one], dtype), np.array([other], np.int64))


@pytest.mark.parametrize("value", [[1j], ["1"], [None], np.zeros(1, "M8[s]")])
def test_assert_close_compares_real_numbers(value: Any) -> None:
    with pytest.raises(TypeError, match=r"y: actual has dtype .*; give real numbers"):
        assert_close(value, [1.0], name="y")
    with pytest.raises(TypeError, match=r"expected has dtype .*; give real numbers"):
        assert_close([1.0], value)


def test_assert_close_scales_with_dtype_and_size() -> None:
    one_step = np.nextafter(np.float32(1), np.float32(2))
    assert assert_close([one_step], np.ones(1, np.float32)) == pytest.approx(1 / TOLERANCES["float32"])
    assert assert_close([1.0 + 2**-52], [1.0]) == pytest.approx(1 / TOLERANCES["float64"])
    assert_close([1.0 + 1e-13], [1.0], scale=1e4)
    with pytest.raises(AssertionError, match="worst at"):
        assert_close([1.0, 1.0 + 1e-12], [1.0, 1.0], scale=[1e4, 1.0])


def test_assert_bitwise_equal_sees_every_bit() -> None:
    quiet, other = np.array([0x7FF8000000000000, 0x7FF8000000000001], np.uint64).view(np.float64)
    assert_bitwise_equal([quiet, 1.0], [quiet, 1.0])
    for a, b, message in (
        ([1.0, 0.0], [1.0, -0.0], r"first at \[1\]: 0.0 \(0000000000000000\) and -0.0 \(8000000000000000\)"),
        ([quiet], [other], r"first at \[0\]: nan \(7ff8000000000000\) and nan \(7ff8000000000001\)"),
        ([1.0], np.ones(1, np.float32), "float64 array .* float32 array"),
        (np.zeros((1, 2)), np.zeros((2, 1)), r"\(1, 2\) .* \(2, 1\)"),
        (2.0, 3.0, r"first at \[\]"),
    ):
        with pytest.raises(AssertionError, match=message):
            assert_bitwise_equal(a, b)


def test_check_gradients_finds_a_fault(reference_layer: Any, rng: np.random.Generator) -> None:
    class Faulty(reference_layer):  # type: ignore[misc]
        def backward(self, dy: Array, out: Any, d_aux_loss: float = 1.0) -> Any:
            grads = super().backward(dy, out, d_aux_loss)
            grads.params["w_up"][...] *= 1 + 1e-5
            return grads

    layer = Faulty(config=random_problem(dtype="float32").config, rng=0)
    before = {name: value.copy() for name, value in layer.params.items()}
    report = check_gradients(layer, rng.standard_normal((9, 8)))
    assert not report.ok
    assert report.worst.name == "w_up"
    assert report.worst.error == pytest.approx(1e-5, rel=1e-3)
    with pytest.raises(AssertionError, match=r"gradients differ: w_up; worst relative error 1.0e-05 \(w_up\)"):
        report.assert_ok()
    assert check_gradients(layer, rng.standard_normal((9, 8)), tolerance=1e-4).ok
    for name, value in layer.params.items():
        assert_bitwise_equal(value, before[name])


def test_check_gradients_avoids_kinks_and_ties(reference_layer: Any, rng: np.random.Generator) -> None:
    options: dict[str, Any] = {
        "activation": "relu",
        "aux_losses": {"load": 0.1, "switch": 0.1},
        "noise_std": 0.1,
        "jitter": 0.1,
    }
    layer = reference_layer(config=random_problem(capacity_factor=0.75, **options).config, rng=0)
    x = rng.standard_normal((3, 12, 8))
    mask = rng.random((3, 12)) < 0.9
    report = check_gradients(layer, x, mask=mask)
    assert report.ok, report
    assert sum(check.rerouted for check in report.checks) < 5
    x[:] = 0  # every token at a tie of all experts, and at the kink of every relu
    report = check_gradients(layer, x, num_coordinates=2)
    assert {check.name: check.rerouted + check.kinks > 0 for check in report.checks}["x"]
    assert all(check.error < 1e-6 for check in report.checks)


def test_check_gradients_of_external_routing(reference_layer: Any, rng: np.random.Generator) -> None:
    layer = reference_layer(config=random_problem(aux_losses={"importance": 0.3}, frozen=True).config, rng=0)
    x = rng.standard_normal((9, 8))
    routing = layer.forward(x).routing
    assert check_gradients(layer, x, logits=routing.logits, d_aux_loss=2.0).ok
    report = check_gradients(layer, x, indices=routing.indices, weights=routing.weights)
    assert report.ok
    assert [check.name for check in report.checks] == ["x", "weights", "w_router", "w_gate", "w_up", "w_down"]
    assert [check.where for check in report.checks if check.name == "w_router"] == ["frozen"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"step": 0}, ValueError, "step must be finite and > 0; got 0"),
        ({"tolerance": 0}, ValueError, "tolerance must be finite and > 0; got 0"),
        ({"num_coordinates": -1}, ValueError, "num_coordinates must be >= 0; got -1"),
        ({"num_directions": 1.5}, TypeError, "num_directions must be an int"),
        ({"rng": "a"}, TypeError, "rng must be .*; got 'a'"),
    ],
)
def test_check_gradients_says_what_it_cannot_take(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    layer = numoe.MoELayer(d_model=4, d_ff=4, num_experts=2, top_k=1, rng=0)
    with pytest.raises(error, match=message):
        check_gradients(layer, np.ones((2, 4)), **options)
    with pytest.raises(TypeError, match=r"layer must be a MoELayer, .*; got PackedMoELayer"):
        check_gradients(layer.pack(), np.ones((2, 4)))
