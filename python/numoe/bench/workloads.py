"""What is measured: layer shapes, routings, and the work each of them is at least."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from numoe.config import MoEConfig, SharedExpertConfig

NUM_ROUTINGS = 8  # rotated from call to call: a routing that repeats measures the L3 cache, not memory

Routings = list[tuple[npt.NDArray[np.int32], npt.NDArray[Any]]]  # indices (T, K), weights (T, K)


DTYPES = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def compute_dtype(dtype: str) -> str:
    """In what is added up; also the dtype of the router's weights."""
    return "float64" if dtype == "float64" else "float32"


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """The sizes of an MoE layer: E experts of which K are active, D × F each, and perhaps a shared one."""

    name: str
    num_experts: int
    top_k: int
    d_model: int
    d_ff: int
    form: str = "glu"
    activation: str = "silu"
    bias: bool = False
    shared_d_ff: int = 0

    @property
    def matrices(self) -> int:
        """gate, up and down; a plain MLP has no gate."""
        return 3 if self.form == "glu" else 2

    @property
    def numbers_per_expert(self) -> int:
        """Of its matrices; the biases' share is below 0.1 %."""
        return self.matrices * self.d_model * self.d_ff

    @property
    def shared_numbers(self) -> int:
        """Of the shared expert's matrices."""
        return self.matrices * self.d_model * self.shared_d_ff

    @property
    def numbers(self) -> int:
        """Of all experts' matrices."""
        return self.num_experts * self.numbers_per_expert + self.shared_numbers

    def reduced(self, divisor: int = 2) -> LayerShape:
        """The same layer with narrower tokens and experts, ``name/divisor``."""
        return dataclasses.replace(
            self,
            name=f"{self.name}/{divisor}",
            d_model=self.d_model // divisor,
            d_ff=self.d_ff // divisor,
            shared_d_ff=self.shared_d_ff // divisor,
        )

    def config(self, dtype: str) -> MoEConfig:
        """The layer's settings: softmax router, nothing dropped; float32 for bfloat16."""
        shared = None
        if self.shared_d_ff:
            shared = SharedExpertConfig(d_ff=self.shared_d_ff, form=self.form, activation=self.activation)
        return MoEConfig.from_options(
            num_experts=self.num_experts,
            top_k=self.top_k,
            d_model=self.d_model,
            d_ff=self.d_ff,
            form=self.form,
            activation=self.activation,
            bias=self.bias,
            shared=shared,
            dtype=compute_dtype(dtype),
        )


def _layers() -> dict[str, LayerShape]:
    def layer(name: str, sizes: tuple[int, int, int, int], **options: Any) -> LayerShape:
        E, K, D, F = sizes
        return LayerShape(name=name, num_experts=E, top_k=K, d_model=D, d_ff=F, **options)

    switch: dict[str, Any] = {"form": "mlp", "activation": "relu"}
    shapes = (
        layer("tiny", (8, 2, 256, 512)),
        layer("small", (16, 2, 512, 1024)),
        layer("switch-base-8", (8, 1, 768, 3072), **switch),
        layer("switch-base-64", (64, 1, 768, 3072), **switch),
        layer("olmoe-1b-7b", (64, 8, 2048, 1024)),
        layer("qwen3-30b-a3b", (128, 8, 2048, 768)),
        layer("deepseek-v2-lite", (64, 6, 2048, 1408), shared_d_ff=2 * 1408),
        layer("gpt-oss-20b", (32, 4, 2880, 2880), bias=True),  # without its clamp
        layer("256-experts", (256, 8, 2048, 512)),
        layer("mixtral-8x7b", (8, 2, 4096, 14336)),
    )
    return {shape.name: shape for shape in shapes}


LAYERS = _layers()
DEFAULT_LAYERS = ("tiny", "small", "switch-base-8", "qwen3-30b-a3b", "deepseek-v2-lite")
QUICK_LAYERS = ("tiny", "small")
_LARGE = 100_000_000  # numbers from which a default run halves D and F


def parse_layer(text: str) -> LayerShape:
    """A layer by its name, or four sizes ``ExKxDxF``.

    >>> parse_layer("8x2x256x512").numbers_per_expert
    393216
    """
    if text in LAYERS:
        return LAYERS[text]
    sizes = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
    if sizes is None:
        raise ValueError(
            f"layer {text!r} is unknown; give one of {', '.join(LAYERS)}, or sizes ExKxDxF like 8x2x256x512."
        )
    E, K, D, F = map(int, sizes.groups())
    if K > E:
        raise ValueError(f"layer {text!r}: top_k = {K} must be <= num_experts = {E}.")
    return LayerShape(name=text, num_experts=E, top_k=K, d_model=D, d_ff=F)


