"""Bad inputs get a sentence - argument, what came, what was expected - before anything changes."""

from __future__ import annotations

import builtins
import copy
import dataclasses
import resource
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numoe
import numpy as np
import pytest
from layers import snapshot
from numoe import losses, optim
from numoe.testing import assert_bitwise_equal

T, D, F, E, K = 6, 4, 5, 3, 2
Layer = numoe.MoELayer


def make(**options: Any) -> Layer:
    return Layer(**({"d_model": D, "d_ff": F, "num_experts": E, "top_k": K, "rng": 0} | options))


def tokens(dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((T, D)).astype(dtype)


X = tokens()
INDICES = np.tile(np.int32([2, 0]), (T, 1))
WEIGHTS = np.full((T, K), 0.5, np.float32)
LOGITS = np.random.default_rng(2).standard_normal((T, E)).astype(np.float32)
ROUTER = numoe.RouterConfig(num_experts=E, top_k=K)
SHARED = numoe.SharedExpertConfig(d_ff=F)


def refused(row: tuple[Callable[..., Any], str], *arguments: Any) -> None:
    """The call raises the exception and the message that the sentence "ExceptionType: pattern" states."""
    call, sentence = row
    error, message = sentence.split(": ", 1)
    with pytest.raises(getattr(builtins, error), match="^" + message):
        call(*arguments)


def forward(**options: Any) -> Callable[[Layer], Any]:
    return lambda layer: layer.forward(**({"x": X} | options))


def backward(dy: Any, **options: Any) -> Callable[[Layer], Any]:
    return lambda layer: layer.backward(dy, layer.forward(X), **options)


def with_x(x: Any) -> Callable[[Layer], Any]:
    return lambda layer: layer(x)


def with_item(array: np.ndarray, at: Any, value: Any, dtype: Any = None) -> np.ndarray:
    changed = array.astype(dtype or array.dtype)
    changed[at] = value
    return changed


def read_only(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


class FromTorch:
    """What `np.asarray` meets in a tensor that it cannot take."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise self.error


REQUIRES_GRAD = RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy().")
ON_GPU = TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")


# ── construction

# fmt: off
CONSTRUCTION: dict[str, tuple[Callable[..., Any], str]] = {
    "B1 no experts": (lambda: make(num_experts=0), r"ValueError: num_experts must be in 1\.\..*; got 0"),
    "B1 negative experts": (lambda: make(num_experts=-3), "ValueError: num_experts must be .*; got -3"),
    "B2 top_k 0": (lambda: make(top_k=0), r"ValueError: top_k must be in 1\.\.num_experts \(3\); got 0"),
    "B2 top_k negative": (lambda: make(top_k=-1), "ValueError: top_k must be in .*; got -1"),
    "B2 top_k hugely negative": (lambda: make(top_k=-(2**70)), r"ValueError: top_k must be in 1\.\.num_e"),
    "B3 top_k > E": (lambda: make(top_k=4), r"ValueError: top_k must be in 1\.\.num_experts \(3\); got 4"),
    "B4 d_model 0": (lambda: make(d_model=0), r"ValueError: d_model must be in 1\.\..*; got 0"),
    "B4 d_ff 0": (lambda: make(d_ff=0), r"ValueError: d_ff must be in 1\.\..*; got 0"),
    "B4 d_ff negative": (lambda: make(d_ff=-1), "ValueError: d_ff must be .*; got -1"),
    **{
        f"B5 num_experts {v!r}": (lambda v=v: make(num_experts=v), "TypeError: num_experts must be an int; got")
        for v in (8.0, "8", None, True, np.float32(8))
    },
    "B6 experts": (lambda: make(num_experts=2**40), "ValueError: num_experts must be .*got 1099511627776"),
    "B6 product": (lambda: make(d_model=2**31 - 1, d_ff=2**31 - 1), "ValueError: w_gate .* bytes"),
    "B7 activation": (lambda: make(activation="sylu"),
        "ValueError: activation .*'silu'.*'sylu'.*mean 'silu'"),
    "B7 score": (lambda: make(score="softmx"), "ValueError: score .*Did you mean 'softmax'"),
    "B7 form": (lambda: make(form="GLU"), "ValueError: form must be one of 'glu', 'mlp'; got 'GLU'"),
    "B7 loss": (lambda: make(aux_losses={"swich": 1}), "ValueError: aux_losses name .*mean 'switch'"),
    "B7 not a string": (lambda: make(activation=3), "TypeError: activation must be one of .*; got 3"),
    **{
        f"B8 capacity_factor {v}": (lambda v=v: make(capacity_factor=v), "ValueError: capacity_factor must be")
        for v in (0, -1.0, float("nan"), float("inf"))
    },
    "B8 capacity_factor beyond floats": (lambda: make(capacity_factor=10**400), "ValueError: capacity_factor must"),
    "B8 both": (lambda: make(capacity=1, capacity_factor=1), "ValueError: capacity and capacity_factor excl"),
    "B8 capacity -1": (lambda: make(capacity=-1), "ValueError: capacity must be >= 0; got -1"),
    "B9 groups": (lambda: make(num_groups=2), r"ValueError: num_groups must divide num_experts \(3\); got 2"),
    "B9 kept": (lambda: make(num_groups=3, groups_kept=4),
        r"ValueError: groups_kept .*num_groups \(3\).*got 4"),
    "B9 top_k": (lambda: make(num_groups=3, group_score="max"),
        r"ValueError: top_k .* \(1 \* 1 = 1\); got 2"),
    **{
        f"B10 dtype {v!r}": (lambda v=v: make(dtype=v), "TypeError: dtype must be one of float32, float64, bfloat16;")
        for v in ("int32", "complex64", object, "bf17", "float16", "float8_e5m2", None, {}, [], "f4,f4", 7)
    },
    "B12 rng": (lambda: make(rng="abc"), "TypeError: rng must be .*default_rng.*; got 'abc'"),
    "B12 rng -1": (lambda: make(rng=-1), "ValueError: rng must be .*int >= 0.*; got -1"),
    "B18 typo": (lambda: make(topk=1), "TypeError: unknown option 'topk'.*Did you mean 'top_k'"),
    "B18 missing": (lambda: Layer(d_model=4), "TypeError: missing options 'd_ff', 'num_experts', 'top_k'"),
    "B18 config": (lambda: Layer(config={"d_model": 4}),
        "TypeError: config must be a numoe.MoEConfig; got dict"),
    "B18 both": (lambda: Layer(config=make().config, top_k=1), "TypeError: give config or single options"),
    "B20 shared 0": (lambda: numoe.SharedExpertConfig(d_ff=0), "ValueError: shared d_ff must be"),
    "B20 shared type": (lambda: make(shared="glu"), "TypeError: shared must be a SharedExpertConfig"),
    "B22 jitter": (lambda: make(jitter=-0.1), "ValueError: jitter must be .*; got -0.1"),
    "B22 jitter 2": (lambda: make(jitter=2.0), "ValueError: jitter must be .*<= 1; got 2"),
    "B22 noise": (lambda: make(noise_std=float("nan")), "ValueError: noise_std must be .*; got nan"),
    "B22 scale": (lambda: make(scale=10**400), "ValueError: scale must be finite"),
    "B22 eps": (lambda: make(normalize_eps="1"), "TypeError: normalize_eps must be a real number; got '1'"),
    "B52 flag": (lambda: make(bias="yes"), "TypeError: bias must be True or False; got 'yes'"),
    "B54 positional": (lambda: Layer(4, 5), "TypeError: .*positional"),
    "B88 negative": (lambda: make(aux_losses={"z": -1}), r"ValueError: aux_losses\['z'\] must be .*; got -1"),
    "B88 nan": (lambda: make(aux_losses={"z": float("nan")}), r"ValueError: aux_losses\['z'\] .*; got nan"),
    "B88 beyond float32": (lambda: make(aux_losses={"z": 1e39}),
        r"ValueError: aux_losses\['z'\] must be finite and .*<= 3.40282e\+38; got 1e\+39"),
    "B88 list": (lambda: make(aux_losses=["z"]), "TypeError: aux_losses must map .*; got list"),
    "B88 load": (lambda: make(aux_losses={"load": 1}), "ValueError: .*'load'.*needs noise_std > 0"),
}
# fmt: on


@pytest.mark.parametrize("row", CONSTRUCTION)
def test_construction(row: str) -> None:
    refused(CONSTRUCTION[row])


# ── calls of a layer

NAN_X = with_item(X, (2, 1), np.nan)
# fmt: off
CALLS: dict[str, tuple[Callable[..., Any], str]] = {
    "B13 transposed": (lambda y: y.load_state_dict(changed(y, "w_up", lambda w: w.swapaxes(1, 2))),
        r"ValueError: .*'w_up' must have shape \(3, 4, 5\); got \(3, 5, 4\).*transposed"),
    "B13 ndim": (lambda y: y.load_state_dict(changed(y, "w_up", lambda w: w[0])),
        r"ValueError: .*'w_up' must have shape \(3, 4, 5\); got \(4, 5\)"),
    "B13 type": (lambda y: y.load_state_dict(changed(y, "w_up", lambda w: "w")), "ValueError: .*'w_up' must"),
    "B13 range": (lambda y: y.load_state_dict(changed(y, "w_up", lambda w: w + 1e39)),
        "ValueError: .*'w_up'.*1e"),
    "B13 key": (lambda y: y.load_state_dict({0: X}), "ValueError: .*unexpected: 0"),
    "B13 mapping": (lambda y: y.load_state_dict([X]), "TypeError: state must map names to arrays; got list"),
    "B24 0-d": (with_x(np.float32(1)),
        r"ValueError: x must have shape \(\.\.\., d_model\) = \(\.\.\., 4\); got \(\)\."),
    "B25 width": (with_x(np.ones((2, 7))), r"ValueError: x must have shape .*4\); got \(2, 7\)"),
    "B27 no width": (with_x(np.ones((2, 0))), r"ValueError: x must have shape .*4\); got \(2, 0\)"),
    "B29 ints": (with_x(np.ones((2, D), int)), "TypeError: x has dtype int64; pass float32 or float64"),
    "B29 bools": (with_x(np.ones((2, D), bool)), "TypeError: x has dtype bool; pass float32"),
    "B30 complex": (with_x(X.astype(complex)), "TypeError: x has dtype complex128"),
    "B31 objects": (with_x(X.astype(object)), "TypeError: x has dtype object"),
    "B31 string": (with_x("abc"), "TypeError: x must be an array of numbers; got str"),
    "B31 strings": (with_x([["a"] * D]), "TypeError: x has dtype <U1"),
    "B31 None": (with_x(None), "TypeError: x must be an array of numbers; got NoneType"),
    "B31 dict": (with_x({"x": X}), "TypeError: x must be an array of numbers; got dict"),
    "B32 ragged": (with_x([[1.0], [1.0, 2.0]]), "ValueError: x is not a rectangular array"),
    "B31 output": (lambda y: y(y.forward(X)), r"TypeError: x is a MoEOutput; pass .* e\.g\. out\.y\."),
    "B31 routing": (lambda y: y(y.forward(X).routing), r"TypeError: x is a Routing; pass .*routing\.weights\."),
    "B31 gradients": (lambda y: y(y.backward(X, y.forward(X))), r"TypeError: x is a MoEGrads; .*grads\.x\."),
    "B31 layer": (lambda y: y(y), "TypeError: x is a MoELayer; pass an array of numbers"),
    "B12 rng": (forward(rng="abc"), "TypeError: rng must be .*; got 'abc'"),
    "B12 rng of a call": (lambda y: y(X, rng=-1), "ValueError: rng must be .*; got -1"),
    "B34 masked": (with_x(np.ma.masked_array(X, X > 0)), r"TypeError: x is a masked array .*mask=~x\.mask"),
    "B36 requires grad": (with_x(FromTorch(REQUIRES_GRAD)), "TypeError: x .FromTorch.*requires grad.*detach"),
    "B38 on the GPU": (with_x(FromTorch(ON_GPU)), r"TypeError: x .FromTorch.*cuda.*\.cpu\(\)"),
    "B43 too large": (with_x(np.full((1, D), 1e39)), "ValueError: x holds float64 values beyond .* float32"),
    "B44 matrix": (with_x(X.view(np.matrix)), "TypeError: x is a np.matrix"),
    "B45 structured": (with_x(np.zeros(2, "f4,f4")), "TypeError: x has dtype"),
    "B45 dates": (with_x(np.zeros((2, D), "M8[s]")), "TypeError: x has dtype datetime64"),
    "B45 void": (with_x(np.zeros((2, D), "V4")), "TypeError: x has dtype .*V4"),
    "B47 NaN": (forward(x=NAN_X, nan_policy="raise"),
        "FloatingPointError: .*NaN .*first at token 2.*nan_policy"),
    "B47 inference": (lambda y: y(NAN_X, nan_policy="raise"), "FloatingPointError: .*first at token 2"),
    "B47 outside logits": (forward(x=NAN_X, logits=LOGITS, nan_policy="raise"),
        "FloatingPointError: .*token 2"),
    "B47 outside routing": (forward(x=NAN_X, indices=INDICES, weights=WEIGHTS, nan_policy="raise"),
        "FloatingPointError: .*token 2"),
    "B47 policy": (forward(nan_policy="ignore"),
        "ValueError: nan_policy must be 'propagate' or 'raise'; got"),
    "B47 policy with a routing": (forward(indices=INDICES, weights=WEIGHTS, nan_policy="ignore"),
        "ValueError: nan_policy must be"),
    "B49 out dtype": (lambda y: y(X, out=np.empty((T, D))),
        "TypeError: out must be a float32 array; got float64"),
    "B49 out list": (lambda y: y(X, out=[0]), "TypeError: out must be a float32 array; got list"),
    "B49 out shape": (lambda y: y(X, out=np.empty((T, 1), "f4")),
        r"ValueError: out must .*\(6, 4\); got \(6, 1\)"),
    "B49 out strides": (lambda y: y(X, out=np.empty((D, T), "f4").T),
        "ValueError: out must be .*C-contiguous"),
    "B49 out read-only": (lambda y: y(X, out=read_only(X.copy())), "ValueError: out must be writable"),
    "B50 overlap": (lambda y: y(x := X.copy(), out=x), "ValueError: out overlaps x"),
    "B50 shifted": (lambda y: y((a := np.zeros((T + 1, D), "f4"))[1:], out=a[:-1]),
        "ValueError: out overlaps x"),
    "B50 behind a view": (lambda y: y(memoryview(x := X.copy()), out=x), "ValueError: out overlaps x"),
    "B53 mask length": (forward(mask=np.ones(T + 1, bool)), r"ValueError: mask must .*\(6,\); got \(7,\)"),
    "B53 mask dtype": (forward(mask=np.ones(T)), "TypeError: mask must be an array of bools.*float64"),
    "B53 mask ragged": (forward(mask=[[True], [True, False]]), "ValueError: mask "),
    "B54 positional": (lambda y: y.forward(X, np.ones(T, bool)), "TypeError: .*positional"),
    "B55 logits width": (forward(logits=np.ones((T, E + 1))),
        r"ValueError: logits must .*E = 3; got \(6, 4\)"),
    "B55 logits order": (forward(x=X.reshape(2, 3, D), logits=LOGITS.reshape(3, 2, E)),
        r"ValueError: logits must .*\(3, 2, 3\)"),
    "B55 logits and routing": (forward(logits=LOGITS, indices=INDICES, weights=WEIGHTS),
        "ValueError: give logits, or indices and weights.*got logits and indices and weights"),
    "B57 no expert": (forward(logits=with_item(LOGITS, 4, -np.inf)),
        "ValueError: .*no expert .* token 4.*-inf"),
    "B63 index E": (forward(indices=with_item(INDICES, (1, 1), E), weights=WEIGHTS),
        r"IndexError: indices\[1, 1\] = 3 is out of range for num_experts = 3"),
    "B63 index -2": (forward(indices=INDICES - 3, weights=WEIGHTS), r"IndexError: indices\[0, 1\] = -3"),
    "B63 2**31": (forward(indices=with_item(INDICES, 0, 2**31, np.int64), weights=WEIGHTS),
        r"IndexError: indices\[0, 0\] = 2147483648"),
    "B63 2**63": (forward(indices=with_item(INDICES, 0, 2**63, np.uint64), weights=WEIGHTS),
        r"IndexError: indices\[0, 0\] = 9223372036854775808"),
    "B64 floats": (forward(indices=INDICES * 1.0, weights=WEIGHTS),
        "TypeError: indices must be an array of ints"),
    "B65 twice": (forward(indices=INDICES * 0, weights=WEIGHTS),
        r"ValueError: indices\[0\] chooses expert 0 twice"),
    "B66 widths": (forward(indices=INDICES, weights=np.ones((T, K + 1), "f4")),
        r"ValueError: indices and weights must .*\(6, 2\) and \(6, 3\)"),
    "B66 transposed": (forward(indices=np.tile([0, 1], (K, T // K)), weights=WEIGHTS.T),
        r"ValueError: indices and weights must .*\(2, 6\)"),
    "B66 weights only": (forward(weights=WEIGHTS), "ValueError: give logits, or .*got weights only"),
    "B73 no forward": (lambda y: y.backward(X, None),
        "TypeError: out must be the MoEOutput of layer.forward"),
    "B75 dy shape": (backward(np.ones((T, D + 1))), r"ValueError: dy must have the shape of out.y, \(6, 4\)"),
    "B75 dy dtype": (backward(np.ones((T, D), int)), "TypeError: dy has dtype int64"),
    "B75 dy None": (backward(None), "TypeError: dy must be an array of numbers; got NoneType"),
    "B75 dy ragged": (backward([[1.0], [1.0, 2.0]]), "ValueError: dy is not a rectangular array"),
    "B75 d_aux_loss type": (backward(X, d_aux_loss="abc"), "TypeError: d_aux_loss must be a real number"),
    "B75 d_aux_loss nan": (backward(X, d_aux_loss=float("nan")), "ValueError: d_aux_loss must be finite"),
    "B75 d_aux_loss range": (backward(X, d_aux_loss=1e300), "ValueError: d_aux_loss"),
    "B79 inference": (lambda y: y.backward(X, y(X)), "TypeError: out must be the MoEOutput.*got ndarray"),
    "B80 other config": (lambda y: y.backward(X, make(top_k=1).forward(X)),
        "ValueError: .*another configuration"),
    "B80 other layer": (lambda y: y.backward(X, Layer(config=y.config, rng=9).forward(X)),
        "ValueError: out comes from another"),
    "B80 copy": (lambda y: copy.deepcopy(y).backward(X, y.forward(X)), "ValueError: out comes from another"),
    "B84 replaced": (lambda y: spoiled(y, "w_up", np.ones((1, 2), "f4"))(X),
        r"ValueError: layer.params\['w_up'\] must be a float32 array of shape \(3, 4, 5\); got float32 \(1, 2\)"),
    "B84 dtype": (lambda y: spoiled(y, "w_up", np.ones((E, D, F)))(X), "ValueError: .*got float64"),
    "B84 deleted": (lambda y: spoiled(y, "w_up", None)(X),
        r"ValueError: layer.params\['w_up'\] must .*got None"),
    "B84 masked": (lambda y: spoiled(y, "w_up", np.ma.masked_array(y.params["w_up"], True))(X),
        r"ValueError: layer.params\['w_up'\] must"),
    "B16 memory order": (lambda y: spoiled(y, "w_up", np.ones((F, D, E), "f4").T)(X),
        r"ValueError: layer.params\['w_up'\] must be C-contiguous and aligned.*np\.ascontiguousarray"),
    "B16 shared": (lambda _: spoiled(make(shared=SHARED), "w_shared_up", np.ones((F, D), "f4").T)(X),
        r"ValueError: layer.params\['w_shared_up'\] must be C-contiguous"),
    "B40 misaligned": (lambda y: spoiled(y, "w_up", misaligned(y.params["w_up"]))(X),
        r"ValueError: layer.params\['w_up'\] must be C-contiguous and aligned"),
    "B88 sum": (lambda _: make(dtype="float64", aux_losses={"z": 1.7e308, "megatron": 1.7e308}).forward(X),
        r"OverflowError: aux_loss, .*float64.*coefficients.*'z': 1.7e\+308"),
    "B90 lengths": (forward(sequence_lengths=[2, 3]), "ValueError: sequence_lengths must sum to T = 6.*sum to 5"),
    "B90 which": (forward(sequence_lengths=[3, -1, 4]), r"ValueError: sequence_lengths\[1\] must be in 0\.\.T"),
    "B90 floats": (forward(sequence_lengths=[2.0, 4.0]), "TypeError: sequence_lengths must be"),
    "B90 ragged": (forward(sequence_lengths=[[2], [2, 2]]), "ValueError: sequence_lengths"),
    "B90 wrap": (forward(x=X[:0], sequence_lengths=[2**62] * 4), "ValueError: sequence_lengths"),
    "B72 bias": (lambda y: y.update_choice_bias(y.forward(X)),
        "ValueError: .*choice_bias=True"),
    "B72 other experts": (lambda _: make(choice_bias=True).update_choice_bias(make(num_experts=2).forward(X)),
        "ValueError: out comes from a layer with 2 experts; this one has 3"),
    "B72 rate": (lambda _: (b := make(choice_bias=True)).update_choice_bias(b.forward(X), rate=1e39),
        "ValueError: rate must be finite and .*got 1e"),
    "B72 read-only": (lambda _: read_only_bias().update_choice_bias(make().forward(X)),
        "ValueError: read-only buffer 'choice_bias'; replace it by a writable copy"),
    "B73 bias without output": (lambda y: make(choice_bias=True).update_choice_bias(None),
        "TypeError: out must be"),
}
# fmt: on


def changed(layer: Layer, name: str, change: Callable[[Any], Any]) -> dict[str, Any]:
    return {key: value.astype(np.float64) for key, value in layer.state_dict().items()} | {
        name: change(layer.params[name].astype(np.float64))
    }


def spoiled(layer: Layer, name: str, value: Any) -> Layer:
    """A second layer on the same arrays, one of them replaced."""
    twin = copy.copy(layer)
    twin.params[name] = value
    return twin


def read_only_bias() -> Layer:
    layer = make(choice_bias=True)
    read_only(layer.buffers["choice_bias"])
    return layer


@pytest.mark.parametrize("row", CALLS)
def test_call(row: str) -> None:
    layer = make(aux_losses={"importance": 0.1})
    before, y = snapshot(layer), layer(X)
    with np.errstate(all="ignore"):
        refused(CALLS[row], layer)
    assert snapshot(layer) == before
    assert_bitwise_equal(layer(X), y)


# ── functions


def plan(**options: Any) -> numoe.Dispatch:
    routing = numoe.Routing(indices=INDICES, weights=WEIGHTS)
    return numoe.dispatch(routing, ROUTER, numoe.DispatchConfig(**options))


def dispatch(options: dict[str, Any] | None = None, lengths: Any = None, **changes: Any) -> Callable[[], Any]:
    routing = numoe.Routing(**({"indices": INDICES, "weights": WEIGHTS} | changes))
    config = numoe.DispatchConfig(**(options or {"capacity": 2}))
    return lambda: numoe.dispatch(routing, ROUTER, config, sequence_lengths=lengths)


def combine(**changes: Any) -> Callable[[], Any]:
    return lambda: numoe.combine(np.ones((T * K, D)), dataclasses.replace(plan(), **changes))


def experts(config: numoe.ExpertConfig | None = None, without: str = "", **options: Any) -> Callable[[], Any]:
    layer = make()
    params = {name: value for name, value in layer.params.items() if name != without}
    return lambda: numoe.experts_forward(X, plan(), params, config or layer.config.experts, **options)


def repeated(array: np.ndarray) -> np.ndarray:
    return with_item(array, 1, array[0])


def combine_weights_backward(dweights: Any) -> Any:
    return numoe.combine_weights_backward(dweights, ROUTING, plan(), ROUTER, numoe.DispatchConfig())


ROUTING = numoe.Routing(indices=INDICES, weights=WEIGHTS)
NOTHING_KEPT = numoe.ExpertCache(gate=None, up=None)
GLU = numoe.ExpertConfig(d_ff=F)
MLP = numoe.ExpertConfig(d_ff=F, form="mlp")
GROUPED = numoe.RouterConfig(num_experts=4, top_k=1, num_groups=2)
# fmt: off
FUNCTIONS: dict[str, tuple[Callable[..., Any], str]] = {
    "B21 choice_bias": (lambda: numoe.route(LOGITS, ROUTER, choice_bias=np.ones(E + 1)),
        "ValueError: choice_bias must have shape"),
    "B21 b_router": (lambda: numoe.router_logits(X, np.ones((D, E), "f4"), np.ones(5, "f4")),
        r"ValueError: b_router must have shape \(E,\) with E = 3 from w_router; got \(5,\)"),
    "B55 one token": (lambda: numoe.route(LOGITS[0], ROUTER), r"ValueError: logits must have 2 dim.*\(3,\)"),
    "B55 batch": (lambda: numoe.route(LOGITS[None], ROUTER), r"ValueError: logits .*got shape \(1, 6, 3\)"),
    "B55 experts": (lambda: numoe.route(LOGITS, GROUPED),
        r"ValueError: logits .* num_experts = 4; got \(6, 3\)"),
    "B57 no expert": (lambda: numoe.route(np.full((2, 3), -np.inf), ROUTER),
        "ValueError: .*no expert .*token 0"),
    "B63 dispatch": (dispatch(indices=INDICES + 1), r"IndexError: indices\[0, 0\] = 3 is out of range"),
    "B65 dispatch": (dispatch(indices=INDICES * 0), r"ValueError: indices\[0\] chooses expert 0 twice"),
    "B66 weights missing": (dispatch(weights=None), "TypeError: weights must be an array"),
    "B66 weights dtype": (dispatch(weights=WEIGHTS.astype(int)), "TypeError: weights has dtype int"),
    "B66 weights shape": (dispatch(weights=WEIGHTS[:, :1]), "ValueError: weights must have"),
    "B66 weights shape, dropless": (dispatch({}, weights=WEIGHTS[:, :1]), "ValueError: weights must have"),
    "B53 mask length": (dispatch(mask=np.ones(T - 1, bool)), "ValueError: mask must have"),
    "B90 lengths": (dispatch({"capacity": 1, "capacity_per": "sequence"}, [1, 2]),
        "ValueError: sequence_len"),
    "B90 negative": (dispatch({"capacity": 1, "capacity_per": "sequence"}, [-1, 7]),
        "ValueError: sequence_len"),
    "B70 rows to one token": (combine(row_token=0 * plan().row_token),
        "ValueError: row_token|^row_assignment"),
    "B70 row twice": (combine(row_assignment=repeated(plan().row_assignment)), "ValueError: row_assignment"),
    "B70 token range": (combine(row_token=plan().row_token + 1),
        r"ValueError: row_token\[\d+\] = 6 is not in 0\.\.5"),
    "B70 no offsets": (combine(offsets=plan().offsets[:0]), "ValueError: offsets must hold E . 1 numbers"),
    "B70 offsets": (combine(offsets=plan().offsets[::-1].copy()), "ValueError: offsets must ascend"),
    "B70 no plan": (lambda: numoe.combine(np.ones((T, D)), None), "TypeError: plan must be a numoe.Dispatch"),
    "B70 no plan for experts": (lambda: numoe.experts_forward(X, INDICES, make().params, make().config.experts),
        "TypeError: plan must be a numoe.Dispatch"),
    "B70 no routing": (lambda: numoe.dispatch(INDICES, ROUTER), "TypeError: routing must be a numoe.Routing"),
    "B70 rows": (lambda: numoe.combine(np.ones((T, D)), plan()), r"ValueError: rows must have shape \(M, D\)"),
    "B66 combine": (lambda: numoe.combine(np.ones((T * K, D)), plan(), np.ones((T, 3))),
        "ValueError: weights"),
    "B7 glu without gate": (experts(without="w_gate"), "ValueError: .*w_gate"),
    "B7 mlp with gate": (experts(MLP), "ValueError: .*w_gate"),
    "B7 biases missing": (experts(numoe.ExpertConfig(d_ff=F, bias=True)), "ValueError: .*(b_up|bias)"),
    "B13 no w_up": (experts(without="w_up"), "ValueError: .*w_up"),
    "B66 weight_on": (experts(numoe.ExpertConfig(d_ff=F, weight_on="input")), "ValueError: weights"),
    "B14 dtype": (lambda: numoe.experts_forward(tokens("f8"), plan(), make().params, make().config.experts),
        r"TypeError: params\['w_gate'\] must be a float64 array like x; got float32"),
    "B51 zero": (lambda: numoe.set_num_threads(0), "ValueError: num_threads is 0.*pass 1 or more"),
    "B51 negative": (lambda: numoe.set_num_threads(-1), "ValueError: num_threads is -1"),
    "B51 string": (lambda: numoe.set_num_threads("4"), "TypeError: .*must be an int; got '4'"),
    "B51 float": (lambda: numoe.set_num_threads(2.5), "TypeError: .*must be an int; got 2.5"),
    "B51 bool": (lambda: numoe.set_num_threads(True), "TypeError: .*must be an int; got True"),
    "B31 plan": (lambda: make().pack().experts(X, None), "TypeError: plan must be a numoe.Dispatch; got NoneType"),
    "B73 cache": (lambda: numoe.experts_backward(np.ones((T * K, D), "f4"), X, plan(), make().params, GLU, None),
        "TypeError: cache must be a numoe.ExpertCache; got NoneType"),
    "B31 experts' config": (lambda: numoe.experts_backward(X, X, plan(), {}, None, NOTHING_KEPT),
        "TypeError: config must be a numoe.ExpertConfig; got NoneType"),
    "B31 params": (lambda: numoe.experts_forward(X, plan(), None, GLU),
        "TypeError: params must map names to arrays; got NoneType"),
    "B66 dweights": (lambda: combine_weights_backward("hello"),
        "TypeError: dweights must be an array of numbers; got str"),
    "B66 dweights shape": (lambda: combine_weights_backward(np.ones((1, 1))),
        r"ValueError: dweights must have the shape of routing.weights, \(6, 2\); got \(1, 1\)"),
    "B66 combine's config": (lambda: numoe.combine_weights(ROUTING, plan(), ROUTER, None),
        "TypeError: config must be a numoe.DispatchConfig; got NoneType"),
    "B66 combine's router": (lambda: numoe.combine_weights(ROUTING, plan(), None, numoe.DispatchConfig()),
        "TypeError: config must be a numoe.RouterConfig; got NoneType"),
    "B81 nan": (lambda: optim.SGD({"w": np.ones(1)}, float("nan")), "ValueError: lr must be finite"),
    "B81 string": (lambda: optim.SGD({"w": np.ones(1)}, "1"), "TypeError: lr must be a real number"),
    "B82 missing": (lambda: optim.SGD({"w": np.ones(1)}, 1.0).step({}), "ValueError: .*missing 'w'"),
    "B90 loss": (lambda: losses.load_balance_loss(LOGITS, INDICES, sequence_lengths=[1, 1]),
        "ValueError: sequen"),
    "B91 counts": (lambda: losses.update_choice_bias(np.zeros(E), np.ones(4)),
        "ValueError: counts must have"),
}
# fmt: on


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("row", FUNCTIONS)
def test_function(row: str) -> None:
    threads = numoe.num_threads()
    refused(FUNCTIONS[row])
    assert numoe.num_threads() == threads


# ── what is accepted, and means the same


def misaligned(array: np.ndarray) -> np.ndarray:
    shifted = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    shifted[...] = array
    assert not shifted.flags.aligned
    return shifted


class Frame:
    """A data frame or tensor: not an ndarray, but it knows how to become one."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return X.copy()


WIDE = np.zeros((2 * T, 2 * D), np.float32)
WIDE[::2, ::2] = X
LAYOUTS = {
    "B16 B39 Fortran order": np.asfortranarray(X),
    "B39 strided": WIDE[::2, ::2],
    "B39 reversed": X[::-1].copy()[::-1],
    "B39 reversed columns": X[:, ::-1].copy()[:, ::-1],
    "B40 misaligned": misaligned(X),
    "B41 big-endian": X.astype(">f4"),
    "B42 read-only": read_only(X.copy()),
    "B33 lists": X.tolist(),
    "B35 B37 __array__": Frame(),
    "B43 float64": X.astype(np.float64),
    "B28 longdouble": X.astype(np.longdouble),
}


@pytest.mark.parametrize("x", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_of_x_and_dy_do_not_matter(x: Any) -> None:
    layer = make()
    plain, out = layer.forward(X), layer.forward(x)
    assert_bitwise_equal(out.y, plain.y)
    assert_bitwise_equal(layer(x), plain.y)
    assert_bitwise_equal(layer.backward(x, out).params["w_up"], layer.backward(X, plain).params["w_up"])
    result = np.empty_like(X)
    assert layer(x, out=result) is result
    assert_bitwise_equal(result, plain.y)


@pytest.mark.parametrize("value", [v for v in LAYOUTS.values() if isinstance(v, np.ndarray)], ids=range(9))
def test_layouts_of_a_loaded_parameter_do_not_matter(value: np.ndarray) -> None:
    """B16, B17: copied in, so that one array may serve twice and stays the caller's own."""
    layer = make(d_model=T, num_experts=D)
    layer.load_state_dict(layer.state_dict() | {"w_router": value})
    assert_bitwise_equal(layer.params["w_router"], X)
    assert not np.shares_memory(layer.params["w_router"], value)


def test_b17_one_array_for_two_parameters() -> None:
    layer, same = make(), np.ones((E, D, F), np.float32)
    layer.load_state_dict(layer.state_dict() | {"w_gate": same, "w_up": same})
    assert not np.shares_memory(layer.params["w_gate"], layer.params["w_up"])


def test_b39_broadcast_tokens() -> None:
    layer = make()
    assert_bitwise_equal(layer(np.broadcast_to(X[0], (T, D))), np.repeat(layer(X[:1]), T, axis=0))


def test_b44_memory_map(tmp_path: Any) -> None:
    X.tofile(tmp_path / "x")
    layer = make()
    assert_bitwise_equal(layer(np.memmap(tmp_path / "x", np.float32, "r", shape=X.shape)), layer(X))


def test_b28_float16_is_computed_in_the_layer_dtype() -> None:
    layer, half = make(), X.astype(np.float16)
    assert_bitwise_equal(layer(half), layer(half.astype(np.float32)))


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint64, ">i4"])
def test_b68_dtypes_of_indices(dtype: Any) -> None:
    layer = make()
    expected = layer.forward(X, indices=INDICES, weights=WEIGHTS).y
    for indices in (INDICES.astype(dtype), np.asfortranarray(INDICES.astype(dtype))):
        assert_bitwise_equal(layer.forward(X, indices=indices, weights=WEIGHTS).y, expected)


def test_b15_read_only_parameters_compute_but_do_not_load() -> None:
    layer = make()
    out = layer.forward(X)
    state = {name: value + 1 for name, value in layer.params.items()}
    for value in layer.params.values():
        value.setflags(write=False)
    assert_bitwise_equal(layer.forward(X).y, out.y)
    layer.backward(X, layer.forward(X))
    with pytest.raises(ValueError, match=r"^read-only parameter 'w_router'"):
        layer.load_state_dict(state)


def test_b5_b12_numpy_integers_and_generators() -> None:
    layer = make(num_experts=np.int64(E), top_k=np.uint8(K), rng=np.random.default_rng(0))
    assert layer.config == make().config and type(layer.config.router.top_k) is int
    assert_bitwise_equal(layer.params["w_up"], make(rng=0).params["w_up"])


def test_b19_many_experts() -> None:
    layer = make(d_model=2, d_ff=1, num_experts=100_000, top_k=1)
    out = layer.forward(np.ones((50, 2)))
    assert out.dispatch.num_rows == 50 and np.isfinite(layer.backward(out.y, out).x).all()


@pytest.mark.usefixtures("restored_threads")
def test_b51_too_many_threads_are_clamped() -> None:
    before = numoe.num_threads()
    numoe.set_num_threads(10**6)
    assert before <= numoe.num_threads() <= 10_000


def test_b47_nothing_is_raised_for_finite_or_masked_tokens() -> None:
    layer, real = make(), np.arange(T) != 2
    assert_bitwise_equal(layer(X, nan_policy="raise"), layer(X))
    assert np.isfinite(layer(NAN_X, mask=real, nan_policy="raise")).all()


@pytest.mark.parametrize("options", [{}, {"jitter": 0.1, "noise_std": 0.1}, {"aux_losses": {"z": 1e-3}}])
@pytest.mark.parametrize("size", [1e-300, 1e-40])
def test_tiny_numbers_are_no_floating_point_error(size: float, options: dict[str, Any]) -> None:
    """Whatever the caller's `np.errstate`: it is about his own arithmetic."""
    layer, x = make(**options), np.full((T, D), size)
    with np.errstate(all="raise"):
        layer.backward(x, layer.forward(x, rng=0))


# ── sizes beyond memory, in a process of its own with 1 GB of address space


HUGE = {
    "B6 parameters": (lambda: make(d_model=2**22, d_ff=2**22), MemoryError, "TiB"),
    "B46 assignments": (
        lambda: make(d_model=1)(np.broadcast_to(np.float32(1), (2**30, 1))),
        OverflowError,
        r"T \* K",
    ),
    "B46 packed": (
        lambda: make(d_model=1).pack()(np.broadcast_to(np.float32(1), (2**30, 1))),
        OverflowError,
        r"T \* K",
    ),
    "B46 bytes": (lambda: make()(np.broadcast_to(np.float32(1), (2**29, D))), MemoryError, "allocate"),
}


@pytest.mark.parametrize("name", HUGE)
def test_sizes_beyond_memory(name: str) -> None:
    command = [sys.executable, "-X", "faulthandler", __file__, name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def check_huge(name: str) -> None:
    call, error, match = HUGE[name]
    with pytest.raises(error, match=match):
        call()
    layer = make()
    assert_bitwise_equal(layer(X), layer(X))  # still at work


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
    check_huge(sys.argv[1])
