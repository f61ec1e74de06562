"""The benchmark's arithmetic, its probes, its files.  Nothing here asserts that anything is fast."""

import argparse
import dataclasses
import itertools
import json
import platform
import re
import shutil
import subprocess
import sys
import time

import numoe
import numpy as np
import pytest
from numoe import _core, bench
from numoe.__main__ import main
from numoe.bench import accuracy, compare, contenders, machine, report, scaling, suite, timing, workloads
from numoe.bench.accuracy import error_against_reference
from numoe.bench.contenders import Task
from numoe.bench.machine import Limits
from numoe.bench.workloads import LAYERS, Cost, cost, make_routings, parse_layer, roofline

TINY = parse_layer("8x2x16x32")
SUPPORTED = [probe["name"] for probe in _core.peak_probes() if probe["supported"]]
DOTS = [probe["name"] for probe in _core.peak_probes() if probe["supported"] and probe["bfloat16_dots"]]


def settings(*arguments):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.settings_of(parser.parse_args(arguments))


# ── options ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_default_run_reduces_the_large_layers_and_no_others():
    layers = {shape.name: shape for shape in settings().layers}
    assert list(layers) == ["tiny", "small", "switch-base-8", "qwen3-30b-a3b/2", "deepseek-v2-lite/2"]
    assert (layers["qwen3-30b-a3b/2"].d_model, layers["qwen3-30b-a3b/2"].d_ff) == (1024, 384)
    assert layers["deepseek-v2-lite/2"].shared_d_ff == 1408
    assert settings("--layers", "8x2x4096x14336").layers[0].d_model == 4096  # what was asked for is measured


def test_full_and_quick_runs():
    full = settings("--full")
    assert full.layers == tuple(LAYERS.values())
    assert full.tokens == (1, 4, 16, 64, 256, 1024, 4096)
    quick = settings("--quick", "--threads", "1", "--dtype", "float64")
    assert [shape.name for shape in quick.layers] == ["tiny", "small"]
    assert (quick.threads, quick.dtype) == (1, "float64")
    assert settings().threads == numoe.num_threads()


def test_cells_show_every_routing_once_and_one_token_only_once():
    def routings(run, tokens, passes):
        return [c.routing for c in run.cells() if (c.tokens, c.passes) == (tokens, passes)]

    run = settings("--layers", "tiny", "--tokens", "1", "16")
    assert routings(run, 16, "forward") == ["uniform", "balanced", "zipf", "one"]
    assert routings(run, 16, "forward+backward") == routings(run, 1, "forward") == ["uniform"]
    chosen = settings("--layers", "tiny", "--tokens", "1", "16", "--routing", "zipf", "one")
    assert routings(chosen, 16, "forward+backward") == ["zipf", "one"]
    assert routings(chosen, 1, "forward") == ["zipf"]
    assert len(settings("--layers", "tiny", "tiny", "--tokens", "4", "4", "--passes", "forward").cells()) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "qwen"], "layer 'qwen' is unknown; give one of tiny, small"),
        (["--layers", "2x4x8x8"], "top_k = 4 must be <= num_experts = 2"),
        (["--tokens", "0"], "'0' must be a whole number >= 1"),
        (["--threads", "two"], "'two' must be a whole number >= 1"),
        (["--seconds", "nan"], "must be a number of seconds > 0"),
        (["--peers", "tensorflow"], "peer 'tensorflow' is unknown; give some of torch-loop"),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
        (["--quick", "--full"], "not allowed with"),
    ],
)
def test_wrong_options_are_explained(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["bench", *arguments])
    assert message in capsys.readouterr().err


