"""Types of the compiled core.  Private: arrays must be C-contiguous, aligned and of exactly the stated dtype."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Float: TypeAlias = NDArray[np.floating[Any]]
Int32: TypeAlias = NDArray[np.int32]
Int64: TypeAlias = NDArray[np.int64]
Bool: TypeAlias = NDArray[np.bool_]

bad_num_threads: str | None

def widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]: ...
def rounded(a: NDArray[np.float32]) -> NDArray[np.uint16]: ...
def line_aligned_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]: ...

class RouterOptions:
    def __init__(
        self,
        *,
        top_k: int,
        score: str,
        normalize: str,
        eps: float,
        eps_mode: str,
        scale: float,
        num_groups: int,
        groups_kept: int,
        group_score: str,
    ) -> None: ...

class ExpertOptions:
    def __init__(self, *, activation: str, weight_on: str) -> None: ...

class _PackedLayer:
    def __init__(
        self,
        params: dict[str, Float],
        choice_bias: Float | None,
        router: RouterOptions,
        options: ExpertOptions,
        shared_params: dict[str, Float] | None,
        shared_options: ExpertOptions,
    ) -> None: ...
    @property
    def nbytes(self) -> int: ...
    def forward(self, x: Float) -> Float: ...
    def forward_routed(self, x: Float, indices: Int32, weights: Float) -> Float: ...
    def forward_ready(self, x: object) -> Float | None: ...
    def experts(
        self,
        x: Float,
        offsets: Int64,
        row_token: Int32,
        row_assignment: Int32,
        top_k: int,
        weights: Float | None,
    ) -> Float: ...

class PackedLayerFloat32(_PackedLayer): ...
class PackedLayerFloat64(_PackedLayer): ...
class PackedLayerBfloat16(_PackedLayer): ...

class ReadProbe:
    def __init__(self, bytes: int) -> None: ...
    @property
    def size(self) -> int: ...
    def rate(self, bytes: int, threads: int) -> float: ...

class ProductProbe:
    def __init__(self, product: str, rows: int, depth: int, cols: int, matrices: int, dtype: str) -> None: ...
    def rate(self, seconds: float) -> float: ...

def router_logits(x: Float, w_router: Float, b_router: Float | None) -> Float: ...
def router_logits_backward(dlogits: Float, x: Float, w_router: Float) -> tuple[Float, Float]: ...
def route(
    logits: Float, options: RouterOptions, choice_bias: Float | None, mask: Bool | None
) -> tuple[Int32, Float]: ...
def route_backward(logits: Float, indices: Int32, dweights: Float, options: RouterOptions) -> Float: ...
def dispatch(
    indices: Int32, weights: Float | None, num_experts: int, groups: Int64 | None, priority: str
) -> tuple[Int64, Int32, Int32, Int32]: ...
def layer_forward(
    x: Float,
    mask: Bool | None,
    w_router: Float,
    b_router: Float | None,
    choice_bias: Float | None,
    router: RouterOptions,
    params: dict[str, Float],
    options: ExpertOptions,
) -> Float: ...
def renormalize_kept(weights: Float, assignment_row: Int32, scale: float) -> Float: ...
def renormalize_kept_backward(weights: Float, assignment_row: Int32, scale: float, dweights: Float) -> Float: ...
def combine(
    rows: Float,
    offsets: Int64,
    row_token: Int32,
    row_assignment: Int32,
    num_tokens: int,
    top_k: int,
    weights: Float | None,
) -> Float: ...
def combine_backward(
    dy: Float,
    rows: Float,
    offsets: Int64,
    row_token: Int32,
    row_assignment: Int32,
    top_k: int,
    weights: Float | None,
) -> tuple[Float, Float]: ...
def experts_forward(
    x: Float,
    offsets: Int64,
    row_token: Int32,
    row_assignment: Int32,
    top_k: int,
    weights: Float | None,
    params: dict[str, Float],
    options: ExpertOptions,
    combined: bool,
    keep_cache: bool,
) -> tuple[Float, Float | None, Float | None]: ...
def experts_backward(
    dresult: Float,
    x: Float,
    offsets: Int64,
    row_token: Int32,
    row_assignment: Int32,
    top_k: int,
    weights: Float | None,
    params: dict[str, Float],
    options: ExpertOptions,
    combined: bool,
    cache_gate: Float | None,
    cache_up: Float | None,
    into: Mapping[str, Float] | None,
    accumulate: bool,
) -> tuple[Float, Float | None, dict[str, Float]]: ...
def load_balance_loss(
    logits: Float, indices: Int32, convention: str, score: str, mask: Bool | None, sequence_lengths: Int64 | None
) -> tuple[float, Float]: ...
def importance_loss(weights: Float, indices: Int32, num_experts: int, mask: Bool | None) -> tuple[float, Float]: ...
def load_loss(
    logits: Float, noisy_logits: Float, noise_std: Float, top_k: int, mask: Bool | None
) -> tuple[float, Float, Float, Float]: ...
def z_loss(logits: Float, mask: Bool | None) -> tuple[float, Float]: ...
def num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def available_cpus() -> int: ...
def target() -> str: ...
def targets() -> list[dict[str, Any]]: ...
def emulated_targets() -> list[dict[str, Any]]: ...
def build_info() -> dict[str, str]: ...
def peak_probes() -> list[dict[str, Any]]: ...
def probe_peak(vectors: str, dtype: str, threads: int, seconds: float) -> float: ...
