"""What several peers need: their package, and the experts' matrices as linear layers store them."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from numoe.bench.contenders import Array, ContenderUnavailableError, Task


def require(module: str, package: str) -> Any:
    """An imported module; the reason, if it cannot be had."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or module).split(".")[0]
        whose = "" if missing == module.split(".")[0] else f" (it needs {missing!r})"
        raise ContenderUnavailableError(f"package {package!r} is not installed{whose}") from None
    except Exception as error:  # a wrong version of something else, a missing library, ...
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ContenderUnavailableError(f"package {package!r} cannot be imported: {reason[0]}") from None


def check_dtype(task: Task, *dtypes: str) -> None:
    """Refuses other dtypes than these."""
    if task.dtype not in dtypes:
        raise ContenderUnavailableError(f"it has no {task.dtype}")


def check_gated_silu(task: Task, *, bias: bool = True) -> None:
    """Refuses experts that are not gated by SiLU, as in most released models."""
    options = task.experts
    if (options.form, options.activation) != ("glu", "silu"):
        raise ContenderUnavailableError(f"it has no {options.form} experts with {options.activation}")
    if options.bias and not bias:
        raise ContenderUnavailableError("it has no biases")


def shared(name: str) -> str:
    """The shared expert's parameter that corresponds to one of the experts'."""
    return name.replace("w_", "w_shared_")


def transposed(task: Task, *names: str) -> Array:
    """Matrices (E, D, F) as (E, F, D), a row per output; several of them below each other."""
    # NumPy's concatenate keeps the order in memory, which is the other one.
    return np.ascontiguousarray(np.concatenate([np.swapaxes(task.weights(name), 1, 2) for name in names], axis=1))


def first_matrices(task: Task) -> tuple[str, ...]:
    """The names of what multiplies x."""
    return ("w_gate", "w_up") if task.experts.form == "glu" else ("w_up",)


def first_biases(task: Task) -> tuple[str, ...]:
    """The names of what is added to those products."""
    return tuple(name.replace("w_", "b_") for name in first_matrices(task)) if task.experts.bias else ()
