"""Checks that numoe runs on itself, for its users too: derived tolerances, and gradients by differences.

Nothing here needs a test framework.  All tolerances of the project are in `TOLERANCES`.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from numoe.config import MoEConfig, checked_int, checked_real, checked_rng

Array = npt.NDArray[Any]

TOLERANCES: dict[str, float] = {
    # dtype: factor in |actual - expected| <= factor * eps(dtype) * scale.  eps is the distance from 1 to the
    # next number; sums of n terms of random sign lose about √n of them, and the layer chains a handful of
    # such sums.
    "bfloat16": 8.0,
    "float16": 16.0,
    "float32": 64.0,
    "float64": 64.0,
    # relative error of a gradient against differences in float64
    "gradient": 1e-6,
}


# ── comparisons ─────────────────────────────────────────────────────────────────────────────────────────────


def assert_close(
    actual: npt.ArrayLike,
    expected: npt.ArrayLike,
    *,
    scale: npt.ArrayLike | None = None,
    factor: float | None = None,
    name: str = "",
) -> float:
    r"""Raise unless two arrays agree within a bound derived from their dtype and the size of what was summed.

    .. math:: |actual - expected| \le factor \cdot eps \cdot scale

    with the eps of the coarser of the two dtypes.  NaN equals NaN, an infinity equals itself; integers and
    bools must be equal.

    Parameters
    ----------
    actual, expected : array_like of one shape
    scale : array_like broadcastable to that shape, optional
        The size of the terms that were summed, e.g. ``abs(x) @ abs(w)`` for ``x @ w``: an error is measured
        against what could cancel.  Default: the largest finite ``abs(expected)``.
    factor : float, optional
        Default: `TOLERANCES` of the coarser dtype.
    name : str
        What is compared, for the message.

    Returns
    -------
    float
        The largest error divided by its bound, at most 1: how much of the tolerance is used.

    Raises
    ------
    TypeError
        For anything but real numbers.
    AssertionError
        With the worst coordinate, both values and the ratio to the bound.

    Examples
    --------
    >>> assert_close(np.float32([1.0, 2.0]), [1.0, 2.0])
    0.0
    >>> assert_close(np.float32([1.0, 2.0]), [1.0, 2.1], name="y")
    Traceback (most recent call last):
    AssertionError: y: 1 of 2 values off by more than 64 eps(float32) * scale.
      worst at [1]: actual 2.0, expected 2.1; difference 0.1 is 6.24e+03 times the bound 1.6e-05
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    label = f"{name}: " if name else ""
    if actual.shape != expected.shape:
        raise AssertionError(f"{label}shapes differ: actual {actual.shape}, expected {expected.shape}.")
    for which, dtype in (("actual", actual.dtype), ("expected", expected.dtype)):
        if dtype.kind not in "biuf" and dtype.name not in TOLERANCES:
            raise TypeError(f"{label}{which} has dtype {dtype}; give real numbers (of complex ones .real and .imag).")
    coarse, eps = _coarser(actual.dtype, expected.dtype)
    factor = TOLERANCES.get(coarse, 0.0) if factor is None else factor
    a, b = actual.astype(np.float64), expected.astype(np.float64)
    if scale is None:
        scale = np.abs(b[np.isfinite(b)]).max(initial=0.0)
    bound = np.broadcast_to(factor * eps * np.abs(np.asarray(scale, np.float64)), a.shape)
    with np.errstate(all="ignore"):
        equal = actual == expected if eps == 0 else a == b  # float64 cannot tell large integers apart
        error = np.maximum(np.abs(a - b), 1 if eps == 0 else 0)
        error = np.where(equal | (np.isnan(a) & np.isnan(b)), 0, np.where(np.isnan(error), np.inf, error))
        ratio = np.where(error == 0, 0, error / bound)
    if a.size == 0 or ratio.max() <= 1:
        return float(ratio.max(initial=0.0))
    at = np.unravel_index(np.argmax(ratio), ratio.shape)
    raise AssertionError(
        f"{label}{np.count_nonzero(ratio > 1)} of {a.size} values off by more than "
        f"{factor:g} eps({coarse}) * scale.\n"
        f"  worst at {_place(at)}: actual {actual[at]}, expected {expected[at]}; "
        f"difference {error[at]:.3g} is {ratio[at]:.3g} times the bound {bound[at]:.3g}"
    )


