"""A byte-level language model: embeddings of the previous bytes → linear → MoE → logits over 256 bytes.

Only the MoE layer comes from numoe; the rest is NumPy, each forward next to its backward.

Letters: T tokens (positions), n previous bytes, C width of an embedding, D d_model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from numoe.demo.data import Batch, Bytes, Ints
from numoe.layer import MoELayer
from numoe.outputs import MoEOutput

Floats = npt.NDArray[np.float32]
EPS = np.float32(1e-6)  # in the root-mean-square norm


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the model; `moe` holds the options of its `MoELayer` except ``d_model``."""

    moe: dict[str, Any]
    context: int = 10  # n
    embedding: int = 32  # C
    d_model: int = 64  # D


# ------------------------------------------------------------------------------------------- the NumPy parts


def embed(contexts: Bytes, table: Floats) -> Floats:
    """(T, n) bytes, (256, C) → (T, n·C): the embeddings of the previous bytes side by side."""
    return table[contexts].reshape(len(contexts), -1)


def embed_backward(dx: Floats, contexts: Bytes) -> Floats:
    """(T, n·C) → (256, C): every byte value collects the gradients of its occurrences."""
    flat = contexts.ravel()
    rows = dx.reshape(flat.size, -1)
    order = np.argsort(flat, kind="stable")
    present, starts = np.unique(flat[order], return_index=True)
    dtable = np.zeros((256, rows.shape[1]), dx.dtype)
    dtable[present] = np.add.reduceat(rows[order], starts, axis=0)
    return dtable


def rms_norm(x: Floats, gain: Floats) -> tuple[Floats, Floats]:
    """Y = gain · x / r with r = sqrt(mean_d x² + eps), (T, D); also returns 1/r, (T, 1)."""
    scale = 1 / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + EPS)
    return x * scale * gain, scale


def rms_norm_backward(dy: Floats, x: Floats, gain: Floats, scale: Floats) -> tuple[Floats, Floats]:
    """Dx = (u - x̂ · mean_d(u x̂)) / r with x̂ = x / r, u = dy · gain;  dgain = Σ_t dy x̂."""
    unit = x * scale
    u = dy * gain
    dx = (u - unit * np.mean(u * unit, axis=1, keepdims=True)) * scale
    return dx, (dy * unit).sum(axis=0)


def cross_entropy(logits: Floats, targets: Bytes) -> tuple[Floats, Floats]:
    """Nats per token (T,) and the gradient (T, 256) of their mean."""
    rows = np.arange(len(targets))
    shifted = logits - logits.max(axis=1, keepdims=True)
    of_target = shifted[rows, targets]
    probability = np.exp(shifted, out=shifted)
    total = probability.sum(axis=1, keepdims=True)
    nats = np.log(total[:, 0]) - of_target
    probability /= total
    probability[rows, targets] -= 1
    probability /= np.float32(len(targets))
    return nats, probability


# ------------------------------------------------------------------------------------------------ the model


@dataclass(frozen=True)
class Pass:
    """One forward: the logits (T, 256) and what the backward needs."""

    logits: Floats
    contexts: Bytes
    embedded: Floats  # (T, n·C)
    before: Floats  # (T, D), input of the first norm
    scale_in: Floats  # (T, 1)
    moe: MoEOutput
    after: Floats  # (T, D), before + moe.y: input of the second norm
    scale_out: Floats  # (T, 1)
    normed: Floats  # (T, D), what the logits are made from


class ByteModel:
    """The parameters, as a nested dict that `numoe.optim` understands, and the two directions."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        rng = np.random.default_rng([seed, 0xB17E])
        self.config = config
        self.moe = MoELayer(d_model=config.d_model, rng=int(rng.integers(2**63)), **config.moe)
        width = config.context * config.embedding

        def normal(*shape: int, std: float) -> Floats:
            return rng.standard_normal(shape, np.float32) * np.float32(std)

        self.params: dict[str, Any] = {
            "embedding": normal(256, config.embedding, std=1.0),
            "w_context": normal(width, config.d_model, std=width**-0.5),
            "norm_in": np.ones(config.d_model, np.float32),
            "moe": self.moe.params,
            "norm_out": np.ones(config.d_model, np.float32),
            "w_logits": normal(config.d_model, 256, std=config.d_model**-0.5),
        }

    def forward(self, contexts: Bytes) -> Pass:
        """(T, n) bytes → logits (T, 256)."""
        p = self.params
        embedded = embed(contexts, p["embedding"])
        before = embedded @ p["w_context"]
        u, scale_in = rms_norm(before, p["norm_in"])
        moe = self.moe.forward(u)
        after = before + moe.y
        normed, scale_out = rms_norm(after, p["norm_out"])
        logits = normed @ p["w_logits"]
        return Pass(logits, contexts, embedded, before, scale_in, moe, after, scale_out, normed)

    def backward(self, dlogits: Floats, done: Pass) -> dict[str, Any]:
        """Gradient of every parameter, auxiliary loss included, by the lines of `forward` in reverse order."""
        p = self.params
        g: dict[str, Any] = {}
        # logits = normed @ w_logits
        g["w_logits"] = done.normed.T @ dlogits
        dnormed = dlogits @ p["w_logits"].T
        # normed = rms_norm(after, norm_out)
        dafter, g["norm_out"] = rms_norm_backward(dnormed, done.after, p["norm_out"], done.scale_out)
        # after = before + moe(u)
        moe = self.moe.backward(dafter, done.moe)
        g["moe"] = moe.params
        # u = rms_norm(before, norm_in)
        dbefore, g["norm_in"] = rms_norm_backward(moe.x, done.before, p["norm_in"], done.scale_in)
        dbefore += dafter
        # before = embed(contexts, embedding) @ w_context
        g["w_context"] = done.embedded.T @ dbefore
        g["embedding"] = embed_backward(dbefore @ p["w_context"].T, done.contexts)
        return g

    def num_params(self) -> tuple[int, int]:
        """All learned numbers, and those that one token uses."""
        plain = sum(value.size for value in self.params.values() if isinstance(value, np.ndarray))
        return plain + self.moe.config.num_params(), plain + self.moe.config.num_active_params()


def predict(model: ByteModel, batch: Batch, chunk: int = 2048) -> tuple[npt.NDArray[np.float64], Ints]:
    """Bits of every target (T,) and the experts that were chosen for it (T, K)."""
    bits, chosen = [], []
    for start in range(0, len(batch.targets), chunk):
        part = slice(start, start + chunk)
        done = model.forward(batch.contexts[part])
        bits.append(cross_entropy(done.logits, batch.targets[part])[0] / np.log(2.0))
        chosen.append(done.moe.routing.indices)
    return np.concatenate(bits).astype(np.float64), np.concatenate(chosen).astype(np.int64)