def test_files_that_cannot_be_used_are_named_before_anything_is_measured(tmp_path, capsys):
    assert main(["bench", "--json", str(tmp_path / "missing" / "a.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").write_text("numbers")
    for name, message in (("a", "was not written by"), ("b", "is not JSON"), ("c", "No such file")):
        assert main(["bench", "--compare", str(tmp_path / f"{name}.json"), str(tmp_path / "a.json")]) == 2
        assert message in capsys.readouterr().err


# ── roofline ────────────────────────────────────────────────────────────────────────────────────────────────


def hits(*experts):
    indices = np.array([experts], np.int32)  # one token, K = len(experts)
    return [(indices, np.ones(indices.shape))]


def test_one_token_of_the_tiny_layer_is_memory_bound():
    # 2 experts * 3 matrices * 256 * 512 * 4 bytes = 3,145,728; x and y: 2 * 256 * 4 = 2,048
    # 2 * 3,145,728 / 4 = 1,572,864 operations;  3,147,776 bytes / 35 GB/s = 89.9 us
    work = cost(LAYERS["tiny"], hits(0, 1), 4, backward=False)
    assert (work.flops, work.bytes, work.experts_hit) == (1_572_864, 3_147_776, 2)
    assert work.working_set == work.bytes  # one routing only
    seconds, bound = roofline(work, 234e9, 35e9)
    assert bound == "memory"
    assert seconds == pytest.approx(89.936e-6, rel=1e-4)


def test_many_tokens_of_qwen3_are_compute_bound():
    # 1024 tokens * 8 * 3 * 2048 * 768 * 2 = 77.309 GFLOP;  / 234 GFLOP/s = 330.4 ms
    # bytes 4 * (128 * 4,718,592 + 2 * 1024 * 2048) = 2.4327 GB;  / 35 GB/s = 69.5 ms
    shape = LAYERS["qwen3-30b-a3b"]
    work = cost(shape, make_routings("balanced", 1024, shape, "float32"), 4, backward=False)
    assert work.flops == 77_309_411_328
    assert work.bytes == 4 * (128 * 4_718_592 + 2 * 1024 * 2048)
    seconds, bound = roofline(work, 234e9, 35e9)
    assert (bound, seconds) == ("compute", pytest.approx(0.33038, rel=1e-4))


def test_a_backward_triples_the_work_and_reads_twice_writes_once():
    forward = cost(LAYERS["small"], hits(0, 5), 8, backward=False)
    both = cost(LAYERS["small"], hits(0, 5), 8, backward=True)
    weights, rows = 8 * 2 * 3 * 512 * 1024, 8 * 2 * 512
    assert both.flops == 3 * forward.flops
    assert forward.bytes == weights + rows
    assert both.bytes == 3 * weights + 2 * rows
    assert both.working_set == 2 * weights + 2 * rows  # the matrices and their gradients


def test_the_shared_expert_counts_for_every_token():
    # 6 routed of 2048 x 1408 and 2816 shared: 2 * 3 * 2048 * (6 * 1408 + 2816) = 138.4 MFLOP per token
    work = cost(LAYERS["deepseek-v2-lite"], hits(0, 1, 2, 3, 4, 5), 4, backward=False)
    assert work.flops == 138_412_032
    assert work.bytes == 4 * (3 * 2048 * (6 * 1408 + 2816) + 2 * 2048)


def test_a_plain_mlp_has_two_matrices():
    work = cost(LAYERS["switch-base-8"], hits(3), 4, backward=False)
    assert work.flops == 2 * 2 * 768 * 3072  # 9.437 MFLOP per token


def test_the_working_set_is_what_all_routings_touch_together():
    work = cost(LAYERS["tiny"], hits(0, 1) + hits(1, 2), 4, backward=False)
    assert work.experts_hit == 2
    assert work.working_set == 4 * (3 * 3 * 256 * 512 + 2 * 256)  # experts 0, 1 and 2


# ── routings ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", workloads.ROUTINGS)
@pytest.mark.parametrize("tokens", [1, 33])
def test_routings_are_valid_and_rotate(kind, tokens):
    shape = LAYERS["small"]
    routings = make_routings(kind, tokens, shape, "float32")
    assert len(routings) >= 8  # fewer stay in the L3 cache
    for indices, weights in routings:
        assert (indices.dtype, weights.dtype, indices.shape) == (np.int32, np.float32, (tokens, 2))
        assert ((indices >= 0) & (indices < 16)).all()
        assert (indices[:, 0] != indices[:, 1]).all()
        assert (weights > 0).all()
        np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    assert len({indices.tobytes() for indices, _ in routings}) > 4
    again = make_routings(kind, tokens, shape, "float32")
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(routings, again, strict=True))


def test_routings_have_the_load_they_are_named_after():
    def loads(kind):
        return [
            np.sort(np.bincount(i.ravel(), minlength=16)) for i, _ in make_routings(kind, 512, LAYERS["small"], "f8")
        ]

    assert all(load.min() == load.max() == 64 for load in loads("balanced"))
    assert all(load.tolist() == [0] * 14 + [512] * 2 for load in loads("one"))
    assert all(load.min() > 30 and load.max() < 110 for load in loads("uniform"))  # 64 ± 7.5
    # weights 1/r over H_16 = 3.38: the first of two draws falls on the favourite with probability 0.30
    assert all(200 < load.max() < 320 and load.min() < 40 for load in loads("zipf"))


# ── contenders ──────────────────────────────────────────────────────────────────────────────────────────────

SHAPES = {
    "glu": TINY,
    "relu": dataclasses.replace(TINY, form="mlp", activation="relu", top_k=1),
    "bias": dataclasses.replace(TINY, bias=True),
    "mlp-bias-gelu": dataclasses.replace(TINY, form="mlp", activation="gelu", bias=True),
    "shared": dataclasses.replace(TINY, shared_d_ff=24),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", contenders.CONTENDERS)
def test_contenders_agree_with_the_reference(name, shape, rng):
    layer = numoe.MoELayer(config=shape.config("float64"), rng=0)
    for value in layer.params.values():
        value[...] = rng.standard_normal(value.shape) / 4
    runner = contenders.CONTENDERS[name](Task(layer=layer, dtype="float64"))
    x, dy = rng.standard_normal((2, 5, 16))
    for kind in ("uniform", "one"):
        indices, weights = make_routings(kind, 5, shape, "float64")[3]
        for gradient in (None,) if name == "packed" else (None, dy):
            assert error_against_reference(runner, layer, x, indices, weights, gradient) < 1e-12


def test_a_wrong_contender_is_noticed(rng):
    class Wrong(contenders.NumpyLoop):
        def forward(self, x, indices, weights):
            return super().forward(x, indices, weights) * 1.01

        def forward_backward(self, x, indices, weights, dy):
            step = super().forward_backward(x, indices, weights, dy)
            step.dparams()["w_down"][indices[0, 0]] = np.nan
            return step

    layer = numoe.MoELayer(config=TINY.config("float32"), rng=0)
    x, dy = rng.standard_normal((2, 5, 16)).astype(np.float32)
    indices, weights = make_routings("uniform", 5, TINY, "float32")[0]
    wrong = Wrong(Task(layer=layer))
    assert error_against_reference(wrong, layer, x, indices, weights) == pytest.approx(0.01, rel=1e-3)
    assert error_against_reference(wrong, layer, x, indices, weights, dy) == np.inf


def test_some_rows_of_a_large_call_are_checked(rng):
    class WrongAtTheEnd(contenders.NumpyLoop):
        def forward(self, x, indices, weights):
            y = super().forward(x, indices, weights)
            y[len(y) // 2 :] = 0
            return y

    layer = numoe.MoELayer(config=TINY.config("float32"), rng=0)
    x, dy = rng.standard_normal((2, 100, 16)).astype(np.float32)
    indices, weights = make_routings("uniform", 100, TINY, "float32")[0]
    wanted = accuracy.sample(layer, x, indices, weights, dy, 3)
    assert wanted.tokens.tolist() == [0, 49, 99]
    numpy, wrong = contenders.NumpyLoop(Task(layer=layer)), WrongAtTheEnd(Task(layer=layer))
    assert accuracy.error_of_sample(numpy, wanted, x, indices, weights, dy) < 1e-5
    assert accuracy.error_of_sample(numpy, wanted, x, indices, weights) < 1e-5
    assert accuracy.error_of_sample(wrong, wanted, x, indices, weights) > 0.1


def test_as_many_tokens_are_checked_as_fit():
    assert accuracy.checked_tokens(LAYERS["tiny"]) == 8
    assert accuracy.checked_tokens(LAYERS["tiny"], 3) == 3
    assert accuracy.checked_tokens(LAYERS["mixtral-8x7b"]) == 1  # 2 experts in float64: 2.8 GB


# ── time ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_window_is_clean_if_the_cpus_were_ours():
    def usage(**changes):
        return dataclasses.replace(timing.Usage(wall=1.0, own=2.0, others=0.0), **changes)

    assert usage().clean(threads=2)
    assert usage(own=1.9).clean(threads=1)
    assert not usage(own=1.9).clean(threads=2)  # below 96 % of 2 CPUs
    assert usage(others=0.16).clean()  # 0.15 cores and two clock ticks
    assert not usage(others=0.18).clean()
    assert usage(own=1.5).cores == 1.5


def test_a_stopwatch_counts_own_cpu_time():
    watch = timing.Stopwatch()
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass
    usage = watch.usage()
    assert 0.05 <= usage.own <= 1
    assert usage.wall >= 0.04
    assert usage.others >= 0


def test_measuring_counts_every_call_once():
    seen = []
    result = timing.measure(seen.append, seconds=0.02)
    assert seen == list(range(len(seen)))
    assert 3 <= result.calls < len(seen)  # the first ones warm up
    assert 0 < result.minimum <= result.median
    assert result.spread >= 0


def test_a_slow_call_is_measured_a_few_times_only():
    seen = []

    def slow(i):
        seen.append(i)
        time.sleep(0.03)

    result = timing.measure(slow, seconds=0.01)
    assert len(seen) <= 10
    assert result.minimum >= 0.03
    assert not result.clean  # asleep: the CPU was not ours


def test_a_very_slow_call_is_measured_once():
    seen = []

    def very_slow(i):
        seen.append(i)
        time.sleep(0.1)

    result = timing.measure(very_slow, seconds=0.001)
    assert (len(seen), result.calls) == (2, 1)  # the first one warms up


def test_medians_and_spreads_by_hand():
    window = ([], timing.Usage(wall=2.0, own=3.0, others=0.0))
    result = timing.summary([4.0, 1.0, 2.0, 3.0, 5.0], [window], clean=True)  # quartiles 2 and 4
    assert result == timing.Timing(median=3.0, minimum=1.0, spread=2 / 3, calls=5, clean=True, cores=1.5)


# ── probes ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_portable_probe_runs_everywhere_and_targets_have_theirs():
    assert SUPPORTED[-1:] == ["portable"]
    supported_targets = {target["name"] for target in _core.targets() if target["supported"]}
    assert supported_targets & set(SUPPORTED) == supported_targets
    with_dots = {target["name"] for target in _core.targets() if target["bfloat16_dots"]}
    assert with_dots == {probe["name"] for probe in _core.peak_probes() if probe["bfloat16_dots"]}


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
    probes = [{"name": name, "supported": True, "bfloat16_dots": "bf16" in name} for name in ("avx512_bf16", "avx512")]
    rates = {("avx512_bf16", "bfloat16"): 4e9, ("avx512", "float32"): 2e9}
    monkeypatch.setattr(_core, "peak_probes", lambda: probes)
    monkeypatch.setattr(_core, "probe_peak", lambda vectors, dtype, threads, seconds: rates[vectors, dtype])
    monkeypatch.setattr(_core, "target", lambda: target)
    monkeypatch.setattr(_core, "targets", lambda: [{"name": target, "supported": True, "bfloat16_dots": True}])
    limits = machine.Machine("bfloat16", 1)
    assert limits.peak_dtype == "bfloat16"
    assert (limits.peak, limits.target_peak) == (4e9, own)
    assert limits.limits(4096, 0.01).peak == 4e9


def test_blas_threads_can_be_set_or_are_unknown():
    try:
        assert machine.set_blas_threads(1) in (1, None)
    finally:
        machine.set_blas_threads(numoe.num_threads())


# ── files and tables ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def small_probe(monkeypatch):
    """A run reads 512 MB, insists on an undisturbed peak and waits for other threads; tests need none of it."""
    monkeypatch.setattr(suite, "settle", lambda: None)
    monkeypatch.setattr(scaling, "settle", lambda: None)
    monkeypatch.setattr(machine, "DRAM_SIZE", 2**24)
    monkeypatch.setattr(machine, "_ATTEMPTS", 1)


@pytest.mark.usefixtures("small_probe")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_run_prints_an_aligned_table_and_writes_what_it_measured(dtype, tmp_path, capsys):
    path, threads = tmp_path / "run.json", numoe.num_threads()
    command = ["bench", "--quick", "--layers", "8x2x16x32", "--tokens", "1", "8", "--threads", "1", "--dtype", dtype]
    assert main([*command, "--seconds", "0.01", "--json", str(path)]) == 0
    assert numoe.num_threads() == threads
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("pass "))
    table = [line for line in lines[start:] if line.startswith(("pass ", "forward ", "fwd+bwd "))]
    assert len(table) == 1 + 7  # forward: T=1, T=8 four routings; forward+backward: T=1, T=8
    lines = [line for line in lines if re.search(r" (numoe|packed|numpy) +\d", line)]
    assert len(lines) == 5 * 3 + 2 * 2  # a line each; packed layers have no backward
    end = table[0].index(" ms") + 3  # right-aligned: every time ends below the end of its title
    assert all(re.search(r"\d$", line[:end]) and line[end] == " " for line in lines)
    assert "no packed in forward+backward: it has no backward" in printed.out
    assert "8x2x16x32: E 8, K 2, D 16, F 32" in printed.out
    assert "bench" not in printed.err  # the bar only
    run = bench.load_run(path)
    assert run == json.loads(json.dumps(run))
    assert run["machine"]["threads"] == run["cells"][0]["threads"] == 1
    assert {cell["dtype"] for cell in run["cells"]} == {dtype}
    for cell in run["cells"]:
        for result in cell["contenders"].values():
            assert result["roofline"] == pytest.approx(
                max(cell["flops"] / np.mean(result["peak"]), cell["bytes"] / np.mean(result["bandwidth"]))
            )
            assert result["share"] == pytest.approx(result["roofline"] / result["median"])
            assert result["error"] < 1e-5
            assert not result["wrong"]
    assert [(row["layer"], row["tokens"]) for row in run["stages"]] == [("8x2x16x32", 1), ("8x2x16x32", 8)]


@pytest.mark.usefixtures("small_probe")
def test_contenders_that_cannot_run_or_are_wrong_are_shown(monkeypatch, capsys):
    def absent(task):
        raise contenders.ContenderUnavailableError("package 'other' is not installed")

    class Wrong(contenders.NumpyLoop):
        def forward(self, x, indices, weights):
            return 2 * super().forward(x, indices, weights)

    monkeypatch.setitem(contenders.CONTENDERS, "other", absent)
    monkeypatch.setitem(contenders.CONTENDERS, "wrong", Wrong)
    options = ["--layers", "8x2x16x32", "--tokens", "4", "--passes", "forward", "--routing", "uniform"]
    assert main(["bench", "--quick", "--seconds", "0.01", *options]) == 0
    printed = capsys.readouterr().out
    assert "no other: package 'other' is not installed" in printed
    assert not re.search(r"^ +other ", printed, re.MULTILINE)
    assert re.search(r"^ +wrong .* 1e\+00 ~?%?!$", printed, re.MULTILINE)


@pytest.mark.usefixtures("small_probe")
def test_a_layer_that_does_not_fit_is_left_out_with_a_line(monkeypatch, capsys):
    monkeypatch.setattr(suite, "available_memory", lambda: 1e9)
    assert main(["bench", "--quick", "--layers", "64x2x4096x4096", "--tokens", "1"]) == 0
    # 64 * 3 * 4096² * 4 bytes = 12.9 GB; 2 checked tokens' 4 experts in float64: 1.6 GB; both again for gradients;
    # the probe: 0.27 GB
    assert "64x2x4096x4096: left out, 28.3 GB of memory are missing" in capsys.readouterr().out


def test_available_memory_is_positive():
    assert machine.available_memory() > 2**20


def cell(median, share=0.5, *, clean=True, spread=0.01, tokens=1, **others):
    def result(seconds):
        return {
            "median": seconds,
            "minimum": seconds,
            "share": share,
            "clean": clean,
            "spread": spread,
            "drifted": False,
            "wrong": False,
        }

    return {
        "layer": "tiny",
        "dtype": "float32",
        "tokens": tokens,
        "passes": "forward",
        "routing": "uniform",
        "threads": 2,
        "contenders": {"numoe": result(median), **{name: result(value) for name, value in others.items()}},
    }


def of_run(*cells):
    facts = dict.fromkeys(("cpu", "target", "threads", "numoe", "numpy", "blas"), "x")
    return {"format": suite.FORMAT, "machine": facts, "cells": list(cells)}


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (cell(1.0, 0.5), cell(1.2, 0.5 / 1.2), "slower"),
        (cell(1.0, 0.5), cell(0.8, 0.5 / 0.8), "faster"),
        (cell(1.0, 0.5), cell(1.04, 0.5 / 1.04), "same"),  # below 5 %
        (cell(1.0, 0.5), cell(1.2, 0.5 / 1.2, spread=0.3), "same"),  # below the spread
        (cell(1.0, 0.5), cell(0.5, 0.5), "same"),  # twice as fast on memory that was twice as fast
        (cell(1.0, 0.5), cell(2.0, 0.5 / 2, clean=False), "?"),
    ],
)
def test_verdicts(before, after, verdict):
    (row,) = compare.compare(of_run(before), of_run(after))
    assert row["verdict"] == verdict
    assert row["ratio"] == after["contenders"]["numoe"]["median"]


