"""What was measured, as text: aligned tables and sentences that follow the numbers, whichever way they point."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from numoe import metrics
from numoe.demo.data import Batch, Corpus, Ints
from numoe.demo.training import Result

Floats = npt.NDArray[np.float64]

SURE = 3.0  # standard errors that make a difference
COLLAPSED = 0.75  # of the experts in effective use: below this it is called a collapse


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Columns as wide as needed; those in `left` start left, the others end right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def text_table(corpus: Corpus) -> str:
    """How much text of each kind there is, and how it looks."""
    rows = [
        (kind, f"{len(train):,}", f"{len(held_out):,}", _glimpse(train.tobytes()))
        for kind, train, held_out in zip(corpus.kinds, corpus.train, corpus.held_out, strict=True)
    ]
    return table(("", "training", "held out", "looks like"), rows, left=(0, 3))


def _glimpse(text: bytes) -> str:
    middle = text[len(text) // 2 :]
    line = max(middle[:2000].splitlines(), key=lambda one: len(one.strip()[:50]))
    return line.decode(errors="replace").strip()[:50]


# ---------------------------------------------------------------------------------------------- prediction


def prediction_table(batch: Batch, kinds: Sequence[str], ngrams: Mapping[str, Floats], runs: Sequence[Result]) -> str:
    """Bits per byte of every predictor, in total and by kind, with size and speed of the trained ones."""

    def bits(values: Floats) -> list[str]:
        parts = [values[batch.kinds == k] for k in range(len(kinds))]
        return [f"{part.mean():.3f}" for part in (values, *parts)]

    rows = [(name, *bits(values), "", "", "", "") for name, values in ngrams.items()]
    for run in runs:
        total, active = run.trainer.model.num_params()
        speed = (f"{total:,}", f"{active:,}", f"{run.trainer.seconds:.1f}", f"{run.tokens_per_second:,.0f}")
        rows.append((run.recipe.label, *bits(run.bits), *speed))
    return table(("bits per byte", "all", *kinds, "parameters", "active", "seconds", "bytes/s"), rows)


def prediction_sentence(ngrams: Mapping[str, Floats], dense: Result, moe: Result) -> str:
    """Who won, by how much, and whether that is more than chance."""
    gain, error = difference(dense.bits, moe.bits)
    bigram = float(ngrams["bigram"].mean() - moe.bits.mean())
    against = f"{abs(bigram):.3f} bits per byte {'below' if bigram > 0 else 'ABOVE'} the bigram table"
    if abs(gain) < SURE * error:
        versus = f"no clear difference to the dense layer ({gain:+.3f} ± {error:.3f})"
    elif gain > 0:
        versus = f"{gain:.3f} ± {error:.3f} below the dense layer that does the same work per byte"
    else:
        versus = f"{-gain:.3f} ± {error:.3f} ABOVE the dense layer: here the mixture did not pay"
    return f"The mixture is {against}, and {versus}."


def difference(first: Floats, second: Floats) -> tuple[float, float]:
    """Mean of ``first - second`` over the same bytes and the standard error of that mean."""
    gap = first - second
    return float(gap.mean()), float(gap.std() / math.sqrt(gap.size))


# ---------------------------------------------------------------------------------------------- specialists


def kind_shares(result: Result, batch: Batch, num_kinds: int) -> Floats:
    """Share of each kind's choices that goes to each expert, (kinds, E)."""
    return np.stack(
        [metrics.load_fraction(result.chosen[batch.kinds == k], result.num_experts) for k in range(num_kinds)]
    )


def specialist_order(shares: Floats) -> Ints:
    """Experts grouped by their favourite kind, the most devoted first."""
    relative = shares / shares.sum(axis=0, keepdims=True).clip(1e-12)
    return np.lexsort((-relative.max(axis=0), relative.argmax(axis=0))).astype(np.int64)


def specialist_table(result: Result, batch: Batch, kinds: Sequence[str]) -> str:
    """Percent of each kind's choices by expert, and the bytes after which an expert is called unusually often."""
    shares = kind_shares(result, batch, len(kinds))
    load = result.load() / max(1, result.load().sum())
    rows = []
    for e in specialist_order(shares):
        cells = [f"{100 * share:.1f}" for share in (load[e], *shares[:, e])]
        favourite = kinds[int(shares[:, e].argmax())] if load[e] > 0 else "(idle)"
        rows.append((f"expert {e}", *cells, favourite, _called_after(result, batch, int(e))))
    return table(("% of choices", "all", *kinds, "most for", "called after"), rows, left=(0, 6, 7))


