"""A run: every layer, token count, routing and direction, each contender beside the limits of the machine."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

import numoe
from numoe.bench import report
from numoe.bench.contenders import (
    CONTENDERS,
    Array,
    ContenderUnavailableError,
    Runner,
    error_against_reference,
)
from numoe.bench.machine import DRAM_SIZE, Machine, available_memory, set_blas_threads, settle
from numoe.bench.timing import Timing, measure
from numoe.bench.workloads import ROUTINGS, Cost, LayerShape, cost, make_routings, roofline
from numoe.layer import MoELayer

FORMAT = 1  # of the JSON
PASSES = ("forward", "forward+backward")
_CHECKED_TOKENS = 8
_DRIFT = 0.15


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run measures, and for how long each."""

    layers: tuple[LayerShape, ...]
    tokens: tuple[int, ...]
    routings: tuple[str, ...] | None  # None: uniform, and in the largest forward all of them
    passes: tuple[str, ...] = PASSES
    dtype: str = "float32"
    threads: int = 1
    seconds: float = 0.3  # per measurement
    probe_seconds: float = 0.05  # per peak probe

    def cells(self) -> list[Cell]:
        """Everything to measure, layer by layer."""
        return [
            Cell(shape, tokens, routing, passes)
            for shape in dict.fromkeys(self.layers)
            for passes in self.passes
            for tokens in dict.fromkeys(self.tokens)
            for routing in self._routings(tokens, passes)
        ]

    def _routings(self, tokens: int, passes: str) -> tuple[str, ...]:
        if self.routings is None:
            largest = tokens == max(self.tokens) and passes == "forward"
            return tuple(ROUTINGS) if largest and tokens > 1 else ("uniform",)
        return self.routings if tokens > 1 else self.routings[:1]  # one token: they are all alike


@dataclass(frozen=True)
class Cell:
    """One row of the table."""

    shape: LayerShape
    tokens: int
    routing: str
    passes: str

    @property
    def backward(self) -> bool:
        """Gradients too."""
        return self.passes == "forward+backward"


def run_bench(settings: Settings, result: report.Row) -> None:
    """Measures and prints; `result` fills up as it goes, so that whoever interrupts it loses nothing."""
    threads_before = numoe.num_threads()
    numoe.set_num_threads(settings.threads)
    try:
        blas_threads = set_blas_threads(settings.threads)
        machine = Machine(settings.dtype, settings.threads, seconds=settings.probe_seconds)
        result |= {
            "format": FORMAT,
            "machine": {**machine.report(), "blas_threads": blas_threads},
            "settings": {**dataclasses.asdict(settings), "layers": [shape.name for shape in settings.layers]},
            "cells": [],
            "stages": [],
        }
        _print_run(settings, machine, result)
        result["machine"]["peak_after"] = machine.peak_again(settings.probe_seconds)
    finally:
        numoe.set_num_threads(threads_before)


def _print_run(settings: Settings, machine: Machine, result: report.Row) -> None:
    for line in report.machine_lines(result["machine"]):
        print(line)
    table = report.Table(tuple(CONTENDERS))
    print(f"\n{table.heading()}", flush=True)
    with tqdm(total=len(settings.cells()), unit="cell", file=sys.stderr, leave=False) as bar:

        def say(text: str) -> None:
            bar.clear()
            print(text, flush=True)

        for shape in dict.fromkeys(settings.layers):
            cells = [cell for cell in settings.cells() if cell.shape == shape]
            missing = memory_needed(cells, settings.dtype) - available_memory()
            if missing > 0:
                say(f"{shape.name}: left out, {missing / 1e9:.1f} GB of memory are missing")
                bar.update(len(cells))
                continue
            LayerRun(shape, settings, machine, bar, say).measure_all(cells, table, result)
    if result["stages"]:
        print()
        for line in report.stage_lines(result["stages"]):
            print(line)
    print(f"\n{report.LEGEND}")


def memory_needed(cells: list[Cell], dtype: str) -> float:
    """Bytes: weights, their gradients, the rows of one call (three copies), and room for the probe."""
    shape, itemsize = cells[0].shape, np.dtype(dtype).itemsize
    copies = 1 + any(cell.backward for cell in cells)
    rows = max(cell.tokens for cell in cells) * shape.top_k * (2 * shape.d_model + 3 * shape.d_ff)
    return itemsize * (copies * shape.numbers + 3 * rows) + DRAM_SIZE / 2


