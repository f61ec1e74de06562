"""Optimisers against steps worked out by hand and against torch, continuation, schedules, and refusals."""

import functools
import math
import pickle
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numoe import optim
from numoe.optim import SGD, AdamW

METHODS = {
    "sgd": lambda p, **k: SGD(p, 0.1, **k),
    "momentum": lambda p, **k: SGD(p, 0.1, momentum=0.9, weight_decay=0.01, **k),
    "nesterov": lambda p, **k: SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01, **k),
    "adamw": lambda p, **k: AdamW(p, 0.01, weight_decay=0.1, **k),
}


def problem(dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"w": (3, 4), "b": (5,), "scale": ()}
    params = {name: np.array(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    steps = [{n: np.array(rng.normal(size=s), dtype) for n, s in shapes.items()} for _ in range(20)]
    return params, steps


def copies(arrays):
    return {name: array.copy() for name, array in arrays.items()}


# ------------------------------------------------------------------------------------------------ the numbers


def test_sgd_by_hand():
    w = np.array([1.0])
    optimizer = SGD({"w": w}, 0.5, momentum=0.5, weight_decay=0.5)
    optimizer.step({"w": np.array([1.0])})  # g = 1 + .5*1 = 1.5;     v = 1.5;            w = 1 - .75
    assert w == [0.25]
    optimizer.step({"w": np.array([1.0])})  # g = 1 + .5*.25 = 1.125; v = .75 + 1.125;    w = .25 - .9375
    assert w == [-0.6875]


def test_nesterov_by_hand():
    w = np.array([1.0])
    SGD({"w": w}, 0.5, momentum=0.5, nesterov=True).step({"w": np.array([1.0])})  # v = 1, move = 1 + .5*1
    assert w == [0.25]


def test_adamw_by_hand():
    w = np.array([1.0])
    optimizer = AdamW({"w": w}, 0.1, betas=(0.5, 0.75), eps=1.0, weight_decay=0.5)
    optimizer.step({"w": np.array([2.0])})
    # w = .95; m = 1, m/(1-.5) = 2; s = 1, s/(1-.75) = 4; move = .1 * 2/(2 + 1)
    assert w == pytest.approx([0.95 - 0.2 / 3], rel=1e-15)
    before = w.copy()
    optimizer.step({"w": np.array([0.0])})
    # m = .5, /(1-.25) = 2/3; s = .75, /(1-.5625) = 12/7
    assert w == pytest.approx(before * 0.95 - 0.1 * (2 / 3) / (math.sqrt(12 / 7) + 1), rel=1e-15)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_twenty_steps_agree_with_torch(method, dtype):
    torch = pytest.importorskip("torch")
    params, steps = problem(dtype)
    theirs = {name: torch.nn.Parameter(torch.tensor(array.copy())) for name, array in params.items()}
    if method == "adamw":
        peer = torch.optim.AdamW(theirs.values(), lr=0.01, weight_decay=0.1, foreach=False)
    else:
        extra = {} if method == "sgd" else {"momentum": 0.9, "weight_decay": 0.01}
        peer = torch.optim.SGD(theirs.values(), lr=0.1, nesterov=method == "nesterov", foreach=False, **extra)
    optimizer = METHODS[method](params)
    for grads in steps:
        optimizer.step(grads)
        for name, tensor in theirs.items():
            tensor.grad = torch.tensor(grads[name])
        peer.step()
    tolerance = 200 * np.finfo(dtype).eps  # 20 steps of about ten rounded operations each
    for name, tensor in theirs.items():
        np.testing.assert_allclose(params[name], tensor.detach().numpy(), rtol=tolerance, atol=tolerance)


def test_state_has_the_dtype_of_the_parameter():
    params = {"half": np.ones(3, np.float32), "full": np.ones(3)}
    optimizer = AdamW(params)
    optimizer.step({"half": np.ones(3, np.float32), "full": np.ones(3)})
    state = optimizer.state_dict()
    assert state["first_moment.half"].dtype == np.float32 and state["second_moment.full"].dtype == np.float64
    assert params["half"].dtype == np.float32


def test_strided_parameters_are_changed_in_place():
    base = np.ones((4, 6))
    view, copy = base[::2, ::-3], np.ones((2, 2))
    grads = {"w": np.arange(4.0).reshape(2, 2)}
    AdamW({"w": view}).step(grads)
    AdamW({"w": copy}).step(grads)
    assert (view == copy).all() and (base[1] == 1).all() and (base[:, 1] == 1).all()


def test_nested_dicts_are_flat_names():
    params = {"moe": {"w_router": np.ones(2), "w_up": np.ones(2)}, "bias": np.ones(2)}
    optimizer = SGD(params, 1.0, weight_decay=1.0, lr_multipliers={"*router*": 0.1}, no_decay=("bias",))
    zero = {"moe": {"w_router": np.zeros(2), "w_up": np.zeros(2)}, "bias": np.zeros(2)}
    optimizer.step(zero)
    assert params["moe"]["w_router"].tolist() == [0.9, 0.9]
    assert params["moe"]["w_up"].tolist() == [0.0, 0.0]
    assert params["bias"].tolist() == [1.0, 1.0]
    flat = {"moe.w_router": np.zeros(2), "moe.w_up": np.zeros(2), "bias": np.zeros(2)}
    optimizer.step(flat)  # gradients may come flat as well


def test_the_first_matching_pattern_counts():
    params = {"a.router": np.ones(1), "a.w": np.ones(1), "b.w": np.ones(1)}
    optimizer = SGD(params, 1.0, lr_multipliers={"*router": 0.0, "a*": 0.5})
    optimizer.step({name: np.ones(1) for name in params})
    assert [p.item() for p in params.values()] == [1.0, 0.5, 0.0]


def test_a_replaced_array_is_the_one_that_moves():
    params = {"w": np.ones(2)}
    optimizer = SGD(params, 1.0)
    old, params["w"] = params["w"], np.zeros(2)
    optimizer.step({"w": np.ones(2)})
    assert params["w"].tolist() == [-1, -1] and old.tolist() == [1, 1]


def test_gradients_are_not_changed():
    params, steps = problem()
    for method in METHODS.values():
        before = copies(steps[0])
        method(copies(params)).step(steps[0])
        assert all((before[name] == steps[0][name]).all() for name in before)


# ----------------------------------------------------------------------------------------------- continuation


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_continuing_from_a_state_gives_identical_numbers(method, dtype):
    params, steps = problem(dtype)
    schedule = optim.cosine(20, warmup_steps=3)
    optimizer = METHODS[method](params, schedule=schedule)
    for grads in steps[:7]:
        optimizer.step(grads)
    saved_params, saved = copies(params), optimizer.state_dict()
    for grads in steps[7:]:
        optimizer.step(grads)
    again = METHODS[method](saved_params, schedule=schedule)
    again.load_state_dict(saved)
    for grads in steps[7:]:
        again.step(grads)
    assert all(params[name].tobytes() == saved_params[name].tobytes() for name in params)


def test_a_state_is_a_copy_and_brings_its_settings():
    params, steps = problem()
    optimizer = AdamW(params, 0.5, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.0)
    optimizer.step(steps[0])
    saved = optimizer.state_dict()
    frozen = copies(saved)
    optimizer.step(steps[1])
    assert all((saved[name] == frozen[name]).all() for name in saved)
    other = AdamW(copies(params))
    other.load_state_dict(saved)
    assert (other.lr, other.beta1, other.beta2, other.eps, other.weight_decay) == (0.5, 0.8, 0.9, 1e-3, 0.0)
    assert other.step_count == 1


def test_an_optimiser_can_be_pickled():
    params, steps = problem()
    optimizer = AdamW(params, schedule=optim.inverse_sqrt(5))
    optimizer.step(steps[0])
    twin = pickle.loads(pickle.dumps(optimizer))
    assert all((twin.state_dict()[name] == array).all() for name, array in optimizer.state_dict().items())
    assert "AdamW(3 arrays, lr=0.001" in repr(twin)


# -------------------------------------------------------------------------------------------------- schedules


def test_schedules_at_their_corners():
    assert optim.constant()(0) == optim.constant()(10**9) == 1.0
    assert optim.linear_warmup(0)(0) == 1.0
    for decaying in (optim.linear, optim.cosine):
        schedule = decaying(100, warmup_steps=10, final=0.1)
        assert schedule(0) == 0.1 and schedule(9) == schedule(10) == 1.0
        assert schedule(55) == pytest.approx(0.55)  # half way down in both shapes
        assert schedule(100) == schedule(10**6) == pytest.approx(0.1)
        assert decaying(5, warmup_steps=5)(4) == 1.0
    assert optim.inverse_sqrt(4)(3) == 1.0 and optim.inverse_sqrt(4)(15) == 0.5
    assert max(optim.inverse_sqrt(7)(s) for s in range(100)) == 1.0


def test_a_schedule_scales_the_step():
    params = {"w": np.zeros(1)}
    optimizer = SGD(params, 1.0, schedule=lambda step: [0.5, 0.25][step])
    assert optimizer.current_lr() == 0.5
    for _ in range(2):
        optimizer.step({"w": np.ones(1)})
    assert params["w"] == [-0.75]


# --------------------------------------------------------------------------------------------------- clipping


def test_clip_by_hand():
    grads = {"a": np.array([[3.0]], np.float32), "inner": {"b": np.array([0.0, 4.0])}}
    assert optim.clip_gradients(grads, 10.0) == 5.0 and grads["a"] == 3.0
    assert optim.clip_gradients(grads, 2.5) == 5.0
    assert grads["a"] == 1.5 and grads["inner"]["b"].tolist() == [0.0, 2.0]
    assert optim.clip_gradients(grads, math.inf) == 2.5


def test_the_norm_is_computed_in_float64_and_does_not_overflow():
    many = np.full(1_000_003, 1e-3, np.float32)
    exact = math.sqrt(many.size) * float(np.float32(1e-3))
    assert optim.clip_gradients({"g": many}, math.inf) == pytest.approx(exact, rel=1e-12)
    assert optim.clip_gradients({"g": np.full(4, 1e200)}, math.inf) == pytest.approx(2e200)
    assert optim.clip_gradients({"g": np.full(4, 1e-200)}, math.inf) == pytest.approx(2e-200)
    assert optim.clip_gradients({"g": np.full(4, 3e38, np.float32)}, 1.0) == pytest.approx(6e38, rel=1e-6)
    assert optim.clip_gradients({}, 1.0) == 0.0
    assert optim.clip_gradients({"g": np.zeros((0, 3))}, 1.0) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_gradients_are_reported_and_left_alone(bad):
    grads = {"good": np.array([3.0]), "broken": np.array([4.0, bad])}
    before = copies(grads)
    with pytest.raises(FloatingPointError, match=r"grads\['broken'\] holds NaN or infinity"):
        optim.clip_gradients(grads, 1.0)
    assert not math.isfinite(optim.clip_gradients(grads, 1.0, error_if_nonfinite=False))
    assert all(grads[name].tobytes() == before[name].tobytes() for name in grads)


# --------------------------------------------------------------------------------------------------- refusals


def read_only(array):
    array.flags.writeable = False
    return array


W, OTHER, LINE = np.ones(2), np.ones(2), np.ones(8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SGD({"w": W}, math.nan), ValueError, "lr must be finite"),
        (lambda: SGD({"w": W}, -1.0), ValueError, "lr must be finite and >= 0; got -1"),
        (lambda: SGD({"w": W}, "0.1"), TypeError, "lr must be a real number"),
        (lambda: SGD({"w": W}, 0.1, momentum=1.5), ValueError, "momentum must be finite and >= 0 and <= 1"),
        (lambda: SGD({"w": W}, 0.1, momentum=W), TypeError, "momentum must be a real number"),
        (lambda: SGD({"w": W}, 0.1, momentum=W, nesterov=True), TypeError, "momentum must be a real number"),
        (lambda: SGD({"w": W}, 0.1, no_decay=None), TypeError, "no_decay must be patterns, .*; got NoneType"),
        (lambda: SGD({"w": W}, 0.1, no_decay=[3]), TypeError, "no_decay must be patterns, .*; got 3"),
        (lambda: SGD({"w": W}, 0.1, lr_multipliers=["w"]), TypeError, "lr_multipliers must map patterns .*got list"),
        (lambda: AdamW({"w": W}, betas=[[1], [1, 2]]), TypeError, "beta1 must be a real number"),
        (lambda: SGD({"w": W}, 0.1, nesterov=True), ValueError, "nesterov=True needs momentum > 0"),
        (lambda: SGD({"w": W}, 0.1, weight_decay=-1), ValueError, "weight_decay must be"),
        (lambda: AdamW({"w": W}, betas=(0.9, 1.0)), ValueError, "beta2 must be < 1"),
        (lambda: AdamW({"w": W}, betas=0.9), TypeError, "betas must be a pair"),
        (lambda: AdamW({"w": W}, eps=0.0), ValueError, "eps must be finite and > 0"),
        (lambda: AdamW({"w": W}, schedule=0.1), TypeError, "schedule must be a function"),
        (
            lambda: AdamW({"w": W}, lr_multipliers={"router": 0.1}),
            ValueError,
            "'router' matches no parameter.*'w'",
        ),
        (
            lambda: AdamW({"w": W}, lr_multipliers={"w": math.nan}),
            ValueError,
            r"lr_multipliers\['w'\] must be",
        ),
        (lambda: AdamW({"w": W}, no_decay="bias"), ValueError, "no_decay: 'bias' matches no parameter"),
        (lambda: AdamW([W]), TypeError, "params must be a dict of arrays"),
        (lambda: AdamW({"w": [1.0]}), TypeError, r"params\['w'\] must be a NumPy array; got list"),
        (lambda: AdamW({1: W}), TypeError, "str keys; got 1"),
        (lambda: AdamW({"w": np.ones(2, int)}), TypeError, "float32, float64 or bfloat16; got dtype int64"),
        (lambda: AdamW({"w": np.ones(2, ">f8")}), TypeError, "float32, float64 or bfloat16"),
        (lambda: AdamW({"w": read_only(np.ones(2))}), ValueError, r"params\['w'\] is read-only"),
        (lambda: AdamW({"a": W, "b": W[1:]}), ValueError, "share memory"),
        (
            lambda: AdamW({"a": LINE[::2], "b": LINE[1:2], "c": LINE[1:4:2]}),  # b and c lie within a's span
            ValueError,
            r"params\['b'\] and params\['c'\] share memory",
        ),
        (lambda: AdamW({"a": {"b": W}, "a.b": OTHER}), ValueError, "both called 'a.b'"),
        (lambda: optim.clip_gradients({"w": W}, 0.0), ValueError, "max_norm must be finite and > 0"),
        (lambda: optim.clip_gradients({"w": W}, "1"), TypeError, "max_norm must be a real number"),
        (lambda: optim.clip_gradients({"w": read_only(np.ones(2))}, 1.0), ValueError, "read-only"),
        (lambda: optim.cosine(0), ValueError, "total_steps must be >= 1"),
        (lambda: optim.cosine(10, warmup_steps=11), ValueError, "warmup_steps must be in 0..10"),
        (lambda: optim.cosine(10, final=2.0), ValueError, "final must be"),
        (lambda: optim.inverse_sqrt(0), ValueError, "warmup_steps must be >= 1"),
        (lambda: optim.linear_warmup(2.5), TypeError, "warmup_steps must be an int"),
    ],
)
def test_wrong_settings_get_a_sentence(call, error, message):
    with pytest.raises(error, match=message):
        call()


