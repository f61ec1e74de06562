"""What packed layers take, and that calls give back what they took."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numoe
import numpy as np
import pytest

C = ctypes.CDLL(None)
STATM = Path("/proc/self/statm")

pytestmark = [
    pytest.mark.skipif(not STATM.exists(), reason="reads the resident memory from /proc/self/statm"),
    pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="sanitizers keep freed memory"),
]


def resident() -> int:
    """Bytes of this process that are in memory, without what malloc could give back."""
    gc.collect()
    if hasattr(C, "malloc_trim"):
        C.malloc_trim(ctypes.c_size_t(0))
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ── packed layers

REALISTIC: list[dict[str, Any]] = [
    {"num_experts": 8, "d_model": 512, "d_ff": 1024},
    {"num_experts": 64, "d_model": 256, "d_ff": 192},
    {"num_experts": 16, "d_model": 768, "d_ff": 256, "form": "mlp", "bias": True},
    {"num_experts": 8, "d_model": 384, "d_ff": 640, "shared": numoe.SharedExpertConfig(d_ff=640)},
]
HUGE_PAGES = 4 * 2**21  # each buffer ends in a huge page of its own
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}


def make(dtype: str, options: dict[str, Any]) -> numoe.MoELayer:
    return numoe.MoELayer(top_k=2, rng=0, dtype="float64" if dtype == "float64" else "float32", **options)


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("options", REALISTIC)
def test_a_packed_layer_takes_its_weights_and_one_percent(options: dict[str, Any], dtype: str) -> None:
    """The percent: the router's last panel, padded to whole vectors.  Only the experts' weights become bfloat16."""
    layer = make(dtype, options)
    router = ("w_router", "w_shared_score")
    packed_size = sum(v.size for name, v in layer.params.items() if name.startswith("w_") and name not in router)
    others = sum(v.nbytes for name, v in layer.params.items() if not name.startswith("w_") or name in router)
    expected = packed_size * BYTES[dtype] + others

    before = resident()
    packed = layer.pack(dtype)
    assert expected * 0.99 <= packed.nbytes <= expected * 1.01
    grown = resident() - before
    assert packed.nbytes * 0.95 - HUGE_PAGES <= grown <= packed.nbytes * 1.01 + HUGE_PAGES


@pytest.mark.parametrize("dtype", BYTES)
def test_a_packed_layer_computes_in_little_more(dtype: str) -> None:
    """64 tokens need 128 rows of 1,536 numbers and a few panels per thread; a second copy of the weights is 25 MB."""
    layer = make(dtype, REALISTIC[0])
    packed, x = layer.pack(dtype), np.ones((64, 512), np.float64 if dtype == "float64" else np.float32)
    before = resident()
    for count in (1, 64):
        packed(x[:count])
    assert resident() - before <= HUGE_PAGES


# ── calls


def calls_of(name: str) -> Callable[[], object]:
    layer = numoe.MoELayer(
        d_model=32,
        d_ff=48,
        num_experts=6,
        top_k=2,
        rng=0,
        shared=numoe.SharedExpertConfig(d_ff=16),
        aux_losses={"z": 0.1},
    )
    x = np.random.default_rng(0).standard_normal((64, 32), dtype=np.float32)

    def refused() -> None:
        with pytest.raises(ValueError, match="must have shape"):
            layer(x[:, 1:])

    packed = {dtype: layer.pack(dtype) for dtype in ("float32", "bfloat16")}
    return {
        "inference": lambda: layer(x),
        "packed float32": lambda: packed["float32"](x),
        "packed bfloat16": lambda: packed["bfloat16"](x),
        "pack": lambda: layer.pack("bfloat16"),
        "forward and backward": lambda: layer.backward(x, layer.forward(x)),
        "an error": refused,
    }[name]


@pytest.mark.parametrize(
    "name", ["inference", "packed float32", "packed bfloat16", "pack", "forward and backward", "an error"]
)
def test_a_thousand_calls_leave_nothing_behind(name: str) -> None:
    """One result of a call is 8 kB: a call that kept it would leave 8 MB; one Python object each, 1,000 objects."""
    call = calls_of(name)
    for _ in range(200):
        call()
    memory, objects = resident(), sys.getallocatedblocks()
    for _ in range(1000):
        call()
    assert resident() - memory < 2 * 2**20
    assert sys.getallocatedblocks() - objects < 300


def test_threads_keep_no_memory_for_the_length_of_a_batch() -> None:
    """The router's gradient is a sum over all tokens, which are packed some thousands at a time."""
    w = np.zeros((64, 16), np.float32)

    def kept_after(tokens: int) -> int:
        numoe.router_logits_backward(np.ones((tokens, 16), np.float32), np.ones((tokens, 64), np.float32), w)
        return resident()

    before = kept_after(10_000)
    assert kept_after(200_000) - before < 20e6
