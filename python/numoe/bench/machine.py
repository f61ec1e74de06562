"""On what it is measured: the machine's facts, its limits (probed in the same run), and NumPy's BLAS."""

from __future__ import annotations

import ctypes
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from numoe import _core, info
from numoe.bench.timing import Stopwatch

CACHE_SIZES = {"L2": 512 * 1024, "L3": 8 * 2**20}  # bytes; L2 per thread, L3 in all
DRAM_SIZE = 512 * 2**20
_ATTEMPTS = 3  # at an undisturbed peak


class Machine:
    """The yardsticks of one run.

    Parameters
    ----------
    dtype : str
    threads : int
    seconds : float
        How long one peak measurement takes; the best of three counts.

    Attributes
    ----------
    facts : dict
        CPU, target, versions, settings of the system.
    peaks : dict
        Kind of vectors → {"1": FLOP/s on one thread, "n": FLOP/s on `threads`}, for all that the CPU has.  For
        bfloat16 that of its products of pairs, of float32 arithmetic where there are none.
    peak_dtype : str
        What `best_vectors` multiply: numbers of the run's dtype, or float32 for bfloat16 without such products.
    read : dict
        "L2", "L3", "DRAM" → bytes per second, keyed alike.
    clean : bool
        False if others used the CPUs during the probes.
    """

    def __init__(self, dtype: str, threads: int, *, seconds: float = 0.05) -> None:
        self.dtype, self.threads, self.clean = dtype, threads, True
        self.facts = collect_facts(threads)
        self._buffer = _core.ReadProbe(DRAM_SIZE)
        self._dtypes: dict[str, str] = {
            probe["name"]: "float32" if dtype == "bfloat16" and not probe["bfloat16_pairs"] else dtype
            for probe in _core.peak_probes()
            if probe["supported"]
        }
        self.peaks = {
            name: {"1": self._peak(name, 1, seconds), "n": self._peak(name, threads, seconds)} for name in self._dtypes
        }
        sizes = {"L2": CACHE_SIZES["L2"] * threads, "L3": CACHE_SIZES["L3"], "DRAM": DRAM_SIZE}
        self.read = {
            name: {
                "1": self._read(CACHE_SIZES["L2"] if name == "L2" else size, 1),
                "n": self._read(size, threads),
            }
            for name, size in sizes.items()
        }

    @property
    def best_vectors(self) -> str:
        """The kind of vector that computes most: usually, not always, the widest."""
        return max((rates["n"], name) for name, rates in self.peaks.items())[1]

    @property
    def peak_dtype(self) -> str:
        """See the class."""
        return self._dtypes[self.best_vectors]

    @property
    def peak(self) -> float:
        """FLOP/s of the machine, whatever target runs."""
        return self.peaks[self.best_vectors]["n"]

    @property
    def target_peak(self) -> float:
        """FLOP/s of the running kernel target's own vectors."""
        return self.peaks.get(self.facts["target"], self.peaks[self.best_vectors])["n"]

    def peak_again(self, seconds: float) -> float:
        """The peak now; beside `peak` it shows whether the machine changed its speed during the run."""
        return self._peak(self.best_vectors, self.threads, seconds)

    def limits(self, working_set: float, seconds: float) -> Limits:
        """What the machine can do now: others may share its cores, its clock and its memory."""
        peak = _core.probe_peak(self.best_vectors, self.peak_dtype, self.threads, seconds)
        return Limits(peak, self.target_peak / self.peak, self.bandwidth(working_set))

    def bandwidth(self, working_set: float) -> float:
        """Bytes per second now from a buffer as large as `working_set`: from the same cache or memory."""
        return float(self._buffer.rate(int(min(max(working_set, 4096), DRAM_SIZE)), self.threads))

    def report(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            **self.facts,
            "dtype": self.dtype,
            "peak_dtype": self.peak_dtype,
            "peaks": self.peaks,
            "best_vectors": self.best_vectors,
            "read": self.read,
            "probes_clean": self.clean,
        }

    def _peak(self, vectors: str, threads: int, seconds: float) -> float:
        best, clean = 0.0, False
        for _ in range(_ATTEMPTS):
            watch = Stopwatch()
            rates = [_core.probe_peak(vectors, self._dtypes[vectors], threads, seconds) for _ in range(3)]
            best, clean = max(best, *rates), watch.usage().clean()
            if clean:
                break
        self.clean &= clean
        return best

    def _read(self, size: int, threads: int) -> float:
        return float(self._buffer.rate(size, threads))


