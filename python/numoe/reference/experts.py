"""The experts: feed-forward networks, each on its own rows."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np

from numoe.config import EXPERT_PARAMS, ExpertConfig
from numoe.reference.functions import Array, activate, activate_slope, quiet
from numoe.reference.routing import Dispatch, per_assignment, row_weights, sum_per_token

Cache = tuple[Array, Array, Array, Array]  # x (n, D), gate (n, F), up (n, F), hidden (n, F)


def feed_forward(form: str, activation: str, w: Mapping[str, Array], x: Array) -> tuple[Array, Cache]:
    """One expert, or the shared one, on the rows x, (n, D) → (n, D), and what its backward needs.

    >>> w = {"w_up": np.eye(2), "w_down": np.ones((2, 2))}
    >>> feed_forward("mlp", "relu", w, np.array([[3.0, -5.0]]))[0]
    array([[3., 3.]])
    """
    up = x @ w["w_up"] + w.get("b_up", 0)
    if form == "glu":
        gate = x @ w["w_gate"] + w.get("b_gate", 0)
        hidden = activate(activation, gate) * up
    else:
        gate = up
        hidden = activate(activation, up)
    out = hidden @ w["w_down"] + w.get("b_down", 0)
    return out, (x, gate, up, hidden)


def feed_forward_backward(
    form: str, activation: str, w: Mapping[str, Array], cache: Cache, dout: Array
) -> tuple[Array, dict[str, Array]]:
    """The gradients of x and of every array in w."""
    x, gate, up, hidden = cache
    # out = hidden @ w_down + b_down
    dhidden = dout @ w["w_down"].T
    dw = {"w_down": hidden.T @ dout, "b_down": dout.sum(axis=0)}
    if form == "glu":
        # hidden = activate(gate) * up
        dgate = dhidden * up * activate_slope(activation, gate)
        dup = dhidden * activate(activation, gate)
        # gate = x @ w_gate + b_gate
        dx = dgate @ w["w_gate"].T
        dw |= {"w_gate": x.T @ dgate, "b_gate": dgate.sum(axis=0)}
    else:
        # hidden = activate(up)
        dup = dhidden * activate_slope(activation, up)
        dx = np.zeros_like(x)
    # up = x @ w_up + b_up
    dx += dup @ w["w_up"].T
    dw |= {"w_up": x.T @ dup, "b_up": dup.sum(axis=0)}
    return dx, {name: dw[name] for name in w}


@quiet
def experts_forward(
    x: Array,
    plan: Dispatch,
    params: Mapping[str, Array],
    config: ExpertConfig,
    *,
    weights: Array | None = None,
) -> tuple[Array, list[Cache]]:
    """Every expert on the tokens of its rows, (T, D) → (M, D), and one cache per expert.

    The weights (T, K) are used for ``weight_on="input"`` only: f(w x) as in Llama-4 instead of w f(x).
    """
    rows_in = x[plan.row_token]
    if config.weight_on == "input":
        rows_in = rows_in * row_weights(plan, weights)
    rows, caches = np.empty_like(rows_in), []
    for e, mine in enumerate(_row_ranges(plan)):
        rows[mine], cache = feed_forward(config.form, config.activation, _expert(params, e), rows_in[mine])
        caches.append(cache)
    return rows, caches


@quiet
def experts_backward(
    drows: Array,
    x: Array,
    plan: Dispatch,
    params: Mapping[str, Array],
    config: ExpertConfig,
    cache: list[Cache],
    *,
    weights: Array | None = None,
) -> tuple[Array, Array | None, dict[str, Array]]:
    """The gradients of x, of the weights if they were used, and of the parameters; 0 for an idle expert."""
    drows_in = np.empty_like(drows)
    dparams = {name: np.empty_like(params[name]) for name in EXPERT_PARAMS if name in params}
    for e, mine in enumerate(_row_ranges(plan)):
        # rows[mine] = feed_forward(rows_in[mine])
        w = _expert(params, e)
        drows_in[mine], dw = feed_forward_backward(config.form, config.activation, w, cache[e], drows[mine])
        for name, gradient in dw.items():
            dparams[name][e] = gradient
    dweights = None
    if config.weight_on == "input":
        # rows_in = x[row_token] * row_weights
        dweights = per_assignment((x[plan.row_token] * drows_in).sum(axis=-1), plan)
        drows_in = drows_in * row_weights(plan, weights)
    # rows_in = x[row_token]
    return sum_per_token(drows_in, plan), dweights, dparams


def _row_ranges(plan: Dispatch) -> list[slice]:
    """The rows of each expert."""
    return [slice(begin, end) for begin, end in itertools.pairwise(plan.offsets)]


def _expert(params: Mapping[str, Array], e: int) -> dict[str, Array]:
    """The parameters of expert e."""
    return {name: params[name][e] for name in EXPERT_PARAMS if name in params}
