"""What is shown: the machine, and an aligned table that grows line by line."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

Row = dict[str, Any]  # one cell of a run, as in its JSON

PASS_NAMES = {"forward": "forward", "forward+backward": "fwd+bwd"}

LEGEND = """\
T tokens; rows = rows per hit expert; ms = median of many calls (min: the fastest); GF/s = useful arithmetic;
roof = shortest possible time in ms, c compute- or m memory-bound: max(flops / peak, bytes of hit experts /
bandwidth), both probed before, between and after the turns, the bandwidth on a buffer of the same size;
share = roof / ms; own = the same with the peak of the running target's vectors; x = times as long as numoe;
error = largest difference from float64 over the largest value, of y and of the gradients.
~ others used the CPUs meanwhile; % that limit moved by more than 15 % meanwhile; ! result is not float64's."""


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
    if machine["peers"]:
        yield ", ".join(f"{package} {version}" for package, version in machine["peers"].items())
    yield (
        f"{machine['platform']}, {machine['mhz']:.0f} MHz, governor {machine['governor']}, huge pages "
        f"{machine['huge_pages']}, load before {machine['load_before']}, {machine['date']}"
    )
    disturbed = "" if machine["probes_clean"] else "  ~ others used the CPUs meanwhile"
    if machine["peak_dtype"] != machine["dtype"]:
        yield f"no {machine['dtype']} products on this CPU: shares are of the float32 peak"
    yield f"{machine['peak_dtype']} peak in GFLOP/s on 1 / {n} threads: {_rates(machine['peaks'])}{disturbed}"
    yield f"read rate in GB/s on 1 / {n} threads: {_rates(machine['read'])}"


class Table:
    """The table of a run, layer by layer: a line per contender, below each other in every cell.

    Parameters
    ----------
    contenders : sequence of str
        The first one is what the others are compared with.
    """

    _TITLES = ("pass", "T", "routing", "rows", "who", "ms", "min", "GF/s", "roof", "share", "own", "x", "error")
    _LEFT = ("pass", "routing", "who")

    def __init__(self, contenders: Sequence[str]) -> None:
        self._main = contenders[0]
        self._widths = (8, 5, 9, 6, max(map(len, contenders)), 9, 9, 6, 10, 5, 5, 5, 6)

    def heading(self) -> str:
        """The titles of the columns."""
        return self._aligned(self._TITLES)

    def layer_lines(self, rows: Sequence[Row]) -> Iterator[str]:
        """All cells of one layer."""
        first = rows[0]
        sizes = f"E {first['num_experts']}, K {first['top_k']}, D {first['d_model']}, F {first['d_ff']}"
        shared = f", shared {first['shared_d_ff']}" if first["shared_d_ff"] else ""
        yield (
            f"{first['layer']}: {sizes}{shared}, {first['form']} {first['activation']}, {first['dtype']}, "
            f"{first['weight_bytes'] / 1e6:,.0f} MB"
        )
        for row in rows:
            cell = [PASS_NAMES[row["passes"]], str(row["tokens"]), row["routing"], short(row["rows_per_expert"], 3)]
            for name, result in row["contenders"].items():
                yield f"{self._aligned([*cell, name, *self._numbers(row, name)])} {flags(result)}".rstrip()
                cell = [""] * len(cell)

    def _numbers(self, row: Row, name: str) -> list[str]:
        result, main = row["contenders"][name], row["contenders"].get(self._main)
        ours = name in ("numoe", "packed")  # they alone run on the target's vectors
        return [
            short(result["median"] * 1e3),
            short(result["minimum"] * 1e3),
            short(row["flops"] / result["median"] / 1e9, 3),
            f"{short(result['roofline'] * 1e3)} {result['bound'][0]}",
            f"{result['share']:.0%}",
            f"{result['target_share']:.0%}" if ours else "",
            "" if main is None or name == self._main else short(result["median"] / main["median"], 3),
            f"{result['error']:.0e}",
        ]

    def _aligned(self, cells: Sequence[str]) -> str:
        return " ".join(
            f"{cell:<{width}}" if title in self._LEFT else f"{cell:>{width}}"
            for cell, width, title in zip(cells, self._widths, self._TITLES, strict=True)
        ).rstrip()


def flags(result: Row) -> str:
    """The marks of the legend that apply to a measurement."""
    marks = {"~": not result["clean"], "%": result["drifted"], "!": result["wrong"]}
    return "".join(mark for mark, applies in marks.items() if applies)


def overview_lines(cells: Sequence[Row]) -> Iterator[str]:
    """Shares of everybody in one table per pass: a line per layer and token count, of the first routing measured."""
    for passes in dict.fromkeys(cell["passes"] for cell in cells):
        lines: dict[Any, Row] = {}
        for cell in cells:
            if cell["passes"] == passes:
                lines.setdefault((cell["layer"], cell["tokens"]), cell)
        names = list(dict.fromkeys(name for cell in lines.values() for name in cell["contenders"]))
        if len(names) > 1 and len(lines) > 1:
            yield from _overview(passes, lines, names)


def _overview(passes: str, lines: Mapping[Any, Row], names: Sequence[str]) -> Iterator[str]:
    main, width = names[0], max(8, *(len(layer) for layer, _ in lines))

    def line(left: str, entry: Callable[[str], str]) -> str:
        entries = (f"{entry(name):>{max(6, len(name) + 1)}}" for name in names)
        return f"{left:<{width + 6}} {' '.join(entries)}".rstrip()

    yield f"share of the shortest possible time in %, {passes}; * the fastest of the line, ! wrong"
    yield line(f"{'layer':<{width}} {'T':>5}", lambda name: f"{name} ")
    for (layer, tokens), cell in lines.items():
        yield line(f"{layer:<{width}} {tokens:>5}", partial(_share, cell))
    yield line(f"x {main}, mean", lambda name: _mean_ratio(lines.values(), name, main))
    yield ""


def _share(cell: Row, name: str) -> str:
    result = cell["contenders"].get(name)
    if result is None:
        return "-"
    fastest = min(other["median"] for other in cell["contenders"].values() if not other["wrong"] or other is result)
    mark = "!" if result["wrong"] else "*" if result["median"] == fastest else " "
    return f"{100 * result['share']:.0f}{mark}"


def _mean_ratio(cells: Iterable[Row], name: str, main: str) -> str:
    """How many times as long as `main`: geometric mean over the cells that both have and that are right."""
    pairs = [(cell["contenders"].get(name), cell["contenders"].get(main)) for cell in cells]
    logs = [math.log(a["median"] / b["median"]) for a, b in pairs if a and b and not a["wrong"]]
    return f"{short(math.exp(sum(logs) / len(logs)), 3)} " if logs else "- "


STAGES = ("router", "top-k", "dispatch", "experts", "combine")


def stage_lines(stages: Sequence[Row]) -> Iterator[str]:
    """The forward's stages, each on its own."""
    if not stages:
        return
    width = max([len(row["layer"]) for row in stages] + [5])
    yield "stages of the forward in us, each called alone (combine is also inside experts, fused)"
    yield f"{'layer':<{width}} {'T':>5} " + " ".join(f"{name:>9}" for name in STAGES) + "  routing / all"
    for row in stages:
        times = " ".join(f"{short(row[name]['median'] * 1e6):>9}" for name in STAGES)
        routing = sum(row[name]["median"] for name in STAGES[:3])
        marks = "" if all(row[name]["clean"] for name in STAGES) else "  ~"
        share = routing / (routing + row["experts"]["median"])
        yield f"{row['layer']:<{width}} {row['tokens']:>5} {times} {share:>14.1%}{marks}"
    yield ""
