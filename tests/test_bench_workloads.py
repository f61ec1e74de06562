"""What is measured: arithmetic, bytes and roofline of a layer by hand; routings with the load they are named after."""

import numpy as np
import pytest
from numoe.bench import workloads
from numoe.bench.workloads import LAYERS, cost, make_routings, roofline


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


# ── routings


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
