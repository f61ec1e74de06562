"""How it is measured: many calls, medians, and a guard that notices when the CPUs were not ours."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_WINDOW = 0.1  # seconds; /proc/stat counts in steps of 0.01
_OTHERS = 0.15  # cores that others may use before a window counts as disturbed
_OWN = 0.96  # of the wall time that a thread must have had a CPU


@dataclass(frozen=True)
class Usage:
    """What the CPUs did for a while."""

    wall: float  # seconds
    own: float  # CPU seconds of this process, all threads
    others: float  # CPU seconds of everybody else on our CPUs, hypervisor included; 0 where unknown

    @property
    def cores(self) -> float:
        """CPUs this process kept busy."""
        return self.own / self.wall

    def clean(self, threads: int = 1) -> bool:
        """True if at least `threads` CPUs were ours alone; two clock ticks of /proc/stat are forgiven."""
        return self.own >= _OWN * threads * self.wall and self.others <= _OTHERS * self.wall + 0.02


class Stopwatch:
    """Starts when it is made; `usage` is what happened since."""

    def __init__(self) -> None:
        self._busy = _busy_seconds()
        self._own = time.process_time()
        self._wall = time.perf_counter()

    def usage(self) -> Usage:
        """Since the start."""
        wall = max(time.perf_counter() - self._wall, 1e-9)
        own = time.process_time() - self._own
        busy = _busy_seconds()
        known = busy is not None and self._busy is not None
        return Usage(wall, own, max(0.0, busy - self._busy - own) if known else 0.0)  # type: ignore[operator]


def _busy_seconds() -> float | None:
    """CPU seconds that the CPUs of our affinity mask have worked since the system started, for whomever."""
    try:
        ours = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        text = Path("/proc/stat").read_text(encoding="ascii")
    except (AttributeError, OSError):  # not Linux
        return None
    lines = [line.split() for line in text.splitlines() if line.startswith("cpu")]
    # user nice system idle iowait irq softirq steal; guests are in user already
    ticks = sum(sum(map(int, f[1:9])) - int(f[4]) - int(f[5]) for f in lines if f[0] in ours)
    return float(ticks / os.sysconf("SC_CLK_TCK"))


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    minimum: float
    spread: float  # interquartile range / median
    calls: int
    clean: bool  # False: others used the CPUs meanwhile; do not trust it
    cores: float  # CPUs kept busy


def measure(call: Callable[[int], object], *, seconds: float, min_calls: int = 3) -> Timing:
    """Times ``call(0), call(1), ...`` in windows until there are `seconds` of undisturbed calls.

    Gives up on a quiet machine after twice that; then all calls count and the result is not `clean`.  Calls so
    slow that `min_calls` take more than 20 times as long are measured less often, at least once.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        done = _warm_up(call)
        windows: list[tuple[list[float], Usage]] = []
        while True:
            windows.append(_window(call, done))
            done += len(windows[-1][0])
            clean = [t for times, usage in windows if usage.clean() for t in times]
            every = [t for times, _ in windows for t in times]
            if len(clean) >= min_calls and sum(clean) >= seconds:
                return summary(clean, windows, clean=True)
            patience = 2 if len(every) >= min_calls else 20
            if sum(every) >= patience * seconds:
                enough = len(clean) >= max(min(min_calls, len(every)), len(every) // 4)
                return summary(clean if enough else every, windows, clean=enough)
    finally:
        if collecting:
            gc.enable()


def _warm_up(call: Callable[[int], object]) -> int:
    """At least one call and 10 ms; the number of calls."""
    done, end = 0, time.perf_counter() + 0.01
    while done == 0 or time.perf_counter() < end:
        call(done)
        done += 1
    return done


def _window(call: Callable[[int], object], first: int) -> tuple[list[float], Usage]:
    times: list[float] = []
    watch = Stopwatch()
    start = now = time.perf_counter()
    while not times or now - start < _WINDOW:
        call(first + len(times))
        before, now = now, time.perf_counter()
        times.append(now - before)
    return times, watch.usage()


def summary(times: list[float], windows: list[tuple[list[float], Usage]], *, clean: bool) -> Timing:
    """Median, minimum and spread of `times`."""
    low, median, high = (float(value) for value in np.percentile(times, (25, 50, 75)))
    wall = sum(usage.wall for _, usage in windows)
    return Timing(
        median=median,
        minimum=min(times),
        spread=(high - low) / median,
        calls=len(times),
        clean=clean,
        cores=sum(usage.own for _, usage in windows) / wall,
    )
