"""Two runs side by side: what became faster or slower, beyond the noise."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from numoe.bench.report import PASS_NAMES, Row, short

_KEY = ("layer", "dtype", "tokens", "passes", "routing", "threads")
_SMALLEST_CHANGE = 0.05


def _results(run: Row) -> dict[tuple[Any, ...], Row]:
    """(cell, contender) → its numbers."""
    return {
        (*(cell[part] for part in _KEY), name): result
        for cell in run["cells"]
        for name, result in cell["contenders"].items()
    }


def compare(before: Row, after: Row) -> list[Row]:
    """Every measurement that both runs have, with the ratio of times (above 1: slower) and a verdict.

    "faster" and "slower" are said only if the time *and* the share of the roofline moved beyond the noise -
    the larger interquartile range of the two, at least 5 % - so that a phase of slow memory is not taken for
    a slower program.  A measurement that others disturbed gets "?".
    """
    old, new = _results(before), _results(after)
    rows = []
    for key in (key for key in old if key in new):
        a, b = old[key], new[key]
        time, share = b["median"] / a["median"], a["share"] / b["share"]
        limit = 1 + max(_SMALLEST_CHANGE, a["spread"], b["spread"])
        verdict = "slower" if min(time, share) > limit else "faster" if max(time, share) < 1 / limit else "same"
        rows.append(
            {
                **dict(zip((*_KEY, "contender"), key, strict=True)),
                "before": a["median"],
                "after": b["median"],
                "ratio": time,
                "share_before": a["share"],
                "share_after": b["share"],
                "verdict": verdict if a["clean"] and b["clean"] else "?",
            }
        )
    return rows


def comparison_lines(before: Row, after: Row) -> Iterator[str]:
    """The comparison as a table with a summary."""
    for name in ("cpu", "target", "threads", "numoe", "numpy", "blas"):
        a, b = before["machine"][name], after["machine"][name]
        if a != b:
            yield f"note: {name} differs: {a} / {b}"
    rows = compare(before, after)
    width = max([len(row["layer"]) for row in rows] + [5])
    yield (
        f"{'layer':<{width}} {'dtype':<8} {'pass':<8} {'T':>5} {'routing':<9} {'who':<13} {'before ms':>10} "
        f"{'after ms':>10} {'ratio':>6} {'share':>13}"
    )
    for row in rows:
        shares = f"{row['share_before']:.0%} > {row['share_after']:.0%}"
        verdict = "" if row["verdict"] == "same" else row["verdict"]
        line = (
            f"{row['layer']:<{width}} {row['dtype']:<8} {PASS_NAMES[row['passes']]:<8} {row['tokens']:>5} "
            f"{row['routing']:<9} {row['contender']:<13} {short(row['before'] * 1e3):>10} "
            f"{short(row['after'] * 1e3):>10} {row['ratio']:>6.2f} {shares:>13} {verdict}"
        )
        yield line.rstrip()
    yield summary_line(before, after, rows)


def summary_line(before: Row, after: Row, rows: Sequence[Row]) -> str:
    """How many of each verdict, the mean ratio, and what could not be compared."""
    counts = {name: sum(row["verdict"] == name for row in rows) for name in ("faster", "slower", "same", "?")}
    alone = len(_results(before)) + len(_results(after)) - 2 * len(rows)
    mean = math.exp(sum(math.log(row["ratio"]) for row in rows) / len(rows)) if rows else 1.0
    return (
        f"{len(rows)} compared: {counts['faster']} faster, {counts['slower']} slower, "
        f"{counts['same']} within noise, {counts['?']} disturbed (?); "
        f"ratio of times, after / before, geometric mean {mean:.3f}; "
        f"{alone} in one file only"
    )
