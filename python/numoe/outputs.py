"""What a layer's forward and backward return."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from numoe import losses
from numoe._arrays import FloatArray
from numoe._steps import Branch, RouterPass
from numoe.config import MoEConfig
from numoe.routing import Dispatch, Routing


@dataclass(frozen=True)
class LossTerm:
    """One auxiliary loss of a forward: its raw value and the coefficient it enters ``aux_loss`` with."""

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


@dataclass(frozen=True, kw_only=True)
class MoEOutput:
    """What `MoELayer.forward` returns; give it to `MoELayer.backward`.

    Attributes
    ----------
    y : (..., D)
    routing : Routing
        ``indices`` (T, K), ``weights`` (T, K), ``logits`` (T, E).
    dispatch : Dispatch
        Which assignments were kept, and in which row.
    losses : dict of str to LossTerm
    aux_loss : float
        Sum of coefficient times value over `losses`.
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


@dataclass(frozen=True, kw_only=True)
class MoEGrads:
    """What `MoELayer.backward` returns.

    Attributes
    ----------
    x : (..., D)
    params : dict of str to array
        Same names and shapes as ``layer.params``.
    logits : (..., E) or None
        Given if the forward got its logits from outside.
    weights : (..., K) or None
        Given if the forward got its routing from outside.
    """

    x: FloatArray
    params: dict[str, FloatArray]
    logits: FloatArray | None = None
    weights: FloatArray | None = None

    def __repr__(self) -> str:
        return f"MoEGrads(x={self.x.shape}, params={{{', '.join(self.params)}}})"