def test_the_comparison_counts_what_both_files_have():
    before = of_run(cell(1.0, numpy=2.0), cell(1.0, tokens=4))
    after = of_run(cell(4.0, 0.125, other=1.0), cell(1.0, tokens=4), cell(1.0, tokens=16))
    after["machine"] = {**after["machine"], "cpu": "y"}
    lines = list(compare.comparison_lines(before, after))
    assert lines[0] == "note: cpu differs: x / y"
    assert "slower" in next(line for line in lines if line.startswith("tiny") and " 4.00 " in line)
    # in common: numoe at T = 1 (4x) and T = 4 (1x), geometric mean 2; alone: numpy, other, numoe at T = 16
    assert lines[-1].startswith("2 compared: 0 faster, 1 slower, 1 within noise, 0 disturbed")
    assert lines[-1].endswith("geometric mean 2.000; 3 in one file only")


def test_a_run_compared_with_itself_is_the_same(tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(of_run(cell(1.0), cell(2.0, tokens=4))))
    assert main(["bench", "--compare", str(path), str(path)]) == 0
    assert "2 compared: 0 faster, 0 slower, 2 within noise" in capsys.readouterr().out


def test_an_interrupted_run_keeps_its_cells(monkeypatch, tmp_path, capsys):
    def interrupted(_settings, result):
        result |= of_run(cell(1.0))
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run_bench", interrupted)
    path = tmp_path / "run.json"
    assert main(["bench", "--json", str(path)]) == 130
    assert len(bench.load_run(path)["cells"]) == 1
    assert "interrupted" in capsys.readouterr().err


