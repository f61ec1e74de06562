"""Kernels at every size around vector widths: exact in integers, bounded in floats, sane at extremes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numoe
import numpy as np
import pytest
from numoe.config import ACTIVATIONS
from numoe.testing import assert_bitwise_equal

Array = np.ndarray[Any, np.dtype[Any]]
DTYPES = (np.float32, np.float64)
SIZES = (*range(1, 18), 31, 32, 33, 63, 64, 65, 127, 128, 129)
SMOOTH = ("silu", "gelu", "gelu_tanh", "quick_gelu")


# ── one layer step by its public functions


def expert_params(rng: np.random.Generator, draw: Any, E: int, D: int, F: int, form: str) -> dict[str, Array]:
    names = {"w_up": (E, D, F), "w_down": (E, F, D), "b_up": (E, F), "b_down": (E, D)}
    if form == "glu":
        names |= {"w_gate": (E, D, F), "b_gate": (E, F)}
    return {name: draw(shape) for name, shape in names.items()}


def plan_of(experts: Array, num_experts: int) -> numoe.Dispatch:
    """Token t goes to experts[t]."""
    indices = np.asarray(experts, np.int32)[:, None]
    routing = numoe.Routing(indices=indices, weights=np.ones(indices.shape, np.float32))
    return numoe.dispatch(routing, numoe.RouterConfig(num_experts=num_experts, top_k=1))


def relu_by_numpy(x: Array, experts: Array, p: dict[str, Array], weights: Array, dy: Array) -> dict[str, Array]:
    """Forward and backward of relu experts, token by token in float64: y and the gradient of everything."""
    p = {name: value.astype(np.float64) for name, value in p.items()}
    out = {f"d{name}": np.zeros_like(value) for name, value in p.items()}
    out |= {"y": np.zeros(x.shape), "dx": np.zeros(x.shape), "dweights": np.zeros(len(x))}
    for t, e in enumerate(experts):
        up = x[t] @ p["w_up"][e] + p["b_up"][e]
        gate = x[t] @ p["w_gate"][e] + p["b_gate"][e] if "w_gate" in p else up
        linear = up if "w_gate" in p else np.ones_like(up)
        h = np.maximum(gate, 0) * linear
        f = h @ p["w_down"][e] + p["b_down"][e]
        out["y"][t] = weights[t] * f
        out["dweights"][t] = dy[t] @ f
        df = weights[t] * dy[t]
        dh = p["w_down"][e] @ df
        dgate = dh * linear * (gate > 0)
        out["dw_down"][e] += np.outer(h, df)
        out["db_down"][e] += df
        pairs = {"gate": dgate, "up": dh * np.maximum(gate, 0)} if "w_gate" in p else {"up": dgate}
        for name, d in pairs.items():
            out[f"dw_{name}"][e] += np.outer(x[t], d)
            out[f"db_{name}"][e] += d
            out["dx"][t] += p[f"w_{name}"][e] @ d
    return out


def relu_by_numoe(x: Array, experts: Array, p: dict[str, Array], weights: Array, dy: Array) -> dict[str, Array]:
    form = "glu" if "w_gate" in p else "mlp"
    config = numoe.ExpertConfig(d_ff=p["w_up"].shape[2], form=form, activation="relu", bias=True)
    plan = plan_of(experts, len(p["w_up"]))
    options: dict[str, Any] = {"weights": weights[:, None], "combined": True}
    y, cache = numoe.experts_forward(x, plan, p, config, **options)
    dx, dweights, dparams = numoe.experts_backward(dy, x, plan, p, config, cache, **options)
    assert dweights is not None
    out = {f"d{name}": value for name, value in dparams.items()}
    return out | {"y": y, "dx": dx, "dweights": dweights[:, 0]}


@pytest.mark.parametrize("form", ["glu", "mlp"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", ["T", "D", "F"])
@pytest.mark.parametrize("size", SIZES)
def test_relu_experts_are_exact_on_integers(
    size: int, axis: str, dtype: Any, form: str, rng: np.random.Generator
) -> None:
    """Numbers -1, 0, 1: no sum leaves the 24 bits of float32, so a lost or doubled term cannot hide."""
    sizes = {"T": 13, "D": 7, "F": 11} | {axis: size}
    T, D, F, E = sizes["T"], sizes["D"], sizes["F"], 3

    def draw(*shape: Any) -> Array:
        return rng.integers(-1, 2, *shape).astype(dtype)

    p = expert_params(rng, draw, E, D, F, form)
    experts = rng.choice(E, T, p=[0.1, 0.0, 0.9])  # uneven, and expert 1 is idle
    weights = rng.choice([1.0, 2.0], T).astype(dtype)
    x, dy = draw((T, D)), draw((T, D))
    actual, expected = relu_by_numoe(x, experts, p, weights, dy), relu_by_numpy(x, experts, p, weights, dy)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(actual[name], value), f"{name}: {np.argwhere(actual[name] != value)[:3]}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_router_is_exact_on_integers(size: int, dtype: Any, rng: np.random.Generator) -> None:
    for T, D, E in ((size, 7, 5), (13, size, 5), (13, 7, size)):
        x, w, b, dz = (rng.integers(-3, 4, s) for s in ((T, D), (D, E), E, (T, E)))
        x_, w_, b_, dz_ = (number.astype(dtype) for number in (x, w, b, dz))
        # NumPy multiplies integers: its BLAS once warned of an invalid value in floats as small.
        assert np.array_equal(numoe.router_logits(x_, w_, b_), x @ w + b)
        dx, dw, db = numoe.router_logits_backward(dz_, x_, w_)
        assert np.array_equal(dx, dz @ w.T)
        assert np.array_equal(dw, x.T @ dz)
        assert np.array_equal(db, dz.sum(axis=0))


# ── rounding


def gamma(n: int, dtype: Any) -> float:
    """The relative error of a sum of n products in any order (Higham 2002, lemma 3.1); eps = 2u."""
    nu = n * np.finfo(dtype).eps / 2
    return float(nu / (1 - nu))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 17, 33), (33, 64, 31), (3, 129, 65)], ids=str)
def test_float32_error_is_within_the_derived_bound(
    shape: tuple[int, int, int], activation: str, rng: np.random.Generator
) -> None:
    T, D, F = shape
    x, gate, up = (rng.standard_normal(s).astype(np.float32) for s in ((T, D), (1, D, F), (1, D, F)))
    down = rng.standard_normal((1, F, D)).astype(np.float32)
    params = {"w_gate": gate, "w_up": up, "w_down": down}
    config = numoe.ExpertConfig(d_ff=F, activation=activation)
    y, _ = numoe.experts_forward(x, plan_of(np.zeros(T), 1), params, config, combined=True)

    x, gate, up, down = (v.astype(np.float64) for v in (x, gate[0], up[0], down[0]))
    eps, bound_in = np.finfo(np.float32).eps, gamma(D, np.float32)
    pre, linear = x @ gate, x @ up
    error_pre, error_linear = bound_in * (abs(x) @ abs(gate)), bound_in * (abs(x) @ abs(up))
    a = act(activation, pre, float(eps))
    lipschitz = 2 * (abs(pre) + error_pre) if activation == "relu2" else 1.2  # of all the others
    error_a = lipschitz * error_pre + a.error(eps)
    h = a.value * linear
    error_h = abs(a.value) * error_linear + abs(linear) * error_a + error_a * error_linear + eps * abs(h)
    error = error_h @ abs(down) + gamma(F, np.float32) * ((abs(h) + error_h) @ abs(down))
    assert np.all(abs(y - h @ down) <= error)
    assert np.any(y != h @ down) or activation == "relu" or shape == (1, 1, 1)  # the bound is put to use


# ── activations against float64


@dataclass(frozen=True)
class Exact:
    """act(v), act'(v) in float64, and the sizes of their terms: rounding is relative to those."""

    value: Array
    slope: Array
    value_terms: Array
    slope_terms: Array

    def error(self, eps: float) -> Array:
        return 8 * eps * self.value_terms


