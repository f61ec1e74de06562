"""Other libraries as contenders.  Each is imported when it is asked for, and by nothing else.

A peer gets the layer in its own best layout, made outside the timing, and the same number of threads as numoe.
What it cannot do (a dtype, an activation, a backward) it says in a `ContenderUnavailableError`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata

from numoe.bench.contenders import Prepare, Runner, Task

_CLASSES = {
    "torch-loop": ("pytorch", "TorchLoop"),
    "torch-grouped": ("pytorch", "TorchGrouped"),
    "onnxruntime": ("onnx", "OnnxRuntime"),
    "zentorch": ("zen", "Zentorch"),
    "ggml": ("ggml", "Ggml"),
    "kt-kernel": ("kt", "KtKernel"),
}

_PACKAGES = {
    "torch-loop": "torch",
    "torch-grouped": "torch",
    "onnxruntime": "onnxruntime",
    "zentorch": "zentorch",
    "ggml": "llama-cpp-python",
    "kt-kernel": "kt-kernel",
}
COPIES = {"packed": 1, "torch-loop": 1, "torch-grouped": 1, "onnxruntime": 2, "zentorch": 2, "ggml": 1, "kt-kernel": 2}
"""How many copies of the weights each contender holds at most; 0 where it is not listed."""
ALONE = {"kt-kernel"}
"""Contenders whose idle threads keep CPUs busy: others beside them would take up to 1.4 times as long."""


def _lazy(module: str, name: str) -> Prepare:
    def prepare(task: Task) -> Runner:
        runner: Runner = getattr(importlib.import_module(f"{__name__}.{module}"), name)(task)
        return runner

    return prepare


PEERS: dict[str, Prepare] = {peer: _lazy(*where) for peer, where in _CLASSES.items()}


def versions(peers: Iterable[str]) -> dict[str, str]:
    """Installed packages of these peers and their versions; imports none of them."""
    found = {}
    for package in dict.fromkeys(_PACKAGES[peer] for peer in peers):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def parse_peer(text: str) -> str:
    """The name of a peer; ``ValueError`` for anything else.

    >>> parse_peer("ggml")
    'ggml'
    """
    if text not in PEERS:
        raise ValueError(f"peer {text!r} is unknown; give some of {', '.join(PEERS)}, or none for all of them.")
    return text
