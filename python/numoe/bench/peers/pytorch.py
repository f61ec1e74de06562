"""PyTorch: the eager loop over hit experts, and grouped products; both train by autograd."""

from __future__ import annotations

import abc
from typing import Any

import ml_dtypes
import numpy as np

from numoe.bench.contenders import Array, ContenderUnavailableError, Runner, Step, Task
from numoe.bench.peers.common import check_dtype, first_biases, first_matrices, require, shared, transposed


class Torch(Runner):
    """What all runners on torch tensors share: threads, conversions without copies, activation, shared expert."""

    def __init__(self, task: Task) -> None:
        self._torch = torch = require("torch", "torch")
        functional = torch.nn.functional
        activations = {
            "silu": functional.silu,
            "relu": functional.relu,
            "gelu": functional.gelu,
            "gelu_tanh": lambda rows: functional.gelu(rows, approximate="tanh"),
        }
        self._options = task.experts
        if self._options.activation not in activations:
            raise ContenderUnavailableError(f"it has no {self._options.activation}")
        self._activate = activations[self._options.activation]
        self._linear = functional.linear
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(task.threads)
        self._shared = [] if task.shared is None else self._shared_matrices(task)

    def close(self) -> None:
        """Gives the threads back."""
        self._torch.set_num_threads(self._threads_before)

    def tensor(self, array: Array) -> Any:
        """The array's memory as a tensor."""
        if array.dtype == ml_dtypes.bfloat16:
            return self._torch.from_numpy(array.view(np.uint16)).view(self._torch.bfloat16)
        return self._torch.from_numpy(array)

    def array(self, tensor: Any) -> Array:
        """A tensor's memory as an array."""
        tensor = tensor.detach()
        if tensor.dtype == self._torch.bfloat16:
            bits: Array = tensor.view(self._torch.uint16).numpy()
            return bits.view(ml_dtypes.bfloat16)
        values: Array = tensor.numpy()
        return values

    def hidden(self, rows: Any) -> Any:
        """What is between the products: (n, 2F) → (n, F) if gated, else (n, F) → (n, F)."""
        if self._options.form != "glu":
            return self._activate(rows)
        gate, up = rows.chunk(2, dim=-1)
        return self._activate(gate) * up

    def add_shared(self, y: Any, x: Any) -> Any:
        """The shared expert's output added."""
        if not self._shared:
            return y
        first, down = self._shared
        return y + self._linear(self.hidden(self._linear(x, first)), down)

    def _shared_matrices(self, task: Task) -> list[Any]:
        first = np.concatenate([task.weights(shared(name)).T for name in first_matrices(task)])
        return [
            self.tensor(np.ascontiguousarray(first)),
            self.tensor(np.ascontiguousarray(task.weights("w_shared_down").T)),
        ]


class TrainedTorch(Torch):
    """Forward and backward around `compute`; `_leaves` are the parameters."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._task = task
        self._first, self._biases = first_matrices(task), first_biases(task)
        self._num_experts = task.num_experts
        self._leaves: list[Any] = []

    @abc.abstractmethod
    def compute(self, x: Any, indices: Any, weights: Any) -> Any:
        """The routed experts' output (T, D)."""

    @abc.abstractmethod
    def gradients(self) -> dict[str, Array]:
        """The routed experts' gradients as the layer has them."""

    def forward(self, x: Array, indices: Array, weights: Array) -> Array:
        """Without autograd."""
        with self._torch.inference_mode():
            rows = self.tensor(x)
            return self.array(self.add_shared(self.compute(rows, self.tensor(indices), self.tensor(weights)), rows))

    def forward_backward(self, x: Array, indices: Array, weights: Array, dy: Array) -> Step:
        """Gradients are written anew by every call, not added to the last ones."""
        leaves = [*self._leaves, *self._shared]
        for leaf in leaves:
            leaf.requires_grad_().grad = None
        rows, shares = (self.tensor(a).requires_grad_() for a in (x, weights))
        y = self.add_shared(self.compute(rows, self.tensor(indices), shares), rows)
        y.backward(self.tensor(dy))
        return Step(self.array(y), self.array(rows.grad), self.array(shares.grad), self._gradients)

    def sort(self, indices: Any) -> tuple[Any, Any, Any]:
        """Assignments by expert, their tokens, and how many every expert has."""
        flat = indices.reshape(-1).long()
        order = flat.argsort(stable=True)
        return order, order // indices.shape[1], self._torch.bincount(flat, minlength=self._num_experts)

    def _gradients(self) -> dict[str, Array]:
        result = self.gradients()
        if self._shared:
            first, down = (self.array(leaf.grad).T for leaf in self._shared)
            parts = np.split(first, len(self._first), axis=1)
            result |= {shared(name): part for name, part in zip(self._first, parts, strict=True)}
            result["w_shared_down"] = down
        return result

    def split(self, name: str, gradient: Array) -> dict[str, Array]:
        """Gradients of what multiplies x ("w_"), or is added to it ("b_"), by parameter; the last axis is D or F."""
        names = self._first if name == "w_" else self._biases
        parts = np.split(gradient, len(names), axis=1)
        return {n: np.swapaxes(p, 1, 2) if name == "w_" else p for n, p in zip(names, parts, strict=True)}


