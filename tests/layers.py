"""Layers for the tests: one with the numbers of a problem, and what one holds."""

from __future__ import annotations

import numoe
from numoe.testing import Problem


def layer_of(problem: Problem) -> numoe.MoELayer:
    """A layer with the problem's numbers."""
    layer = numoe.MoELayer(config=problem.config, rng=0)
    layer.load_state_dict(problem.params | problem.buffers)
    return layer


def snapshot(layer: numoe.MoELayer) -> dict[str, bytes]:
    """Every bit of the parameters and buffers."""
    return {name: value.tobytes() for name, value in layer.state_dict().items()}
