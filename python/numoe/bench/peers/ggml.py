"""ggml, of llama.cpp: its graph for a mixture of experts, called through the libraries that llama-cpp-python brings.

Weights are float32 or bfloat16; activations are float32, and rounded to bfloat16 inside the products with such weights.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from numoe.bench.contenders import Array, ContenderUnavailableError, Runner, Task
from numoe.bench.peers.common import check_dtype, first_biases, first_matrices, shared, transposed
from numoe.bench.workloads import Routings

_TYPES = {"float32": 0, "int32": 26, "bfloat16": 30}  # enum ggml_type
_OBJECTS = 256  # tensors and graphs that a context has room for


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


_FUNCTIONS: dict[str, tuple[Any, ...]] = {  # name: result, arguments
    "ggml_init": (c_void_p, _InitParams),
    "ggml_free": (None, c_void_p),
    "ggml_tensor_overhead": (c_size_t,),
    "ggml_graph_overhead": (c_size_t,),
    "ggml_new_tensor": (c_void_p, c_void_p, c_int, c_int, POINTER(c_int64)),
    "ggml_get_data": (c_void_p, c_void_p),
    "ggml_set_input": (None, c_void_p),
    "ggml_set_output": (None, c_void_p),
    "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_mul_mat_id": (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_add_id": (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_swiglu": (c_void_p, c_void_p, c_void_p),
    "ggml_relu": (c_void_p, c_void_p, c_void_p),
    "ggml_mul": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_add": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_view_2d": (c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_size_t, c_size_t),
    "ggml_new_graph": (c_void_p, c_void_p),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_backend_cpu_buffer_type": (c_void_p,),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_gallocr_new": (c_void_p, c_void_p),
    "ggml_gallocr_alloc_graph": (c_bool, c_void_p, c_void_p),
    "ggml_gallocr_free": (None, c_void_p),
    "ggml_backend_cpu_init": (c_void_p,),
    "ggml_backend_cpu_set_n_threads": (None, c_void_p, c_int),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
    "ggml_backend_free": (None, c_void_p),
    "ggml_version": (c_char_p,),
}


class Library:
    """Its C functions, without the prefix ``ggml_``."""

    def __init__(self) -> None:
        package = importlib.util.find_spec("llama_cpp")
        if package is None or package.origin is None:
            raise ContenderUnavailableError("package 'llama-cpp-python' is not installed")
        folder = Path(package.origin).parent / "lib"
        try:
            libraries = [ctypes.CDLL(str(folder / f"lib{name}.so")) for name in ("ggml-base", "ggml-cpu")]
        except OSError as error:
            raise ContenderUnavailableError(f"its libraries in llama-cpp-python cannot be loaded: {error}") from None
        self._functions: dict[str, Any] = {}
        for name, (result, *arguments) in _FUNCTIONS.items():
            found = [getattr(library, name) for library in libraries if hasattr(library, name)]
            if not found:
                raise ContenderUnavailableError(f"this release of llama-cpp-python has no {name}")
            found[0].restype, found[0].argtypes = result, arguments
            self._functions[name.removeprefix("ggml_")] = found[0]

    def __getattr__(self, name: str) -> Any:
        return self._functions[name]

    def context(self) -> int:
        """A place for tensors and graphs, not for their numbers."""
        size = _OBJECTS * self.tensor_overhead() + self.graph_overhead()
        return int(self.init(_InitParams(size, None, True)))

    def tensor(self, context: int, dtype: str, *shape: int) -> int:
        """A tensor with NumPy's order of axes; ggml counts them from the last."""
        sizes = (c_int64 * len(shape))(*reversed(shape))
        return int(self.new_tensor(context, _TYPES[dtype], len(shape), sizes))

    def write(self, tensor: int, array: Array) -> None:
        """Numbers into a tensor."""
        assert array.flags.c_contiguous
        ctypes.memmove(self.get_data(tensor), array.ctypes.data, array.nbytes)


