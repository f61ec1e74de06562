"""The two pictures of the demo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]


def draw_specialists(path: Path, shares: Floats, kinds: Sequence[str], experts: Sequence[int]) -> None:
    """Heat map of who does what: shares (kinds, E) of each kind's choices, columns named by `experts`."""
    figure = Figure(figsize=(1.6 + 0.62 * len(experts), 1.5 + 0.62 * len(kinds)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(100 * shares, cmap="Blues", vmin=0, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        dark = share > 0.6 * shares.max()
        axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color="w" if dark else "k")
    axes.set_xticks(range(len(experts)), [str(e) for e in experts])
    axes.set_yticks(range(len(kinds)), list(kinds))
    axes.set_xlabel("expert")
    axes.set_title(f"Where each kind of text is sent: % of its choices (even: {100 / len(experts):.1f})")
    figure.colorbar(image, ax=axes, label="%", fraction=0.03)
    figure.savefig(path, dpi=150)


def draw_balance(path: Path, labels: Sequence[str], histories: Sequence[Floats], loads: Sequence[Floats]) -> None:
    """Effective experts over the steps, (steps,) each, and the final load shares from busiest to idlest, (E,) each."""
    ordered = [np.sort(load)[::-1] for load in loads]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    experts = len(loads[0])
    for i, (label, history, load) in enumerate(zip(labels, histories, ordered, strict=True)):
        left.plot(np.arange(1, len(history) + 1), history, label=label, color=f"C{i}")
        right.bar(np.arange(experts) + 0.27 * (i - 1), 100 * load, width=0.27, label=label, color=f"C{i}")
    left.axhline(experts, color="0.6", linestyle=":")
    left.set(xlabel="training step", ylabel="effective experts, exp(entropy)", ylim=(0, 1.05 * experts))
    left.set_title(f"How many of the {experts} experts are in use")
    right.legend(title="balancing")
    right.axhline(100 / experts, color="0.6", linestyle=":")
    right.set(xlabel="experts, busiest first", ylabel="% of all choices", xticks=[])
    right.set_title("Load on held-out text after training (dotted: even)")
    figure.savefig(path, dpi=130)
