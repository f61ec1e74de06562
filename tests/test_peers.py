"""Other libraries in the benchmark: told when they are absent, checked against the reference where they are not."""

import re
import subprocess
import sys

import numoe
import numpy as np
import pytest
from bench_cases import TINY, settings
from numoe import bench
from numoe.__main__ import main
from numoe.bench import contenders, peers, workloads
from numoe.bench.accuracy import error_against_reference
from numoe.bench.contenders import Task
from numoe.bench.workloads import DTYPES, make_routings

SHAPES = {
    "plain": workloads.LayerShape(name="plain", num_experts=8, top_k=2, d_model=32, d_ff=64),
    "bias": workloads.LayerShape(name="bias", num_experts=8, top_k=3, d_model=32, d_ff=64, bias=True),
    "shared": workloads.LayerShape(name="shared", num_experts=8, top_k=2, d_model=32, d_ff=64, shared_d_ff=96),
    "relu": workloads.LayerShape(
        name="relu", num_experts=8, top_k=1, d_model=32, d_ff=64, form="mlp", activation="relu"
    ),
}
PACKAGES = {  # peer: dtype and module whose absence is told by the name of the package
    "torch-loop": ("float32", "torch", "torch"),
    "torch-grouped": ("float32", "torch", "torch"),
    "onnxruntime": ("float32", "onnx", "onnx"),
    "zentorch": ("float32", "torch", "torch"),
    "ggml": ("float32", "llama_cpp", "llama-cpp-python"),
    "kt-kernel": ("bfloat16", "kt_kernel", "kt-kernel"),
}


def peer_errors(name, shape, dtype, rng, *, backward):
    """The largest error of forward, and of forward and backward, for several numbers of tokens."""
    layer = numoe.MoELayer(config=shape.config(dtype), rng=0)
    for parameter, value in layer.params.items():
        if parameter.startswith("b_"):
            value[...] = rng.standard_normal(value.shape)
        value[...] = value.astype(DTYPES[dtype])
    runner = peers.PEERS[name](Task(layer=layer, dtype=dtype, threads=2))
    try:
        for tokens in (1, 6, 40):
            x, dy = rng.standard_normal((2, tokens, shape.d_model)).astype(DTYPES[dtype])
            indices, weights = make_routings("uniform", tokens, shape, dtype)[0]
            for gradient in (None, dy) if backward else (None,):
                yield error_against_reference(runner, layer, x, indices, weights, gradient)
    finally:
        runner.close()


def test_peers_are_asked_for():
    assert settings().peers == ()
    assert settings("--peers").peers == tuple(peers.PEERS)
    assert settings("--peers", "ggml", "torch-loop").peers == ("ggml", "torch-loop")
    assert list(settings("--peers", "ggml").contenders()) == ["numoe", "packed", "numpy", "ggml"]
    assert set(peers.COPIES) == {"packed", *peers.PEERS}


