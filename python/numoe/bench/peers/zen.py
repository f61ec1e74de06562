"""zentorch: one fused operation for the whole layer; made for AMD's CPUs."""

from __future__ import annotations

import numpy as np

from numoe.bench.contenders import Array, ContenderUnavailableError, Task
from numoe.bench.peers.common import check_dtype, check_gated_silu, require, transposed
from numoe.bench.peers.pytorch import Torch


class Zentorch(Torch):
    """``zentorch_fused_moe``, forward only."""

    def __init__(self, task: Task) -> None:
        check_dtype(task, "float32", "bfloat16")
        check_gated_silu(task)
        require("torch", "torch")
        require("zentorch", "zentorch")  # refuses to be imported beside another release of torch
        super().__init__(task)
        self._ops = self._torch.ops.zentorch
        self._flush()
        self._w13 = self.tensor(transposed(task, "w_gate", "w_up"))
        self._w2 = self.tensor(transposed(task, "w_down"))
        self._b13 = self._b2 = None
        if task.experts.bias:
            self._b13 = self.tensor(np.concatenate([task.weights("b_gate"), task.weights("b_up")], axis=1))
            self._b2 = self.tensor(task.weights("b_down").copy())

    def forward(self, x: Array, indices: Array, weights: Array) -> Array:
        """The weights are packed by the first call."""
        torch = self._torch
        with torch.inference_mode():
            rows = self.tensor(x)
            y = torch.zeros_like(rows)
            shares, chosen = self.tensor(weights), self.tensor(indices)
            arguments = (rows, self._w13, self._w2, self._b13, self._b2, shares, chosen, False, "silu")
            try:
                self._ops.zentorch_fused_moe(y, *arguments)
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[0]
                raise ContenderUnavailableError(f"zentorch_fused_moe refuses: {reason}") from None
            return self.array(self.add_shared(y, rows))

    def close(self) -> None:
        """Its packed weights are found by address: a later layer at the same one would get them."""
        self._flush()
        super().close()

    def _flush(self) -> None:
        for name in ("zentorch_flush_moe_weight_cache", "zentorch_clear_weight_cache"):
            if hasattr(self._ops, name):
                getattr(self._ops, name)()
