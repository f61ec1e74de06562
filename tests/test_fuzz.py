"""Every function of the core with garbage, and with calls that are almost right: no crash."""

from __future__ import annotations

import itertools
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numoe
import numpy as np
import pytest
from numoe import _core

T, D, F, E, K = 6, 4, 5, 3, 2
RNG = np.random.default_rng(1)
X, LOGITS = (RNG.standard_normal((T, n)).astype(np.float32) for n in (D, E))
INDICES, WEIGHTS = np.tile(np.int32([2, 0]), (T, 1)), np.full((T, K), 0.5, np.float32)
NUMBERS = (-1, 0, 1, 2**31 - 1, 2**40, -(2**40))

# fmt: off
GARBAGE: list[Any] = [
    None, True, 0, -1, 2, 2**31, 2**62, -(2**63), 2**64, 1.5, float("nan"), "", "sum", "max", b"x", object(),
    [], [1.0], {}, {"w_up": 1}, np.float32(1), np.array(1.0), np.array(None), np.array(["a"]), np.arange(4),
    np.zeros(0), np.zeros((0, 0)), np.zeros((2, 0), "i4"), np.zeros(3, "f4,i4"), np.ones(T, bool),
    np.ones((T, D), complex), np.ones((T, D)), np.ones((T, E), "f4"), np.ones((1, 1, 1, 1)),
    np.full((T, K), 2**30, "i4"), np.full((T, K), -(2**31), "i4"),
]
# fmt: on


def valid_calls() -> dict[str, list[Any]]:
    """Arguments that each function of `_core` accepts."""
    routing = numoe.Routing(indices=INDICES, weights=WEIGHTS)
    p = numoe.dispatch(routing, numoe.RouterConfig(num_experts=E, top_k=K))
    layer = numoe.MoELayer(d_model=D, d_ff=F, num_experts=E, top_k=K, rng=0)
    params = {name: value for name, value in layer.params.items() if name != "w_router"}
    double = {name: value.astype(np.float64) for name, value in layer.params.items()}
    rows, w = np.ones((T * K, D), np.float32), layer.params["w_router"]
    router = [K, "softmax", "sum", 0.0, "add", 1.0, 1, 1, "max"]
    chosen = router_options(*router)
    options = _core.ExpertOptions(activation="silu", weight_on="output")
    order = [p.offsets, p.row_token, p.row_assignment]
    up = np.ones((T * K, F), np.float32)
    grads = {name: np.zeros_like(value) for name, value in params.items()}
    capacities, mask = np.array([[0, 2, 1], [2, T, 3]]), np.ones(T, bool)
    narrow = {n: v if n == "w_router" else v.astype("bfloat16").view(np.uint16) for n, v in layer.params.items()}
    return {
        "line_aligned_zeros": [(2, 3), np.dtype("f4")],
        "widened": [np.arange(6, dtype=np.uint16)],
        "rounded": [X],
        "router_logits": [X, w, w[0]],
        "router_logits_backward": [LOGITS, X, w],
        "route": [LOGITS, chosen, w[0], mask],
        "route_backward": [LOGITS, INDICES, WEIGHTS, chosen],
        "dispatch": [INDICES, WEIGHTS, E, capacities, "batch"],
        "renormalize_kept": [WEIGHTS, p.assignment_row, 1.0],
        "renormalize_kept_backward": [WEIGHTS, p.assignment_row, 1.0, WEIGHTS],
        "combine": [rows, *order, T, K, WEIGHTS],
        "combine_backward": [X, rows, *order, K, WEIGHTS],
        "experts_forward": [X, *order, K, WEIGHTS, params, options, True, True],
        "experts_forward bfloat16": [X, *order, K, WEIGHTS, narrow, options, True, True],
        "experts_backward": [X, X, *order, K, WEIGHTS, params, options, True, up, up, grads, True],
        "layer_forward": [X, mask, w, w[0], w[0], chosen, params, options],
        "layer_forward bfloat16": [X, mask, w, w[0], w[0], chosen, narrow, options],
        "load_balance_loss": [LOGITS, INDICES, "switch", "softmax", mask, np.array([2, 4])],
        "importance_loss": [WEIGHTS, INDICES, E, mask],
        "load_loss": [LOGITS, LOGITS, np.abs(LOGITS) + 1, K, mask],
        "z_loss": [LOGITS, mask],
        "PackedLayerFloat32": [layer.params, None, chosen, options, None, options],
        "PackedLayerFloat64": [double, np.ones(E), chosen, options, double | {"score": np.ones(D)}, options],
        "PackedLayerBfloat16": [layer.params, w[0], chosen, options, layer.params, options],
        "PackedLayerFloat32.forward": [X],
        "PackedLayerFloat32.forward_ready": [X],
        "PackedLayerFloat32.experts": [X, *order, K, WEIGHTS],
        "RouterOptions": router,
        "ExpertOptions": ["silu", "output"],
        "ReadProbe": [64],
        "ProductProbe": ["outer", 3, 5, 7, 2, "float32"],
        "set_num_threads": [2],
    }


