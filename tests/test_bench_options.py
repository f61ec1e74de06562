"""The benchmark's options: what runs by default, what is refused."""

import subprocess
import sys

import numoe
import pytest
from bench_cases import settings
from numoe.__main__ import main
from numoe.bench.workloads import LAYERS, parse_layer


def test_a_default_run_reduces_the_large_layers_and_no_others():
    layers = {shape.name: shape for shape in settings().layers}
    assert list(layers) == ["tiny", "small", "switch-base-8", "qwen3-30b-a3b/2", "deepseek-v2-lite/2"]
    assert (layers["qwen3-30b-a3b/2"].d_model, layers["qwen3-30b-a3b/2"].d_ff) == (1024, 384)
    assert layers["deepseek-v2-lite/2"].shared_d_ff == 1408
    for name in ("8x2x4096x14336", "olmoe-1b-7b"):  # what was asked for is measured
        assert settings("--layers", name).layers == (parse_layer(name),)


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


def test_the_command_shows_its_help():
    command = [sys.executable, "-m", "numoe", "bench", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(option in text for option in ("--layers", "--quick", "--full", "--json", "--compare"))