@dataclass(frozen=True)
class Limits:
    """Of the machine, at one moment."""

    peak: float  # FLOP/s
    target_share: float  # of that peak: what the vectors of the running target reach
    bandwidth: float  # bytes/s


def settle() -> None:
    """Lets the threads of whoever ran last fall asleep: OpenBLAS's spin for about 30 ms after their work."""
    time.sleep(0.05)


# ── facts ───────────────────────────────────────────────────────────────────────────────────────────────────


def collect_facts(threads: int) -> dict[str, Any]:
    """What a reader needs to know of machine and versions to make sense of a number."""
    facts = info.collect()
    facts.pop("targets")
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {
        **facts,
        "threads": threads,
        "blas": f"{blas['name']} {blas['version']}",
        "cpu_flags": _cpu_flags(),
        "mhz": _first_number("/proc/cpuinfo", "cpu MHz"),
        "governor": _read_text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or "not visible",
        "huge_pages": _bracketed(_read_text("/sys/kernel/mm/transparent_hugepage/enabled")),
        "load_before": _read_text("/proc/loadavg").split(" ")[0],
        "affinity": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [],
        "binding": "not pinned",
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def available_memory() -> float:
    """Bytes that can still be allocated, the container's limit included; infinite where unknown."""
    kilobytes = _first_number("/proc/meminfo", "MemAvailable")
    free = kilobytes * 1024 if kilobytes else float("inf")
    with suppress(ValueError):
        limit = int(_read_text("/sys/fs/cgroup/memory.max"))
        free = min(free, limit - int(_read_text("/sys/fs/cgroup/memory.current")))
    return free


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _first_number(path: str, key: str) -> float:
    """The number in the first line that starts with `key`; 0 if there is none."""
    for line in _read_text(path).splitlines():
        if line.startswith(key):
            return float(line.split(":", 1)[1].split()[0])
    return 0.0


def _bracketed(text: str) -> str:
    """The choice in force of a kernel setting like ``always [madvise] never``."""
    return text[text.find("[") + 1 : text.find("]")] if "[" in text else text or "not visible"


def _cpu_flags() -> str:
    """Those of the CPU's features that matter to a matrix product."""
    wanted = ("avx2", "fma", "avx512", "avx_vnni", "amx", "asimd", "sve", "bf16", "i8mm")
    lines = [line for line in _read_text("/proc/cpuinfo").splitlines() if line.startswith(("flags", "Features"))]
    flags = lines[0].split(":", 1)[1].split() if lines else []
    return " ".join(flag for flag in flags if any(name in flag for name in wanted))


# ── NumPy's BLAS ────────────────────────────────────────────────────────────────────────────────────────────


def set_blas_threads(threads: int) -> int | None:
    """Ask NumPy's OpenBLAS for `threads` threads; how many it will use, or None if there is no telling.

    Other BLAS libraries obey their environment variables only, and those only before NumPy is imported.
    """
    np.ones((2, 2)) @ np.ones((2, 2))  # some builds load their BLAS on first use
    for path in _loaded_libraries("openblas"):
        with suppress(OSError):
            library = ctypes.CDLL(path)
            for prefix, suffix in (("scipy_", "64_"), ("scipy_", ""), ("", "64_"), ("", "")):
                with suppress(AttributeError):
                    getattr(library, f"{prefix}openblas_set_num_threads{suffix}")(threads)
                    return int(getattr(library, f"{prefix}openblas_get_num_threads{suffix}")())
    return None


def _loaded_libraries(name: str) -> list[str]:
    """Paths of the loaded shared libraries whose file name contains `name`."""
    lines = _read_text("/proc/self/maps").splitlines()
    paths = {line.split(maxsplit=5)[5] for line in lines if len(line.split(maxsplit=5)) == 6}
    return sorted(path for path in paths if name in Path(path).name)
