"""The benchmark's probes of the machine.  Nothing here asserts that anything is fast."""

import itertools
import platform
import re
import shutil
import subprocess

import numoe
import pytest
from numoe import _core
from numoe.bench import machine

SUPPORTED = [probe["name"] for probe in _core.peak_probes() if probe["supported"]]
DOTS = [probe["name"] for probe in _core.peak_probes() if probe["supported"] and probe["bfloat16_pairs"]]


def test_the_portable_probe_runs_everywhere_and_targets_have_theirs():
    assert SUPPORTED[-1:] == ["portable"]
    supported_targets = {target["name"] for target in _core.targets() if target["supported"]}
    assert supported_targets & set(SUPPORTED) == supported_targets
    with_dots = {target["name"] for target in _core.targets() if target["bfloat16_pairs"]}
    assert with_dots == {probe["name"] for probe in _core.peak_probes() if probe["bfloat16_pairs"]}


@pytest.mark.parametrize(
    ("vectors", "dtype"),
    [*itertools.product(SUPPORTED, ["float32", "float64"]), *((name, "bfloat16") for name in DOTS)],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_peaks_are_plausible(vectors, dtype, threads):
    rate = _core.probe_peak(vectors, dtype, threads, 0.005)
    assert 1e7 < rate < 1e13  # 64 lanes and two units at 6 GHz are 0.8 TFLOP/s per core


@pytest.mark.parametrize("size", [4096, 2**19, 2**22])
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_read_rates_are_plausible(size, threads):
    probe = _core.ReadProbe(2**22 - 5)
    assert probe.size == 2**22  # whole huge pages
    assert 1e6 < probe.rate(size, threads) < 1e14


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: _core.probe_peak("mmx", "float32", 1, 0.01), "vectors='mmx' is not what this CPU"),
        (lambda: _core.probe_peak("portable", "int8", 1, 0.01), "dtype must be 'float32' or 'float64', or 'bfloat16' "),
        (lambda: _core.probe_peak("portable", "bfloat16", 1, 0.01), "got 'bfloat16' for 'portable'"),
        (lambda: _core.probe_peak("portable", "float32", 0, 0.01), "threads must be in 1.."),
        (lambda: _core.probe_peak("portable", "float32", 1, float("nan")), "seconds must be > 0"),
        (lambda: _core.ReadProbe(0), "bytes must be in 1.."),
        (lambda: _core.ReadProbe(2**20).rate(2**30, 1), "bytes must be in 1..2097152"),
        (lambda: _core.ReadProbe(2**20).rate(64, -1), "threads must be in 1.."),
    ],
)
def test_probes_refuse_what_they_cannot_measure(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


ACCUMULATORS = {"avx512": 14, "avx2": 12, "portable": 13}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="reads x86 instructions")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump")
@pytest.mark.skipif(_core.build_info()["build_type"] == "Debug", reason="an unoptimised build spills everything")
@pytest.mark.parametrize(("vectors", "dtype"), [*itertools.product(ACCUMULATORS, ["f32", "f64"]), ("avx512", "bf16")])
def test_peak_loops_keep_their_accumulators_in_registers(vectors, dtype):
    """A compiler that spills one of them makes the probe read a third of the truth."""
    name = f"numoe_peak_{vectors}_{dtype}"
    command = ["objdump", "-d", "--no-show-raw-insn", f"--disassemble={name}", _core.__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    code = listing[listing.index(f"<{name}") :].splitlines()
    multiply = "v?f?n?mul[ps][sd]" if vectors == "portable" else "vfmadd[123]{3}p[sd]|vdpbf16ps"
    register = {"avx512": "zmm", "avx2": "ymm", "portable": "xmm"}[vectors]
    products = [line for line in code if re.search(multiply, line)]
    assert len(products) > 0
    assert len(products) % ACCUMULATORS[vectors] == 0
    assert all(register in line and "(" not in line for line in products)  # no memory operand
    assert not [line for line in code if re.search(r"[xyz]mm", line) and re.search(r"\(%r[sb]p", line)]


@pytest.mark.parametrize(("target", "own"), [("avx512_bf16", 4e9), ("avx512", 2e9)])
def test_bfloat16_is_held_against_dot_products_where_the_cpu_has_them(target, own, small_probe, monkeypatch):
    """Vectors without them are as fast as in float32: weights are widened."""
    probes = [{"name": name, "supported": True, "bfloat16_pairs": "bf16" in name} for name in ("avx512_bf16", "avx512")]
    rates = {("avx512_bf16", "bfloat16"): 4e9, ("avx512", "float32"): 2e9}
    monkeypatch.setattr(_core, "peak_probes", lambda: probes)
    monkeypatch.setattr(_core, "probe_peak", lambda vectors, dtype, threads, seconds: rates[vectors, dtype])
    monkeypatch.setattr(_core, "target", lambda: target)
    monkeypatch.setattr(_core, "targets", lambda: [{"name": target, "supported": True, "bfloat16_pairs": True}])
    limits = machine.Machine("bfloat16", 1)
    assert limits.peak_dtype == "bfloat16"
    assert (limits.peak, limits.target_peak) == (4e9, own)
    assert limits.limits(4096, 0.01).peak == 4e9


def test_blas_threads_can_be_set_or_are_unknown():
    try:
        assert machine.set_blas_threads(1) in (1, None)
    finally:
        machine.set_blas_threads(numoe.num_threads())


def test_available_memory_is_positive():
    assert machine.available_memory() > 2**20