def sigmoid(z: Array) -> Array:
    e = np.exp(-np.abs(z))
    return np.where(z >= 0, 1, e) / (1 + e)


def gated(v: Array, inner: Array, inner_slope: Array, eps: float) -> Exact:
    """v s with s = σ(inner), r = 1 - s: a relative error of `inner` grows by |inner| r in s, |inner| s in r.

    If r is computed as 1 - s, it also has s's rounding error, eps/2, or all of itself where s rounds to 1.
    """
    s, r = sigmoid(inner), sigmoid(-inner)
    magnified = 1 + abs(inner) * r
    tail = abs(s * v * inner_slope) * (r * (1 + abs(inner)) + np.minimum(1, r / eps))
    return Exact(v * s, s * (1 + v * inner_slope * r), abs(v * s) * magnified, s * magnified + tail)


def act(name: str, v: Array, eps: float) -> Exact:
    """Saturated beyond ±1000, where the products below would meet inf * 0."""
    c = np.clip(v, -1000.0, 1000.0)
    if name == "relu":
        return Exact(np.maximum(v, 0), (v > 0) * 1.0, abs(v), np.ones_like(v))
    if name == "relu2":
        with np.errstate(over="ignore"):
            return Exact(np.maximum(v, 0) ** 2, 2 * np.maximum(v, 0), v**2, abs(v))
    if name == "gelu":
        cdf = 0.5 * np.vectorize(math.erfc, otypes=[float])(-c / math.sqrt(2))
        density = np.exp(-(c**2) / 2) / math.sqrt(2 * math.pi)
        tail = abs(c) * density  # dΦ = φ dv, dφ = -v φ dv
        exact = Exact(c * cdf, cdf + c * density, abs(c * cdf) + abs(c) * tail, cdf + tail * (2 + c**2))
    elif name == "gelu_tanh":
        k = math.sqrt(8 / math.pi)
        exact = gated(c, k * (c + 0.044715 * c**3), k * (1 + 3 * 0.044715 * c**2), eps)
    else:
        k = 1.702 if name == "quick_gelu" else 1.0
        exact = gated(c, k * c, np.full_like(c, k), eps)
    beyond = np.where(v > 0, v, 0.0)
    value, terms = (np.where(abs(v) > 1000, beyond, part) for part in (exact.value, exact.value_terms))
    return Exact(value, exact.slope, terms, exact.slope_terms)