def test_flags():
    result = cell(1.0)["contenders"]["numoe"]
    assert report.flags(result) == ""
    assert report.flags({**result, "clean": False, "drifted": True}) == "~%"
    assert report.flags({**result, "wrong": True}) == "!"


def test_the_overview_shows_who_was_fastest_and_who_is_wrong():
    cells = [cell(2.0, 0.4, numpy=1.0, other=4.0), cell(3.0, 0.2, numpy=12.0, tokens=16)]
    cells[1]["contenders"]["cheat"] = {**cells[1]["contenders"]["numpy"], "median": 0.1, "wrong": True}
    title, heading, one, many, mean, end = report.overview_lines(cells)
    assert "forward;" in title
    assert heading.split() == ["layer", "T", "numoe", "numpy", "other", "cheat"]
    assert one.split() == ["tiny", "1", "40", "40*", "40", "-"]
    assert many.split() == ["tiny", "16", "20*", "20", "-", "20!"]
    assert mean.split() == ["x", "numoe,", "mean", "1.00", "1.41", "2.00", "-"]  # √(0.5 * 4)
    assert end == ""


def test_the_command_shows_its_help():
    command = [sys.executable, "-m", "numoe", "bench", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(option in text for option in ("--layers", "--quick", "--full", "--json", "--compare"))


@pytest.mark.usefixtures("small_probe")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scaling_is_relative_to_the_first(dtype, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scaling, "EXPERTS", (8, 16))
    monkeypatch.setattr(scaling, "_TOKENS", 16)
    path = tmp_path / "run.json"
    options = ["--layers", "8x2x32x32", "--tokens", "1", "--passes", "forward", "--seconds", "0.01", "--dtype", dtype]
    assert main(["bench", "--quick", *options, "--threads", "2", "--scaling", "--json", str(path)]) == 0
    assert "  packed  8: 1.00  16: " in capsys.readouterr().out
    kinds = bench.load_run(path)["scaling"]
    for kind, key in (("experts", "per_token"), ("threads", "median"), ("routing", "median")):
        mine = [row for row in kinds[kind] if row["contender"] == "packed"]
        assert [row["relative"] for row in mine] == [row[key] / mine[0][key] for row in mine]
    assert [row["threads"] for row in kinds["threads"] if row["contender"] == "packed"] == [1, 2]


def test_judging_a_timing_by_hand():
    def limits(*bandwidths, peaks=(100.0, 100.0)):
        return tuple(Limits(peak, 0.25, bandwidth) for peak, bandwidth in zip(peaks, bandwidths, strict=True))

    work = Cost(flops=200.0, bytes=30.0, working_set=30.0, experts_hit=1.0)
    time_taken = timing.Timing(median=4.0, minimum=3.0, spread=0.0, calls=3, clean=True, cores=1.0)
    # bandwidth 10: memory 3 s, compute 2 s (8 s with the target's vectors)
    result = suite.judge(time_taken, work, limits(8.0, 12.0), 0.0, "float32")
    assert (result["roofline"], result["bound"], result["share"], result["target_share"]) == (3.0, "memory", 0.75, 2.0)
    assert result["drifted"]
    assert not suite.judge(time_taken, work, limits(10.0, 10.0), 0.0, "float32")["drifted"]
    assert suite.judge(time_taken, work, limits(10.0, 10.0), float("nan"), "float32")["wrong"]
    # a machine at half its speed: compute 4 s
    result = suite.judge(time_taken, work, limits(10.0, 10.0, peaks=(60.0, 40.0)), 0.0, "float32")
    assert (result["roofline"], result["bound"], result["share"]) == (4.0, "compute", 1.0)
    assert result["drifted"]