STEP_FAULTS = {
    "missing": (lambda o, p, g: g.pop("b"), ValueError, "missing 'b'"),
    "unknown": (lambda o, p, g: g.update(w_router=np.ones(1)), ValueError, "unknown 'w_router'"),
    "shape": (lambda o, p, g: g.update(b=np.ones(4)), ValueError, r"shape \(5,\); got \(4,\)"),
    "dtype": (
        lambda o, p, g: g.update(b=np.ones(5, np.float32)),
        TypeError,
        "dtype float64, its parameter's; got float32",
    ),
    "type": (
        lambda o, p, g: g.update(b=None),
        TypeError,
        r"grads\['b'\] must be a NumPy array; got NoneType",
    ),
    "alias": (lambda o, p, g: g.update(b=p["b"]), ValueError, "shares memory with its parameter"),
    "read-only": (lambda o, p, g: read_only(p["scale"]), ValueError, r"params\['scale'\] is read-only"),
    "resized": (
        lambda o, p, g: (p.update(b=np.ones(9)), g.update(b=np.ones(9))),
        ValueError,
        r"was float64 \(5,\).*is now float64 \(9,\)",
    ),
    "added": (lambda o, p, g: p.update(c=np.ones(1)), ValueError, "params has changed"),
    "lr": (lambda o, p, g: setattr(o, "lr", math.nan), ValueError, "lr must be finite"),
    "setting": (lambda o, p, g: setattr(o, "weight_decay", "0"), TypeError, "weight_decay must be a real"),
    "schedule": (
        lambda o, p, g: setattr(o, "schedule", lambda s: math.nan),
        ValueError,
        r"schedule\(1\) must be",
    ),
}


