"""What the tests of `numoe.losses` share: random arguments, every loss by name, its gradients by argument."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from numoe.losses import CONVENTIONS, Loss, importance_loss, load_balance_loss, load_loss, z_loss

SCORES = ("softmax", "softmax_chosen", "sigmoid", "sqrt_softplus")
DTYPES = (np.float32, np.float64)
EPS = np.finfo(np.float64).eps


def top_k(logits: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-logits, axis=1, kind="stable")[:, :k]


def random_problem(seed: int, T: int = 12, E: int = 5, K: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Logits with a bias towards the last experts, and their top K."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((T, E)) + np.linspace(-1, 1, E)
    return logits, top_k(logits, K)


def random_noise(seed: int, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Noisy logits and their noise_std (T, E)."""
    rng = np.random.default_rng(seed)
    noise_std = rng.uniform(0.3, 1.5, logits.shape)
    return logits + noise_std * rng.standard_normal(logits.shape), noise_std


def random_arrays(seed: int, T: int = 12) -> dict[str, np.ndarray]:
    """The arguments of all losses: E = 5, K = 2; one choice is not routed."""
    logits, indices = random_problem(seed, T)
    indices[3, 1] = -1
    noisy, noise_std = random_noise(seed + 1, logits)
    weights = np.random.default_rng(seed + 2).random(indices.shape)
    names = ("logits", "indices", "noisy_logits", "noise_std", "weights")
    return dict(zip(names, (logits, indices, noisy, noise_std, weights), strict=True))


def balance(a: Any, mask: Any = None, lengths: Any = None, **options: Any) -> Loss:
    return load_balance_loss(a["logits"], a["indices"], mask=mask, sequence_lengths=lengths, **options)


def load(a: Any, mask: Any = None, lengths: Any = None, *, k: int) -> Loss:
    return load_loss(a["logits"], a["noisy_logits"], a["noise_std"], k, mask=mask)


# name -> loss(arrays, mask, sequence lengths)
LOSSES: dict[str, Callable[..., Loss]] = {
    f"{c} {s}": partial(balance, convention=c, score=s) for c in CONVENTIONS for s in SCORES
}
LOSSES |= {f"load {k}": partial(load, k=k) for k in (1, 2, 4, 5)}
LOSSES["importance"] = lambda a, mask=None, _=None: importance_loss(a["weights"], a["indices"], 5, mask=mask)
LOSSES["z"] = lambda a, mask=None, _=None: z_loss(a["logits"], mask=mask)

for_both_dtypes = pytest.mark.parametrize("dtype", DTYPES)
for_every_loss = pytest.mark.parametrize("name", LOSSES)
with_and_without_mask = pytest.mark.parametrize("masked", [False, True])


def gradients(loss: Loss) -> dict[str, np.ndarray]:
    """Argument name → its gradient."""
    return {name[1:]: g for name, g in vars(loss).items() if name != "value" and g is not None}
