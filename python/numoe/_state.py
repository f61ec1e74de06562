"""What a layer keeps: its parameters and buffers, drawn, checked, read from a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from numoe import checkpoint
from numoe._arrays import FloatArray
from numoe.config import MoEConfig


def initial_params(config: MoEConfig, rng: np.random.Generator) -> dict[str, FloatArray]:
    """Router N(0, 0.02²), matrices N(0, 1/fan_in), biases 0; every tensor is drawn whole, in the documented order."""
    params = {name: np.zeros(shape, config.compute_dtype) for name, shape in config.param_shapes().items()}
    for name, value in params.items():
        if name.startswith("w_"):
            fan_in = value.shape[-2] if value.ndim > 1 else value.shape[0]
            std = 0.02 if name == "w_router" else fan_in**-0.5
            rng.standard_normal(out=value, dtype=value.dtype)
            value *= std
    return {name: value.astype(config.param_dtype(name), copy=False) for name, value in params.items()}


def initial_buffers(config: MoEConfig) -> dict[str, FloatArray]:
    """Zeros."""
    return {name: np.zeros(shape, config.param_dtype(name)) for name, shape in config.buffer_shapes().items()}


def check_state(config: MoEConfig, params: Mapping[str, FloatArray], buffers: Mapping[str, FloatArray]) -> None:
    """The parameters are the user's to change; their names, shapes and dtype are not."""
    for kind, values, shapes in (
        ("params", params, config.param_shapes()),
        ("buffers", buffers, config.buffer_shapes()),
    ):
        for name, shape in shapes.items():
            value, dtype = values.get(name), config.param_dtype(name)
            if type(value) is np.ndarray and value.shape == shape and value.dtype == dtype:
                continue
            ours = isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray)
            if value is None or not ours or value.shape != shape or value.dtype != dtype:
                got = f"{value.dtype} {value.shape}" if value is not None and ours else type(value).__name__
                raise ValueError(
                    f"layer.{kind}[{name!r}] must be a {dtype} array of shape {shape}; got {got}.  "
                    f"Assign in place: layer.{kind}[{name!r}][...] = value."
                )


def read_state(path: Any) -> tuple[MoEConfig, dict[str, FloatArray], dict[str, FloatArray]]:
    """Configuration, parameters and buffers of a file; what does not fit its own configuration is refused."""
    state, settings = checkpoint.load(path)
    try:
        config = MoEConfig.from_dict(settings)
    except (TypeError, ValueError, KeyError) as error:
        raise checkpoint.CheckpointError(f"{path}: the configuration inside is not valid: {error}") from None
    shapes = config.param_shapes() | config.buffer_shapes()
    for name, value in state.items():
        if name in shapes and value.dtype != config.param_dtype(name):
            expects = config.param_dtype(name)
            raise checkpoint.CheckpointError(f"{path}: {name!r} must be {expects}; got {value.dtype}.")
    expected = {name: (shape, config.param_dtype(name)) for name, shape in shapes.items()}
    arrays, _ = checkpoint.checked_state(state, expected, source=str(path))
    params = {name: arrays[name] for name in config.param_shapes()}
    return config, params, {name: arrays[name] for name in config.buffer_shapes()}
