"""A run: every layer, token count, routing and direction, each contender beside the limits of the machine."""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

import numoe
from numoe.bench import report
from numoe.bench.accuracy import Sample, checked_tokens, error_against_reference, error_of_sample, is_wrong, sample
from numoe.bench.contenders import CONTENDERS, Array, ContenderUnavailableError, Prepare, Runner, Task
from numoe.bench.machine import DRAM_SIZE, Limits, Machine, available_memory, set_blas_threads, settle
from numoe.bench.peers import ALONE, COPIES, PEERS, versions
from numoe.bench.timing import Measurement, Timing, measure
from numoe.bench.workloads import (
    DTYPES,
    ROUTINGS,
    Cost,
    LayerShape,
    Routings,
    compute_dtype,
    cost,
    make_routings,
    roofline,
)
from numoe.layer import MoELayer

FORMAT = 1  # of the JSON
PASSES = ("forward", "forward+backward")
_DRIFT = 0.15


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run measures, and for how long each."""

    layers: tuple[LayerShape, ...]
    tokens: tuple[int, ...]
    routings: tuple[str, ...] | None  # None: uniform, and in the largest forward all of them
    passes: tuple[str, ...] = PASSES
    peers: tuple[str, ...] = ()  # besides the contenders that are always there
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

    def contenders(self) -> dict[str, Prepare]:
        """Names and how to make them, numoe first."""
        return {**CONTENDERS, **{name: PEERS[name] for name in PEERS if name in self.peers}}

    def _routings(self, tokens: int, passes: str) -> tuple[str, ...]:
        if self.routings is None:
            largest = tokens == max(self.tokens) and passes == "forward"
            return tuple(ROUTINGS) if largest and tokens > 1 else ("uniform",)
        return self.routings if tokens > 1 else self.routings[:1]  # one token: they are all alike


@dataclass(frozen=True)
class Cell:
    """One situation: what every contender is measured in."""

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
            "machine": {**machine.report(), "blas_threads": blas_threads, "peers": versions(settings.peers)},
            "settings": {**dataclasses.asdict(settings), "layers": [shape.name for shape in settings.layers]},
            "cells": [],
            "stages": [],
            "unavailable": [],
        }
        _print_run(settings, machine, result)
        result["machine"]["peak_after"] = machine.peak_again(settings.probe_seconds)
    finally:
        numoe.set_num_threads(threads_before)


def _print_run(settings: Settings, machine: Machine, result: report.Row) -> None:
    for line in report.machine_lines(result["machine"]):
        print(line)
    table = report.Table(tuple(settings.contenders()))
    print(f"\n{table.heading()}", flush=True)
    total = len(settings.cells()) * len(settings.contenders())
    with tqdm(total=total, unit="row", file=sys.stderr, leave=False) as bar:

        def say(text: str) -> None:
            bar.clear()
            print(text, flush=True)

        for shape in dict.fromkeys(settings.layers):
            cells = [cell for cell in settings.cells() if cell.shape == shape]
            missing = memory_needed(cells, settings.dtype) - available_memory()
            if missing > 0:
                say(f"{shape.name}: left out, {missing / 1e9:.1f} GB of memory are missing")
                bar.update(len(cells) * len(settings.contenders()))
                continue
            LayerRun(shape, settings, machine, bar, say).measure_all(cells, table, result)
    print()
    for line in report.overview_lines(result["cells"]):
        print(line)
    for line in report.stage_lines(result["stages"]):
        print(line)
    print(report.LEGEND)


def memory_needed(cells: list[Cell], dtype: str) -> float:
    """Bytes: weights and perhaps gradients, and what the calls need."""
    copies = 1 + any(cell.backward for cell in cells)
    return np.dtype(compute_dtype(dtype)).itemsize * copies * cells[0].shape.numbers + memory_of_calls(cells, dtype)


def memory_of_calls(cells: list[Cell], dtype: str) -> float:
    """Bytes: rows of one call (three copies), the probe, and the check in float64."""
    shape, itemsize = cells[0].shape, np.dtype(compute_dtype(dtype)).itemsize
    copies = 1 + any(cell.backward for cell in cells)
    rows = max(cell.tokens for cell in cells) * shape.top_k * (2 * shape.d_model + 3 * shape.d_ff)
    hit = min(shape.num_experts, checked_tokens(shape) * shape.top_k)
    checked = hit * shape.numbers_per_expert + shape.shared_numbers
    return itemsize * 3 * rows + 8 * copies * checked + DRAM_SIZE / 2


class LayerRun:
    """All cells of one layer.

    In each cell the contenders take turns of a tenth of a second, as far as their copies of the weights fit the memory:
    a shared machine changes its speed within seconds.
    """

    def __init__(
        self, shape: LayerShape, settings: Settings, machine: Machine, bar: Any, say: Callable[[str], None]
    ) -> None:
        self._shape, self._settings, self._machine, self._bar, self._say = shape, settings, machine, bar, say
        self._dtype = settings.dtype
        self._layer = MoELayer(config=shape.config(self._dtype), rng=0)
        if self._dtype == "bfloat16":
            for value in self._layer.params.values():
                value[...] = value.astype(DTYPES["bfloat16"])
        self._samples: dict[Cell, Sample] = {}
        self._gradient_errors: dict[str, float] = {}

    def measure_all(self, cells: list[Cell], table: report.Table, result: report.Row) -> None:
        """Measures `cells`, prints them, and adds them to `result`."""
        rows = [self._row(cell) for cell in cells]
        result["cells"] += rows
        waiting = self._settings.contenders()
        while waiting:
            self._measure_some(waiting, cells, rows, result)
            gc.collect()
        for line in table.layer_lines(rows):
            self._say(line)
        if "forward" in self._settings.passes and self._dtype != "bfloat16":
            result["stages"] += [self._stages(tokens) for tokens in self._settings.tokens]

    def _measure_some(
        self, waiting: dict[str, Prepare], cells: list[Cell], rows: list[report.Row], result: report.Row
    ) -> None:
        """Measures those of `waiting` that can be there together, and takes them out."""
        with ExitStack() as opened:
            runners = self._some_runners(waiting, cells, result, opened)
            for cell, row in zip(cells, rows, strict=True):
                self._measure_cell(runners, cell, row, result)
                self._bar.update(len(runners))

    @contextmanager
    def _refusal(self, name: str, result: report.Row, where: str = "") -> Iterator[None]:
        """Prints why a contender cannot run, once; another library's errors are such a reason, ours are not."""
        try:
            yield
            return
        except ContenderUnavailableError as error:
            reason = str(error)
        except Exception as error:
            if name in CONTENDERS and self._dtype != "bfloat16":
                raise
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else 'no message'}"
        line = f"no {name}{where}: {reason}"
        if line not in (known["line"] for known in result["unavailable"]):
            self._say(line)
        entry = {"layer": self._shape.name, "contender": name, "line": line}
        if entry not in result["unavailable"]:
            result["unavailable"].append(entry)

    def _some_runners(
        self, waiting: dict[str, Prepare], cells: list[Cell], result: report.Row, opened: ExitStack
    ) -> dict[str, Runner]:
        """Takes out of `waiting`, in order, those for whose copies of the weights there is memory; one at least.

        `opened` closes them, also those that were there when a later one failed.
        """
        runners: dict[str, Runner] = {}
        free = available_memory() - memory_of_calls(cells, self._dtype)
        while waiting:
            name, prepare = next(iter(waiting.items()))
            needed = self._memory_of(name, cells)
            if runners and (needed > free or name in ALONE or ALONE & runners.keys()):
                break
            del waiting[name]
            with self._refusal(name, result):
                if needed > free:
                    missing = f"{(needed - free) / 1e9:.1f} GB of memory are missing for {self._shape.name}"
                    raise ContenderUnavailableError(missing)
                runner = runners[name] = prepare(self._task(cells))
                opened.callback(runner.close)
                free -= needed
        return runners

    def _memory_of(self, name: str, cells: list[Cell]) -> float:
        """Bytes of a contender's copies of the weights."""
        weights = DTYPES[self._dtype].itemsize * self._shape.numbers
        gradients = 2.0 * weights * any(cell.backward for cell in cells)  # the contender's, and as the layer has them
        return float(COPIES.get(name, 0) * weights + gradients)

    def _task(self, cells: list[Cell]) -> Task:
        tokens = max(cell.tokens for cell in cells)
        return Task(layer=self._layer, dtype=self._dtype, threads=self._settings.threads, tokens=max(tokens, 8))

    def _inputs(self, cell: Cell) -> tuple[Array, Array | None, Routings]:
        """The same x, dy and routings for everybody."""
        rng = np.random.default_rng([1, cell.tokens])
        x, dy = (rng.standard_normal((2, cell.tokens, self._shape.d_model))).astype(DTYPES[self._dtype])
        return x, dy if cell.backward else None, make_routings(cell.routing, cell.tokens, self._shape, self._dtype)

    def _row(self, cell: Cell) -> report.Row:
        """The cell in the result, without contenders."""
        shape, machine, itemsize = self._shape, self._machine, DTYPES[self._dtype].itemsize
        work = cost(shape, self._inputs(cell)[2], itemsize, backward=cell.backward)
        return {
            "layer": shape.name,
            **{k: v for k, v in dataclasses.asdict(shape).items() if k != "name"},
            "weight_bytes": itemsize * shape.numbers,
            "dtype": self._dtype,
            "threads": machine.threads,
            "passes": cell.passes,
            "tokens": cell.tokens,
            "routing": cell.routing,
            "rows_per_expert": cell.tokens * shape.top_k / work.experts_hit,
            **dataclasses.asdict(work),
            "peak": machine.peak,
            "contenders": {},
        }

    def _measure_cell(self, runners: dict[str, Runner], cell: Cell, row: report.Row, result: report.Row) -> None:
        """Adds what each contender reached, and what the machine allowed before, between and after its turns."""
        errors: dict[str, float] = {}
        waiting: dict[str, Measurement] = {}
        done: dict[str, report.Row] = {}
        for name, runner in runners.items():
            with self._turn(name, cell, result):
                errors[name] = self._error(name, runner, cell)
                waiting[name] = self._prepared(runner, cell)
        work = Cost(**{field.name: row[field.name] for field in dataclasses.fields(Cost)})
        limits = [self._limits_now(work)]
        while waiting:
            for name, measurement in list(waiting.items()):
                settle()
                with self._turn(name, cell, result):
                    measurement.take_window()
                if measurement.windows < len(limits):  # it was refused
                    del waiting[name]
            limits.append(self._limits_now(work))
            for name in [name for name, measurement in waiting.items() if measurement.done]:
                done[name] = judge(waiting.pop(name).timing(), work, limits, errors[name], self._dtype)
        row["contenders"] |= {name: done[name] for name in runners if name in done}

    @contextmanager
    def _turn(self, name: str, cell: Cell, result: report.Row) -> Iterator[None]:
        self._bar.set_description(f"{cell.shape.name} {name} {cell.passes} T={cell.tokens}")
        with self._refusal(name, result, f" in {cell.passes}"):
            yield

    def _prepared(self, runner: Runner, cell: Cell) -> Measurement:
        """Of the runner's calls in this cell, each with another routing."""
        x, dy, routings = self._inputs(cell)

        def call(i: int) -> object:
            indices, weights = routings[i % len(routings)]
            if dy is not None:
                return runner.forward_backward(x, indices, weights, dy)
            return runner.forward(x, indices, weights)

        runner.prepare(routings)
        return Measurement(call, seconds=self._settings.seconds)

    def _limits_now(self, work: Cost) -> Limits:
        settle()
        return self._machine.limits(work.working_set, self._settings.probe_seconds)

    def _error(self, name: str, runner: Runner, cell: Cell) -> float:
        """Of some rows of the cell's own call; for gradients also of a small call, with those of the weights."""
        x, dy, routings = self._inputs(cell)
        indices, weights = routings[0]
        if cell not in self._samples:
            count = checked_tokens(self._shape, cell.tokens)
            self._samples[cell] = sample(self._layer, x, indices, weights, dy, count)
        runner.prepare([(indices, weights)])
        error = error_of_sample(runner, self._samples[cell], x, indices, weights, dy)
        if not cell.backward:
            return error
        if name not in self._gradient_errors:
            small = dataclasses.replace(cell, tokens=checked_tokens(self._shape), routing="uniform")
            x, dy, routings = self._inputs(small)
            self._gradient_errors[name] = error_against_reference(runner, self._layer, x, *routings[0], dy)
        return max(error, self._gradient_errors[name])

    def _stages(self, tokens: int) -> report.Row:
        """The forward's steps one by one, on the layer's own router: where a regression sits."""
        params, config = self._layer.params, self._layer.config
        x = np.random.default_rng(1).standard_normal((tokens, self._shape.d_model)).astype(DTYPES[self._dtype])
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
        return {"layer": self._shape.name, "tokens": tokens, "dtype": self._dtype, **times}


def judge(timing: Timing, work: Cost, limits: Sequence[Limits], error: float, dtype: str) -> report.Row:
    """A timing beside what the machine allowed right before, meanwhile and after it."""
    peaks, bandwidths = [now.peak for now in limits], [now.bandwidth for now in limits]
    peak, bandwidth = sum(peaks) / len(peaks), sum(bandwidths) / len(bandwidths)
    best, bound = roofline(work, peak, bandwidth)
    best_of_target, _ = roofline(work, peak * limits[0].target_share, bandwidth)
    moved = bandwidths if bound == "memory" else peaks
    drift = max(moved) / min(moved) - 1
    return {
        **dataclasses.asdict(timing),
        "peak": peaks,
        "bandwidth": bandwidths,
        "roofline": best,
        "bound": bound,
        "share": best / timing.median,
        "target_share": best_of_target / timing.median,
        "drifted": drift > _DRIFT,
        "error": error,
        "wrong": is_wrong(error, dtype),
    }
