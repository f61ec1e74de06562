"""numoe: Mixture-of-Experts layers for NumPy, forward and backward, in C++.

Legend of axis letters, used in every docstring, message and comment:

====  =======================================================================
T     tokens (all leading axes of x, flattened)
D     d_model, the width of a token
F     d_ff, the width inside an expert
E     num_experts
K     top_k, experts per token
N     T * K assignments: (token, choice) pairs
M     rows, the assignments that were kept (M <= N: capacity may drop some)
C     capacity, rows per expert
S     width inside the shared expert
====  =======================================================================

The *router* picks experts; "gate" is only ever the gate of a gated linear unit.  Weights read like NumPy: ``x @ w``.
"""

import warnings as _warnings

from numoe import _core, losses, metrics, optim, reference, testing
from numoe.checkpoint import CheckpointError
from numoe.config import DispatchConfig, ExpertConfig, MoEConfig, RouterConfig, SharedExpertConfig
from numoe.experts import ExpertCache, experts_backward, experts_forward
from numoe.info import num_threads, set_num_threads, show_versions
from numoe.layer import MoELayer
from numoe.outputs import LossTerm, MoEGrads, MoEOutput
from numoe.packed import PackedMoELayer
from numoe.routing import (
    Dispatch,
    Routing,
    combine,
    combine_backward,
    combine_weights,
    combine_weights_backward,
    dispatch,
    route,
    route_backward,
    router_logits,
    router_logits_backward,
)

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Dispatch",
    "DispatchConfig",
    "ExpertCache",
    "ExpertConfig",
    "LossTerm",
    "MoEConfig",
    "MoEGrads",
    "MoELayer",
    "MoEOutput",
    "PackedMoELayer",
    "RouterConfig",
    "Routing",
    "SharedExpertConfig",
    "combine",
    "combine_backward",
    "combine_weights",
    "combine_weights_backward",
    "dispatch",
    "experts_backward",
    "experts_forward",
    "losses",
    "metrics",
    "num_threads",
    "optim",
    "reference",
    "route",
    "route_backward",
    "router_logits",
    "router_logits_backward",
    "set_num_threads",
    "show_versions",
    "testing",
]

if _core.bad_num_threads is not None:
    _warnings.warn(
        f"NUMOE_NUM_THREADS={_core.bad_num_threads!r} is not a whole number >= 1; using {num_threads()} threads.",
        RuntimeWarning,
        stacklevel=2,
    )