class LayerRun:
    """All cells of one layer."""

    def __init__(
        self, shape: LayerShape, settings: Settings, machine: Machine, bar: Any, say: Callable[[str], None]
    ) -> None:
        self._shape, self._settings, self._machine, self._bar, self._say = shape, settings, machine, bar, say
        self._layer = MoELayer(config=shape.config(settings.dtype), rng=0)
        self._rng = np.random.default_rng(1)
        self._errors: dict[str, dict[str, float]] = {passes: {} for passes in PASSES}
        self._runners = self._prepared()

    def _prepared(self) -> dict[str, Runner]:
        """The contenders that can run this layer, each checked once against float64."""
        runners: dict[str, Runner] = {}
        x, dy = self._tokens(_CHECKED_TOKENS), self._tokens(_CHECKED_TOKENS)
        indices, weights = make_routings("uniform", _CHECKED_TOKENS, self._shape, self._settings.dtype)[0]
        for name, prepare in CONTENDERS.items():
            try:
                runners[name] = prepare(self._layer)
            except ContenderUnavailableError as reason:
                self._say(f"{self._shape.name}: no {name}: {reason}")
                continue
            for passes in self._settings.passes:
                gradient = dy if passes == "forward+backward" else None
                error = error_against_reference(runners[name], self._layer, x, indices, weights, gradient)
                self._errors[passes][name] = error
        return runners

    def _tokens(self, count: int) -> Array:
        return self._rng.standard_normal((count, self._shape.d_model)).astype(self._settings.dtype)

    def measure_all(self, cells: list[Cell], table: report.Table, result: report.Row) -> None:
        """Measures `cells`, prints a line each, and adds them to `result`."""
        for i, cell in enumerate(cells):
            self._bar.set_description(f"{cell.shape.name} {cell.passes} T={cell.tokens}")
            row = self._measure(cell)
            if i == 0:
                worst = {name: max(self._errors[p].get(name, 0.0) for p in PASSES) for name in self._runners}
                self._say(table.group(row, worst))
            self._say(table.line(row))
            result["cells"].append(row)
            self._bar.update()
        if "forward" in self._settings.passes:
            for tokens in self._settings.tokens:
                result["stages"].append(self._stages(tokens))

    def _measure(self, cell: Cell) -> report.Row:
        shape, machine, dtype = cell.shape, self._machine, self._settings.dtype
        itemsize = np.dtype(dtype).itemsize
        routings = make_routings(cell.routing, cell.tokens, shape, dtype)
        work = cost(shape, routings, itemsize, backward=cell.backward)
        x, dy = self._tokens(cell.tokens), self._tokens(cell.tokens)
        contenders = {}
        settle()
        before = machine.bandwidth(work.working_set)
        for name, runner in self._runners.items():

            def call(i: int, runner: Runner = runner) -> object:
                indices, weights = routings[i % len(routings)]
                if cell.backward:
                    return runner.forward_backward(x, indices, weights, dy)
                return runner.forward(x, indices, weights)

            timing = measure(call, seconds=self._settings.seconds)
            settle()
            after = machine.bandwidth(work.working_set)
            error = self._errors[cell.passes][name]
            contenders[name] = judge(timing, work, machine, (before, after), error, dtype)
            before = after
        return {
            "layer": shape.name,
            **{k: v for k, v in dataclasses.asdict(shape).items() if k != "name"},
            "weight_bytes": itemsize * shape.numbers,
            "dtype": dtype,
            "threads": machine.threads,
            "passes": cell.passes,
            "tokens": cell.tokens,
            "routing": cell.routing,
            "rows_per_expert": cell.tokens * shape.top_k / work.experts_hit,
            **dataclasses.asdict(work),
            "peak": machine.peak,
            "contenders": contenders,
        }

    def _stages(self, tokens: int) -> report.Row:
        """The forward's steps one by one, on the layer's own router: where a regression sits."""
        params, config = self._layer.params, self._layer.config
        x = self._tokens(tokens)
        logits = numoe.router_logits(x, params["w_router"])
        routing = numoe.route(logits, config.router)
        plan = numoe.dispatch(routing, config.router)
        rows = np.zeros((plan.num_rows, x.shape[1]), x.dtype)

        def experts(_: int) -> object:
            return numoe.experts_forward(
                x, plan, params, config.experts, weights=routing.weights, combined=True, keep_cache=False
            )

        steps: dict[str, Callable[[int], object]] = {
            "router": lambda _: numoe.router_logits(x, params["w_router"]),
            "top-k": lambda _: numoe.route(logits, config.router),
            "dispatch": lambda _: numoe.dispatch(routing, config.router),
            "experts": experts,
            "combine": lambda _: numoe.combine(rows, plan, routing.weights),
        }
        seconds = self._settings.seconds / 4
        times = {name: dataclasses.asdict(measure(step, seconds=seconds)) for name, step in steps.items()}
        return {"layer": self._shape.name, "tokens": tokens, "dtype": self._settings.dtype, **times}


def judge(
    timing: Timing, work: Cost, machine: Machine, bandwidths: tuple[float, float], error: float, dtype: str
) -> report.Row:
    """A timing beside what the machine allows."""
    bandwidth = sum(bandwidths) / 2
    best, bound = roofline(work, machine.peak, bandwidth)
    best_of_target, _ = roofline(work, machine.target_peak, bandwidth)
    drift = max(bandwidths) / min(bandwidths) - 1
    return {
        **dataclasses.asdict(timing),
        "bandwidth": bandwidths,
        "roofline": best,
        "bound": bound,
        "share": best / timing.median,
        "target_share": best_of_target / timing.median,
        "drifted": bound == "memory" and drift > _DRIFT,
        "error": error,
        "wrong": not error <= 1e4 * float(np.finfo(dtype).eps),
    }