class Ggml(Runner):
    """Gate and up in one ``mul_mat_id``, SwiGLU, down, weights, sum; forward only."""

    def __init__(self, task: Task) -> None:
        check_dtype(task, "float32", "bfloat16")
        options = task.experts
        if (options.form, options.activation) not in (("glu", "silu"), ("mlp", "relu")):
            raise ContenderUnavailableError(f"its float32 kernels have no {options.form} with {options.activation}")
        self._lib = lib = Library()
        self._gated = options.form == "glu"
        self._backend = lib.backend_cpu_init()
        lib.backend_cpu_set_n_threads(self._backend, task.threads)
        self._allocator = lib.gallocr_new(lib.backend_cpu_buffer_type())
        self._context, self._graph_context = lib.context(), 0
        self._weights: dict[str, int] = {}
        self._buffer = self._copy_weights(task)
        self._shape = (0, 0)  # T, K of the graph

    def prepare(self, routings: Routings) -> None:
        """The graph for so many tokens."""
        if routings[0][0].shape != self._shape:
            self._build(*routings[0][0].shape)

    def forward(self, x: Array, indices: Array, weights: Array) -> Array:
        """Copies x in and y out, as its API has it."""
        lib = self._lib
        lib.write(self._x, x.astype(np.float32, copy=False))
        lib.write(self._ids, indices)
        lib.write(self._shares, weights)
        if lib.backend_graph_compute(self._backend, self._graph) != 0:
            raise ContenderUnavailableError("its graph could not be computed")
        y = np.empty(x.shape, np.float32)
        ctypes.memmove(y.ctypes.data, lib.get_data(self._y), y.nbytes)
        return y.astype(x.dtype, copy=False)

    def close(self) -> None:
        """All of its memory."""
        lib = self._lib
        lib.gallocr_free(self._allocator)
        for context in (self._context, self._graph_context):
            lib.free(context or None)
        lib.backend_buffer_free(self._buffer)
        lib.backend_free(self._backend)

    def _copy_weights(self, task: Task) -> int:
        """Rows of gate and up below each other, (E, 2F, D); biases in float32."""
        first, biases = first_matrices(task), first_biases(task)
        arrays: dict[str, Callable[[], Array]] = {
            "w1": lambda: transposed(task, *first),
            "w2": lambda: transposed(task, "w_down"),
        }
        if biases:
            arrays["b1"] = lambda: np.concatenate([task.layer.params[name] for name in biases], axis=1)
            arrays["b2"] = lambda: task.layer.params["b_down"]
        if task.shared is not None:
            arrays["s1"] = lambda: np.ascontiguousarray(np.concatenate([task.weights(shared(n)).T for n in first]))
            arrays["s2"] = lambda: np.ascontiguousarray(task.weights("w_shared_down").T)
        lib = self._lib
        E, D, F = task.num_experts, task.d_model, task.experts.d_ff * len(first)
        S = task.shared.d_ff if task.shared is not None else 0
        shapes = {"w1": (E, F, D), "w2": (E, D, task.experts.d_ff), "b1": (E, F), "b2": (E, D)}
        shapes |= {"s1": (S * len(first), D), "s2": (D, S)}
        for name in arrays:
            dtype = "float32" if name.startswith("b") else task.dtype
            self._weights[name] = lib.tensor(self._context, dtype, *shapes[name])
        buffer = int(lib.backend_alloc_ctx_tensors_from_buft(self._context, lib.backend_cpu_buffer_type()) or 0)
        if not buffer:
            raise ContenderUnavailableError("its copy of the weights does not fit into memory")
        for name, make in arrays.items():
            lib.write(self._weights[name], make())
        self._width = D
        return buffer

    def _build(self, tokens: int, top_k: int) -> None:
        lib, w = self._lib, self._weights
        lib.free(self._graph_context or None)
        self._graph_context = c = lib.context()
        self._x = lib.tensor(c, "float32", tokens, 1, self._width)
        self._ids = lib.tensor(c, "int32", tokens, top_k)
        self._shares = lib.tensor(c, "float32", tokens, top_k, 1)
        for tensor in (self._x, self._ids, self._shares):
            lib.set_input(tensor)
        rows = lib.mul_mat_id(c, w["w1"], self._x, self._ids)
        rows = self._hidden(lib.add_id(c, rows, w["b1"], self._ids) if "b1" in w else rows)
        rows = lib.mul_mat_id(c, w["w2"], rows, self._ids)
        rows = lib.add_id(c, rows, w["b2"], self._ids) if "b2" in w else rows
        rows = lib.mul(c, rows, self._shares)
        row = 4 * self._width  # bytes
        choices = [lib.view_2d(c, rows, self._width, tokens, top_k * row, k * row) for k in range(top_k)]
        y = choices[0]
        for other in choices[1:]:
            y = lib.add(c, y, other)
        if "s1" in w:
            dense = lib.view_2d(c, self._x, self._width, tokens, row, 0)
            y = lib.add(c, y, lib.mul_mat(c, w["s2"], self._hidden(lib.mul_mat(c, w["s1"], dense))))
        lib.set_output(y)
        self._y, self._graph = y, lib.new_graph(c)
        lib.build_forward_expand(self._graph, y)
        if not lib.gallocr_alloc_graph(self._allocator, self._graph):
            raise ContenderUnavailableError("its intermediate results do not fit into memory")
        self._shape = (tokens, top_k)

    def _hidden(self, rows: int) -> int:
        lib = self._lib
        activate = lib.swiglu if self._gated else lib.relu
        return int(activate(self._graph_context, rows))