def assert_bitwise_equal(a: npt.ArrayLike, b: npt.ArrayLike, *, name: str = "") -> None:
    """Raise unless two arrays have the same shape, dtype and bits: -0.0 is not 0.0, a NaN equals its copy.

    >>> assert_bitwise_equal(np.zeros(3), [0.0, -0.0, 0.0], name="dx")
    Traceback (most recent call last):
    AssertionError: dx: 1 of 3 values differ in their bits.
      first at [1]: 0.0 (0000000000000000) and -0.0 (8000000000000000)
    """
    a, b = np.asarray(a), np.asarray(b)
    label = f"{name}: " if name else ""
    if a.shape != b.shape or a.dtype != b.dtype:
        raise AssertionError(f"{label}{a.dtype} array {a.shape} and {b.dtype} array {b.shape} differ in kind.")
    bytes_a, bytes_b = (
        np.frombuffer(np.ascontiguousarray(v).tobytes(), np.uint8).reshape(a.size, a.itemsize) for v in (a, b)
    )
    different = np.flatnonzero((bytes_a != bytes_b).any(axis=1))
    if different.size == 0:
        return
    first = np.unravel_index(different[0], a.shape)
    order = -1 if sys.byteorder == "little" else 1  # print the sign first
    hex_a, hex_b = (v[different[0], ::order].tobytes().hex() for v in (bytes_a, bytes_b))
    raise AssertionError(
        f"{label}{different.size} of {a.size} values differ in their bits.\n"
        f"  first at {_place(first)}: {a[first]} ({hex_a}) and {b[first]} ({hex_b})"
    )


def _coarser(*dtypes: np.dtype[Any]) -> tuple[str, float]:
    """Name and eps of the floating dtype with the largest eps; integers have eps 0."""
    known = [(_eps(d), d.name) for d in dtypes if d.name in TOLERANCES]
    eps, name = max(known, default=(0.0, dtypes[0].name))
    return name, eps


def _eps(dtype: np.dtype[Any]) -> float:
    return float(ml_dtypes.finfo(dtype).eps)  # type: ignore[no-untyped-call]


def _place(at: tuple[Any, ...]) -> str:
    return f"[{', '.join(str(int(i)) for i in at)}]"


# ── random problems ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Problem:
    """A layer's configuration, numbers for it, and tokens."""

    config: MoEConfig
    params: dict[str, Array]
    buffers: dict[str, Array]
    x: Array  # (..., D)
    dy: Array  # (..., D)


def random_problem(rng: Any = 0, *, tokens: int | tuple[int, ...] = 12, **options: Any) -> Problem:
    """Random parameters, tokens and output gradients of a small layer; all drawn, none special.

    Parameters
    ----------
    rng : seed or numpy.random.Generator
    tokens : int or tuple of int
        T, or the batch shape.
    **options
        Of ``MoEConfig.from_options``, over d_model=8, d_ff=12, num_experts=6, top_k=2, dtype="float64".

    Examples
    --------
    >>> problem = random_problem(top_k=1, tokens=(2, 3))
    >>> problem.x.shape, problem.params["w_router"].shape, problem.x.dtype
    ((2, 3, 8), (8, 6), dtype('float64'))
    """
    defaults = {"d_model": 8, "d_ff": 12, "num_experts": 6, "top_k": 2, "dtype": "float64"}
    config = MoEConfig.from_options(**(defaults | options))
    generator = checked_rng(rng)
    params = {
        # Matrices keep the size of what they multiply; biases are large enough to matter.
        name: _normal(generator, shape, shape[-2] ** -0.5 if name.startswith("w_") and len(shape) > 1 else 0.3).astype(
            config.param_dtype(name)
        )
        for name, shape in config.param_shapes().items()
    }
    buffers = {
        name: _normal(generator, shape, 0.1).astype(config.param_dtype(name))
        for name, shape in config.buffer_shapes().items()
    }
    shape = (*(tokens if isinstance(tokens, tuple) else (tokens,)), config.d_model)
    x, dy = (_normal(generator, shape, 1.0).astype(config.dtype) for _ in range(2))
    return Problem(config, params, buffers, x, dy)


