"""Every function of the core with garbage, and with calls that are almost right: exceptions, never a crash."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import numoe
from numoe import _core

T, D, F, E, K = 6, 4, 5, 3, 2
RNG = np.random.default_rng(1)
X, LOGITS = (RNG.standard_normal((T, n)).astype(np.float32) for n in (D, E))
INDICES, WEIGHTS = np.tile(np.int32([2, 0]), (T, 1)), np.full((T, K), 0.5, np.float32)
NUMBERS = (-1, 0, 1, 2**31 - 1, 2**40, -(2**40))

# fmt: off
GARBAGE: list[Any] = [
    None, True, 0, -1, 2, 2**31, 2**62, -(2**63), 2**64, 1.5, float("nan"), "", "sum", "batch", b"x", object(),
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
    rows, w = np.ones((T * K, D), np.float32), layer.params["w_router"]
    weighing = {"score": "softmax", "normalize": "sum", "eps": 0.0, "eps_mode": "add", "scale": 1.0}
    groups = {"num_groups": 1, "groups_kept": 1, "group_score": "max"}
    router = _core.RouterOptions(top_k=K, **weighing, **groups)
    options = _core.ExpertOptions(activation="silu", weight_on="output")
    order = [p.offsets, p.row_token, p.row_assignment]
    up = np.ones((T * K, F), np.float32)
    capacities, mask = np.array([[0, 2, 1], [2, T, 3]]), np.ones(T, bool)
    return {
        "router_logits": [X, w, w[0]],
        "router_logits_backward": [LOGITS, X, w],
        "route": [LOGITS, router, w[0], mask],
        "route_backward": [LOGITS, INDICES, WEIGHTS, router],
        "dispatch": [INDICES, WEIGHTS, E, capacities, "batch"],
        "renormalize_kept": [WEIGHTS, p.assignment_row, 1.0],
        "renormalize_kept_backward": [WEIGHTS, p.assignment_row, 1.0, WEIGHTS],
        "combine": [rows, *order, T, K, WEIGHTS],
        "combine_backward": [X, rows, *order, K, WEIGHTS],
        "experts_forward": [X, *order, K, WEIGHTS, params, options, True, True],
        "experts_backward": [X, X, *order, K, WEIGHTS, params, options, True, up, up],
        "load_balance_loss": [LOGITS, INDICES, "switch", "softmax", mask, np.array([2, 4])],
        "importance_loss": [WEIGHTS, INDICES, E, mask],
        "load_loss": [LOGITS, LOGITS, np.abs(LOGITS) + 1, K, mask],
        "z_loss": [LOGITS, mask],
        "num_threads": [],
        "set_num_threads": [2],
        "available_cpus": [],
        "target": [],
        "targets": [],
        "build_info": [],
    }


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


def fuzz(name: str) -> None:
    """Any answer or exception of R1 is fine; a crash ends the process, and stderr tells the call."""
    function, valid = getattr(_core, name), valid_calls()[name]
    function(*valid)
    rng = np.random.default_rng(0)
    for _ in range(1500 if valid else 10):
        arguments = [mutated(rng, v) if rng.random() < 0.4 else v for v in valid]
        if (
            name == "set_num_threads"
            and not isinstance(arguments[0], str | float)
            and arguments[0] in (2**31, 1e6)
        ):
            continue
        os.pwrite(2, f"{name}{arguments!r}".replace("\n", " ")[:4000].ljust(4000).encode(), 0)
        try:
            function(*arguments)
        except (TypeError, ValueError, IndexError, MemoryError, OverflowError) as error:
            assert str(error)


def test_the_fuzz_knows_every_function() -> None:
    functions = {name for name in dir(_core) if callable(getattr(_core, name)) and not name.startswith("_")}
    assert functions == valid_calls().keys() | {"RouterOptions", "ExpertOptions"}


@pytest.mark.parametrize("name", valid_calls())
def test_garbage_never_crashes(name: str, tmp_path: Any) -> None:
    log = tmp_path / "stderr"
    with log.open("w") as stderr:
        code = subprocess.run(
            [sys.executable, __file__, name], stderr=stderr, timeout=120, check=False
        ).returncode
    assert code == 0, f"exit code {code}; last call: {log.read_text().strip()[:3000]}"


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    fuzz(sys.argv[1])
