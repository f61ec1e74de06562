"""Equal bits: for any number of threads, in every run, and for a token whoever its neighbours are."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from typing import Any

import numoe
import numpy as np
import pytest
from layers import layer_of
from numoe.testing import assert_bitwise_equal, random_problem

pytestmark = pytest.mark.usefixtures("restored_threads")
Options = dict[str, Any]

LAYERS: dict[str, Options] = {
    "mixtral": {},
    "odd": {"d_model": 37, "d_ff": 29, "num_experts": 7, "top_k": 3, "activation": "gelu", "bias": True},
    "mlp input": {"form": "mlp", "activation": "relu2", "weight_on": "input", "d_model": 65, "d_ff": 33},
    "sigmoid shared": {
        "score": "sigmoid",
        "linear_bias": True,
        "shared": numoe.SharedExpertConfig(d_ff=19, gate="sigmoid"),
    },
    "one expert": {"num_experts": 1, "top_k": 1, "d_model": 33, "d_ff": 131},
    "many experts": {"num_experts": 300, "top_k": 5, "d_model": 17, "d_ff": 9},
    "dropping": {"capacity_factor": 0.8, "drop_priority": "batch", "renormalize_after_drop": True},
    "losses": {"aux_losses": dict.fromkeys(("switch", "megatron", "deepseek-sequence", "importance", "z"), 0.1)},
    "float64": {"dtype": "float64", "d_model": 31, "d_ff": 21},
}
NO_DROP = [name for name in LAYERS if name != "dropping"]


def make(name: str) -> numoe.MoELayer:
    problem = random_problem(0, **({"d_model": 24, "d_ff": 40, "dtype": "float32"} | LAYERS[name]))
    return layer_of(problem)


def tokens(layer: numoe.MoELayer, count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, layer.config.d_model)).astype(layer.dtype)


def results(layer: numoe.MoELayer, x: np.ndarray, dy: np.ndarray) -> dict[str, np.ndarray]:
    """Everything a forward and a backward give."""
    out = layer.forward(x)
    grads = layer.backward(dy, out)
    losses = np.array([term.value for term in out.losses.values()] + [out.aux_loss])
    routing = {"indices": out.routing.indices, "weights": out.routing.weights, "logits": out.routing.logits}
    return {"y": out.y, "inference": layer(x), "losses": losses, "dx": grads.x} | routing | grads.params


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_bitwise_equal(actual[name], value, name=name)


# ── threads


@pytest.mark.parametrize("count", [1, 5, 83, 700])
@pytest.mark.parametrize("name", LAYERS)
def test_bits_do_not_depend_on_the_number_of_threads(name: str, count: int) -> None:
    layer = make(name)
    x, dy = tokens(layer, count), tokens(layer, count, seed=2)
    numoe.set_num_threads(1)
    expected = results(layer, x, dy)
    for threads in (2, 3, 5, 8):
        numoe.set_num_threads(threads)
        assert_same(results(layer, x, dy), expected)


@pytest.mark.parametrize("name", LAYERS)
def test_bits_do_not_depend_on_the_run(name: str) -> None:
    """Fresh memory has other contents each time: scratch that is read before it is written would show."""
    layer = make(name)
    x, dy = tokens(layer, 83), tokens(layer, 83, seed=2)
    first = results(layer, x, dy)
    for fill in (np.nan, 1e30, 0.0):
        junk = [np.full(n, fill, layer.dtype) for n in (83 * 24, 166 * 40, 5000, 50_000)]
        del junk  # back to the allocator, with its contents
        assert_same(results(layer, x, dy), first)


def digest() -> str:
    layer = make("odd")
    found = results(layer, tokens(layer, 50), tokens(layer, 50, seed=2))
    return hashlib.sha256(b"".join(value.tobytes() for value in found.values())).hexdigest()


@pytest.mark.parametrize("threads", [1, 3])
def test_bits_do_not_depend_on_the_process(threads: int) -> None:
    environment = os.environ | {"NUMOE_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest()


# ── neighbours


@pytest.mark.parametrize("name", NO_DROP)
def test_a_token_alone_has_the_bits_it_has_in_a_batch(name: str) -> None:
    layer = make(name)
    x = tokens(layer, 83)
    batch = layer(x)
    for t in (0, 1, 40, 82):
        assert_bitwise_equal(layer(x[t]), batch[t])


@pytest.mark.parametrize("name", NO_DROP)
@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 7, 8, 9, 11, 15, 16, 17, 31, 33, 64, 65, 127, 129])
def test_a_token_has_the_same_bits_in_any_batch_at_any_place(name: str, count: int) -> None:
    """Forward, and the gradient of x: one token among others, at the first, a middle and the last place."""
    layer = make(name)
    probe, dprobe = tokens(layer, 1, seed=3), tokens(layer, 1, seed=4)
    y, dx = forward_backward(layer, probe, dprobe)
    for seed, place in enumerate((0, count // 2, count - 1)):
        x, dy = tokens(layer, count, seed=5 + seed), tokens(layer, count, seed=8 + seed)
        x[place], dy[place] = probe[0], dprobe[0]
        all_y, all_dx = forward_backward(layer, x, dy)
        assert_bitwise_equal(all_y[place], y[0], name="y")
        assert_bitwise_equal(all_dx[place], dx[0], name="dx")


def forward_backward(layer: numoe.MoELayer, x: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """y and dx; without the losses, whose gradient for one token depends on all of them."""
    out = layer.forward(x)
    return out.y, layer.backward(dy, out, d_aux_loss=0.0).x


@pytest.mark.parametrize("name", NO_DROP)
def test_a_batch_in_pieces_has_the_bits_of_the_whole(name: str) -> None:
    layer = make(name)
    x = tokens(layer, 200)
    whole = layer(x)
    for size in (1, 7, 64, 150):
        pieces = [layer(x[begin : begin + size]) for begin in range(0, len(x), size)]
        assert_bitwise_equal(np.concatenate(pieces), whole)


@pytest.mark.parametrize("weight_on", ["output", "input"])
def test_experts_shared_out_to_threads_and_shared_by_them(weight_on: str) -> None:
    """Two threads work off the rows of D numbers in portions: experts 0-7 apart, the huge one together, 9-15 apart."""
    layer = numoe.MoELayer(d_model=1600, d_ff=5, num_experts=16, top_k=2, weight_on=weight_on, rng=0)
    counts = np.array([600] * 8 + [9000] + [700] * 7)
    chosen = np.random.default_rng(0).permutation(np.repeat(np.arange(16), counts))
    indices = np.stack([chosen[:9350], chosen[9350:]], axis=1)
    indices[indices[:, 0] == indices[:, 1], 1] = -1
    weights = np.random.default_rng(1).random(indices.shape, np.float32)
    x, dy = tokens(layer, len(indices)), tokens(layer, len(indices), seed=2)

    def step(threads: int) -> dict[str, np.ndarray]:
        numoe.set_num_threads(threads)
        out = layer.forward(x, indices=indices, weights=weights)
        grads = layer.backward(dy, out)
        assert grads.weights is not None
        return {"y": out.y, "dx": grads.x, "dweights": grads.weights} | grads.params

    expected = step(1)
    for threads in (2, 3):
        assert_same(step(threads), expected)


def test_a_batch_beyond_the_scratch_budget() -> None:
    """10,000 rows of 2,016 numbers are worked off in several portions of experts; one expert alone exceeds one."""
    layer = numoe.MoELayer(d_model=16, d_ff=2000, num_experts=4, top_k=2, rng=0)
    x, dy = tokens(layer, 5000), tokens(layer, 5000, seed=2)
    y, dx = forward_backward(layer, x, dy)
    for begin in (0, 2467, 4990):
        part = slice(begin, begin + 10)
        small_y, small_dx = forward_backward(layer, x[part], dy[part])
        assert_bitwise_equal(y[part], small_y)
        assert_bitwise_equal(dx[part], small_dx)


def test_all_neighbours_to_one_expert() -> None:
    """Given routings: a token's bits stay when the others crowd its experts, or leave them."""
    layer = make("odd")
    x, weights = tokens(layer, 90), np.full((90, 3), 0.5, np.float32)
    alone = layer.forward(x[:1], indices=[[4, 1, 2]], weights=weights[:1]).y
    for others in ([4, 1, 2], [0, 3, 5], [1, 0, 6]):
        indices = np.tile(others, (90, 1))
        indices[0] = [4, 1, 2]
        assert_bitwise_equal(layer.forward(x, indices=indices, weights=weights).y[:1], alone)