def _normal(generator: np.random.Generator, shape: tuple[int, ...], std: float) -> Array:
    return std * generator.standard_normal(shape)


# ── gradients ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class GradientCheck:
    """One array's gradient against differences."""

    name: str
    shape: tuple[int, ...]
    checked: int  # coordinates and directions compared
    rerouted: int  # skipped: every step changed who is routed where, or who is dropped
    kinks: int  # skipped: no derivative there (relu), or none that a step resolves
    error: float  # the worst relative error
    where: str  # of the worst: a coordinate, or "direction"
    backward: float  # what backward says there
    differences: float  # what differences say there


@dataclass(frozen=True)
class GradientReport:
    """What `check_gradients` found; prints as a table."""

    checks: tuple[GradientCheck, ...]
    tolerance: float

    @property
    def worst(self) -> GradientCheck:
        """The check with the largest error."""
        return max(self.checks, key=lambda check: check.error)

    @property
    def ok(self) -> bool:
        """True if every array was compared somewhere and agrees."""
        return not self._unchecked() and not self._wrong()

    def assert_ok(self) -> None:
        """Raise ``AssertionError`` with the table unless `ok`."""
        if not self.ok:
            raise AssertionError(str(self))

    def _unchecked(self) -> list[str]:
        return [c.name for c in self.checks if c.checked == 0 and 0 not in c.shape]

    def _wrong(self) -> list[str]:
        return [c.name for c in self.checks if not c.error <= self.tolerance]

    def __repr__(self) -> str:
        worst = self.worst
        verdict = f"gradients differ: {', '.join(self._wrong())}" if self._wrong() else "gradients agree"
        if self._unchecked():
            verdict += f"; no differentiable place found: {', '.join(self._unchecked())}"
        found = f"worst relative error {worst.error:.1e} ({worst.name})"
        head = f"{verdict}; {found}, tolerance {self.tolerance:.0e}"
        rows = [("name", "shape", "checked", "rerouted", "kinks", "error", "worst at", "backward", "differences")]
        for c in self.checks:
            numbers = (f"{c.error:.1e}", c.where, f"{c.backward:.9g}", f"{c.differences:.9g}")
            rows.append((c.name, str(c.shape), str(c.checked), str(c.rerouted), str(c.kinks), *numbers))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join([head, *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)])


