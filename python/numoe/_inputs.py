"""What a caller gives a layer's forward: checked, and as the steps take it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from numoe._arrays import BoolArray, FloatArray, IntArray, as_float, as_indices, as_mask, converted, plain_array
from numoe.config import MoEConfig
from numoe.routing import Routing


def tokens_of(x: Any, mask: Any, config: MoEConfig) -> tuple[FloatArray, tuple[int, ...], BoolArray | None]:
    """X as (T, D) in the dtype of the arithmetic with zeros where masked, its original shape, and the mask (T,)."""
    width = config.d_model
    check_count(x, config.router.top_k)
    array = as_float(x, "x", config.array_dtype)
    shape = array.shape
    if not shape or shape[-1] != width:
        raise ValueError(f"x must have shape (..., d_model) = (..., {width}); got {shape}.")
    tokens = array if len(shape) == 2 else array.reshape(math.prod(shape[:-1]), width)
    tokens = converted(tokens, config.compute_dtype)
    if mask is None:
        return tokens, shape, None
    valid = as_mask(mask, len(tokens), shape[:-1])
    return np.where(valid[:, None], tokens, tokens.dtype.type(0)), shape, valid


def check_count(x: Any, choices: int) -> None:
    """The assignments of x (..., D) can be numbered; asked before x is converted."""
    tokens = math.prod(getattr(x, "shape", ())[:-1])
    if tokens * choices >= 2**31:
        raise OverflowError(f"T * K = {tokens} * {choices} must be below 2**31; split the batch.")


def lengths_of(shape: tuple[int, ...]) -> IntArray | None:
    """Sequence lengths of x by its shape: all but the last two axes count sequences."""
    return np.full(math.prod(shape[:-2]), shape[-2], np.int32) if len(shape) > 2 else None


def check_out(out: Any, x: FloatArray, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """``out=`` can take the result without touching x."""
    if not isinstance(out, np.ndarray) or out.dtype != dtype:
        raise TypeError(f"out must be a {dtype} array; got {getattr(out, 'dtype', type(out).__name__)}.")
    if out.shape != shape or not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError(f"out must be writable, C-contiguous and of shape {shape}; got {out.shape}, {out.strides=}.")
    if np.shares_memory(out, x):
        raise ValueError("out overlaps x; pass another array.")


# ── where the routing comes from ─────────────────────────────────────────────────────────────────────────────────────


def routing_source(logits: Any, indices: Any, weights: Any) -> str:
    """Where the routing comes from: "x", "logits" or "indices"."""
    names = [n for n, v in (("logits", logits), ("indices", indices), ("weights", weights)) if v is not None]
    if names not in ([], ["logits"], ["indices", "weights"]):
        raise ValueError(f"give logits, or indices and weights, or none of them; got {' and '.join(names)} only.")
    return names[0] if names else "x"


def outside_logits(logits: Any, shape: tuple[int, ...], config: MoEConfig) -> FloatArray:
    """The caller's router logits as (T, E)."""
    array, tokens = as_float(logits, "logits", config.compute_dtype), math.prod(shape[:-1])
    experts = config.router.num_experts
    if array.shape not in ((*shape[:-1], experts), (tokens, experts)):
        raise ValueError(f"logits must have x's leading shape {shape[:-1]} and E = {experts}; got {array.shape}.")
    return array.reshape(tokens, experts)


def outside_routing(
    indices: Any, weights: Any, shape: tuple[int, ...], real: BoolArray | None, config: MoEConfig
) -> Routing:
    """The caller's decision; masked tokens are not routed, and what is not routed weighs 0."""
    choices = config.router.top_k
    width = (math.prod(shape[:-1]), choices)
    chosen, value = plain_array(indices, "indices"), as_float(weights, "weights", config.compute_dtype)
    if chosen.shape != value.shape or chosen.shape not in ((*shape[:-1], choices), width):
        raise ValueError(
            f"indices and weights must both have x's leading shape {shape[:-1]} and K = {choices}; got "
            f"{chosen.shape} and {value.shape}."
        )
    chosen = as_indices(chosen.reshape(width), config.router.num_experts)
    value = value.reshape(width)
    if real is not None:
        chosen = np.where(real[:, None], chosen, np.int32(-1))
    return Routing(indices=chosen, weights=np.where(chosen >= 0, value, value.dtype.type(0)), mask=real)
