"""How the layer's time grows: with the number of experts, with threads, and with skewed routings."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

import numoe
from numoe.bench.contenders import CONTENDERS, ContenderUnavailableError, Runner, Task
from numoe.bench.machine import settle
from numoe.bench.report import Row, short
from numoe.bench.suite import Settings
from numoe.bench.timing import Timing, measure
from numoe.bench.workloads import DTYPES, LAYERS, ROUTINGS, LayerShape, make_routings
from numoe.layer import MoELayer

EXPERTS = (8, 32, 128, 512, 2048)
_TOP_K, _ROWS, _D, _F = 2, 8, 64, 128  # of the layers with many experts; rows per expert
_TOKENS = 1024
_OURS = ("numoe", "packed")


def print_scaling(settings: Settings, result: Row) -> None:
    """Measures and prints all three; adds them to `result`."""
    threads_before = numoe.num_threads()
    numoe.set_num_threads(settings.threads)
    try:
        scaling = result["scaling"] = {
            "experts": experts_scaling(settings),
            "threads": thread_scaling(settings),
            "routing": skew_scaling(settings),
        }
    finally:
        numoe.set_num_threads(threads_before)
    print()
    for line in scaling_lines(scaling):
        print(line)


def experts_scaling(settings: Settings) -> list[Row]:
    """E = 8 to 2048 at the same K and rows per expert: what every token pays for experts it does not visit.

    Layers of fewer experts are as many more, visited in turns: the weights come from memory for every E.
    """
    rows = []
    for num_experts in EXPERTS:
        shape = LayerShape(
            name=f"{num_experts}x{_TOP_K}x{_D}x{_F}", num_experts=num_experts, top_k=_TOP_K, d_model=_D, d_ff=_F
        )
        tokens = _ROWS * num_experts // _TOP_K
        for name, runners in _runners(shape, settings, tokens, layers=max(EXPERTS) // num_experts):
            time = _measure(runners, shape, "balanced", tokens, settings).median / tokens
            rows.append({"contender": name, "num_experts": num_experts, "tokens": tokens, "per_token": time})
    return _relative(rows, "per_token")


def thread_scaling(settings: Settings) -> list[Row]:
    """One thread, then all of them."""
    rows, shape = [], LAYERS["small"]
    for threads in sorted({1, settings.threads}):
        numoe.set_num_threads(threads)
        for name, runners in _runners(shape, settings, _TOKENS):
            time = _measure(runners, shape, "balanced", _TOKENS, settings).median
            rows.append({"contender": name, "threads": threads, "tokens": _TOKENS, "median": time})
    return _relative(rows, "median")


def skew_scaling(settings: Settings) -> list[Row]:
    """Balanced, then the other routings."""
    shape, rows = LAYERS["small"], []
    for name, runners in _runners(shape, settings, _TOKENS):
        for routing in sorted(ROUTINGS, key=lambda routing: routing != "balanced"):
            time = _measure(runners, shape, routing, _TOKENS, settings).median
            rows.append({"contender": name, "routing": routing, "tokens": _TOKENS, "median": time})
    return _relative(rows, "median")


def scaling_lines(scaling: dict[str, list[Row]]) -> Iterator[str]:
    """A line per question and contender."""
    titles = {
        "experts": f"time per token, E experts (K {_TOP_K}, {_ROWS} rows each, D {_D}, F {_F}), E = 8 is 1",
        "threads": f"time on n threads (layer small, T {_TOKENS}), 1 thread is 1",
        "routing": f"time under skew (layer small, T {_TOKENS}), balanced is 1",
    }
    keys = {"experts": "num_experts", "threads": "threads", "routing": "routing"}
    for kind, title in titles.items():
        yield title
        for name in dict.fromkeys(row["contender"] for row in scaling[kind]):
            mine = [row for row in scaling[kind] if row["contender"] == name]
            yield f"  {name:<7} " + "  ".join(f"{row[keys[kind]]}: {short(row['relative'], 3)}" for row in mine)


def _runners(shape: LayerShape, settings: Settings, tokens: int, layers: int = 1) -> Iterator[tuple[str, list[Runner]]]:
    """Numoe's two forms, those that have the dtype, of each of some layers."""
    config = shape.config(settings.dtype)
    tasks = [
        Task(layer=MoELayer(config=config, rng=i), dtype=settings.dtype, threads=settings.threads, tokens=tokens)
        for i in range(layers)
    ]
    for name in _OURS:
        try:
            runners = [CONTENDERS[name](task) for task in tasks]
        except ContenderUnavailableError:
            continue
        yield name, runners


def _measure(runners: list[Runner], shape: LayerShape, routing: str, tokens: int, settings: Settings) -> Timing:
    """The forward of one runner after the other."""
    routings = make_routings(routing, tokens, shape, settings.dtype)
    x = np.random.default_rng(1).standard_normal((tokens, shape.d_model)).astype(DTYPES[settings.dtype])
    for runner in runners:
        runner.prepare(routings)
    settle()
    return measure(
        lambda i: runners[i % len(runners)].forward(x, *routings[i % len(routings)]), seconds=settings.seconds
    )


def _relative(rows: list[Row], key: str) -> list[Row]:
    """With each time relative to the contender's first."""
    first: dict[str, float] = {}
    for row in rows:
        first.setdefault(row["contender"], row[key])
    return [{**row, "relative": row[key] / first[row["contender"]]} for row in rows]