@pytest.mark.parametrize("width", [*range(1, 18), 31, 33, 63, 65])
def test_odd_widths(width: int) -> None:
    """D, F and E at odd sizes: 1 thread and 3, alone and together."""
    options = {"d_model": width, "d_ff": width + 2, "num_experts": width, "top_k": 1, "rng": 0}
    layer = numoe.MoELayer(**options)
    x = tokens(layer, 23)
    numoe.set_num_threads(1)
    expected = layer(x)
    numoe.set_num_threads(3)
    assert_bitwise_equal(layer(x), expected)
    assert_bitwise_equal(np.stack([layer(token) for token in x]), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_over_many_tokens_do_not_depend_on_their_neighbours(dtype: Any) -> None:
    """The router's gradient over more tokens than are packed at once; its last columns fill no panel."""
    rng = np.random.default_rng(0)
    x, dlogits = rng.standard_normal((20_000, 20)).astype(dtype), rng.standard_normal((20_000, 96)).astype(dtype)
    w = np.zeros((20, 96), dtype)
    _, whole, _ = numoe.router_logits_backward(dlogits, x, w)
    for experts in (1, 5, 33, 64, 70):
        _, some, _ = numoe.router_logits_backward(np.ascontiguousarray(dlogits[:, :experts]), x, w[:, :experts].copy())
        assert_bitwise_equal(some, np.ascontiguousarray(whole[:, :experts]), name=f"{experts} experts")
    every_sum_rounded = len(x) * np.finfo(dtype).eps
    np.testing.assert_allclose(whole, x.T.astype(np.float64) @ dlogits, rtol=0, atol=4 * every_sum_rounded)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_every_number_of_rows_gives_a_token_the_same_bits(dtype: str) -> None:
    """Rows of an expert decide which tile takes them, how many panels it reads at once, and where a panel ends."""
    layer = numoe.MoELayer(d_model=150, d_ff=205, num_experts=1, top_k=1, dtype=dtype, rng=0)
    packed, x = layer.pack(), tokens(layer, 100)
    dy = tokens(layer, 100, seed=2)
    whole, y = layer.forward(x), packed(x)
    dx = layer.backward(dy, whole).x
    for count in (*range(1, 71), 97):
        part = layer.forward(x[:count])
        assert_bitwise_equal(part.y, whole.y[:count], name=f"y of {count}")
        assert_bitwise_equal(packed(x[:count]), y[:count], name=f"packed y of {count}")
        assert_bitwise_equal(layer.backward(dy[:count], part).x, dx[:count], name=f"dx of {count}")
    assert_bitwise_equal(y, whole.y)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_few_rows_read_weights_from_memory_to_the_same_bits(dtype: str) -> None:
    """More than caches keep: few tokens read several panels at once, in other ways than those of a small layer."""
    layer = numoe.MoELayer(d_model=1030, d_ff=2765, num_experts=1, top_k=1, dtype=dtype, rng=0)
    packed, x = layer.pack(), tokens(layer, 30)
    assert packed.nbytes > 16 << 20
    y = packed(x)
    for count in range(1, 15):
        assert_bitwise_equal(packed(x[:count]), y[:count], name=f"packed y of {count}")
    assert_bitwise_equal(y, layer(x))


if __name__ == "__main__":
    print(digest())