def check_gradients(
    layer: Any,
    x: npt.ArrayLike,
    *,
    mask: npt.ArrayLike | None = None,
    logits: npt.ArrayLike | None = None,
    indices: npt.ArrayLike | None = None,
    weights: npt.ArrayLike | None = None,
    sequence_lengths: npt.ArrayLike | None = None,
    d_aux_loss: float = 1.0,
    rng: Any = 0,
    num_coordinates: int = 4,
    num_directions: int = 1,
    step: float = 1e-3,
    tolerance: float = TOLERANCES["gradient"],
) -> GradientReport:
    r"""Compare ``layer.backward`` with central differences of ``L = <dy, y> + d_aux_loss * aux_loss``.

    .. math:: \frac{\partial L}{\partial v} \approx \frac{4 D(h/2) - D(h)}{3}, \quad
              D(h) = \frac{L(\theta + h v) - L(\theta - h v)}{2h}

    for x, every parameter, and the logits or weights if they are given, along coordinates v (the one with the
    largest gradient and random ones) and random unit directions.  A float64 copy of the layer does the work;
    the layer itself is not touched.  Where a step changes the routing or who is dropped, or meets a kink, a
    smaller step is tried, then another coordinate.

    Parameters
    ----------
    layer : MoELayer
    x, mask, logits, indices, weights, sequence_lengths
        As for ``layer.forward``.
    d_aux_loss : float
        As for ``layer.backward``.
    rng : seed or numpy.random.Generator
        For dy, coordinates, directions; and for jitter and noise, which are drawn once.
    num_coordinates, num_directions : int
        Per array.
    step : float
        The first h, relative to the root mean square of the array.
    tolerance : float
        What ``report.ok`` allows: ``|backward - differences|`` relative to the larger of the two and of the
        root mean square of that array's gradient.

    Returns
    -------
    GradientReport
        Nothing is raised for wrong gradients; call ``report.assert_ok()`` for that.

    Raises
    ------
    TypeError, ValueError
        For a layer without a backward, or a setting out of range.

    Examples
    --------
    >>> import numoe
    >>> layer = numoe.MoELayer(d_model=4, d_ff=6, num_experts=3, top_k=2, rng=0, aux_losses={"switch": 0.1})
    >>> x = np.random.default_rng(0).standard_normal((5, 4))
    >>> report = check_gradients(layer, x)
    >>> report.ok, [check.name for check in report.checks]
    (True, ['x', 'w_router', 'w_gate', 'w_up', 'w_down'])
    """
    if not callable(getattr(layer, "backward", None)):
        raise TypeError(f"layer must be a MoELayer, which has a backward; got {type(layer).__name__}.")
    checked_real("step", step, strict=True)
    checked_real("tolerance", tolerance, strict=True)
    checked_int("num_coordinates", num_coordinates, 0)
    checked_int("num_directions", num_directions, 0)
    given = {"logits": logits, "weights": weights}
    inputs = {"x": x} | {name: value for name, value in given.items() if value is not None}
    fixed = {"mask": mask, "indices": indices, "sequence_lengths": sequence_lengths}
    generator = checked_rng(rng)
    if layer.config.router.jitter or layer.config.router.noise_std:
        fixed["rng"] = int(generator.integers(2**63))
    probe = _Probe(layer, inputs, fixed, d_aux_loss, generator)
    frozen = ("w_router", "b_router") if layer.config.router.frozen else ()
    checks = []
    for name, gradient in probe.gradients.items():
        if name in frozen:  # backward promises zeros, differences would not
            largest = float(np.abs(gradient).max(initial=0.0))
            error = 0.0 if largest == 0 else np.inf
            checks.append(GradientCheck(name, gradient.shape, 1, 0, 0, error, "frozen", largest, 0.0))
        else:
            candidates = _candidates(gradient, generator, num_coordinates, num_directions)
            checks.append(_check_array(probe, name, candidates, num_coordinates + num_directions, step, tolerance))
    return GradientReport(tuple(checks), tolerance)


@dataclass(frozen=True)
class _Differences:
    """What two steps of size h to both sides of a point say."""

    slope: float  # (L(+h) - L(-h)) / 2h
    bend: float  # L(+h) - 2 L(0) + L(-h)
    rerouted: bool  # routing or dispatch is not that of the point


