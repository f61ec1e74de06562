"""The bare products that a layer consists of: how near the kernels alone come to the machine's limits.

What a layer reaches less is routing, gathering, activation and combination; what these reach less is the kernel's, the
caches', or somebody else's who uses the machine.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from numoe import _core
from numoe.bench.machine import DRAM_SIZE, Machine
from numoe.bench.report import Row

PRODUCTS = {
    "packed": "rows · panels of a packed matrix",
    "row-major": "rows · a matrix as NumPy has it",
    "transposed": "rows · its transpose: gradients of inputs",
    "outer": "rowsᵀ · rows, written to it: its gradient",
}
ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512)
_DEPTH, _COLS, _MATRICES = 2048, 1024, 32  # 256 MB: more than caches keep
_SLICE = 0.02  # seconds of one product before the next one has its turn


def print_products(seconds: float, result: Row) -> None:
    """Measures and prints them, line by line, on one thread; adds them to `result`."""
    machine = Machine("float32", 1)
    rows = result["products"] = []
    for line in heading():
        print(line, flush=True)
    for count in ROWS:
        rows.append(measure_products(machine, count, seconds))
        print(product_line(rows[-1]), flush=True)


def measure_products(machine: Machine, rows: int, seconds: float) -> Row:
    """Shares of the limit with `rows` rows, slice by slice, the limits probed before each slice."""
    probes = {name: _core.ProductProbe(name, rows, _DEPTH, _COLS, _MATRICES) for name in PRODUCTS}
    shares: dict[str, list[float]] = {name: [] for name in PRODUCTS}
    bounds = []
    for _ in range(max(3, round(seconds / _SLICE))):
        limits = machine.limits(DRAM_SIZE, _SLICE / 4)
        memory = limits.bandwidth * rows / 2  # 2 · rows operations for the 4 bytes of a number
        limit = min(limits.peak, memory)
        bounds.append(memory < limits.peak)
        for name, probe in probes.items():
            shares[name].append(probe.rate(_SLICE) / limit)
    return {
        "rows": rows,
        "bound": "memory" if np.mean(bounds) > 0.5 else "compute",
        "products": {
            name: {"median": float(np.median(values)), "best": float(np.quantile(values, 0.9))}
            for name, values in shares.items()
        },
    }


def heading() -> Iterator[str]:
    """What the lines show."""
    yield f"bare products, float32, one thread, matrices ({_DEPTH}, {_COLS}) from memory:"
    yield from (f"  {name:<10} {text}" for name, text in PRODUCTS.items())
    yield "share of the limit in %, median and in parentheses the best tenth; m memory-, c compute-bound"
    yield f"{'rows':>4}    " + " ".join(f"{name:>12}" for name in PRODUCTS)


def product_line(row: Row) -> str:
    """One number of rows."""
    entries = (f"{100 * p['median']:>6.0f} ({100 * p['best']:>3.0f})" for p in row["products"].values())
    return f"{row['rows']:>4} {row['bound'][0]}  " + " ".join(entries)