class TorchLoop(TrainedTorch):
    """One hit expert after the other; a tensor per expert, so that no gradient is as large as all of them."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._w1 = [self.tensor(matrix) for matrix in transposed(task, *self._first)]
        self._w2 = [self.tensor(matrix) for matrix in transposed(task, "w_down")]
        self._b1: list[Any] = [None] * self._num_experts
        self._b2: list[Any] = [None] * self._num_experts
        if self._biases:
            b1 = np.concatenate([task.weights(name) for name in self._biases], axis=1)
            self._b1, self._b2 = ([self.tensor(row) for row in rows.copy()] for rows in (b1, task.weights("b_down")))
        self._leaves = [leaf for leaf in (*self._w1, *self._w2, *self._b1, *self._b2) if leaf is not None]

    def compute(self, x: Any, indices: Any, weights: Any) -> Any:
        """``index_add_`` of every expert's weighted rows."""
        order, tokens, counts = self.sort(indices)
        flat_weights = weights.reshape(-1)
        y = self._torch.zeros_like(x)
        begin = 0
        for e, count in enumerate(counts.tolist()):
            if count == 0:
                continue
            mine = slice(begin, begin + count)
            begin += count
            hidden = self.hidden(self._linear(x[tokens[mine]], self._w1[e], self._b1[e]))
            rows = self._linear(hidden, self._w2[e], self._b2[e]) * flat_weights[order[mine], None]
            y = y.index_add_(0, tokens[mine], rows.to(x.dtype))
        return y

    def gradients(self) -> dict[str, Array]:
        """Zeros for experts that were not hit."""
        result = self.split("w_", self._stacked(self._w1))
        result["w_down"] = np.swapaxes(self._stacked(self._w2), 1, 2)
        if self._biases:
            result |= {**self.split("b_", self._stacked(self._b1)), "b_down": self._stacked(self._b2)}
        return result

    def _stacked(self, leaves: list[Any]) -> Array:
        return np.stack([self.array(self._torch.zeros_like(w) if w.grad is None else w.grad) for w in leaves])


class TorchGrouped(TrainedTorch):
    """Rows sorted by expert, two grouped products, as transformers' ``grouped_mm`` experts do it."""

    def __init__(self, task: Task) -> None:
        check_dtype(task, "float32", "bfloat16")
        torch = require("torch", "torch")
        product = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
        if product is None:
            raise ContenderUnavailableError(f"torch {torch.__version__} has no grouped_mm")
        super().__init__(task)
        self._product: Any = product
        self._w1 = self.tensor(transposed(task, *self._first))
        self._w2 = self.tensor(transposed(task, "w_down"))
        self._leaves = [self._w1, self._w2]
        if self._biases:
            b1 = np.concatenate([task.weights(name) for name in self._biases], axis=1)
            self._b1, self._b2 = self.tensor(b1), self.tensor(task.weights("b_down").copy())
            self._leaves += [self._b1, self._b2]

    def compute(self, x: Any, indices: Any, weights: Any) -> Any:
        """Sort, gather, multiply, undo the sorting, add up the choices."""
        tokens, top_k = indices.shape
        order, sources, counts = self.sort(indices)
        ends = counts.cumsum(0).int()
        rows = self._product(x[sources], self._w1.transpose(1, 2), offs=ends)
        if self._biases:
            experts = indices.reshape(-1)[order].long()
            rows = rows + self._b1[experts]
        rows = self._product(self.hidden(rows), self._w2.transpose(1, 2), offs=ends)
        if self._biases:
            rows = rows + self._b2[experts]
        rows = rows * weights.reshape(-1)[order, None]
        places = self._torch.empty_like(order)
        places[order] = self._torch.arange(len(order))
        return rows[places].view(tokens, top_k, -1).sum(dim=1).to(x.dtype)

    def gradients(self) -> dict[str, Array]:
        """Of the two stacked parameters."""
        result = self.split("w_", self.array(self._w1.grad))
        result["w_down"] = np.swapaxes(self.array(self._w2.grad), 1, 2)
        if self._biases:
            result |= {**self.split("b_", self.array(self._b1.grad)), "b_down": self.array(self._b2.grad)}
        return result
