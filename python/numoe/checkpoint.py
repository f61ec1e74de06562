"""Arrays on disk: one safetensors file with the configuration inside, written whole or not at all.

Reading executes nothing.  The safetensors library checks the file's structure; this module checks that it is ours and
that names, shapes and dtypes are the expected ones before anything is used.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from numoe._arrays import as_float

FORMAT = "numoe-1"
Specs = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]  # name -> shape and dtype
_REFUSED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


class CheckpointError(ValueError):
    """A state or a file that does not fit; raised before anything was changed."""


def save(path: Any, state: Mapping[str, npt.NDArray[Any]], *, config: Mapping[str, Any]) -> None:
    """Write `state` and the JSON-able `config` to `path` (``.safetensors``).

    The file appears under its name only when it is complete; an existing one stays as it was until then, and its
    permissions and symbolic links to it remain.

    Examples
    --------
    >>> import numpy as np, tempfile, os
    >>> from numoe import checkpoint
    >>> path = os.path.join(tempfile.mkdtemp(), "state.safetensors")
    >>> checkpoint.save(path, {"a": np.arange(3.0)}, config={"step": 7})
    >>> checkpoint.load(path)
    ({'a': array([0., 1., 2.])}, {'step': 7})
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors; got {Path(path).name!r}.")
    target = Path(os.path.realpath(path))  # a link stays one
    metadata = {"format": FORMAT, "config": json.dumps(config, sort_keys=True)}
    arrays = {name: np.asarray(value, order="C") for name, value in state.items()}
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # less the process's mask
        mode = stat.S_IMODE((target if target.is_file() else temporary).stat().st_mode)
        safetensors.numpy.save_file(arrays, temporary, metadata=metadata)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)  # safetensors has put a file of its own there
        os.replace(temporary, target)
    except safetensors.SafetensorError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{target} cannot be written: {error}") from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load(
    path: Any, specs_of: Callable[[dict[str, Any]], Specs] | None = None
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """The state and configuration written by `save`.

    Parameters
    ----------
    path : path-like
    specs_of : function, optional
        From the configuration to the shape and dtype of every array that must be there; the file's header is compared
        with them before any array is read.

    Raises
    ------
    CheckpointError
        If the file is not a safetensors file written by numoe, or holds something else than `specs_of` says.
    OSError
        If it cannot be read.
    MemoryError
        If its arrays do not fit into memory.
    """
    target = Path(path)
    if target.suffix in _REFUSED:
        raise CheckpointError(
            f"{target}: {target.suffix} files may run code when they are read, so numoe does not read them.  Convert "
            "it with safetensors.torch.save_file in the program that wrote it."
        )
    if target.exists() and not target.is_file() and not target.is_dir():  # opening a pipe would wait for ever
        raise CheckpointError(f"{target} is not a regular file.")
    with target.open("rb"):  # OSError with the path: missing, or no permission
        pass
    try:
        with safetensors.safe_open(target, framework="np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(
                    f"{target}: not written by numoe.MoELayer.save "
                    f"(format {metadata.get('format')!r}, expected {FORMAT!r})."
                )
            config = _parse_config(metadata.get("config", ""), target)
            headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            if specs_of is not None:
                _check_headers(headers, specs_of(config), str(target))
            _check_memory(target)
            return {name: file.get_tensor(name) for name in headers}, config
    except (safetensors.SafetensorError, TypeError) as error:  # TypeError: a dtype that NumPy does not know
        raise CheckpointError(f"{target}: not a complete safetensors file: {error}") from None


_STORED = {"float32": "F32", "float64": "F64", "bfloat16": "BF16"}  # safetensors' names of a layer's dtypes


def _check_headers(headers: Mapping[str, Any], expected: Specs, source: str) -> None:
    """What the file says it holds is what is expected."""
    _check_names(headers, expected, source)
    for name, (shape, dtype) in expected.items():
        stored = headers[name].get_dtype()
        if stored != _STORED[dtype.name]:
            raise CheckpointError(f"{source}: {name!r} must be {dtype} ({_STORED[dtype.name]}); got {stored}.")
        _check_shape(tuple(headers[name].get_shape()), name, shape, source)


def _check_memory(source: Path) -> None:
    """There is memory for all arrays: where there is none, safetensors panics, which may end the process."""
    size = source.stat().st_size
    try:
        np.empty(size + 2**20, np.uint8)  # and some for what is around them
    except MemoryError:
        raise MemoryError(f"{source}: its {size:,} bytes do not fit into memory.") from None


def _parse_config(text: str, source: Path) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{source}: the configuration inside is not valid: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{source}: the configuration inside is not valid: a {type(config).__name__}.")
    return config


def checked_state(state: Mapping[str, Any], expected: Specs) -> dict[str, npt.NDArray[Any]]:
    """The expected arrays found in `state`, in their dtype."""
    arrays = {}
    for name, (shape, dtype) in expected.items():
        if name not in state:
            continue
        try:
            value = arrays[name] = as_float(state[name], repr(name), dtype)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"state: {error}") from None
        _check_shape(value.shape, name, shape, "state")
    return arrays


def _check_shape(got: tuple[int, ...], name: str, shape: tuple[int, ...], source: str) -> None:
    if got != shape:
        transposed = len(shape) >= 2 and got == (*shape[:-2], shape[-1], shape[-2])
        hint = "  It is transposed: numoe's weights read like NumPy, x @ w." if transposed else ""
        raise CheckpointError(f"{source}: {name!r} must have shape {shape}; got {got}.{hint}")


def _check_names(given: Iterable[str], expected: Iterable[str], source: str, hint: str = "") -> None:
    """Exactly the expected names are there."""
    found = (("missing", _missing(given, expected)), ("unexpected", _missing(expected, given)))
    parts = [f"{kind}: {_some(names)}" for kind, names in found if names]
    if parts:
        raise CheckpointError(f"{source}: {'; '.join(parts)}.{hint}")


def _missing(names: Iterable[str], of: Iterable[str]) -> list[str]:
    there = set(names)
    return [name for name in of if name not in there]


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name)[:80] for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def copy_state(state: Mapping[str, npt.ArrayLike], own: Mapping[str, npt.NDArray[Any]], *, strict: bool) -> list[str]:
    """Copy `state` into the arrays of `own`; everything is checked before the first byte moves."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state must map names to arrays; got {type(state).__name__}.")
    expected = {name: (value.shape, value.dtype) for name, value in own.items()}
    if strict:
        _check_names(state, expected, "state", "  Pass strict=False to load what fits.")
    arrays = checked_state(state, expected)
    for name in arrays:
        if not own[name].flags.writeable:
            raise ValueError(f"read-only parameter {name!r}; replace it by a writable copy first.")
    for name, value in arrays.items():  # one parameter of the layer may come as another's new value
        if any(other != name and np.may_share_memory(value, array) for other, array in own.items()):
            arrays[name] = value.copy()
    for name, value in arrays.items():
        own[name][...] = value
    return [*_missing(state, expected), *_missing(expected, state)]