def activate(name: str, v: Array) -> tuple[Array, Array]:
    """act(v) and act'(v) by the layer: one expert with D = F = 1 and all weights 1, one token per value."""
    one = np.ones((1, 1, 1), v.dtype)
    params, config = {"w_up": one, "w_down": one}, numoe.ExpertConfig(d_ff=1, form="mlp", activation=name)
    x, plan = v[:, None], plan_of(np.zeros(len(v)), 1)
    rows, cache = numoe.experts_forward(x, plan, params, config)
    dx, _, _ = numoe.experts_backward(np.ones_like(rows), x, plan, params, config, cache)
    return rows[:, 0], dx[:, 0]


def interesting(dtype: Any) -> Array:
    """Both signs of: a grid where the functions bend, magnitudes over the whole range, the seams of the code."""
    info = np.finfo(dtype)
    seams = np.array([87.3, 88.7, 104.0, 708.0, 709.7, 746.0])
    near = np.concatenate([seams, np.nextafter(seams, 0), np.nextafter(seams, np.inf)])
    whole = np.logspace(math.log10(info.tiny) - 5, math.log10(info.max) - 1e-3, 1500, dtype=np.longdouble)
    v = np.concatenate([np.linspace(0, 12, 4001), np.linspace(12, 800, 1001), near, whole]).astype(dtype)
    return np.concatenate([v, -v])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_and_slope(name: str, dtype: Any) -> None:
    v = interesting(dtype)
    value, slope = activate(name, v)
    info = np.finfo(dtype)
    exact = act(name, v.astype(np.float64), float(info.eps))
    # eˣ is cut where it leaves the normal range; at most |v inner'(v)| < 4096 multiplies what is cut off.
    floor = 4096 * info.tiny if name in SMOOTH else info.smallest_subnormal
    for actual, wanted, terms in (
        (value, exact.value, exact.value_terms),
        (slope, exact.slope, exact.slope_terms),
    ):
        finite = abs(wanted) <= float(info.max)
        assert np.all(np.isposinf(actual[~finite]))
        ratio = abs(actual[finite] - wanted[finite]) / (8 * info.eps * terms[finite] + floor)
        worst = np.argmax(ratio)
        assert ratio[worst] <= 1, f"{ratio[worst]:.3g} times the bound at {v[finite][worst]}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_at_special_values(name: str, dtype: Any) -> None:
    value, slope = activate(name, np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 1e30, -1e30], dtype))
    assert value[0] == np.inf and value[1] == 0 and np.isnan(value[2])
    assert value[3] == 0 and value[4] == 0 and value[6] == 0
    at_large = dtype(1e30) ** 2 if name == "relu2" and dtype is np.float64 else np.inf
    assert value[5] == (at_large if name == "relu2" else dtype(1e30))
    assert slope[1] == 0 and slope[6] == 0
    assert slope[0] == (np.inf if name == "relu2" else 1)
    assert slope[5] == (dtype(2e30) if name == "relu2" else 1)
    assert slope[3] == slope[4] == (0.5 if name in SMOOTH else 0)  # relu'(0) = 0
    assert np.isnan(slope[2]) or name == "relu"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33])