def router_options(*values: Any) -> Any:
    names = ("top_k", "score", "normalize", "eps", "eps_mode", "scale", "num_groups", "groups_kept", "group_score")
    return _core.RouterOptions(**dict(zip(names, values, strict=True)))


def packed_layer() -> Any:
    return _core.PackedLayerFloat32(*valid_calls()["PackedLayerFloat32"])


# What is more than one call: objects that were accepted are then used.
CALLS: dict[str, Callable[..., Any]] = {
    "RouterOptions": lambda *values: _core.route(LOGITS, router_options(*values), None, None),
    "ExpertOptions": lambda act, on: _core.ExpertOptions(activation=act, weight_on=on),
    "PackedLayerFloat32": lambda *values: _core.PackedLayerFloat32(*values).forward(X),
    "PackedLayerFloat32.forward": lambda x: packed_layer().forward(x),
    "PackedLayerFloat32.forward_ready": lambda x: packed_layer().forward_ready(x),
    "PackedLayerFloat64": lambda *values: _core.PackedLayerFloat64(*values).forward(X.astype(np.float64)),
    "PackedLayerBfloat16": lambda *values: _core.PackedLayerBfloat16(*values).forward(X),
    "PackedLayerFloat32.experts": lambda *values: packed_layer().experts(*values),
}
SAFE = {  # take no arguments
    "num_threads",
    "available_cpus",
    "target",
    "targets",
    "emulated_targets",
    "build_info",
    "peak_probes",
}
SLOW = {"probe_peak"}  # runs as long as it is told


def mutated(rng: np.random.Generator, value: Any) -> Any:
    """Garbage, or `value` with another shape, dtype, memory order or content."""
    if isinstance(value, dict) and rng.random() < 0.7:
        name = str(rng.choice(sorted(value)))
        return value | {name: mutated(rng, value[name])}
    if not isinstance(value, np.ndarray) or rng.random() < 0.2:
        return GARBAGE[rng.integers(len(GARBAGE))]
    axis = int(rng.integers(value.ndim)) if value.ndim else 0
    index = np.index_exp[:] * axis
    changes: list[Callable[[], Any]] = [
        lambda: value[(*index, slice(0, -1))],
        lambda: value[(*index, slice(0, 0))],
        lambda: np.concatenate([value, value], axis=axis),
        lambda: value[None],
        lambda: value.T,
        lambda: value[..., ::-1],
        lambda: value.astype(rng.choice(["f8", "f4", "i4", "i8", "u1", "?", ">f4"])),
        lambda: np.where(rng.random(value.shape) < 0.1, rng.choice(NUMBERS), value).astype(value.dtype),
        lambda: value * value.dtype.type(0),
    ]
    with np.errstate(all="ignore"):
        return changes[rng.integers(len(changes))]()


