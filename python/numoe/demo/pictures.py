"""The two pictures: with matplotlib if it is there, otherwise the same numbers as plain coloured cells."""

from __future__ import annotations

import importlib.util
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

WHITE, BLUE = (255.0, 255.0, 255.0), (8.0, 48.0, 107.0)  # least and most, as in matplotlib's "Blues"


def have_matplotlib() -> bool:
    """Tell whether the extra ``numoe[plot]`` is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_specialists(path: Path, shares: Floats, kinds: Sequence[str], experts: Sequence[int]) -> None:
    """Heat map of who does what: shares (kinds, E) of each kind's choices, columns named by `experts`."""
    if not have_matplotlib():
        write_cells(path, shares)
        return
    from matplotlib.figure import Figure

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
    if not have_matplotlib():
        write_cells(path, np.stack(ordered))
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    experts = len(loads[0])
    for i, (label, history, load) in enumerate(zip(labels, histories, ordered, strict=True)):
        left.plot(np.arange(1, len(history) + 1), history, label=label, color=f"C{i}")
        right.bar(np.arange(experts) + 0.27 * (i - 1), 100 * load, width=0.27, label=label, color=f"C{i}")
    left.axhline(experts, color="0.6", linestyle=":")
    left.set(xlabel="training step", ylabel="effective experts, exp(entropy)", ylim=(0, 1.05 * experts))
    left.set_title(f"How many of the {experts} experts are in use")
    left.legend(title="balancing", loc="lower left")
    right.axhline(100 / experts, color="0.6", linestyle=":")
    right.set(xlabel="experts, busiest first", ylabel="% of all choices", xticks=[])
    right.set_title("Load on held-out text after training (dotted: even)")
    figure.savefig(path, dpi=130)


def write_cells(path: Path, matrix: Floats, cell: int = 40) -> None:
    """Write a PNG (RFC 2083) of a matrix: one square per entry, from white at 0 to blue at the largest."""
    shade = (matrix / max(float(matrix.max()), 1e-300))[..., None]
    colours = np.array(WHITE) + shade * (np.array(BLUE) - np.array(WHITE))
    pixels = np.repeat(np.repeat(colours.astype(np.uint8), cell, axis=0), cell, axis=1)
    height, width = pixels.shape[:2]
    lines = np.insert(pixels.reshape(height, -1), 0, 0, axis=1)  # every line starts with its filter type, 0 = none

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB, no interlace
    data = zlib.compress(lines.tobytes())
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
