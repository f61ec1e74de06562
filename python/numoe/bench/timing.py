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
_WARM_UP = 0.01  # seconds
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


class Measurement:
    """Times ``call(0), call(1), ...`` in windows, between which others may have their turn.

    It is done when there are `seconds` of undisturbed calls, and gives up after twice that; then all calls count and
    the result is not `clean`.  Calls so slow that `min_calls` take more than 20 times as long are measured less often,
    at least once.
    """

    def __init__(self, call: Callable[[int], object], *, seconds: float, min_calls: int = 3) -> None:
        self._call, self._seconds, self._min_calls = call, seconds, min_calls
        self._calls = 0
        self._windows: list[tuple[list[float], Usage]] = []

    @property
    def windows(self) -> int:
        """How many there were."""
        return len(self._windows)

    @property
    def done(self) -> bool:
        """Whether another window would add nothing."""
        if self._is_clean():
            return True
        every = self._times()
        patience = 2 if len(every) >= self._min_calls else 20
        return bool(every) and sum(every) >= patience * self._seconds

    def take_window(self) -> None:
        """Warms up, then times calls for a tenth of a second, at least one."""
        collecting = gc.isenabled()
        gc.disable()
        try:
            self._warm_up()
            self._windows.append(self._timed_calls())
        finally:
            if collecting:
                gc.enable()

    def timing(self) -> Timing:
        """What all windows so far say."""
        every, clean = self._times(), self._times(clean=True)
        enough = self._is_clean() or len(clean) >= max(min(self._min_calls, len(every)), len(every) // 4)
        return summary(clean if enough else every, self._windows, clean=enough)

    def _times(self, *, clean: bool = False) -> list[float]:
        return [t for times, usage in self._windows for t in times if usage.clean() or not clean]

    def _is_clean(self) -> bool:
        clean = self._times(clean=True)
        return len(clean) >= self._min_calls and sum(clean) >= self._seconds

    def _warm_up(self) -> None:
        """10 ms of calls; none before later windows of slower calls, to which cold caches mean little."""
        end = time.perf_counter() + _WARM_UP
        slow = bool(self._windows) and self._windows[-1][0][-1] > _WARM_UP
        while self._calls == 0 or (not slow and time.perf_counter() < end):
            self._call(self._calls)
            self._calls += 1

    def _timed_calls(self) -> tuple[list[float], Usage]:
        times: list[float] = []
        watch = Stopwatch()
        start = now = time.perf_counter()
        while not times or now - start < _WINDOW:
            self._call(self._calls)
            self._calls += 1
            before, now = now, time.perf_counter()
            times.append(now - before)
        return times, watch.usage()


def measure(call: Callable[[int], object], *, seconds: float, min_calls: int = 3) -> Timing:
    """The timing of one `Measurement`, with nobody else's turns between its windows."""
    measurement = Measurement(call, seconds=seconds, min_calls=min_calls)
    while not measurement.done:
        measurement.take_window()
    return measurement.timing()


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
