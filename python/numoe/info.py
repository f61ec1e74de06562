"""What is running: versions, build, CPU targets and threads.  ``python -m numoe info``; paste it into a bug report."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from typing import Any

import numpy as np

from numoe import _core
from numoe.config import checked_int


def set_num_threads(n: int) -> None:
    """Let calls use up to `n` threads from now on, in this process.

    Parameters
    ----------
    n : int
        At least 1; more threads than CPUs are obeyed, up to 1024, but never faster.

    Raises
    ------
    TypeError, ValueError
        If `n` is not an int, or below 1.

    Examples
    --------
    >>> import numoe
    >>> before = numoe.num_threads()
    >>> numoe.set_num_threads(1)
    >>> numoe.num_threads()
    1
    >>> numoe.set_num_threads(before)
    """
    _core.set_num_threads(min(checked_int("num_threads", n, -(2**31)), 2**31 - 1))


def num_threads() -> int:
    """How many threads a call may use: `set_num_threads`, else NUMOE_NUM_THREADS, else the CPUs available.

    Examples
    --------
    >>> import numoe
    >>> numoe.num_threads() >= 1
    True
    """
    return _core.num_threads()


def collect() -> dict[str, Any]:
    """All facts as a dict, in the order in which `show_versions` prints them.

    Examples
    --------
    >>> from numoe import info
    >>> info.collect()["target"] in [t["name"] for t in info.collect()["targets"]]
    True
    """
    return {
        "numoe": importlib.metadata.version("numoe") if _installed() else "not installed",
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "build": _core.build_info(),
        "target": _core.target(),
        "targets": _core.targets(),
        "bfloat16 pairs": _bfloat16_pairs(),
        "threads": _core.num_threads(),
        "cpus available": _core.available_cpus(),
    }


def multiplies_pairs() -> bool:
    """Whether the target in use multiplies bfloat16 layers in pairs, with both factors rounded."""
    targets = [*_core.targets(), *_core.emulated_targets()]
    return next(bool(target["bfloat16_pairs"]) for target in targets if target["name"] == _core.target())


def _bfloat16_pairs() -> str:
    if multiplies_pairs():
        return "multiplied by this target"
    here = any(target["bfloat16_pairs"] and target["supported"] for target in _core.targets())
    return "not multiplied by this target" if here else "not on this CPU"


def _installed() -> bool:
    try:
        importlib.metadata.version("numoe")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def show_versions() -> None:
    """Print versions, build, targets and threads.

    See Also
    --------
    numoe.info.collect
    """
    for name, value in collect().items():
        if name == "targets":
            chosen = _core.target()
            for target in value:
                state = (
                    "in use" if target["name"] == chosen else "available" if target["supported"] else "not on this CPU"
                )
                print(f"  {target['name']:<12} {state:<16} {target['description']}")
        elif isinstance(value, dict):
            print(f"{name + ':':<16}" + ", ".join(f"{key} {text}" for key, text in value.items()))
        else:
            print(f"{name + ':':<16}{value}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(_args: argparse.Namespace) -> int:
    """The command's body; 0 for success."""
    show_versions()
    print("\nNUMOE_TARGET=<name> forces a target; NUMOE_NUM_THREADS=<n> or numoe.set_num_threads(n) the threads.")
    return 0