@pytest.mark.parametrize("fault", STEP_FAULTS)
def test_a_refused_step_changes_nothing(fault):
    """The fault sits in the last arrays, so a check made on the way would come after the first update."""
    params, steps = problem()
    optimizer = AdamW(params)
    optimizer.step(steps[0])
    before_params, before_state = copies(params), optimizer.state_dict()
    spoil, error, message = STEP_FAULTS[fault]
    grads = dict(steps[1])
    old = dict(params)
    spoil(optimizer, params, grads)
    with pytest.raises(error, match=message):
        optimizer.step(grads)
    state = optimizer.state_dict() if fault != "setting" else before_state
    assert optimizer.step_count == 1
    assert all(old[name].tobytes() == before_params[name].tobytes() for name in old)
    assert all(state[n].tobytes() == a.tobytes() for n, a in before_state.items() if fault != "lr" or n != "lr")


STATE_FAULTS = {
    "missing": (lambda s: s.pop("second_moment.w"), ValueError, r"missing \['second_moment.w'\]"),
    "unknown": (lambda s: s.update({"velocity.w": np.ones(1)}), ValueError, r"unknown \['velocity.w'\]"),
    "shape": (lambda s: s.update({"second_moment.scale": np.ones(2)}), ValueError, r"shape \(\); got \(2,\)"),
    "dtype": (lambda s: s.update(step_count=np.array(1.0)), TypeError, "dtype int64; got float64"),
    "lr": (lambda s: s.update(lr=np.array(math.nan)), ValueError, "lr must be finite"),
    "beta": (lambda s: s.update(beta1=np.array(1.0)), ValueError, "beta1 must be < 1"),
    "step": (lambda s: s.update(step_count=np.array(-1)), ValueError, "step_count.* must be >= 0"),
}


