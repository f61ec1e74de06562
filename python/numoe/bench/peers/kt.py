"""kt-kernel, the CPU kernels of KTransformers; bfloat16, forward only."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np

from numoe.bench.contenders import Array, ContenderUnavailableError, Runner, Task
from numoe.bench.peers.common import check_dtype, check_gated_silu, require, transposed

_MULTIPLE = 32  # of both widths; for others it corrupts memory


class KtKernel(Runner):
    """One layer on a thread pool of its own."""

    def __init__(self, task: Task) -> None:
        check_dtype(task, "bfloat16")
        check_gated_silu(task, bias=False)
        if task.shared is not None:
            raise ContenderUnavailableError("it has no shared expert")
        if task.d_model % _MULTIPLE or task.experts.d_ff % _MULTIPLE:
            raise ContenderUnavailableError(f"it needs widths that are multiples of {_MULTIPLE}")
        package = require("kt_kernel", "kt-kernel")
        self._extension = package.kt_kernel_ext
        self._top_k = task.top_k
        self._weights = [transposed(task, name) for name in ("w_gate", "w_up", "w_down")]
        kernel = self._kernel(package.__cpu_variant__)
        with _silence():
            self._pool = self._extension.CPUInfer(self._threads(task.threads))
            self._layer = kernel(self._settings(task))
            order = np.arange(task.num_experts, dtype=np.int64)
            self._pool.submit(self._layer.load_weights_task(order.ctypes.data))
            self._pool.sync()
        self._weights = []  # it has packed its own

    def forward(self, x: Array, indices: Array, weights: Array) -> Array:
        """Waits for the pool."""
        y = np.empty_like(x)
        count, chosen = np.array([len(x)], np.int32), indices.astype(np.int64)
        arrays = (chosen, weights, x, y)
        pointers = (array.ctypes.data for array in arrays)
        self._pool.submit(self._layer.forward_task(count.ctypes.data, self._top_k, *pointers, False))
        self._pool.sync()
        return y

    def close(self) -> None:
        """Ends its threads."""
        with _silence():
            del self._layer, self._pool

    def _kernel(self, variant: str) -> Any:
        """Its AVX-512 kernel emulates bfloat16 products where the CPU has none; the one for AVX2 is faster then."""
        names = ["AMXBF16_MOE", "AVX2BF16_MOE"]
        if variant not in ("amx", "avx512_bf16"):
            names.reverse()
        found = [kernel for name in names if (kernel := getattr(self._extension.moe, name, None)) is not None]
        if not found:
            raise ContenderUnavailableError(f"its build for this CPU ({variant}) has no bfloat16 kernel")
        return found[0]

    def _threads(self, threads: int) -> Any:
        settings = self._extension.WorkerPoolConfig()
        settings.subpool_count, settings.subpool_numa_map, settings.subpool_thread_count = 1, [0], [threads]
        return settings

    def _settings(self, task: Task) -> Any:
        sizes = (task.num_experts, task.top_k, task.d_model, task.experts.d_ff)
        settings = self._extension.moe.MOEConfig(*sizes, 0)
        settings.layer_idx, settings.pool, settings.max_len = 0, self._pool.backend_, max(task.tokens, 512)
        for name, matrices in zip(("gate", "up", "down"), self._weights, strict=True):
            assert matrices.dtype == ml_dtypes.bfloat16
            setattr(settings, f"{name}_projs", [[matrix.ctypes.data for matrix in matrices]])
            setattr(settings, f"{name}_scales", [])
        return settings


@contextmanager
def _silence() -> Iterator[None]:
    """Drops what the extension writes to standard output past Python."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)
