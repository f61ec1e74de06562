"""The whole layer in readable NumPy: the slow version that every kernel of numoe must agree with.

Read the files in this order: `routing`, `experts`, `losses`, `layer`.  Every forward function is
followed by its adjoint, which quotes each forward line above the lines that differentiate it and runs in
mirrored order; ``dv`` means ∂L/∂v.  The layer computes in the dtype of its configuration, float64
included; the functions follow the dtype of their arrays.  Nothing here is compiled, fused or clever;
nothing falls back to it.

Letters: T tokens · D d_model · F d_ff · E experts · K top_k · N = T·K assignments · M ≤ N rows · C capacity
· S shared width · B sequences.  An *assignment* is a (token, choice) pair with number ``t*K + k``; a *row*
is its place in expert order.

>>> import numpy as np
>>> from numoe import reference
>>> from numoe.config import MoEConfig
>>> config = MoEConfig.from_options(d_model=2, d_ff=3, num_experts=2, top_k=1, dtype="float64")
>>> params = {name: np.ones(shape) for name, shape in config.param_shapes().items()}
>>> out = reference.forward(config, params, [[1.0, 0.0], [0.0, 2.0]])
>>> out.routing.indices.ravel()  # ties go to the lowest index
array([0, 0], dtype=int32)
>>> out.y.round(4)  # F * silu(v) * v for v = 1 and v = 2
array([[ 2.1932,  2.1932],
       [10.5696, 10.5696]])
>>> grads = reference.backward(config, params, np.ones((2, 2)), out)
>>> grads.params["w_down"][:, 0].round(4)  # expert 1 was idle
array([[4.2542, 4.2542],
       [0.    , 0.    ]])
"""

from numoe.reference.experts import experts_backward, experts_forward, feed_forward, feed_forward_backward
from numoe.reference.functions import activate, activate_slope
from numoe.reference.layer import LossTerm, MoEGrads, MoEOutput, backward, forward
from numoe.reference.losses import (
    Loss,
    importance_loss,
    load_balance_loss,
    load_loss,
    update_choice_bias,
    z_loss,
)
from numoe.reference.routing import (
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

__all__ = [
    "Dispatch",
    "Loss",
    "LossTerm",
    "MoEGrads",
    "MoEOutput",
    "Routing",
    "activate",
    "activate_slope",
    "backward",
    "combine",
    "combine_backward",
    "combine_weights",
    "combine_weights_backward",
    "dispatch",
    "experts_backward",
    "experts_forward",
    "feed_forward",
    "feed_forward_backward",
    "forward",
    "importance_loss",
    "load_balance_loss",
    "load_loss",
    "route",
    "route_backward",
    "router_logits",
    "router_logits_backward",
    "update_choice_bias",
    "z_loss",
]