def test_activation_does_not_depend_on_the_place(n: int, name: str, dtype: Any) -> None:
    """A value in a vector's body, in its tail, or alone has the same bits."""
    v = np.linspace(-3, 3, n).astype(dtype)
    together = activate(name, v)
    alone = [activate(name, v[i : i + 1]) for i in range(n)]
    for whole, part in zip(together, zip(*alone, strict=True), strict=True):
        assert_bitwise_equal(whole, np.concatenate(part))


# ── extremes


def mlp(x: Array, up: Array, down: Array, activation: str = "relu") -> Array:
    params = {"w_up": up, "w_down": down}
    config = numoe.ExpertConfig(d_ff=up.shape[2], form="mlp", activation=activation)
    return numoe.experts_forward(x, plan_of(np.zeros(len(x)), 1), params, config, combined=True)[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("D", [1, 5, 16, 33])
def test_bad_numbers_stay_in_their_row_and_column(D: int, bad: float, rng: np.random.Generator) -> None:
    x, up, down = (rng.standard_normal(s).astype(np.float32) for s in ((11, D), (1, D, 9), (1, 9, D)))
    clean = mlp(x, up, down)
    for t in range(len(x)):
        soiled = x.copy()
        soiled[t] = bad
        assert_bitwise_equal(np.delete(mlp(soiled, up, down), t, axis=0), np.delete(clean, t, axis=0))
    for j in range(D):
        soiled = down.copy()
        soiled[:, :, j] = bad
        assert_bitwise_equal(np.delete(mlp(x, up, soiled), j, axis=1), np.delete(clean, j, axis=1))


@pytest.mark.parametrize("n", SIZES)
def test_equal_rows_and_equal_columns_have_equal_bits(n: int, rng: np.random.Generator) -> None:
    x, up, down = (rng.standard_normal(s).astype(np.float32) for s in ((1, 6), (1, 6, 9), (1, 9, 6)))
    y = mlp(np.repeat(x, n, axis=0), up, down, "gelu")
    assert_bitwise_equal(y, np.repeat(y[:1], n, axis=0))
    wide = mlp(np.repeat(x[:, :1], n, axis=1), np.repeat(up[:, :1], n, axis=1), np.repeat(down[:, :, :1], n, axis=2))
    assert_bitwise_equal(wide, np.repeat(wide[:, :1], n, axis=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_numbers_survive(dtype: Any) -> None:
    tiny = np.finfo(dtype).smallest_subnormal
    one = np.ones((1, 1, 1), dtype)
    v = tiny * np.arange(1, 40, dtype=dtype)[:, None]
    assert_bitwise_equal(mlp(v, one, one), v)
    assert_bitwise_equal(mlp(v, 2 * one, one), 2 * v)
    for name in SMOOTH:  # slope ½ at 0
        assert np.all(abs(activate(name, v[:, 0])[0] - v[:, 0] / 2) <= tiny)


def test_the_floating_point_mode_stays() -> None:
    smallest = np.array([1e-40], np.float32)
    assert (smallest * np.float32(0.5))[0] == np.float32(5e-41)  # not flushed to zero by importing or computing
    mlp(
        np.ones((200, 33), np.float32),
        np.ones((1, 33, 65), np.float32),
        np.ones((1, 65, 33), np.float32),
        "silu",
    )
    assert (smallest * np.float32(0.5))[0] == np.float32(5e-41)


def test_overflow_is_infinite_and_silent() -> None:
    with np.errstate(all="raise"):
        big = np.full((1, 1, 1), 1e20, np.float32)
        assert np.all(np.isposinf(mlp(np.full((3, 1), 1e20, np.float32), big, big)))


def test_cancellation_is_bounded_by_the_terms() -> None:
    """1e8 - 1e8 + 1 in float32: the error is relative to the terms, not to the result."""
    w = np.ones((1, 3, 1), np.float32)
    y = mlp(np.array([[1e8, -1e8, 1.0], [1.0, 1e8, -1e8]], np.float32), w, np.ones((1, 1, 3), np.float32))
    assert np.all(abs(y - 1) <= gamma(4, np.float32) * 2e8)
