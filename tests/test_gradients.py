"""float64 differences through the whole C++ layer: every router × expert form × loss; the worst error is shown."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numoe
import numpy as np
import pytest
from layers import layer_of
from numoe.config import ACTIVATIONS, AUX_LOSSES, FORMS, PRIORITIES, WEIGHT_ON
from numoe.testing import TOLERANCES, GradientReport, check_gradients, random_problem

Options = dict[str, Any]

ROUTERS: list[Options] = [
    {},
    {"normalize": "none"},
    {"normalize_eps": 0.1},
    {"normalize": "l2", "normalize_eps": 0.9, "eps_mode": "max"},
    {"score": "softmax_chosen", "scale": 2.5},
    {"score": "softmax_chosen", "normalize": "l2"},
    {"score": "sigmoid"},
    {"score": "sigmoid", "normalize": "none", "choice_bias": True, "num_groups": 2, "groups_kept": 1},
    {"score": "sigmoid", "normalize": "l2", "normalize_eps": 0.1, "linear_bias": True},
    {"score": "sqrt_softplus", "scale": 0.5},
    {"score": "sqrt_softplus", "normalize": "none", "num_groups": 3, "groups_kept": 2, "group_score": "max"},
    {"score": "sqrt_softplus", "normalize_eps": 1.0, "eps_mode": "max"},
]
LOSSES: list[Options] = [{"aux_losses": {}}, *({"aux_losses": {name: 0.3}} for name in AUX_LOSSES)]
WORST: dict[str, float] = {}


@pytest.fixture(scope="module", autouse=True)
def _summary(request: pytest.FixtureRequest) -> Iterator[None]:
    """One line at the end of the module: the largest relative error of all gradients, and where it was."""
    yield
    name, error = max(WORST.items(), key=lambda item: item[1], default=("", 0.0))
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print(f"\nworst relative gradient error of {len(WORST)} layers: {error:.1e} ({name})")


def check(tokens: int | tuple[int, ...] = 5, inputs: Options | None = None, **options: Any) -> GradientReport:
    """`check_gradients` for a small random layer with the options."""
    if "load" in options.get("aux_losses", {}):
        options = {"noise_std": 0.7} | options
    sizes = {"d_model": 3, "d_ff": 2, "num_experts": 6, "top_k": 2}
    problem = random_problem(1, tokens=tokens, **(sizes | options))
    report = check_gradients(layer_of(problem), problem.x, num_coordinates=1, num_directions=1, **(inputs or {}))
    report.assert_ok()
    WORST[str(options)] = report.worst.error
    return report


def in_turn(values: tuple[str, ...], router: Options, losses: Options) -> str:
    return values[(ROUTERS.index(router) + LOSSES.index(losses)) % len(values)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("router", ROUTERS)
def test_router_form_loss(router: Options, losses: Options, form: str) -> None:
    weight_on, activation = in_turn(WEIGHT_ON, router, losses), in_turn(ACTIVATIONS, router, losses)
    check(form=form, activation=activation, weight_on=weight_on, **losses, **router)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weight_on", WEIGHT_ON)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_expert(form: str, activation: str, weight_on: str, bias: bool) -> None:
    check(form=form, activation=activation, weight_on=weight_on, bias=bias, top_k=3)


@pytest.mark.parametrize("priority", PRIORITIES)
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("weight_on", WEIGHT_ON)
def test_dropped_assignments(priority: str, renormalize: bool, weight_on: str) -> None:
    drop = {"capacity": 1, "drop_priority": priority, "renormalize_after_drop": renormalize}
    check(tokens=8, top_k=3, weight_on=weight_on, scale=1.5, aux_losses={"megatron": 0.2}, **drop)


@pytest.mark.parametrize("gate", ["none", "sigmoid"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_shared_expert(gate: str, form: str, activation: str) -> None:
    check(shared=numoe.SharedExpertConfig(d_ff=3, gate=gate, form=form, activation=activation))


@pytest.mark.parametrize("losses", LOSSES)
def test_mask_and_sequences(losses: Options) -> None:
    mask = np.array([[True, True, False], [False, True, True], [False, False, False]])
    report = check((3, 3), {"mask": mask}, capacity_per="sequence", capacity=2, **losses)
    assert report.checks[0].checked > 0


@pytest.mark.parametrize("losses", [{}, {"aux_losses": {"z": 0.2, "switch": 0.1, "importance": 0.3}}])
@pytest.mark.parametrize("router", ROUTERS)
def test_external_logits(router: Options, losses: Options) -> None:
    logits = np.random.default_rng(5).standard_normal((5, 6))
    report = check(5, {"logits": logits}, **losses, **router)
    assert [c.name for c in report.checks][:2] == ["x", "logits"]


@pytest.mark.parametrize("weight_on", WEIGHT_ON)
@pytest.mark.parametrize("losses", [{}, {"aux_losses": {"importance": 0.3}}])
def test_external_routing(weight_on: str, losses: Options) -> None:
    indices = np.array([[0, 3], [5, -1], [-1, -1], [3, 0], [2, 1]])
    weights = np.random.default_rng(6).standard_normal((5, 2))
    report = check(5, {"indices": indices, "weights": weights}, weight_on=weight_on, **losses)
    assert [c.name for c in report.checks][:2] == ["x", "weights"]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("losses", LOSSES)
def test_noise_jitter_and_a_frozen_router(losses: Options, frozen: bool) -> None:
    check(jitter=0.2, noise_std=0.5, frozen=frozen, linear_bias=True, **losses)


@pytest.mark.parametrize(
    "options",
    [{"num_experts": 1, "top_k": 1}, {"top_k": 6}, {"d_model": 1, "d_ff": 1}, {"d_model": 9, "d_ff": 17}],
)
@pytest.mark.parametrize("losses", [LOSSES[0], {"aux_losses": dict.fromkeys(AUX_LOSSES, 0.1)}])
def test_sizes(options: Options, losses: Options) -> None:
    check(**options, **losses)


def test_all_losses_at_once_without_their_gradient() -> None:
    check(5, {"d_aux_loss": 0.0}, aux_losses=dict.fromkeys(AUX_LOSSES, 0.1))
    check(5, {"d_aux_loss": -2.0}, aux_losses=dict.fromkeys(AUX_LOSSES, 0.1))


def test_the_check_sees_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """One part in a hundred thousand is ten times the tolerance."""
    right = numoe.MoELayer.backward

    def wrong(*args: Any, **options: Any) -> numoe.MoEGrads:
        grads = right(*args, **options)
        grads.params["w_up"][...] *= 1 + 1e-5
        return grads

    monkeypatch.setattr(numoe.MoELayer, "backward", wrong)
    with pytest.raises(AssertionError, match="gradients differ: w_up;"):
        check()
    assert TOLERANCES["gradient"] == 1e-6


def test_every_combination_is_in_the_product() -> None:
    """A new score, normalisation, form, loss or activation must be added to the lists above."""
    scores = {router.get("score", "softmax") for router in ROUTERS}
    norms = {router.get("normalize", "sum") for router in ROUTERS}
    assert scores == set(numoe.config.SCORES) and norms == set(numoe.config.NORMALIZATIONS)
    assert {name for loss in LOSSES for name in loss["aux_losses"]} == set(AUX_LOSSES)
    for values in (ACTIVATIONS, WEIGHT_ON):
        assert {in_turn(values, router, loss) for router, loss in itertools.product(ROUTERS, LOSSES)} == set(values)