@pytest.mark.parametrize("fault", STATE_FAULTS)
def test_a_refused_state_changes_nothing(fault):
    params, steps = problem()
    optimizer = AdamW(params)
    optimizer.step(steps[0])
    before = optimizer.state_dict()
    optimizer.step(steps[1])
    current = optimizer.state_dict()
    spoil, error, message = STATE_FAULTS[fault]
    spoil(before)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(before)
    assert all(optimizer.state_dict()[name].tobytes() == array.tobytes() for name, array in current.items())


@pytest.mark.parametrize("size", [1e-25, 3e38])
@pytest.mark.parametrize("method", METHODS)
def test_a_caller_who_traps_floating_point_errors_gets_whole_steps(method, size):
    """The second array's numbers underflow or overflow, when the first has been changed."""
    params = {"a": np.ones(3, np.float32), "b": np.ones(3, np.float32)}
    plain = copies(params)
    steps = [{"a": np.ones(3, np.float32), "b": np.full(3, size, np.float32)}] * 2
    optimizer, expected = METHODS[method](params), METHODS[method](plain)
    with np.errstate(all="ignore"):
        for grads in steps:
            expected.step(grads)
    with np.errstate(all="raise"):
        for grads in steps:
            optimizer.step(grads)
    assert all(params[name].tobytes() == plain[name].tobytes() for name in params)


