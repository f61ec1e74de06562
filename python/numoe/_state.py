"""What a layer keeps: its parameters and buffers, drawn, checked, read from a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from numoe import _core, checkpoint
from numoe._arrays import FloatArray, line_aligned
from numoe.config import READ_IN_PLACE, MoEConfig
from numoe.routing import checked_choice_bias


def initial_params(config: MoEConfig, rng: np.random.Generator) -> dict[str, FloatArray]:
    """Router N(0, 0.02²), matrices N(0, 1/fan_in), biases 0; every tensor is drawn whole, in the documented order."""
    zeros = _core.line_aligned_zeros
    params = {name: zeros(shape, config.compute_dtype) for name, shape in config.param_shapes().items()}
    for name, value in params.items():
        if name.startswith("w_"):
            fan_in = value.shape[-2] if value.ndim > 1 else value.shape[0]
            std = 0.02 if name == "w_router" else fan_in**-0.5
            rng.standard_normal(out=value, dtype=value.dtype)
            value *= std
    return {name: line_aligned(value, config.param_dtype(name)) for name, value in params.items()}


def initial_buffers(config: MoEConfig) -> dict[str, FloatArray]:
    """Zeros."""
    return {name: np.zeros(shape, dtype) for name, (shape, dtype) in config.buffer_specs.items()}


def check_state(config: MoEConfig, params: Mapping[str, FloatArray], buffers: Mapping[str, FloatArray]) -> None:
    """The parameters are the user's to change; their names, shapes and dtype are not."""
    for kind, values, specs in (("params", params, config.param_specs), ("buffers", buffers, config.buffer_specs)):
        for name, (shape, dtype) in specs.items():
            value = values.get(name)
            if type(value) is not np.ndarray or value.shape != shape or value.dtype != dtype or not _in_order(value):
                _check_array(f"layer.{kind}[{name!r}]", value, shape, dtype, in_order=name in READ_IN_PLACE)
        if len(values) != len(specs):
            odd = ", ".join(repr(name) for name in values if name not in specs)
            raise ValueError(f"layer.{kind} must hold {', '.join(specs) or 'nothing'} alone; unexpected: {odd}.")


def check_numbers(buffers: Mapping[str, FloatArray]) -> None:
    """What every call refuses is not kept, and not packed: a choice bias that is not finite."""
    bias = buffers.get("choice_bias")
    if bias is not None:
        checked_choice_bias(bias, bias.dtype)


def _in_order(array: FloatArray) -> bool:
    flags = array.flags
    return flags.c_contiguous and flags.aligned


def _check_array(name: str, value: Any, shape: tuple[int, ...], dtype: np.dtype[Any], in_order: bool) -> None:
    """A subclass of ndarray passes, unless it means something else."""
    ours = isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray)
    if not ours or value.shape != shape or value.dtype != dtype:
        got = f"{value.dtype} {value.shape}" if ours else type(value).__name__
        raise ValueError(
            f"{name} must be a {dtype} array of shape {shape}; got {got}.  Assign in place: {name}[...] = value."
        )
    if in_order and not _in_order(value):
        raise ValueError(f"{name} must be C-contiguous and aligned; put np.ascontiguousarray({name}) in its place.")


def read_state(path: Any) -> tuple[MoEConfig, dict[str, FloatArray], dict[str, FloatArray]]:
    """Configuration, parameters and buffers of a file; what does not fit its own configuration is refused unread."""

    def configured(settings: dict[str, Any]) -> MoEConfig:
        try:
            return MoEConfig.from_dict(settings)
        except (TypeError, ValueError) as error:
            raise checkpoint.CheckpointError(f"{path}: the configuration inside is not valid: {error}") from None

    def specs_of(settings: dict[str, Any]) -> checkpoint.Specs:
        config = configured(settings)
        return config.param_specs | config.buffer_specs

    state, settings = checkpoint.load(path, specs_of)
    config = configured(settings)
    params = {name: line_aligned(state.pop(name)) for name in config.param_specs}  # one at a time in memory twice
    buffers = {name: state[name] for name in config.buffer_specs}
    try:
        check_numbers(buffers)
    except ValueError as error:
        raise checkpoint.CheckpointError(f"{path}: {error}") from None
    return config, params, buffers
