"""A byte-level language model: embeddings of the previous bytes → linear → MoE layers → logits over 256 bytes.

Only the MoE layers come from numoe; the rest is NumPy, each forward next to its backward.

Letters: T tokens (positions), n previous bytes, C width of an embedding, D d_model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from numoe.demo.data import Batch, Bytes
from numoe.layer import MoELayer, MoEOutput

Floats = npt.NDArray[np.float32]
EPS = np.float32(1e-6)  # in the root-mean-square norm


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of the model; `moe` holds the options of every `MoELayer` except ``d_model``."""

    moe: dict[str, Any]
    context: int = 12  # n
    embedding: int = 24  # C
    d_model: int = 64  # D
    num_layers: int = 1


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
    shifted = logits - logits.max(axis=1, keepdims=True)
    probability = np.exp(shifted)
    total = probability.sum(axis=1, keepdims=True)
    rows = np.arange(len(targets))
    nats = np.log(total[:, 0]) - shifted[rows, targets]
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
    hidden: list[Floats]  # (T, D) before each norm
    scales: list[Floats]  # (T, 1) of each norm
    normed: Floats  # (T, D), what the logits are made from
    moe: list[MoEOutput]


class ByteModel:
    """The parameters, as a nested dict that `numoe.optim` understands, and the two directions."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        rng = np.random.default_rng([seed, 0xB17E])
        self.config = config
        wide = config.context * config.embedding
        self.layers = [
            MoELayer(d_model=config.d_model, rng=rng.integers(2**63), **config.moe) for _ in range(config.num_layers)
        ]

        def normal(*shape: int, std: float) -> Floats:
            return rng.standard_normal(shape, np.float32) * np.float32(std)

        self.params: dict[str, Any] = {
            "embedding": normal(256, config.embedding, std=1.0),
            "w_context": normal(wide, config.d_model, std=wide**-0.5),
            "w_logits": normal(config.d_model, 256, std=config.d_model**-0.5),
        }
        self.params |= {f"norm_{i}": np.ones(config.d_model, np.float32) for i in range(config.num_layers + 1)}
        self.params |= {f"moe_{i}": layer.params for i, layer in enumerate(self.layers)}

    def forward(self, contexts: Bytes) -> Pass:
        """(T, n) bytes → logits (T, 256)."""
        p = self.params
        embedded = embed(contexts, p["embedding"])
        x = embedded @ p["w_context"]
        hidden, scales, outs = [], [], []
        for i, layer in enumerate(self.layers):
            u, scale = rms_norm(x, p[f"norm_{i}"])
            out = layer.forward(u)
            hidden.append(x)
            scales.append(scale)
            outs.append(out)
            x = x + out.y
        normed, scale = rms_norm(x, p[f"norm_{len(self.layers)}"])
        return Pass(normed @ p["w_logits"], contexts, embedded, [*hidden, x], [*scales, scale], normed, outs)

    def backward(self, dlogits: Floats, done: Pass) -> dict[str, Any]:
        """Gradient of every parameter, auxiliary losses included; each line is the adjoint of one in `forward`."""
        p, last = self.params, len(self.layers)
        grads: dict[str, Any] = {"w_logits": done.normed.T @ dlogits}
        dnormed = dlogits @ p["w_logits"].T
        dx, grads[f"norm_{last}"] = rms_norm_backward(dnormed, done.hidden[last], p[f"norm_{last}"], done.scales[last])
        for i in reversed(range(last)):
            moe = self.layers[i].backward(dx, done.moe[i])
            grads[f"moe_{i}"] = moe.params
            du, grads[f"norm_{i}"] = rms_norm_backward(moe.x, done.hidden[i], p[f"norm_{i}"], done.scales[i])
            dx = dx + du
        grads["w_context"] = done.embedded.T @ dx
        grads["embedding"] = embed_backward(dx @ p["w_context"].T, done.contexts)
        return grads

    def num_params(self) -> tuple[int, int]:
        """All learned numbers, and those that one token uses."""
        plain = sum(value.size for value in self.params.values() if isinstance(value, np.ndarray))
        configs = [layer.config for layer in self.layers]
        return plain + sum(c.num_params() for c in configs), plain + sum(c.num_active_params() for c in configs)


def held_out_bits(model: ByteModel, batch: Batch, chunk: int = 2048) -> tuple[npt.NDArray[np.float64], Floats]:
    """Bits of every target (T,), and the load of each expert by kind of text, (kinds, layers, E)."""
    kinds, experts = int(batch.kinds.max()) + 1, model.layers[0].config.router.num_experts
    load = np.zeros((kinds, len(model.layers), experts), np.float32)
    bits = []
    for start in range(0, len(batch.targets), chunk):
        part = slice(start, start + chunk)
        done = model.forward(batch.contexts[part])
        bits.append(cross_entropy(done.logits, batch.targets[part])[0] / np.log(2.0))
        for i, out in enumerate(done.moe):
            kind = np.repeat(batch.kinds[part], out.routing.indices.shape[1])
            np.add.at(load, (kind, i, out.routing.indices.ravel()), 1)
    return np.concatenate(bits).astype(np.float64), load
