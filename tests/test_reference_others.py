"""`numoe.reference` against other people's code: Mixtral of transformers, activations of torch."""

from __future__ import annotations

import numpy as np
import pytest
from numoe import reference
from numoe.config import ACTIVATIONS
from numoe.testing import TOLERANCES, assert_close, random_problem
from reference_cases import backward, forward


def test_mixtral_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    problem = random_problem(tokens=(2, 7), aux_losses={"hf": 1.0})
    w = {name: torch.tensor(value) for name, value in problem.params.items()}
    config = mixtral.MixtralConfig(hidden_size=8, intermediate_size=12, num_local_experts=6, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    block = mixtral.MixtralSparseMoeBlock(config).to(torch.float64)
    with torch.no_grad():
        block.gate.weight.copy_(w["w_router"].T)
        block.experts.gate_up_proj.copy_(torch.cat([w["w_gate"], w["w_up"]], dim=2).transpose(1, 2))
        block.experts.down_proj.copy_(w["w_down"].transpose(1, 2))
    x = torch.tensor(problem.x, requires_grad=True)
    result = block(x)
    result = result[0] if isinstance(result, tuple) else result
    logits = (x @ block.gate.weight.T).reshape(-1, 6)
    aux = mixtral.load_balancing_loss_func((logits,), num_experts=6, top_k=2)
    ((result * torch.tensor(problem.dy)).sum() + aux).backward()

    out = forward(problem)
    grads = backward(problem, out)
    # transformers computes the router's softmax and the loss's means in float32 whatever the layer's dtype.
    loose = {"factor": TOLERANCES["float32"] * 2**29}
    assert_close(out.y, result.detach().numpy(), name="y", **loose)
    assert_close(out.aux_loss, aux.item(), name="aux_loss", **loose)
    assert_close(grads.x, x.grad.numpy(), name="x", **loose)
    assert_close(grads.params["w_router"], block.gate.weight.grad.numpy().T, name="w_router", **loose)
    dgate, dup = np.split(block.experts.gate_up_proj.grad.numpy().transpose(0, 2, 1), 2, axis=2)
    assert_close(grads.params["w_gate"], dgate, name="w_gate", **loose)
    assert_close(grads.params["w_up"], dup, name="w_up", **loose)
    assert_close(
        grads.params["w_down"],
        block.experts.down_proj.grad.numpy().transpose(0, 2, 1),
        name="w_down",
        **loose,
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_torch(activation: str) -> None:
    torch = pytest.importorskip("torch")
    v = np.linspace(-9, 9, 181)
    t = torch.tensor(v, requires_grad=True)
    functional = torch.nn.functional
    y = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda u: functional.gelu(u, approximate="tanh"),
        "relu": functional.relu,
        "relu2": lambda u: functional.relu(u) ** 2,
        "quick_gelu": lambda u: u * torch.sigmoid(1.702 * u),
    }[activation](t)
    y.sum().backward()
    assert_close(reference.activate(activation, v), y.detach().numpy())
    assert_close(reference.activate_slope(activation, v), t.grad.numpy())
