"""Arrays in: every user array passes through here once and comes out as the core wants it.

C-contiguous, aligned, native byte order, of the layer's dtype - copied only where that is not so already.  What cannot
be meant (objects, complex numbers, masks that would be lost) is refused with the argument's name and a way out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from numpy.lib.array_utils import byte_bounds

from numoe import _core

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]

FLOAT32: np.dtype[Any] = np.dtype(np.float32)
FLOAT64: np.dtype[Any] = np.dtype(np.float64)
BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
INT32: np.dtype[Any] = np.dtype(np.int32)
_OTHER_FLOATS = (BFLOAT16, np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
_PARTS = {"MoEOutput": "out.y", "Routing": "routing.weights", "MoEGrads": "grads.x"}  # what was meant, most likely


def is_ready(x: Any, dtype: np.dtype[Any], ndim: int | None) -> bool:
    """True only if the core takes `x` as it is: what most arrays of most calls are, told in a fraction of 1 µs."""
    if type(x) is not np.ndarray or x.dtype != dtype or (ndim is not None and x.ndim != ndim):
        return False
    flags = x.flags
    return flags.c_contiguous and flags.aligned


def as_float(x: Any, name: str, dtype: Any = None, ndim: int | None = None) -> FloatArray:
    """`x` as a floating-point array ready for the core.

    Any floating dtype is converted to `dtype` (default: float32 and float64 stay, others become float32); a value that
    was finite and would become infinite raises ``ValueError``.
    """
    if dtype is not None:
        if is_ready(x, dtype, ndim):
            return x  # type: ignore[no-any-return]
    elif is_ready(x, FLOAT32, ndim) or is_ready(x, FLOAT64, ndim):
        return x  # type: ignore[no-any-return]
    array = plain_array(x, name)
    if array.dtype == object and type(x).__module__.startswith("numoe"):
        kind = type(x).__name__
        what = f"one of its arrays, e.g. {_PARTS[kind]}" if kind in _PARTS else "an array of numbers"
        raise TypeError(f"{name} is a {kind}; pass {what}.")
    if array.dtype.kind != "f" and array.dtype not in _OTHER_FLOATS:
        raise TypeError(
            f"{name} has dtype {array.dtype}; pass float32 or float64, e.g. np.asarray({name}, dtype=np.float32)."
        )
    if ndim is not None and array.ndim != ndim:
        hint = f"  For one row pass {name}[None]." if array.ndim + 1 == ndim else ""
        raise ValueError(f"{name} must have {ndim} dimension{'s' * (ndim != 1)}; got shape {array.shape}.{hint}")
    if dtype is None:
        dtype = array.dtype.newbyteorder("=") if array.dtype.name in ("float32", "float64") else np.float32
    return _convert(array, name, np.dtype(dtype))


def as_bits(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """bfloat16 numbers as the core takes them: their bits, not a copy."""
    return x.view(np.uint16)


def converted(array: npt.NDArray[Any], dtype: np.dtype[Any]) -> FloatArray:
    """The same numbers, rounded where they must be; between float32 and bfloat16 by all threads."""
    before = array.dtype
    if before == dtype:
        return array
    if before == BFLOAT16 and dtype == FLOAT32:
        return _core.widened(as_bits(_in_order(array)))
    if before == FLOAT32 and dtype == BFLOAT16:
        return _core.rounded(_in_order(array)).view(dtype)
    with np.errstate(all="ignore"):
        return array.astype(dtype)


def _in_order(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """C-contiguous and aligned; a copy only if it must be one."""
    flags = array.flags
    return array if flags.c_contiguous and flags.aligned else np.require(array, requirements=["C", "A"])


def plain_array(x: Any, name: str) -> npt.NDArray[Any]:
    """`x` as an ndarray; subclasses that mean something else, and what NumPy cannot read, are refused."""
    if type(x) is np.ndarray:
        return x
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(
            f"{name} is a masked array and its mask would be lost; pass {name}.filled(0) and mask=~{name}.mask."
        )
    if isinstance(x, np.matrix):
        raise TypeError(
            f"{name} is a np.matrix, which is always 2-D and multiplies differently; pass np.asarray({name})."
        )
    if x is None or isinstance(x, str | bytes | dict | set):
        raise TypeError(f"{name} must be an array of numbers; got {type(x).__name__}.")
    try:
        return np.asarray(x)
    except ValueError as error:
        raise ValueError(f"{name} is not a rectangular array of numbers: {error}") from None
    except (RuntimeError, TypeError) as error:  # torch: requires grad, or not on the CPU
        raise TypeError(
            f"{name} ({type(x).__name__}) cannot become a NumPy array: {error}  "
            "(a torch tensor needs .detach().cpu() first)"
        ) from None


def _convert(array: npt.NDArray[Any], name: str, dtype: np.dtype[Any]) -> FloatArray:
    if array.dtype != dtype:
        narrower = dtype.itemsize < array.dtype.itemsize
        result = converted(array, dtype)
        if narrower and bool(np.any(np.isinf(result) & np.isfinite(array))):
            raise ValueError(
                f"{name} holds {array.dtype} values beyond the range of {dtype} (largest magnitude "
                f"{np.max(np.abs(array[np.isfinite(array)])):.3g}); rescale it or use a {array.dtype} layer."
            )
        array = result
    return _in_order(array)


def line_aligned(array: npt.NDArray[Any], dtype: np.dtype[Any] | None = None) -> npt.NDArray[Any]:
    """The same numbers, in `dtype`, from the start of a cache line on: loads that cross lines cost twice.

    NumPy's own arrays start anywhere, large ones mostly 16 bytes into a line.  A copy, unless nothing needs changing.
    """
    dtype = array.dtype if dtype is None else dtype
    flags = array.flags
    if array.dtype == dtype and flags.c_contiguous and flags.writeable and array.ctypes.data % 64 == 0:
        return array
    placed = _core.line_aligned_zeros(array.shape, dtype)
    placed[...] = array
    return placed


def overlap(
    written: Mapping[str, npt.NDArray[Any]], read: Mapping[str, npt.NDArray[Any]] | None = None
) -> tuple[str, str] | None:
    """The names of two arrays that share memory, one of them written at least; None if there are none.

    >>> a = np.zeros(4)
    >>> overlap({"even": a[::2], "odd": a[1::2]}), overlap({"head": a[:3]}, {"tail": a[2:], "all": a})
    (None, ('head', 'all'))
    """
    named = [*written.items(), *(read or {}).items()]
    if len(written) * len(named) < 200 and not any(
        np.may_share_memory(array, other) for i, array in enumerate(written.values()) for _, other in named[i + 1 :]
    ):
        return None  # a few µs for the arrays of a small layer
    spans = sorted((*byte_bounds(array), i) for i, (_, array) in enumerate(named) if array.size)
    begun: list[tuple[int, int]] = []  # end and number of those that reach to where the next one starts
    for start, stop, i in spans:
        begun = [(end, j) for end, j in begun if end > start]
        for _, j in begun:
            (first, one), (second, other) = named[min(i, j)], named[max(i, j)]
            if min(i, j) < len(written) and np.shares_memory(one, other):
                return first, second
        begun.append((stop, i))
    return None


def as_mask(mask: Any, num_tokens: int, leading: tuple[int, ...] | None = None, name: str = "mask") -> BoolArray:
    """A padding mask (T,) of bools, ``True`` for real tokens; given in x's leading shape or as (T,)."""
    array = plain_array(mask, name)
    if array.dtype != np.bool_:
        raise TypeError(f"{name} must be an array of bools, True for real tokens; got dtype {array.dtype}.")
    if array.shape not in ((num_tokens,), leading):
        expected = (num_tokens,) if leading is None else leading
        raise ValueError(f"{name} must have one entry per token, shape {expected}; got {array.shape}.")
    stored = np.require(array.reshape(num_tokens), requirements=["C", "A"]).view(np.uint8)
    real: BoolArray = stored != 0
    return real  # a bool array made by .view(bool) may hold other bytes than 0 and 1


