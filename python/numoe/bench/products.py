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
from numoe.info import multiplies_pairs

PRODUCTS = {
    "packed": "rows · panels of a packed matrix",
    "row-major": "rows · a matrix as NumPy has it",
    "transposed": "rows · its transpose: gradients of inputs",
    "outer": "rowsᵀ · rows, written to it: its gradient",
}
ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256, 512)
IN_L1 = "in L1"  # packed again, with a matrix that stays there: what the tile reaches with nothing to wait for
_DEPTH, _COLS, _MATRICES = 2048, 1024, 32  # 256 MB: more than caches keep
_BYTES_IN_L1, _COLS_IN_L1 = 16 << 10, 32
_SLICE = 0.02  # seconds of one product before the next one has its turn


def print_products(dtype: str, seconds: float, result: Row) -> None:
    """Measures and prints them, line by line, on one thread; adds them to `result`.

    Of bfloat16 numbers if the run is about them and the target multiplies them.
    """
    machine = Machine("bfloat16" if dtype == "bfloat16" and multiplies_pairs() else "float32", 1)
    rows = result["products"] = []
    for line in heading(machine.dtype):
        print(line, flush=True)
    for count in ROWS:
        rows.append(measure_products(machine, count, seconds))
        print(product_line(rows[-1]), flush=True)


def measure_products(machine: Machine, rows: int, seconds: float) -> Row:
    """Shares of the limit with `rows` rows, slice by slice, the limits probed before each slice."""
    probes = {name: _core.ProductProbe(name, rows, _DEPTH, _COLS, _MATRICES, machine.dtype) for name in PRODUCTS}
    probes[IN_L1] = _core.ProductProbe("packed", rows, depth_in_l1(machine.dtype), _COLS_IN_L1, 1, machine.dtype)
    shares: dict[str, list[float]] = {name: [] for name in probes}
    bounds = []
    for _ in range(max(3, round(seconds / _SLICE))):
        limits = machine.limits(DRAM_SIZE, _SLICE / 4)
        memory = {name: limits.bandwidth * 2 * rows / number_size(name, machine.dtype) for name in PRODUCTS}
        memory[IN_L1] = np.inf
        bounds.append(memory["packed"] < limits.peak)
        for name, probe in probes.items():
            shares[name].append(probe.rate(_SLICE) / min(limits.peak, memory[name]))
    return {
        "rows": rows,
        "bound": "memory" if np.mean(bounds) > 0.5 else "compute",
        "products": {
            name: {"median": float(np.median(values)), "best": float(np.quantile(values, 0.9))}
            for name, values in shares.items()
        },
    }


def number_size(product: str, dtype: str) -> int:
    """Bytes of one of the matrix's numbers, which takes part in 2 operations per row; gradients are float32."""
    return 2 if dtype == "bfloat16" and product != "outer" else 4


def depth_in_l1(dtype: str) -> int:
    """Rows of the matrix that stays there."""
    return _BYTES_IN_L1 // (_COLS_IN_L1 * number_size("packed", dtype))


def heading(dtype: str) -> Iterator[str]:
    """What the lines show."""
    yield f"bare products, {dtype}, one thread, matrices ({_DEPTH}, {_COLS}) from memory:"
    yield from (f"  {name:<10} {text}" for name, text in PRODUCTS.items())
    stays = f"packed, one matrix ({depth_in_l1(dtype)}, {_COLS_IN_L1}) that stays in the L1: share of the peak"
    yield f"  {IN_L1:<10} {stays}"
    yield "share of the limit in %, median and in parentheses the best tenth; m memory-, c compute-bound"
    yield f"{'rows':>4}    " + " ".join(f"{name:>12}" for name in (*PRODUCTS, IN_L1))


def product_line(row: Row) -> str:
    """One number of rows."""
    entries = (f"{100 * p['median']:>6.0f} ({100 * p['best']:>3.0f})" for p in row["products"].values())
    return f"{row['rows']:>4} {row['bound'][0]}  " + " ".join(entries)