def test_no_peer_is_imported_before_it_is_asked_for():
    code = (
        "import sys, numoe.bench; print({'torch', 'onnx', 'onnxruntime', 'llama_cpp', 'kt_kernel'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.usefixtures("small_probe")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peers_that_are_not_installed_are_told(dtype, monkeypatch, capsys):
    missing = {name: package for name, (needs, _, package) in PACKAGES.items() if needs == dtype}
    for _, module, _ in PACKAGES.values():
        monkeypatch.setitem(sys.modules, module, None)
    options = ["--layers", "8x2x32x32", "--tokens", "4", "--passes", "forward", "--routing", "uniform"]
    assert main(["bench", "--quick", "--seconds", "0.01", *options, "--dtype", dtype, "--peers", *missing]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no ")]
    assert [line for line in lines if "package" in line] == [
        f"no {name}: package {package!r} is not installed" for name, package in missing.items()
    ]


def test_versions_are_those_of_installed_packages(monkeypatch):
    monkeypatch.setitem(peers._PACKAGES, "ggml", "no-such-package")
    monkeypatch.setitem(peers._PACKAGES, "torch-loop", "numpy")
    assert peers.versions(["ggml", "torch-loop", "torch-loop"]) == {"numpy": np.__version__}


@pytest.mark.usefixtures("small_probe")
def test_a_peer_that_fails_is_told_and_an_error_of_ours_is_not_hidden(monkeypatch, tmp_path, capsys):
    class Failing(contenders.NumpyLoop):
        def forward(self, x, indices, weights):
            raise RuntimeError("no such instruction\nand more")

    monkeypatch.setitem(peers.PEERS, "ggml", Failing)
    path = tmp_path / "run.json"
    options = ["--layers", "8x2x32x32", "--tokens", "1", "4", "--passes", "forward", "--seconds", "0.01"]
    assert main(["bench", "--quick", *options, "--peers", "ggml", "--json", str(path)]) == 0
    assert capsys.readouterr().out.count("no ggml in forward: RuntimeError: no such instruction\n") == 1
    run = bench.load_run(path)
    assert [entry["contender"] for entry in run["unavailable"]] == ["ggml"]
    assert all(list(cell["contenders"]) == ["numoe", "packed", "numpy"] for cell in run["cells"])
    monkeypatch.setitem(contenders.CONTENDERS, "numpy", Failing)
    with pytest.raises(RuntimeError, match="no such instruction"):
        main(["bench", "--quick", *options])


@pytest.mark.usefixtures("small_probe")
def test_a_peer_whose_copy_does_not_fit_is_left_out(monkeypatch, capsys):
    monkeypatch.setitem(peers.COPIES, "ggml", 1e12)
    options = ["--layers", "8x2x32x32", "--tokens", "1", "--passes", "forward", "--seconds", "0.01"]
    assert main(["bench", "--quick", *options, "--peers", "ggml"]) == 0
    assert re.search(r"no ggml: \d+\.\d GB of memory are missing for 8x2x32x32", capsys.readouterr().out)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "dtype", "limit"), [
    ("torch-loop", "float64", 1e-12),
    ("torch-loop", "float32", 1e-5),
    ("torch-loop", "bfloat16", 0.05),
    ("torch-grouped", "float32", 1e-5),
    ("torch-grouped", "bfloat16", 0.05),
])  # fmt: skip
def test_torch_agrees_with_the_reference(name, dtype, limit, shape, rng):
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    assert max(peer_errors(name, SHAPES[shape], dtype, rng, backward=True)) < limit
    assert torch.get_num_threads() == threads


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", SHAPES)
def test_onnx_runtime_agrees_with_the_reference(shape, rng):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    assert max(peer_errors("onnxruntime", SHAPES[shape], "float32", rng, backward=False)) < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "dtype", "limit"), [
    ("zentorch", "float32", 1e-4),
    ("ggml", "float32", 1e-5),
    ("ggml", "bfloat16", 0.05),
    ("kt-kernel", "bfloat16", 0.05),
])  # fmt: skip
def test_other_peers_agree_with_the_reference_where_they_run(name, dtype, limit, rng):
    checked = []
    for shape in SHAPES.values():
        try:
            checked += peer_errors(name, shape, dtype, rng, backward=False)
        except contenders.ContenderUnavailableError as reason:
            if not checked and "package" in str(reason):
                pytest.skip(str(reason))
    assert max(checked) < limit


@pytest.mark.parametrize(
    ("name", "dtype", "reason"),
    [
        ("onnxruntime", "bfloat16", "it has no bfloat16"),
        ("zentorch", "float64", "it has no float64"),
        ("torch-grouped", "float64", "it has no float64"),
        ("kt-kernel", "float32", "it has no float32"),
    ],
)
def test_a_peer_without_the_dtype_says_so_before_it_is_imported(name, dtype, reason, monkeypatch):
    for module in ("torch", "onnx", "kt_kernel"):
        monkeypatch.setitem(sys.modules, module, None)
    layer = numoe.MoELayer(config=TINY.config(dtype), rng=0)
    with pytest.raises(contenders.ContenderUnavailableError, match=f"^{reason}$"):
        peers.PEERS[name](Task(layer=layer, dtype=dtype))


@pytest.mark.usefixtures("small_probe")
def test_bfloat16_is_measured_against_its_own_limits(tmp_path, capsys):
    path = tmp_path / "run.json"
    options = ["--layers", "8x2x32x64", "--tokens", "1", "16", "--passes", "forward", "--seconds", "0.01"]
    assert main(["bench", "--quick", *options, "--dtype", "bfloat16", "--json", str(path)]) == 0
    assert "no numpy: NumPy has no bfloat16 products" in capsys.readouterr().out
    run = bench.load_run(path)
    assert run["machine"]["peak_dtype"] in ("bfloat16", "float32")
    for row in run["cells"]:
        assert row["weight_bytes"] == 2 * 8 * 3 * 32 * 64
        assert row["bytes"] == 2 * (row["experts_hit"] * 3 * 32 * 64 + 2 * row["tokens"] * 32)
        assert 1e-5 < row["contenders"]["packed"]["error"] < 0.02  # of y rounded to bfloat16
        assert not row["contenders"]["packed"]["wrong"]
