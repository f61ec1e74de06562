"""The benchmark's bare products.  Nothing here asserts that anything is fast."""

import itertools
import re

import pairs
import pytest
from numoe import _core, bench
from numoe.__main__ import main
from numoe.bench import products
from numoe.bench.machine import Limits

SIZES = [(1, 1, 1), (3, 5, 7), (7, 64, 33), (64, 150, 205), (300, 33, 64)]
DTYPES = ["float32"] + ["bfloat16"] * pairs.USED


def probe(product, rows, depth, cols, matrices, dtype="float32"):
    return _core.ProductProbe(product, rows, depth, cols, matrices, dtype)


@pytest.mark.parametrize(("product", "sizes", "dtype"), [*itertools.product(products.PRODUCTS, SIZES, DTYPES)])
def test_no_product_beats_the_machine(product, sizes, dtype):
    """Whatever returns without computing would, even if the clock doubled between probe and product."""
    fastest = max(
        _core.probe_peak(vectors["name"], dtype if vectors["bfloat16_pairs"] else "float32", 1, 0.005)
        for vectors in _core.peak_probes()
        if vectors["supported"]
    )
    assert 0 < probe(product, *sizes, 3, dtype).rate(0.002) < 2 * fastest


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: probe("inner", 1, 1, 1, 1), "product='inner' is unknown; pass one of: packed, row-major"),
        (lambda: probe("packed", 0, 1, 1, 1), "must be >= 1, and together at most 2^30 numbers; got 0, 1"),
        (lambda: probe("outer", 1, 2**62, 2**62, 1), "must be >= 1, and together at most 2^30 numbers"),
        (lambda: probe("outer", 2**40, 1, 1, 1), "must be >= 1, and together at most 2^30 numbers"),
        (lambda: probe("outer", 1, 1, 1, 1, "int8"), "dtype must be 'float32', or 'bfloat16' where"),
        (lambda: probe("packed", 1, 1, 1, 1).rate(0.0), "seconds must be > 0"),
    ],
)
def test_the_probe_refuses_what_it_cannot_measure(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.usefixtures("small_probe")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("target", [_core.target(), "emulated-avx2"])
def test_a_run_shows_every_product_and_keeps_it(target, dtype, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(_core, "target", lambda: target)
    monkeypatch.setattr(products, "ROWS", (1, 40))
    monkeypatch.setattr(products, "_DEPTH", 48)
    monkeypatch.setattr(products, "_COLS", 32)
    monkeypatch.setattr(products, "_SLICE", 0.001)
    limits = Limits(peak=8.0, target_share=1.0, bandwidth=1.0)  # 2 operations for 4 bytes: 16 rows are as fast as both
    monkeypatch.setattr(products.Machine, "limits", lambda *_: limits)
    path = tmp_path / "run.json"
    options = ["--dtype", dtype, "--layers", "tiny", "--tokens", "1", "--passes", "forward", "--seconds", "0.003"]
    assert main(["bench", *options, "--products", "--json", str(path)]) == 0
    rows = bench.load_run(path)["products"]
    assert [row["rows"] for row in rows] == [1, 40]
    assert [row["bound"] for row in rows] == ["memory", "compute"]
    for row in rows:
        assert list(row["products"]) == [*products.PRODUCTS, products.IN_L1]
        assert all(0 < share["median"] <= share["best"] for share in row["products"].values())
    lines = capsys.readouterr().out.splitlines()
    shown = dtype if pairs.multiplies_pairs() else "float32"
    assert any(line.startswith(f"bare products, {shown}, one thread") for line in lines)
    start = next(i for i, line in enumerate(lines) if line.startswith("bare products"))
    assert len(lines[start:]) >= 1 + len(products.PRODUCTS) + 1 + 2 + len(rows)