class _Probe:
    """L as a function of every array of a float64 copy of a layer, and what `backward` says about it."""

    def __init__(
        self,
        layer: Any,
        inputs: Mapping[str, npt.ArrayLike],
        fixed: Mapping[str, Any],
        d_aux_loss: float,
        generator: np.random.Generator,
    ) -> None:
        self.layer = type(layer)(config=dataclasses.replace(layer.config, dtype="float64"), rng=0)
        for mine, original in ((self.layer.params, layer.params), (self.layer.buffers, layer.buffers)):
            for name in mine:
                mine[name][...] = original[name]
        self.inputs = {name: np.array(value, np.float64) for name, value in inputs.items()}
        self.fixed = {name: value for name, value in fixed.items() if value is not None}
        self.d_aux_loss = d_aux_loss
        self.base = self._forward()
        self.dy = generator.standard_normal(self.base.y.shape)
        grads = self.layer.backward(self.dy, self.base, d_aux_loss=d_aux_loss)
        self.gradients: dict[str, Array] = {name: getattr(grads, name) for name in self.inputs} | grads.params
        terms = np.abs(self.dy * self.base.y).sum() + abs(d_aux_loss * self.base.aux_loss)
        self.rounding = float(np.finfo(np.float64).eps * terms)  # of L

    def _forward(self) -> Any:
        return self.layer.forward(**self.inputs, **self.fixed)

    def array(self, name: str) -> Array:
        """The array that is perturbed in place."""
        found: Array = self.inputs[name] if name in self.inputs else self.layer.params[name]
        return found

    def differences(self, name: str, v: Array, h: float) -> _Differences:
        """Step by +h and -h along v, and back."""
        array = self.array(name)
        original, change, rerouted = array.copy(), [], False
        for signed in (h, -h):
            array += signed * v
            out = self._forward()
            array[...] = original
            change.append(np.vdot(self.dy, out.y - self.base.y) + self.d_aux_loss * (out.aux_loss - self.base.aux_loss))
            rerouted |= not np.array_equal(out.routing.indices, self.base.routing.indices)
            rerouted |= not np.array_equal(out.dispatch.kept, self.base.dispatch.kept)
        return _Differences(float(change[0] - change[1]) / (2 * h), float(change[0] + change[1]), rerouted)


def _candidates(
    gradient: Array, generator: np.random.Generator, num_coordinates: int, num_directions: int
) -> Iterator[tuple[str, Array]]:
    """Random unit directions, the coordinate with the largest gradient, and more random ones than needed."""
    if gradient.size == 0:
        return
    for _ in range(num_directions):
        v = generator.standard_normal(gradient.shape)
        yield "direction", v / np.linalg.norm(v)
    largest = int(np.argmax(np.abs(gradient)))
    others = generator.choice(gradient.size, min(4 * num_coordinates, gradient.size), replace=False)
    for flat in [largest, *(int(i) for i in others if i != largest)]:
        v = np.zeros(gradient.shape)
        v.flat[flat] = 1
        yield _place(np.unravel_index(flat, gradient.shape)), v


def _check_array(
    probe: _Probe,
    name: str,
    candidates: Iterator[tuple[str, Array]],
    wanted: int,
    step: float,
    tolerance: float,
) -> GradientCheck:
    """Compare along the first `wanted` candidates at which differences can tell the derivative."""
    gradient, array = probe.gradients[name], probe.array(name)
    finite = array[np.isfinite(array)]
    unit = float(np.sqrt(np.mean(finite**2))) if finite.any() else 1.0
    size = float(np.sqrt(np.mean(gradient**2))) if gradient.size else 0.0
    skipped = {"rerouted": 0, "kink": 0}
    worst = (0.0, "", 0.0, 0.0)
    checked = 0
    for where, v in candidates:
        if checked == wanted:
            break
        expected = float(np.vdot(gradient, v))
        if not np.isfinite(expected):
            checked, worst = checked + 1, (np.inf, where, expected, np.nan)
            continue
        for h in (step * unit, step * unit / 8, step * unit / 64):
            outer, inner = probe.differences(name, v, h), probe.differences(name, v, h / 2)
            slope = (4 * inner.slope - outer.slope) / 3
            # Gradients too small for differences to resolve are measured against the smallest they could.
            scale = max(abs(expected), abs(slope), size, 100 * probe.rounding / (h * tolerance))
            # Both vanish as h² for a smooth function; a kink shows in the first, one at the very point in the
            # second.
            doubt = max(abs(inner.slope - outer.slope), abs(outer.bend - 4 * inner.bend) / h)
            trouble = "rerouted" if outer.rerouted or inner.rerouted else "kink"
            if trouble == "kink" and doubt <= tolerance * scale:
                checked += 1
                error = 0.0 if expected == slope else abs(expected - slope) / scale
                worst = max(worst, (error, where, expected, slope))
                break
        else:
            skipped[trouble] += 1
    return GradientCheck(name, gradient.shape, checked, skipped["rerouted"], skipped["kink"], *worst)
