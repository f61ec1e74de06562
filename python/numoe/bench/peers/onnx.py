"""ONNX Runtime: its ``com.microsoft.MoE`` operator in a model made by hand; float32, forward only.

The operator has its own router, so it gets logits whose softmax over the chosen experts is the weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from numoe.bench.contenders import Array, ContenderUnavailableError, Runner, Task
from numoe.bench.peers.common import check_dtype, first_matrices, require, shared, transposed
from numoe.bench.workloads import Routings

_NEVER = -100.0  # the logit of an expert that is not chosen; exp(-100) is 0 beside the others


class OnnxRuntime(Runner):
    """A session with one operator, or with the shared expert's products beside it."""

    def __init__(self, task: Task) -> None:
        check_dtype(task, "float32")
        options = task.experts
        if (options.form, options.activation) not in (("glu", "silu"), ("mlp", "relu"), ("mlp", "silu")):
            raise ContenderUnavailableError(f"it has no {options.form} experts with {options.activation}")
        self._onnx, self._ort = require("onnx", "onnx"), require("onnxruntime", "onnxruntime")
        self._num_experts = task.num_experts
        self._logits: dict[int, tuple[Array, Array]] = {}  # by the indices' identity
        settings = self._ort.SessionOptions()
        settings.intra_op_num_threads, settings.inter_op_num_threads = task.threads, 1
        settings.log_severity_level = 3
        arrays = _weights(task)
        # Beside the model, whose own format ends at 2 GB.
        self._values = [self._ort.OrtValue.ortvalue_from_numpy(value) for value in arrays.values()]
        settings.add_external_initializers(list(arrays), self._values)
        model = self._model(task, arrays).SerializeToString()
        self._session = self._ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])

    def prepare(self, routings: Routings) -> None:
        """The logits that mean these routings."""
        self._logits = {id(indices): (indices, self._router_logits(indices, w)) for indices, w in routings}

    def forward(self, x: Array, indices: Array, weights: Array) -> Array:
        """Routing included: softmax and top-k of the given logits."""
        y: Array = self._session.run(None, {"x": x, "logits": self._logits[id(indices)][1]})[0]
        return y

    def close(self) -> None:
        """Ends the session's threads."""
        del self._session

    def _router_logits(self, indices: Array, weights: Array) -> Array:
        logits = np.full((len(indices), self._num_experts), _NEVER, np.float32)
        np.put_along_axis(logits, indices.astype(np.int64), np.log(weights), axis=1)
        return logits

    def _model(self, task: Task, arrays: dict[str, Array]) -> Any:
        helper, floats = self._onnx.helper, self._onnx.TensorProto.FLOAT
        width = task.d_model
        inputs = [
            helper.make_tensor_value_info("x", floats, ["T", width]),
            helper.make_tensor_value_info("logits", floats, ["T", self._num_experts]),
        ]
        output = helper.make_tensor_value_info("y", floats, ["T", width])
        initializers = [self._outside(name, value) for name, value in arrays.items()]
        graph = helper.make_graph(self._nodes(task), "moe", inputs, [output], initializers)
        versions = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=versions, ir_version=10)

    def _nodes(self, task: Task) -> list[Any]:
        node, options = self._onnx.helper.make_node, task.experts
        gated = {"activation_type": "swiglu", "swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0}
        nodes = [
            node(
                "MoE",
                ["x", "logits", "fc1", "fc1_bias", "fc2", "fc2_bias"]
                if options.bias
                else ["x", "logits", "fc1", "", "fc2"],
                ["y" if task.shared is None else "routed"],
                domain="com.microsoft",
                k=task.top_k,
                normalize_routing_weights=1,
                **(gated if options.form == "glu" else {"activation_type": options.activation}),
            )
        ]
        if task.shared is not None:
            nodes += self._shared_nodes(options.form == "glu")
        return nodes

    def _shared_nodes(self, gated: bool) -> list[Any]:
        node = self._onnx.helper.make_node
        if not gated:
            raise ContenderUnavailableError("it has no shared experts without a gate")
        return [
            node("MatMul", ["x", "w_gate"], ["gate"]),
            node("MatMul", ["x", "w_up"], ["up"]),
            node("Sigmoid", ["gate"], ["slope"]),
            node("Mul", ["gate", "slope"], ["active"]),
            node("Mul", ["active", "up"], ["hidden"]),
            node("MatMul", ["hidden", "w_down"], ["shared"]),
            node("Add", ["routed", "shared"], ["y"]),
        ]

    def _outside(self, name: str, value: Array) -> Any:
        """A tensor of the model whose numbers are handed over in memory."""
        tensor = self._onnx.TensorProto(name=name, data_type=self._onnx.TensorProto.FLOAT, dims=value.shape)
        tensor.data_location = self._onnx.TensorProto.EXTERNAL
        for key, text in (("location", "memory"), ("offset", "0"), ("length", str(value.nbytes))):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, text
        return tensor


def _weights(task: Task) -> dict[str, Array]:
    """The initializers; rows of gate and up alternate in the fused matrix."""
    experts, names = task.num_experts, first_matrices(task)
    fc1 = np.stack([np.swapaxes(task.weights(name), 1, 2) for name in names], axis=2)
    result = {"fc1": fc1.reshape(experts, -1, task.d_model), "fc2": transposed(task, "w_down")}
    if task.experts.bias:
        biases = np.stack([task.weights(name.replace("w_", "b_")) for name in names], axis=2)
        result |= {"fc1_bias": biases.reshape(experts, -1), "fc2_bias": task.weights("b_down")}
    if task.shared is not None:
        result |= {name: task.weights(shared(name)) for name in (*names, "w_down")}
    return {name: np.ascontiguousarray(value) for name, value in result.items()}
