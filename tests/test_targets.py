"""Every CPU target this machine can run, the emulated ones too: their shapes, their bits, their part of the suite."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_determinism
from numoe import _core

HERE = Path(__file__).parent
REAL = {target["name"]: target for target in _core.targets()}
EMULATED = {target["name"]: target for target in _core.emulated_targets()}
AVAILABLE = [name for name, target in (REAL | EMULATED).items() if target["supported"]]
PACKED = {"float32": ("float32", "bfloat16"), "float64": ("float64",)}
OTHERS = [name for name in AVAILABLE if name != _core.target()]

# What a target's kernels decide: every size, packed layers, bits, and the gradients of every activation and form.
PARTS = (
    "test_kernels.py",
    "test_packed.py",
    "test_bfloat16.py",
    "test_determinism.py::test_bits_do_not_depend_on_the_number_of_threads",
    "test_determinism.py::test_a_token_alone_has_the_bits_it_has_in_a_batch",
    "test_determinism.py::test_a_batch_in_pieces_has_the_bits_of_the_whole",
    "test_determinism.py::test_odd_widths",
    "test_gradients.py::test_expert",
    "test_gradients.py::test_shared_expert",
    "test_gradients.py::test_sizes",
)


def run(target: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"NUMOE_TARGET": target}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True, check=False)


@pytest.mark.skipif("NUMOE_TARGET" in os.environ, reason="NUMOE_TARGET is set: this run is about one target")
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("target", OTHERS)
def test_the_other_targets_pass_their_part_of_the_suite(target: str) -> None:
    """The one in use has the whole suite."""
    done = run(target, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", *PARTS)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert f"numoe: target {target}," in done.stdout


def test_emulated_targets_have_the_shapes_of_the_real_ones() -> None:
    """Otherwise they would test other tiles than those that run on the CPUs they stand for."""
    assert set(EMULATED) == {"emulated-amx_bf16", "emulated-avx512_bf16", "emulated-avx512", "emulated-avx2"}
    for name, target in EMULATED.items():
        if original := REAL.get(name.removeprefix("emulated-")):
            for fact in ("float32_tile", "float64_tile", "bfloat16_pairs"):
                assert target[fact] == original[fact]


# Gradients behind dot(), the one kernel that adds up lanes: they may differ between targets.
BEHIND_DOT = {"dx", "w_router", "b_router", "w_shared_score"}


def test_unfused_targets_give_the_same_bits() -> None:
    """Each number is one fixed sequence of operations: without fusing, neither lanes nor tile heights change a bit.

    Dot products are fused, and their factors rounded.
    """
    bits = {target: run(target, __file__) for target in ("portable", *EMULATED)}
    for target, done in bits.items():
        assert done.returncode == 0, done.stderr
        found, expected = (text.stdout.splitlines() for text in (done, bits["portable"]))
        assert len(found) == len(expected) > 50
        for ours, theirs in zip(found, expected, strict=True):
            dots = target in EMULATED and EMULATED[target]["bfloat16_pairs"] and " bfloat16 " in theirs
            assert (ours != theirs) if dots else (ours == theirs), target


def print_bits() -> None:
    """What layers of many forms make of 83 tokens."""
    for name in test_determinism.LAYERS:
        layer = test_determinism.make(name)
        x, dy = test_determinism.tokens(layer, 83), test_determinism.tokens(layer, 83, seed=2)
        found = test_determinism.results(layer, x, dy)
        if layer.config.dispatch.dropless:
            found |= {dtype: layer.pack(dtype)(x) for dtype in PACKED[str(layer.dtype)]}
        for key in sorted(found.keys() - BEHIND_DOT):
            print(name, key, hashlib.sha256(found[key].tobytes()).hexdigest()[:16])


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="reads who made the CPU")
def test_dot_products_come_first_where_they_are_faster_than_float32() -> None:
    names = [name for name in REAL if name in ("avx512", "avx512_bf16")]
    intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    assert names in ([], ["avx512", "avx512_bf16"] if intel else ["avx512_bf16", "avx512"])


@pytest.mark.parametrize("value", ["", None])
def test_the_best_real_target_is_the_default(value: str | None) -> None:
    environment = {name: text for name, text in os.environ.items() if name != "NUMOE_TARGET"}
    if value is not None:
        environment["NUMOE_TARGET"] = value
    command = [sys.executable, "-c", "import numoe; print(numoe._core.target())"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == next(name for name in AVAILABLE if name not in EMULATED)


@pytest.mark.parametrize("name", [name for name, target in REAL.items() if not target["supported"]] or ["avx1024"])
def test_a_target_that_this_cpu_lacks_is_refused_with_a_sentence(name: str) -> None:
    done = run(name, "-c", "import numoe")
    available = ", ".join(name for name, target in REAL.items() if target["supported"])
    assert done.returncode == 1  # an exception, not a signal
    assert done.stderr.rstrip().endswith(
        f"NUMOE_TARGET='{name}' is not a target that this CPU and this build have; set it to one of: {available}, "
        "or unset it"
    )


if __name__ == "__main__":
    print_bits()
