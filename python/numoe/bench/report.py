"""What is shown: the machine, and an aligned table that grows line by line."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = dict[str, Any]  # one cell of a run, as in its JSON

PASS_NAMES = {"forward": "forward", "forward+backward": "fwd+bwd"}

LEGEND = """\
T tokens; rows = rows per hit expert; ms = median of many calls (min: the fastest); GF/s = useful arithmetic;
roof = shortest possible time in ms, c compute- or m memory-bound: max(flops / peak, bytes of hit experts /
bandwidth), both probed in this run, the bandwidth right before and after, on a buffer of the same size;
share = roof / ms; own = the same with the peak of the running target's vectors; x = times as long as numoe.
~ others used the CPUs meanwhile; % bandwidth moved by more than 15 % meanwhile; ! result is not float64's."""


def short(value: float, digits: int = 4) -> str:
    """`value` with so many significant digits, never in exponent form.

    >>> short(0.012345), short(1234567.0)
    ('0.01235', '1234567')
    """
    if not math.isfinite(value) or value == 0:
        return f"{value:.0f}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def _rates(rates: Mapping[str, Mapping[str, float]]) -> str:
    """Name and 10⁹ per second, on one thread / on all."""
    return ", ".join(f"{name} {short(r['1'] / 1e9, 3)} / {short(r['n'] / 1e9, 3)}" for name, r in rates.items())


def machine_lines(machine: Row) -> Iterator[str]:
    """The machine, the versions and the probes."""
    n, build = machine["threads"], machine["build"]
    yield (
        f"{machine['cpu']} ({machine['cpu_flags']}), {machine['cpus available']} CPUs available; "
        f"target {machine['target']}, {n} threads, {machine['binding']}"
    )
    blas = "unknown" if machine["blas_threads"] is None else machine["blas_threads"]
    yield (
        f"numoe {machine['numoe']} ({build['compiler']} {build['flags'].strip()}), "
        f"Python {machine['python']}, NumPy {machine['numpy']}, {machine['blas']} on {blas} threads"
    )
    yield (
        f"{machine['platform']}, {machine['mhz']:.0f} MHz, governor {machine['governor']}, huge pages "
        f"{machine['huge_pages']}, load before {machine['load_before']}, {machine['date']}"
    )
    disturbed = "" if machine["probes_clean"] else "  ~ others used the CPUs meanwhile"
    yield f"{machine['dtype']} peak in GFLOP/s on 1 / {n} threads: {_rates(machine['peaks'])}{disturbed}"
    yield f"read rate in GB/s on 1 / {n} threads: {_rates(machine['read'])}"


class Table:
    """The table of a run, line by line, in columns whose widths are known beforehand.

    Parameters
    ----------
    contenders : sequence of str
        numoe first; every other one gets a column of times and one of ratios.
    """

    _WIDTHS = (8, 5, 9, 6, 9, 9, 6, 10, 5, 5)
    _TITLES = ("pass", "T", "routing", "rows", "ms", "min", "GF/s", "roof", "share", "own")
    _LEFT = ("pass", "routing")

    def __init__(self, contenders: Sequence[str]) -> None:
        self._main, *self._others = contenders

    def heading(self) -> str:
        """The titles of the columns."""
        return self._aligned([*self._TITLES, *(t for name in self._others for t in (f"{name} ms", "x"))])

    def group(self, row: Row, errors: Mapping[str, float]) -> str:
        """The line above a layer's rows."""
        sizes = f"E {row['num_experts']}, K {row['top_k']}, D {row['d_model']}, F {row['d_ff']}"
        shared = f", shared {row['shared_d_ff']}" if row["shared_d_ff"] else ""
        wrong = ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
        return (
            f"{row['layer']}: {sizes}{shared}, {row['form']} {row['activation']}, {row['dtype']}, "
            f"{row['weight_bytes'] / 1e6:,.0f} MB; error against float64: {wrong}"
        )

    def line(self, row: Row) -> str:
        """One cell of the run."""
        main = row["contenders"][self._main]
        cells = [
            PASS_NAMES[row["passes"]],
            str(row["tokens"]),
            row["routing"],
            short(row["rows_per_expert"], 3),
            short(main["median"] * 1e3),
            short(main["minimum"] * 1e3),
            short(row["flops"] / main["median"] / 1e9, 3),
            f"{short(main['roofline'] * 1e3)} {main['bound'][0]}",
            f"{main['share']:.0%}",
            f"{main['target_share']:.0%}",
        ]
        for name in self._others:
            other = row["contenders"].get(name)
            cells += ["-", "-"] if other is None else self._other_cells(other["median"], main["median"])
        return f"{self._aligned(cells)}  {flags(row)}".rstrip()

    @staticmethod
    def _other_cells(seconds: float, main: float) -> list[str]:
        return [short(seconds * 1e3), short(seconds / main, 3)]

    def _aligned(self, cells: Sequence[str]) -> str:
        widths = [*self._WIDTHS, *(w for name in self._others for w in (max(9, len(name) + 3), 5))]
        left = [title in self._LEFT for title in self._TITLES] + [False] * 2 * len(self._others)
        return " ".join(
            f"{cell:<{width}}" if to_left else f"{cell:>{width}}"
            for cell, width, to_left in zip(cells, widths, left, strict=True)
        )


def flags(row: Row) -> str:
    """The marks of the legend that apply; those of a contender other than the first carry its name."""
    marks = []
    for i, (name, result) in enumerate(row["contenders"].items()):
        found = "~" * (not result["clean"]) + "%" * result["drifted"] + "!" * result["wrong"]
        if found:
            marks.append(found if i == 0 else f"{name} {found}")
    return ", ".join(marks)


STAGES = ("router", "top-k", "dispatch", "experts", "combine")


def stage_lines(stages: Sequence[Row]) -> Iterator[str]:
    """The forward's stages, each on its own."""
    width = max([len(row["layer"]) for row in stages] + [5])
    yield "stages of the forward in us, each called alone (combine is also inside experts, fused)"
    yield f"{'layer':<{width}} {'T':>5} " + " ".join(f"{name:>9}" for name in STAGES) + "  routing / all"
    for row in stages:
        times = " ".join(f"{short(row[name]['median'] * 1e6):>9}" for name in STAGES)
        routing = sum(row[name]["median"] for name in STAGES[:3])
        marks = "" if all(row[name]["clean"] for name in STAGES) else "  ~"
        share = routing / (routing + row["experts"]["median"])
        yield f"{row['layer']:<{width}} {row['tokens']:>5} {times} {share:>14.1%}{marks}"
