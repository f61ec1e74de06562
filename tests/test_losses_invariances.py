"""Auxiliary losses: what may change without changing them - masked tokens, order, dtype, threads."""

from __future__ import annotations

import numpy as np
import pytest
from loss_cases import LOSSES, SCORES, for_every_loss, gradients, random_arrays
from numoe import _core
from numoe.losses import load_balance_loss, z_loss


@pytest.mark.parametrize("T", [40, 1000])
@for_every_loss
def test_mask_equals_removing_the_rows(name: str, T: int) -> None:
    # Bits are equal within one block of 256 tokens; beyond, sums are associated differently.
    rtol, atol = (0, 0) if T <= 256 else (1e-12, 1e-16)
    arrays, mask, half = random_arrays(31, T), np.random.default_rng(32).random(T) < 0.6, T // 2
    for array in arrays.values():  # what a masked token holds does not matter
        array[~mask] = -1 if array.dtype == int else np.nan
    masked = LOSSES[name](arrays, mask, [half, T - half])
    lengths = [mask[:half].sum(), mask[half:].sum()]
    removed = LOSSES[name]({of: array[mask] for of, array in arrays.items()}, None, lengths)
    assert masked.value == pytest.approx(removed.value, rel=rtol, abs=0)
    for of, gradient in gradients(masked).items():
        assert not gradient[~mask].any()
        np.testing.assert_allclose(gradient[mask], gradients(removed)[of], rtol=rtol, atol=atol)


@for_every_loss
def test_order_of_the_tokens_does_not_matter(name: str) -> None:
    arrays, order = random_arrays(34, 600), np.random.default_rng(35).permutation(600)
    straight = LOSSES[name](arrays)
    shuffled = LOSSES[name]({of: array[order] for of, array in arrays.items()})
    assert shuffled.value == pytest.approx(straight.value, rel=1e-13)
    for of, gradient in gradients(straight).items():
        np.testing.assert_allclose(gradients(shuffled)[of], gradient[order], rtol=1e-11, atol=1e-16)


@for_every_loss
def test_repeating_the_tokens_does_not_change_the_value(name: str) -> None:
    arrays = random_arrays(37)
    often = LOSSES[name]({of: np.tile(array, (40, 1)) for of, array in arrays.items()})
    assert often.value == pytest.approx(LOSSES[name](arrays).value, rel=1e-9)  # 1e-10 in the divisor of CV²


@pytest.mark.parametrize("score", SCORES)
def test_hf_uses_the_softmax_whatever_the_score(score: str) -> None:
    found, expected = LOSSES[f"hf {score}"](random_arrays(1)), LOSSES["hf softmax"](random_arrays(1))
    assert found.value == expected.value
    np.testing.assert_array_equal(found.dlogits, expected.dlogits)


@for_every_loss
def test_float32_data_are_computed_in_float64(name: str) -> None:
    # The same bits as for the widened data; the gradient is rounded once.
    single = {n: a if n == "indices" else a.astype(np.float32) for n, a in random_arrays(42, 700).items()}
    double = {n: a if n == "indices" else a.astype(np.float64) for n, a in single.items()}
    found, exact = LOSSES[name](single), LOSSES[name](double)
    assert found.value == exact.value
    for of, gradient in gradients(found).items():
        assert gradient.dtype == np.float32
        np.testing.assert_array_equal(gradient, gradients(exact)[of].astype(np.float32))


def test_error_does_not_grow_with_the_number_of_tokens() -> None:
    row = np.array([[0.1, 0.7, -0.3]], np.float32)
    many, first = np.repeat(row, 200_000, axis=0), np.ones((200_000, 1), np.int32)
    assert z_loss(many).value == pytest.approx(z_loss(row).value, rel=1e-13)
    one = load_balance_loss(row, first[:1])
    assert load_balance_loss(many, first).value == pytest.approx(one.value, rel=1e-13)


@pytest.mark.usefixtures("restored_threads")
@for_every_loss
def test_bits_do_not_depend_on_threads(name: str) -> None:
    arrays, found = random_arrays(45, 2000), []
    for threads in (1, 2, 5):
        _core.set_num_threads(threads)
        found.append(LOSSES[name](arrays, None, [700, 1300]))
    for other in found[1:]:
        assert other.value == found[0].value
        for of, gradient in gradients(other).items():
            np.testing.assert_array_equal(gradient, gradients(found[0])[of])
