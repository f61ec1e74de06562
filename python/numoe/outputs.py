"""What a layer's forward and backward return."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from numoe import losses
from numoe._arrays import FloatArray
from numoe._steps import Branch, RouterPass
from numoe.config import MoEConfig
from numoe.routing import Dispatch, Routing


@dataclass(frozen=True)
class LossTerm:
    """One auxiliary loss of a forward: its raw value and the coefficient it enters ``aux_loss`` with.

    Examples
    --------
    >>> import numpy as np, numoe
    >>> layer = numoe.MoELayer(d_model=8, d_ff=16, num_experts=4, top_k=2, aux_losses={"importance": 0.1}, rng=0)
    >>> layer.forward(np.zeros((3, 8), np.float32)).losses["importance"].coefficient
    0.1
    """

    value: float
    coefficient: float


class ForwardCache(NamedTuple):
    """What the backward needs."""

    params: dict[str, FloatArray]  # the layer's own: tells whose forward this was
    config: MoEConfig
    x: FloatArray  # (T, D), zeros for masked tokens
    router: RouterPass | None  # None: indices and weights came from outside
    routed: Branch
    shared: Branch | None
    losses: dict[str, losses.Loss]
    given: tuple[int, ...] | None  # the shape of the logits or weights from outside


@dataclass(frozen=True, kw_only=True, eq=False)
class MoEOutput:
    """What `MoELayer.forward` returns; give it to `MoELayer.backward`.

    Attributes
    ----------
    y : (..., D)
        Of the layer's dtype, in x's shape.
    routing : Routing
        ``indices`` (T, K), ``weights`` (T, K), ``logits`` (T, E); float32 in a bfloat16 layer.
    dispatch : Dispatch
        Which assignments were kept, and in which row.
    losses : dict of str to LossTerm
    aux_loss : float
        Sum of coefficient times value over `losses`.

    Examples
    --------
    >>> import numpy as np, numoe
    >>> layer = numoe.MoELayer(d_model=8, d_ff=16, num_experts=4, top_k=2, capacity=2, rng=0)
    >>> layer.forward(np.ones((3, 8), np.float32))
    MoEOutput(y=(3, 8), Dispatch(T=3, K=2, E=4, M=4 rows, capacity=2), dropped=2, aux_loss=0)
    """

    y: FloatArray
    routing: Routing
    dispatch: Dispatch
    losses: dict[str, LossTerm]
    aux_loss: float
    _cache: ForwardCache = field(repr=False)

    def __repr__(self) -> str:
        dropped = int((self.routing.indices >= 0).sum()) - self.dispatch.num_rows
        return f"MoEOutput(y={self.y.shape}, {self.dispatch!r}, dropped={dropped}, aux_loss={self.aux_loss:.6g})"


def check_output(out: Any) -> None:
    """`out` is what a forward returns."""
    if not isinstance(out, MoEOutput):
        raise TypeError(f"out must be the MoEOutput of layer.forward(x); got {type(out).__name__}.")


@dataclass(frozen=True, kw_only=True, eq=False)
class MoEGrads:
    """What `MoELayer.backward` returns.

    Attributes
    ----------
    x : (..., D)
        Of the layer's dtype.
    params : dict of str to array
        Same names and shapes as ``layer.params``; float32 in a bfloat16 layer, as `logits` and `weights` are.
    logits : (..., E) or None
        Given if the forward got its logits from outside.
    weights : (..., K) or None
        Given if the forward got its routing from outside.

    Examples
    --------
    >>> import numpy as np, numoe
    >>> layer = numoe.MoELayer(d_model=8, d_ff=16, num_experts=4, top_k=2, rng=0)
    >>> out = layer.forward(np.ones((3, 8), np.float32), logits=np.ones((3, 4)))
    >>> grads = layer.backward(out.y, out)
    >>> grads, grads.logits.shape, grads.weights
    (MoEGrads(x=(3, 8), params={w_router, w_gate, w_up, w_down}), (3, 4), None)
    """

    x: FloatArray
    params: dict[str, FloatArray]
    logits: FloatArray | None = None
    weights: FloatArray | None = None

    def __repr__(self) -> str:
        return f"MoEGrads(x={self.x.shape}, params={{{', '.join(self.params)}}})"