def fit_default_run(shape: LayerShape) -> LayerShape:
    """A layer in a size that takes seconds, not minutes; small ones stay."""
    return shape.reduced() if shape.numbers > _LARGE else shape


# ── routings ────────────────────────────────────────────────────────────────────────────────────────────────


def _top(scores: npt.NDArray[Any], top_k: int) -> npt.NDArray[np.int32]:
    """The columns of the K largest scores of every row."""
    return np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k].astype(np.int32)


def _balanced(rng: np.random.Generator, tokens: int, shape: LayerShape) -> npt.NDArray[np.int32]:
    """Round robin through the experts in a random order: loads differ by at most 1."""
    order = rng.permutation(shape.num_experts).astype(np.int32)
    return order[np.arange(tokens * shape.top_k).reshape(tokens, shape.top_k) % shape.num_experts]


def _uniform(rng: np.random.Generator, tokens: int, shape: LayerShape) -> npt.NDArray[np.int32]:
    """Every set of K experts is equally likely."""
    return _top(rng.random((tokens, shape.num_experts), np.float32), shape.top_k)


def _zipf(rng: np.random.Generator, tokens: int, shape: LayerShape) -> npt.NDArray[np.int32]:
    """Draws without replacement, the r-th most popular expert with weight 1/r (Gumbel top-k)."""
    log_weight = -np.log(rng.permutation(shape.num_experts) + 1)
    return _top(log_weight + rng.gumbel(size=(tokens, shape.num_experts)), shape.top_k)


def _one(rng: np.random.Generator, tokens: int, shape: LayerShape) -> npt.NDArray[np.int32]:
    """All tokens to the same K experts, the worst skew there is."""
    return np.tile(rng.permutation(shape.num_experts)[: shape.top_k].astype(np.int32), (tokens, 1))


ROUTINGS: dict[str, Callable[[np.random.Generator, int, LayerShape], npt.NDArray[np.int32]]] = {
    "uniform": _uniform,
    "balanced": _balanced,
    "zipf": _zipf,
    "one": _one,
}


def make_routings(kind: str, tokens: int, shape: LayerShape, dtype: str, seed: int = 0) -> Routings:
    """`NUM_ROUTINGS` independent routings of one kind, with positive weights that sum to 1 per token."""
    rng = np.random.default_rng([seed, tokens, shape.num_experts])
    result: Routings = []
    for _ in range(NUM_ROUTINGS):
        indices = np.ascontiguousarray(ROUTINGS[kind](rng, tokens, shape))
        weights = rng.random(indices.shape) + 0.1
        result.append((indices, (weights / weights.sum(axis=1, keepdims=True)).astype(compute_dtype(dtype))))
    return result


# ── roofline ────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Cost:
    """The least work of one call: arithmetic, memory traffic, and what all routings together touch."""

    flops: float
    bytes: float
    working_set: float
    experts_hit: float


def cost(shape: LayerShape, routings: Routings, itemsize: int, *, backward: bool) -> Cost:
    """The mean over `routings`.

    Forward: 2 operations per number of an expert and row; every hit expert's matrices are read once, x is
    read, y written.  With the backward: three times the operations, whatever is computed again; the
    matrices are read twice and their gradients written once; x and dy are read, y and dx written.
    """
    indices = [chosen for chosen, _ in routings]
    tokens, top_k = indices[0].shape
    hit = float(np.mean([len(np.unique(chosen)) for chosen in indices]))
    touched = len(np.unique(np.concatenate([chosen.ravel() for chosen in indices])))
    operations = 2.0 * tokens * (top_k * shape.numbers_per_expert + shape.shared_numbers)
    weights = hit * shape.numbers_per_expert + shape.shared_numbers
    all_weights = touched * shape.numbers_per_expert + shape.shared_numbers
    rows = 2.0 * tokens * shape.d_model
    return Cost(
        flops=operations * (3 if backward else 1),
        bytes=itemsize * (3 * weights + 2 * rows if backward else weights + rows),
        working_set=itemsize * (2 * all_weights + 2 * rows if backward else all_weights + rows),
        experts_hit=hit,
    )


def roofline(work: Cost, peak: float, bandwidth: float) -> tuple[float, str]:
    """The shortest possible time in seconds, and what limits it: ``max(flops / peak, bytes / bandwidth)``.

    >>> roofline(Cost(flops=200.0, bytes=30.0, working_set=30.0, experts_hit=1.0), peak=100.0, bandwidth=10.0)
    (3.0, 'memory')
    """
    compute, memory = work.flops / peak, work.bytes / bandwidth
    return (memory, "memory") if memory > compute else (compute, "compute")