def test_clipping_is_whole_where_floating_point_errors_are_trapped():
    grads = {"a": np.ones(1, np.float32), "b": np.full(1, 1e-38, np.float32)}
    with np.errstate(all="raise"):
        assert optim.clip_gradients(grads, 0.125) == 1.0
    assert grads["a"] == 0.125 and grads["b"] == np.float32(1e-38) / 8


def test_running_out_of_memory_comes_before_any_change(monkeypatch):
    params, steps = problem()
    optimizer = AdamW(params)
    before = copies(params)

    def refuse(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(optim.np, "empty", refuse)
    with pytest.raises(MemoryError):
        optimizer.step(steps[0])
    assert all(params[name].tobytes() == before[name].tobytes() for name in params)


@pytest.mark.parametrize("make", [optim.AdamW, functools.partial(optim.SGD, momentum=0.9)], ids=["AdamW", "SGD"])
def test_bfloat16_parameters_follow_their_float32_master(make: Any) -> None:
    """Steps far below the last bit of bfloat16 add up, as in float32."""
    rng = np.random.default_rng(0)
    exact = {"w": rng.standard_normal((5, 4)).astype(ml_dtypes.bfloat16).astype(np.float32)}
    narrow = {"w": exact["w"].astype(ml_dtypes.bfloat16)}
    one, other = make(exact, lr=1e-5), make(narrow, lr=1e-5)
    start = narrow["w"].copy()
    for _ in range(3000):
        grads = {"w": rng.standard_normal((5, 4)).astype(np.float32) + 1}
        one.step(grads)
        other.step(grads)
    assert np.array_equal(narrow["w"], exact["w"].astype(ml_dtypes.bfloat16))
    assert not np.array_equal(narrow["w"], start)
    assert other.state_dict()["master.w"].dtype == np.float32


def test_a_changed_bfloat16_parameter_replaces_its_master() -> None:
    params = {"w": np.ones(3, ml_dtypes.bfloat16)}
    optimiser = optim.SGD(params, lr=0.5)
    params["w"][1] = 8
    optimiser.step({"w": np.ones(3, np.float32)})
    assert params["w"].astype(float).tolist() == [0.5, 7.5, 0.5]
    with pytest.raises(
        TypeError, match=r"grads\['w'\] must have dtype float32, in which a bfloat16 parameter is updated; got bfloat16"
    ):
        optimiser.step({"w": np.ones(3, ml_dtypes.bfloat16)})