def as_lengths(lengths: Any, num_tokens: int, name: str = "sequence_lengths") -> npt.NDArray[np.int64] | None:
    """Lengths (B,) of the sequences that make up T tokens, each in 0..T, with sum T; None stays None."""
    if lengths is None:
        return None
    array = plain_array(lengths, name)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(f"{name} must be a 1-D array of ints; got shape {array.shape}, dtype {array.dtype}.")
    bad = np.flatnonzero((array < 0) | (array > num_tokens))
    if bad.size:
        raise ValueError(
            f"{name}[{bad[0]}] must be in 0..T ({num_tokens}); got {array[bad[0]]}.  "
            "A length counts all rows of one sequence, masked ones included."
        )
    total = sum(array.tolist())  # of Python ints, which cannot wrap around
    if total != num_tokens:
        raise ValueError(f"{name} must sum to T = {num_tokens}, the number of tokens; they sum to {total}.")
    return array.astype(np.int64)


def as_indices(indices: Any, num_experts: int, name: str = "indices") -> IntArray:
    """Chosen experts (T, K) as int32, each in ``0..E-1`` or -1 for "not routed"; anything else names its position."""
    array = plain_array(indices, name)
    if is_ready(array, INT32, 2) and (array.size == 0 or (array.min() >= -1 and array.max() < num_experts)):
        return array
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must be an array of ints; got dtype {array.dtype}.")
    if array.ndim != 2:
        hint = f"  For one choice per token pass {name}[:, None]." if array.ndim == 1 else ""
        raise ValueError(f"{name} must have shape (T, K); got {array.shape}.{hint}")
    bad = (array < -1) | (array >= num_experts) if array.dtype.kind == "i" else array >= num_experts
    if bad.any():
        t, k = (int(i) for i in np.argwhere(bad)[0])
        raise IndexError(
            f"{name}[{t}, {k}] = {array[t, k]} is out of range for num_experts = {num_experts} (-1 means not routed)."
        )
    return np.require(array, np.int32, requirements=["C", "A"])


def check_distinct(indices: npt.NDArray[np.signedinteger[Any]], name: str = "indices") -> None:
    """A token may visit an expert once only."""
    if indices.shape[1] == 1:
        return
    ordered = np.sort(indices, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        t, k = (int(i) for i in np.argwhere(twice)[0])
        raise ValueError(
            f"{name}[{t}] chooses expert {ordered[t, k]} twice; the choices of one token must be distinct."
        )
