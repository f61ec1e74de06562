"""Arrays on disk: one safetensors file with the configuration inside, written whole or not at all.

Reading executes nothing.  The safetensors library checks the file's structure; this module checks that it is ours and
that names, shapes and dtypes are the expected ones before anything is used.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from numoe._arrays import as_float

FORMAT = "numoe-1"
_REFUSED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


class CheckpointError(ValueError):
    """A state or a file that does not fit; raised before anything was changed."""


def save(path: Any, state: Mapping[str, npt.NDArray[Any]], *, config: Mapping[str, Any]) -> None:
    """Write `state` and the JSON-able `config` to `path` (``.safetensors``).

    The file appears under its name only when it is complete; an existing one stays as it was until then.

    Examples
    --------
    >>> import numpy as np, tempfile, os
    >>> from numoe import checkpoint
    >>> path = os.path.join(tempfile.mkdtemp(), "state.safetensors")
    >>> checkpoint.save(path, {"a": np.arange(3.0)}, config={"step": 7})
    >>> checkpoint.load(path)
    ({'a': array([0., 1., 2.])}, {'step': 7})
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors; got {target.name!r}.")
    metadata = {"format": FORMAT, "config": json.dumps(config, sort_keys=True)}
    arrays = {name: np.ascontiguousarray(value) for name, value in state.items()}
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    os.close(handle)
    try:
        safetensors.numpy.save_file(arrays, temporary, metadata=metadata)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load(path: Any) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """The state and configuration written by `save`.

    Raises
    ------
    CheckpointError
        If the file is not a safetensors file written by numoe.
    OSError
        If it cannot be read.
    """
    target = Path(path)
    if target.suffix in _REFUSED:
        raise CheckpointError(
            f"{target}: {target.suffix} files may run code when they are read, so numoe does not read them.  Convert "
            "it with safetensors.torch.save_file in the program that wrote it."
        )
    with target.open("rb"):  # OSError with the path: missing, a directory, no permission
        pass
    try:
        with safetensors.safe_open(target, framework="np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(
                    f"{target}: not written by numoe.MoELayer.save "
                    f"(format {metadata.get('format')!r}, expected {FORMAT!r})."
                )
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return state, _parse_config(metadata.get("config", ""))
    except CheckpointError:
        raise
    except (safetensors.SafetensorError, ValueError) as error:
        raise CheckpointError(f"{target}: not a complete safetensors file: {error}") from None


def _parse_config(text: str) -> dict[str, Any]:
    config = json.loads(text)
    if not isinstance(config, dict):
        raise ValueError(f"its configuration is {type(config).__name__}, not an object")
    return config


def check_state(
    state: Mapping[str, Any],
    expected: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]],
    *,
    source: str = "state",
    strict: bool = True,
) -> list[str]:
    """Names, shapes and dtypes of `state` against what is expected; returns the odd names if not strict."""
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    if strict and (missing or unexpected):
        parts = [
            f"{kind}: {_some(names)}" for kind, names in (("missing", missing), ("unexpected", unexpected)) if names
        ]
        raise CheckpointError(f"{source}: {'; '.join(parts)}.  Pass strict=False to load what fits.")
    for name, (shape, dtype) in expected.items():
        if name not in state:
            continue
        value = np.asarray(state[name])
        if value.shape != shape:
            hint = ""
            if value.ndim >= 2 and value.shape == (*shape[:-2], shape[-1], shape[-2]):
                hint = "  It is transposed: numoe's weights read like NumPy, x @ w."
            raise CheckpointError(f"{source}: {name!r} must have shape {shape}; got {value.shape}.{hint}")
        if value.dtype.kind not in "fV" or (
            value.dtype != dtype and value.dtype.kind == "V" and value.dtype.names is not None
        ):
            raise CheckpointError(f"{source}: {name!r} must be floating-point like {dtype}; got {value.dtype}.")
    return missing + unexpected


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name)[:80] for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def copy_state(state: Mapping[str, npt.ArrayLike], own: Mapping[str, npt.NDArray[Any]], *, strict: bool) -> list[str]:
    """Copy `state` into the arrays of `own`; everything is checked before the first byte moves."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state must map names to arrays; got {type(state).__name__}.")
    odd = check_state(state, {name: (value.shape, value.dtype) for name, value in own.items()}, strict=strict)
    for name, value in own.items():
        if name in state and not value.flags.writeable:
            raise ValueError(f"read-only parameter {name!r}; replace it by a writable copy first.")
    converted = {name: as_float(state[name], repr(name), own[name].dtype) for name in own if name in state}
    for name, value in converted.items():
        own[name][...] = value
    return odd
