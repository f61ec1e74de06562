"""Auxiliary losses: which arguments are converted, which are refused and how."""

from __future__ import annotations

import builtins
import math

import numpy as np
import pytest
from loss_cases import LOSSES, random_arrays, random_problem
from numoe.losses import (
    CONVENTIONS,
    compare_conventions,
    importance_loss,
    load_balance_loss,
    load_loss,
    update_choice_bias,
    z_loss,
)


def test_arguments_are_converted_and_never_written() -> None:
    logits, indices = random_problem(47)
    expected = load_balance_loss(logits, indices)
    for z, i in [
        (np.asfortranarray(logits), indices.astype(np.uint8)),
        (logits[:, ::-1][:, ::-1], np.repeat(indices, 2, axis=1)[:, ::2]),
        (logits.tolist(), indices.tolist()),
        (logits.astype(">f8"), indices.astype(">i8")),
    ]:
        assert load_balance_loss(z, i).value == expected.value
    arrays = random_arrays(48)
    for array in arrays.values():
        array.setflags(write=False)
    for loss in LOSSES.values():
        loss(arrays)


Z, I = np.zeros((3, 4)), np.zeros((3, 2), int)
W, F = Z[:, :2], Z.astype(np.float32)
ERRORS = {
    "ValueError: logits must have 2 dim": lambda: load_balance_loss(np.zeros(3), I),
    "TypeError: logits": lambda: load_balance_loss(np.zeros((3, 4), int), I),
    "ValueError: logits must have .* at least one expert": lambda: load_balance_loss(np.zeros((3, 0)), I),
    r"ValueError: indices must have shape \(T, K\).*T = 3": lambda: load_balance_loss(Z, I[:2]),
    "ValueError: indices must .* K >= 1": lambda: load_balance_loss(Z, I[:, :0]),
    "ValueError: indices": lambda: load_balance_loss(Z, I[0]),
    "TypeError: indices": lambda: load_balance_loss(Z, I + 0.5),
    r"IndexError: indices\[1, 1\] = 4": lambda: load_balance_loss(Z, [[0, 1], [2, 4], [9, 0]]),
    r"IndexError: indices\[1, 0\] = -2": lambda: load_balance_loss(Z, [[0, 1], [-2, 3], [0, 0]]),
    "ValueError: convention .* Did you mean 'switch'": lambda: load_balance_loss(Z, I, convention="swich"),
    "TypeError: convention must be one of 'switch'": lambda: load_balance_loss(Z, I, convention=None),
    "ValueError: score .* Did you mean 'softmax'": lambda: load_balance_loss(Z, I, score="softmx"),
    "ValueError: mask": lambda: load_balance_loss(Z, I, mask=np.ones(4, bool)),
    "TypeError: mask": lambda: load_balance_loss(Z, I, mask=np.ones(3)),
    "ValueError: .* sum to T = 3.*sum to 2": lambda: load_balance_loss(Z, I, sequence_lengths=[1, 1]),
    r"ValueError: .*lengths\[0\] must be in 0..T": lambda: load_balance_loss(Z, I, sequence_lengths=[4, -1]),
    r"ValueError: .*lengths\[1\]": lambda: load_balance_loss(Z, I, sequence_lengths=[3, -1, 1]),
    r"ValueError: .*got 9223": lambda: load_balance_loss(Z, I, sequence_lengths=np.uint64([2**63, 3])),
    "TypeError: sequence_lengths .*float64": lambda: load_balance_loss(Z, I, sequence_lengths=[1.5, 1.5]),
    r"TypeError: sequence_lengths .*shape \(\)": lambda: load_balance_loss(Z, I, sequence_lengths=3),
    r"ValueError: indices .* of weights \(T, K\) = \(3, 4\)": lambda: importance_loss(Z, I, 4),
    "ValueError: num_experts must be in 1": lambda: importance_loss(W, I, 0),
    "TypeError: num_experts must be an int": lambda: importance_loss(W, I, 4.0),
    r"IndexError: indices\[0, 0\]": lambda: importance_loss(W, I + 4, 4),
    "ValueError: noisy_logits must have the shape": lambda: load_loss(Z, Z[:2], 1.0, 1),
    r"ValueError: top_k must be in 1..E \(4\); got 0": lambda: load_loss(Z, Z, 1.0, 0),
    r"ValueError: top_k must be in 1..E \(4\); got 5": lambda: load_loss(Z, Z, 1.0, 5),
    "TypeError: top_k must be an int": lambda: load_loss(Z, Z, 1.0, 1.5),
    "ValueError: noise_std .*> 0 .*token 0, expert 0.*expert_load": lambda: load_loss(Z, Z, 0.0, 1),
    "ValueError: .*got nan for token 0, expert 2": lambda: load_loss(Z, Z, [1, 1, np.nan, -1], 1),
    "ValueError: noise_std must be finite": lambda: load_loss(Z, Z, np.inf, 1),
    "ValueError: noise_std .*in float32": lambda: load_loss(F, F, 1e-60, 1),
    r"ValueError: noise_std .* broadcasts .*\(3, 4\)": lambda: load_loss(Z, Z, np.ones(3), 1),
    "ValueError: noise_std .* broadcasts": lambda: load_loss(Z, Z, np.ones((1, 3, 4)), 1),
    r"ValueError: logits .*\(2, 3, 4\)": lambda: z_loss(np.zeros((2, 3, 4))),
    "TypeError: logits must be an array": lambda: z_loss("logits"),
    r"ValueError: counts .*\(E,\) = \(3,\)": lambda: update_choice_bias(np.zeros(3), [1, 2]),
    r"ValueError: counts\[1\] must be finite .* got -2": lambda: update_choice_bias(np.zeros(2), [1, -2]),
    r"ValueError: counts\[1\] must be finite .* got nan": lambda: update_choice_bias(np.zeros(2), [1, np.nan]),
    "TypeError: counts must be an array of numbers": lambda: update_choice_bias(np.zeros(1), ["a"]),
    "ValueError: rate must .* got -1": lambda: update_choice_bias(np.zeros(2), [1, 2], rate=-1),
    "ValueError: rate must .* got nan": lambda: update_choice_bias(np.zeros(2), [1, 2], rate=math.nan),
    "ValueError: rate must be finite and >= 0 and <= 3.40282e\\+38; got 1e\\+39": lambda: update_choice_bias(
        np.zeros(2, np.float32), [1, 2], rate=1e39
    ),
    "ValueError: choice_bias would become infinite; give a smaller rate than 3e\\+38": lambda: update_choice_bias(
        np.full(2, 3e38, np.float32), [1, 2], rate=3e38
    ),
    "ValueError: choice_bias must be finite; entry 1 is not": lambda: update_choice_bias([0.0, np.inf], [1, 2]),
    "TypeError: choice_bias": lambda: update_choice_bias(np.zeros(2, int), [1, 2]),
    "TypeError: kept must be a bool array": lambda: compare_conventions(Z, I, kept=np.ones((3, 2))),
    "ValueError: kept must have the shape": lambda: compare_conventions(Z, I, kept=np.ones(3, bool)),
}


@pytest.mark.parametrize("sentence", ERRORS)
def test_errors_are_sentences(sentence: str) -> None:
    error, message = sentence.split(": ", 1)
    with pytest.raises(getattr(builtins, error), match="^" + message):
        ERRORS[sentence]()


def test_conventions_table_prints() -> None:
    logits, indices = random_problem(49)
    lines = str(compare_conventions(logits, indices)).splitlines()
    assert len(lines) == 1 + len(CONVENTIONS)
    assert lines[1].startswith("switch") and "after drop" not in lines[0]
    dropped = str(compare_conventions(logits, indices, kept=np.ones(indices.shape, bool))).splitlines()
    assert dropped[0].endswith("after drop") and len(set(map(len, dropped))) == 1