# What random changes hardly ever hit: sizes of zero and beyond 64 bits, groups that are not consecutive.
EMPTY = {kind: np.zeros(0, kind) for kind in ("i4", "i8")}
NO_WIDTH = {"w_up": np.zeros((E, 0, 0)), "w_down": np.zeros((E, 0, 0))}
NO_D_MODEL = {"w_up": np.zeros((E, 0, F)), "w_down": np.zeros((E, F, 0))}
EDGES: list[tuple[str, dict[int, Any]]] = [
    ("dispatch", {1: None}),
    ("dispatch", {1: [[1.0, 1.0]] * T}),
    ("dispatch", {3: np.array([[0, T, 2], [10**9, 10**9 + 5, 2]]), 4: "position"}),
    ("dispatch", {3: np.array([[0, T, 2], [T, 2, 2]]), 4: "choice"}),
    ("dispatch", {2: 2**62}),
    ("dispatch", {2: 2**63 - 1}),
    ("combine", {0: np.zeros((0, D)), 1: EMPTY["i8"], 2: EMPTY["i4"], 3: EMPTY["i4"], 6: None}),
    ("combine", {4: 2**62}),
    ("combine", {5: 2**62, 6: None}),
    ("experts_forward", {0: np.zeros((T, 0)), 5: None, 6: NO_WIDTH}),
    ("experts_forward", {0: np.zeros((T, 0)), 5: None, 6: NO_D_MODEL}),
    ("experts_forward", {4: 2**62, 5: None}),
    (
        "experts_backward",
        {0: np.zeros((T, 0)), 1: np.zeros((T, 0)), 6: None, 7: NO_WIDTH, 10: None, 11: np.zeros((T * K, 0)), 12: None},
    ),
    ("PackedLayerFloat64", {0: {"w_router": np.zeros((0, E))} | NO_WIDTH, 4: None}),
    ("PackedLayerFloat32.experts", {4: 2**62, 5: None}),
    ("router_logits", {0: np.zeros((T, 0)), 1: np.zeros((0, E)), 2: None}),
    ("router_logits", {0: np.zeros((T, D)), 1: np.zeros((D, 0)), 2: None}),
    ("ProductProbe", {1: 2**62}),
    ("ProductProbe", {2: 2**62, 3: 2**62}),
    ("importance_loss", {2: 2**62}),
    ("load_loss", {3: 2**62}),
]


def calls(name: str, count: int = 250) -> Iterator[list[Any]]:
    """The edges, and random changes of about a third of the arguments."""
    valid, rng = valid_calls()[name], np.random.default_rng(0)
    for where, changes in EDGES:
        if where == name:
            yield [changes.get(i, v) for i, v in enumerate(valid)]
    for _ in range(count):
        yield [mutated(rng, v) if rng.random() < 0.35 else v for v in valid]


def fuzz(name: str) -> None:
    """Any answer, and any exception that users may meet, is fine.  A crash leaves the number of its call behind."""
    function = CALLS.get(name) or getattr(_core, name.partition(" ")[0])
    function(*valid_calls()[name])
    os.write(2, bytes(9))  # room for the number; what others write comes after it
    for number, arguments in enumerate(calls(name)):
        os.pwrite(2, f"{number:9}".encode(), 0)
        try:
            function(*arguments)
        except (TypeError, ValueError, IndexError, MemoryError, OverflowError) as error:
            assert str(error)  # noqa: PT017


def test_the_fuzz_knows_every_function() -> None:
    functions = {name for name in dir(_core) if callable(getattr(_core, name)) and not name.startswith("_")}
    assert functions == {name.partition(".")[0].partition(" ")[0] for name in valid_calls()} | SAFE | SLOW


@pytest.mark.parametrize("name", valid_calls())
def test_garbage_never_crashes(name: str, tmp_path: Path) -> None:
    log = tmp_path / "stderr"
    with log.open("w") as stderr:
        done = subprocess.run([sys.executable, __file__, name], stderr=stderr, timeout=120, check=False)
    if done.returncode:
        text = log.read_text()
        culprit = next(itertools.islice(calls(name), int(text[:9]), None))
        pytest.fail(f"exit code {done.returncode} after {name}{tuple(culprit)!r}\n{text[9:]}")


if __name__ == "__main__":
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):  # which maps terabytes for itself
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    fuzz(sys.argv[1])
