"""Whole runs of the benchmark: what they print, and what they write."""

import json
import re

import numoe
import numpy as np
import pytest
from bench_cases import cell, of_run
from numoe import bench
from numoe.__main__ import main
from numoe.bench import contenders, scaling, suite


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
    for measured in run["cells"]:
        for result in measured["contenders"].values():
            assert result["roofline"] == pytest.approx(
                max(measured["flops"] / np.mean(result["peak"]), measured["bytes"] / np.mean(result["bandwidth"]))
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


@pytest.mark.usefixtures("small_probe")
@pytest.mark.parametrize(("copies", "together"), [(1, 2), (2, 1), (4, 0)])  # one copy is that of "packed"
def test_contenders_are_measured_together_as_far_as_memory_goes(copies, together, monkeypatch, capsys):
    alive, most = set(), [0]

    class Heavy(contenders.NumpyLoop):
        def __init__(self, task):
            super().__init__(task)
            alive.add(self)
            most[0] = max(most[0], len(alive))

        def close(self):
            alive.remove(self)
            super().close()

    shape = bench.parse_layer("8x2x16x32")
    weights = 4 * shape.numbers
    cells = suite.Settings(layers=(shape,), tokens=(4,), routings=("uniform",), passes=("forward",)).cells()
    free = 3.5 * weights + suite.memory_of_calls(cells, "float32")
    monkeypatch.setattr(suite, "available_memory", lambda: free)
    for name in ("a", "b", "c"):
        monkeypatch.setitem(contenders.CONTENDERS, name, Heavy)
        monkeypatch.setitem(suite.COPIES, name, copies)
    options = ["--layers", "8x2x16x32", "--tokens", "4", "--passes", "forward", "--routing", "uniform"]
    assert main(["bench", "--quick", "--seconds", "0.01", *options]) == 0
    printed = capsys.readouterr().out
    assert most[0] == together
    assert not alive
    for name in ("a", "b", "c"):
        assert bool(re.search(rf"^ +{name} +\d", printed, re.MULTILINE)) == (together > 0)
    assert ("missing" in printed) == (together == 0)


@pytest.mark.usefixtures("small_probe")
def test_contenders_take_turns_within_a_row(monkeypatch, capsys):
    turns = []

    def logging(name):
        class Logging(contenders.NumpyLoop):
            def forward(self, x, indices, weights):
                if name == "refuses" and turns.count(name) == 2:
                    raise contenders.ContenderUnavailableError("it has had enough")
                if turns[-1:] != [name]:
                    turns.append(name)
                return super().forward(x, indices, weights)

        return Logging

    names = ("a", "refuses", "b")
    monkeypatch.setattr(suite, "CONTENDERS", {name: logging(name) for name in names})
    options = ["--layers", "8x2x16x32", "--tokens", "4", "--passes", "forward", "--routing", "uniform"]
    assert main(["bench", "--quick", "--seconds", "0.25", *options]) == 0
    # the check of each, then a window each and probes, in rounds; who refuses in its first window is left out
    assert turns[:9] == ["a", "refuses", "b", "a", "refuses", "b", "a", "b", "a"]
    assert "no refuses in forward: it has had enough" in capsys.readouterr().out


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


def test_an_interrupted_run_keeps_its_cells(monkeypatch, tmp_path, capsys):
    def interrupted(_settings, result):
        result |= of_run(cell(1.0))
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run_bench", interrupted)
    path = tmp_path / "run.json"
    assert main(["bench", "--json", str(path)]) == 130
    assert len(bench.load_run(path)["cells"]) == 1
    assert "interrupted" in capsys.readouterr().err