def _called_after(result: Result, batch: Batch, expert: int, how_many: int = 6) -> str:
    """Previous bytes that are most over-represented where `expert` is chosen: largest p ln(p / q)."""
    last = batch.contexts[:, -1]
    here = np.bincount(last[(result.chosen == expert).any(axis=1)], minlength=256) / 1.0
    p, q = here / max(1.0, here.sum()), np.bincount(last, minlength=256) / len(last)
    score = np.where(p > 0, p * np.log(np.maximum(p, 1e-12) / np.maximum(q, 1e-12)), 0.0)
    best = [b for b in np.argsort(-score)[:how_many] if score[b] > 0]
    return " ".join(_visible(int(b)) for b in best)


def _visible(byte: int) -> str:
    names = {32: "space", 10: "newline", 0: "start"}
    return names.get(byte) or (chr(byte) if 32 < byte < 127 else f"\\x{byte:02x}")


def specialist_sentence(shares: Floats, kinds: Sequence[str]) -> str:
    """The most one-sided expert, and how much the choice of an expert says about the kind of text."""
    even = 1 / shares.shape[1]
    k, e = (int(i) for i in np.unravel_index(np.argmax(shares), shares.shape))
    joint = shares / shares.sum()
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    known = float((joint * np.log2(np.where(joint > 0, joint / np.maximum(independent, 1e-300), 1))).sum())
    return (
        f"Expert {e} takes {100 * shares[k, e]:.1f} % of the choices made for {kinds[k]}, "
        f"{shares[k, e] / even:.1f} times an even share.  One choice of an expert tells {known:.2f} of the "
        f"{math.log2(len(kinds)):.2f} bits that name the kind of text; nobody told the router about kinds."
    )


# ------------------------------------------------------------------------------------------------- balance


def balance_table(runs: Sequence[Result]) -> str:
    """Load on held-out text for each way of balancing."""
    rows = []
    for run in runs:
        load = metrics.load_summary(run.load())
        use = (f"{load['effective_experts']:.1f}", f"{load['dead_experts']:.0f}")
        uneven = (f"{1 + load['max_violation']:.2f}", f"{load['cv']:.2f}")
        rows.append((run.recipe.label, *use, *uneven, f"{run.bits.mean():.3f}"))
    header = ("balancing", "effective experts", "never used", "busiest / even", "CV", "bits per byte")
    return table(header, rows)


def balance_sentence(none: Result, cures: Sequence[Result]) -> str:
    """Whether the unbalanced run collapsed, and what the best cure did to load and prediction."""
    experts = none.num_experts

    def effective(run: Result) -> float:
        return metrics.load_summary(run.load())["effective_experts"]

    before, best = effective(none), max(cures, key=effective)
    busiest = 1 + metrics.load_summary(none.load())["max_violation"]
    if before >= COLLAPSED * experts:
        start = f"Without balancing {before:.1f} of {experts} experts were in effective use: no collapse in this run"
    else:
        start = (
            f"Without balancing the router collapses onto {before:.1f} of {experts} experts, the busiest with "
            f"{busiest:.1f} times its share"
        )
    gain, error = difference(none.bits, best.bits)
    change = f"{abs(gain):.3f} ± {error:.3f} bits per byte {'better' if gain > 0 else 'WORSE'}"
    if abs(gain) < SURE * error:
        change = f"not measurably different ({gain:+.3f} ± {error:.3f} bits per byte)"
    return f"{start}; with “{best.recipe.label}” it is {effective(best):.1f}, and the prediction is {change}."


# ------------------------------------------------------------------------------------------------- numbers


def numbers(
    kinds: Sequence[str], batch: Batch, ngrams: Mapping[str, Floats], runs: Mapping[str, Result]
) -> dict[str, Any]:
    """Everything measured, for ``results.json``."""

    def by_kind(bits: Floats) -> dict[str, float]:
        return {"all": float(bits.mean())} | {
            kind: float(bits[batch.kinds == k].mean()) for k, kind in enumerate(kinds)
        }

    return {
        "bits_per_byte": {n: by_kind(b) for n, b in ngrams.items()} | {n: by_kind(r.bits) for n, r in runs.items()},
        "runs": {
            name: {
                "recipe": run.recipe.to_dict(),
                "seconds": run.trainer.seconds,
                "bytes_per_second": run.tokens_per_second,
                "training_bits": run.losses,
                "load": run.load().tolist(),
                "balance": metrics.load_summary(run.load()),
            }
            for name, run in runs.items()
        },
    }
