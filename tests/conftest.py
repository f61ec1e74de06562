"""What several test files share: generators, readable ids, problems that differences can be trusted on."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numoe
import numpy as np
import numpy.typing as npt
import pytest
from numoe import _core, reference
from numoe.bench import machine, scaling, suite
from numoe.config import MoEConfig
from numoe.testing import Problem, random_problem

Array = npt.NDArray[Any]


def pytest_report_header() -> str:
    return f"numoe: target {_core.target()}, {_core.num_threads()} threads"


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """``normalize=sum,normalize_eps=0.1`` for a dict of options, instead of ``options3``."""
    if isinstance(val, dict):
        return ",".join(f"{key}={value}" for key, value in val.items()) or "default"
    return None


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator of its own for every test, the same in every run."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def restored_threads() -> Iterator[None]:
    """The number of threads is afterwards what it was."""
    before = numoe.num_threads()
    yield
    numoe.set_num_threads(before)


@pytest.fixture
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run reads 512 MB, insists on an undisturbed peak and waits for other threads; tests need none of it."""
    monkeypatch.setattr(suite, "settle", lambda: None)
    monkeypatch.setattr(scaling, "settle", lambda: None)
    monkeypatch.setattr(machine, "DRAM_SIZE", 2**24)
    monkeypatch.setattr(machine, "_ATTEMPTS", 1)


class ReferenceLayer:
    """`numoe.reference` behind the methods of a layer."""

    def __init__(self, *, config: MoEConfig, rng: Any = None) -> None:
        problem = random_problem(rng, **_flat_options(config))
        self.config, self.params, self.buffers = config, problem.params, problem.buffers

    def forward(self, x: npt.ArrayLike, **options: Any) -> reference.MoEOutput:
        return reference.forward(self.config, self.params, x, buffers=self.buffers, **options)

    def backward(self, dy: Array, out: reference.MoEOutput, d_aux_loss: float = 1.0) -> reference.MoEGrads:
        return reference.backward(self.config, self.params, dy, out, d_aux_loss)


def _flat_options(config: MoEConfig) -> dict[str, Any]:
    parts = (config.router, config.dispatch, config.experts)
    options = {f.name: getattr(part, f.name) for part in parts for f in dataclasses.fields(part)}
    own = {name: getattr(config, name) for name in ("d_model", "shared", "aux_losses", "dtype")}
    return options | own


@pytest.fixture
def reference_layer() -> type[ReferenceLayer]:
    """The class; numbers are drawn from ``rng=``."""
    return ReferenceLayer


@pytest.fixture
def separated_problem() -> Callable[..., Problem]:
    """`random_problem` with room around every decision: see `margin`."""

    def build(*, tokens: int | tuple[int, ...] = 6, inputs: Mapping[str, Any] | None = None, **options: Any) -> Problem:
        options = {"d_model": 5, "d_ff": 4, "num_experts": 4} | options
        for seed in range(300):
            problem = random_problem(seed, tokens=tokens, **options)
            if margin(problem, inputs or {}) > 5e-3:
                return problem
        raise AssertionError(f"no well separated problem for {options}")

    return build


def margin(problem: Problem, inputs: Mapping[str, Any]) -> float:
    """The smallest distance of any number from a place where the layer's output jumps or has a kink.

    These are the places: two experts' keys equal, two groups' scores equal, a relu at 0, ``eps_mode="max"``
    at its switch, and two weights equal where weights decide who is dropped.
    """
    config = problem.config
    out = reference.forward(config, problem.params, problem.x, buffers=problem.buffers, **inputs)
    router, routing = config.router, out.routing
    real = routing.indices[:, 0] >= 0
    distances = []
    if routing.logits is not None:
        z = routing.logits[real]
        s = reference.routing.score(router.score, z) + problem.buffers.get("choice_bias", 0.0)
        key = s if router.choice_bias else z
        distances.append(_gaps(key)[:, : router.top_k])
        groups = np.sort(s.reshape(len(s), router.num_groups, -1), axis=-1)
        size = 1 if router.group_score == "max" else 2
        distances.append(_gaps(groups[..., -size:].sum(axis=-1)))
        chosen = np.take_along_axis(s, routing.indices[real], axis=-1)
        if router.score == "softmax_chosen":
            chosen = reference.functions.softmax(chosen)
        norm = chosen.sum(axis=-1) if router.normalize == "sum" else np.linalg.norm(chosen, axis=-1)
        distances.append(norm - router.normalize_eps if router.eps_mode == "max" else [])
    if config.experts.activation in ("relu", "relu2"):
        distances += [gate for _, gate, _, _ in out.cache.experts]
    if config.shared is not None and config.shared.activation in ("relu", "relu2") and out.cache.shared is not None:
        distances.append(out.cache.shared.ffn[1])
    if config.dispatch.drop_priority in ("probability", "batch"):
        distances.append(_gaps(routing.weights[routing.indices >= 0]))
    return min((float(np.abs(d).min()) for d in map(np.asarray, distances) if d.size), default=np.inf)


def _gaps(values: Array) -> Array:
    """Distances of neighbours in descending order along the last axis."""
    return np.diff(-np.sort(-values, axis=-1), axis=-1)
