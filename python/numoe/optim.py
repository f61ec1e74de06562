r"""Optimisers that change a dict of arrays in place, schedules, and gradient clipping.

>>> import numpy as np
>>> params = {"w": np.array([1.0, -2.0])}
>>> optimizer = SGD(params, lr=0.1)
>>> optimizer.step({"w": np.array([10.0, 0.0])})
>>> params["w"]
array([ 0., -2.])

Parameters and gradients may be nested dicts, ``{"moe": layer.params, "embedding": table}``; names are then
joined by dots, ``moe.w_router``.  Arrays are looked up by name at every step, so an array that was replaced
in the dict is the one that is changed.  A step checks everything first: after an error no parameter and no
state has changed.  (Ctrl-C in the middle of a step may leave some parameters updated and others not.)
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import numpy.typing as npt

from numoe._arrays import overlap
from numoe.config import checked_flag, checked_int, checked_real

Array = npt.NDArray[Any]
Schedule = Callable[[int], float]


# ------------------------------------------------------------------------------------------------- schedules


def _constant(step: int) -> float:
    return 1.0


def _warmup(step: int, *, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def _decay(step: int, *, total_steps: int, warmup_steps: int, final: float, shape: str) -> float:
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    left = 1 - done if shape == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return final + (1 - final) * left


def _inverse_sqrt(step: int, *, warmup_steps: int) -> float:
    return min((step + 1) / warmup_steps, math.sqrt(warmup_steps / (step + 1)))


def constant() -> Schedule:
    """The factor 1 at every step.

    >>> constant()(1000)
    1.0
    """
    return _constant


def linear_warmup(warmup_steps: int) -> Schedule:
    """``min(1, (step + 1) / warmup_steps)``: rises linearly, then stays; `step` counts from 0.

    >>> [linear_warmup(4)(step) for step in range(5)]
    [0.25, 0.5, 0.75, 1.0, 1.0]
    """
    return functools.partial(_warmup, warmup_steps=checked_int("warmup_steps", warmup_steps, 0))


def linear(total_steps: int, *, warmup_steps: int = 0, final: float = 0.0) -> Schedule:
    """Linear warm-up, then a straight line from 1 down to `final` at `total_steps`, constant afterwards.

    >>> [linear(4)(step) for step in range(6)]
    [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    return _decaying(total_steps, warmup_steps, final, "linear")


def cosine(total_steps: int, *, warmup_steps: int = 0, final: float = 0.0) -> Schedule:
    r"""Linear warm-up, then half a cosine from 1 down to `final` at `total_steps`, constant afterwards.

    ``final + (1 - final) (1 + cos(π (step - warmup) / (total - warmup))) / 2``: SGDR without restarts
    (Loshchilov, Hutter 2017, arXiv:1608.03983).

    >>> [round(cosine(6, warmup_steps=2, final=0.1)(step), 3) for step in range(8)]
    [0.5, 1.0, 1.0, 0.868, 0.55, 0.232, 0.1, 0.1]
    """
    return _decaying(total_steps, warmup_steps, final, "cosine")


def _decaying(total_steps: int, warmup_steps: int, final: float, shape: str) -> Schedule:
    total = checked_int("total_steps", total_steps, 1)
    warmup = checked_int("warmup_steps", warmup_steps, 0, total)
    factor = checked_real("final", final, high=1.0)
    return functools.partial(_decay, total_steps=total, warmup_steps=warmup, final=factor, shape=shape)


def inverse_sqrt(warmup_steps: int) -> Schedule:
    """Linear warm-up, then ``sqrt(warmup_steps / (step + 1))`` (Vaswani et al. 2017, arXiv:1706.03762).

    >>> [inverse_sqrt(2)(step) for step in (0, 1, 7)]
    [0.5, 1.0, 0.5]
    """
    return functools.partial(_inverse_sqrt, warmup_steps=checked_int("warmup_steps", warmup_steps, 1))


# --------------------------------------------------------------------------------------- dicts of arrays


def flatten(tree: Mapping[str, Any], name: str = "params") -> dict[str, Array]:
    """Nested dicts of arrays as one dict with dotted names; the arrays themselves, not copies.

    >>> list(flatten({"moe": {"w_up": np.zeros(2), "w_down": np.zeros(2)}, "bias": np.zeros(1)}))
    ['moe.w_up', 'moe.w_down', 'bias']
    """
    if not isinstance(tree, Mapping):
        raise TypeError(f"{name} must be a dict of arrays (or of such dicts); got {type(tree).__name__}.")
    flat: dict[str, Array] = {}
    for key, value in tree.items():
        if not isinstance(key, str):
            raise TypeError(f"{name} must have str keys; got {key!r} ({type(key).__name__}).")
        inner = flatten(value, f"{name}[{key!r}]") if isinstance(value, Mapping) else {"": value}
        for rest, array in inner.items():
            full = f"{key}.{rest}" if rest else key
            if not isinstance(array, np.ndarray):
                raise TypeError(f"{name}[{full!r}] must be a NumPy array; got {type(array).__name__}.")
            if full in flat:
                raise ValueError(f"{name} has two arrays that are both called {full!r} once dots join the names.")
            flat[full] = array
    return flat


def _check_writable(arrays: Mapping[str, Array], name: str) -> None:
    """Every array is native float32, float64 or bfloat16, may be written, and shares no memory with another one."""
    for key, array in arrays.items():
        if array.dtype not in (np.float32, np.float64, ml_dtypes.bfloat16):
            raise TypeError(f"{name}[{key!r}] must be float32, float64 or bfloat16; got dtype {array.dtype}.")
        if not array.flags.writeable:
            raise ValueError(f"{name}[{key!r}] is read-only and cannot be changed in place; pass a writable array.")
    shared = overlap(arrays)
    if shared is not None:
        first, second = shared
        raise ValueError(f"{name}[{first!r}] and {name}[{second!r}] share memory; give each array once.")


def _work_dtype(param: Array) -> np.dtype[Any]:
    """Of a parameter's gradient, of its slots and of the arithmetic: float32 for bfloat16, else its own."""
    return np.dtype(np.float32) if param.dtype == ml_dtypes.bfloat16 else param.dtype


def _check_gradients(grads: Mapping[str, Array], params: Mapping[str, Array]) -> None:
    """`grads` has exactly the names, shapes and dtypes of `params` and does not overlap its own parameter."""
    missing, unknown = [n for n in params if n not in grads], [n for n in grads if n not in params]
    if missing or unknown:
        parts = [f"missing {', '.join(map(repr, missing))}"] if missing else []
        parts += [f"unknown {', '.join(map(repr, unknown))}"] if unknown else []
        raise ValueError(
            f"grads must have one entry per parameter; {' and '.join(parts)}.  "
            f"The optimiser was made for {', '.join(map(repr, params))}."
        )
    for name, param in params.items():
        grad = grads[name]
        if grad.shape != param.shape:
            raise ValueError(f"grads[{name!r}] must have the parameter's shape {param.shape}; got {grad.shape}.")
        if grad.dtype != _work_dtype(param):
            why = "its parameter's" if _work_dtype(param) == param.dtype else "in which a bfloat16 parameter is updated"
            raise TypeError(f"grads[{name!r}] must have dtype {_work_dtype(param)}, {why}; got {grad.dtype}.")
        if np.may_share_memory(grad, param):
            raise ValueError(f"grads[{name!r}] shares memory with its parameter; pass a separate array.")


@np.errstate(all="ignore")
def clip_gradients(grads: Mapping[str, Any], max_norm: float, *, error_if_nonfinite: bool = True) -> float:
    r"""Scale all gradients in place so that their common 2-norm is at most `max_norm`; return the old norm.

    .. math:: n = \sqrt{\sum_i g_i^2}, \qquad g \leftarrow g \cdot \min(1, max\_norm / n)

    The norm is computed in float64.  (Pascanu et al. 2013, arXiv:1211.5063.)

    Parameters
    ----------
    grads : dict of arrays, may be nested
        float32 or float64; changed in place when n > max_norm.
    max_norm : float
        > 0; ``math.inf`` only measures.
    error_if_nonfinite : bool
        What to do when a gradient holds NaN or infinity: raise, or return the non-finite norm so that the
        caller can skip the step.  Gradients stay as they are in both cases.

    Returns
    -------
    float
        n.

    Raises
    ------
    FloatingPointError
        For a non-finite norm; the sentence names the first parameter whose gradient is not finite.
    TypeError, ValueError
        For a wrong `max_norm`, arrays that are not floating point, or read-only arrays.

    Examples
    --------
    >>> grads = {"w": np.array([3.0, 0.0]), "b": np.array([4.0])}
    >>> clip_gradients(grads, max_norm=1.0)
    5.0
    >>> grads["w"], grads["b"]
    (array([0.6, 0. ]), array([0.8]))
    """
    unlimited = np.isscalar(max_norm) and max_norm == math.inf
    limit = math.inf if unlimited else checked_real("max_norm", max_norm, strict=True)
    strict = checked_flag("error_if_nonfinite", error_if_nonfinite)
    flat = flatten(grads, "grads")
    _check_writable(flat, "grads")
    norm = _global_norm(flat.values())
    if not math.isfinite(norm):
        if strict:
            name = next(name for name, grad in flat.items() if not np.isfinite(grad).all())
            raise FloatingPointError(
                f"grads[{name!r}] holds NaN or infinity; the gradients were left as they are.  "
                "Pass error_if_nonfinite=False to get the norm and skip such a step yourself."
            )
        return norm
    if norm > limit:
        for grad in flat.values():
            np.multiply(grad, limit / norm, out=grad)
    return norm


def _global_norm(arrays: Iterable[Array]) -> float:
    """2-norm over all arrays in float64, on scaled values where squares would overflow or underflow."""
    arrays = [array.reshape(-1) for array in arrays]
    norm = math.sqrt(sum(float(np.einsum("i,i->", a, a, dtype=np.float64)) for a in arrays))
    if math.isnan(norm) or 1e-140 < norm < math.inf:
        return norm
    top = max((float(np.abs(a).max(initial=0.0)) for a in arrays), default=0.0)
    if top == 0.0 or not math.isfinite(top):
        return norm
    return top * math.sqrt(sum(float(np.square(a / top).sum(dtype=np.float64)) for a in arrays))


# -------------------------------------------------------------------------------------------- optimisers


class _Optimizer(abc.ABC):
    """What SGD and AdamW share: settings, the order of a step, the state.  A subclass updates one array."""

    _slots: tuple[str, ...] = ()  # names of the state arrays per parameter
    _highs: ClassVar[dict[str, float]] = {}  # setting saved with the state -> its largest value
    lr: float
    weight_decay: float

    def __init__(
        self,
        params: Mapping[str, Any],
        settings: Mapping[str, float],
        schedule: Schedule | None,
        lr_multipliers: Mapping[str, float] | None,
        no_decay: Iterable[str],
    ) -> None:
        if schedule is not None and not callable(schedule):
            raise TypeError(f"schedule must be a function of the step; got {type(schedule).__name__}.")
        self._set(self._checked(settings))
        self.schedule = constant() if schedule is None else schedule
        self.step_count = 0
        self._tree = params
        flat = flatten(params)
        _check_writable(flat, "params")
        self._multiplier = _multipliers(list(flat), {} if lr_multipliers is None else lr_multipliers)
        exempt = _multipliers(list(flat), dict.fromkeys(_patterns(no_decay), 0.0), "no_decay")
        self._decays = {name: factor != 0.0 for name, factor in exempt.items()}
        self._state = {name: self._new_slots(param) for name, param in flat.items()}

    def _new_slots(self, param: Array) -> dict[str, Array]:
        """Zeros, and for a bfloat16 parameter its float32 master copy: most steps are smaller than its last bit."""
        slots = {slot: np.zeros(param.shape, _work_dtype(param)) for slot in self._slots}
        return slots if _work_dtype(param) == param.dtype else {"master": param.astype(np.float32), **slots}

    def __repr__(self) -> str:
        numbers = ", ".join(f"{name}={value!r}" for name, value in self._settings().items())
        return f"{type(self).__name__}({len(self._state)} arrays, {numbers}, step_count={self.step_count})"

    def _settings(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in self._highs}

    def _checked(self, settings: Mapping[str, float]) -> dict[str, float]:
        """Return `settings` as finite floats in their ranges."""
        return {name: checked_real(name, settings[name], high=high) for name, high in self._highs.items()}

    def _set(self, settings: Mapping[str, float]) -> None:
        for name, number in settings.items():
            setattr(self, name, number)

    def current_lr(self) -> float:
        """Learning rate of the next step, ``lr * schedule(step_count)``, before per-parameter multipliers."""
        factor = checked_real(f"schedule({self.step_count})", self.schedule(self.step_count))
        return checked_real("lr", self.lr) * factor

    @np.errstate(all="ignore")  # an overflow that raised would leave half a step behind
    def step(self, grads: Mapping[str, Any]) -> None:
        """Change every parameter in place by one step of the method.

        Parameters
        ----------
        grads : dict of arrays, may be nested
            Exactly one gradient per parameter, of its shape and dtype (float32 for bfloat16).  Not changed.

        Raises
        ------
        TypeError, ValueError
            For missing or unknown names, wrong shapes or dtypes, parameters that became read-only or changed
            their shape, and a learning rate that is negative or not finite.  Nothing has changed then.
        """
        params, gradients = flatten(self._tree), flatten(grads, "grads")
        _check_writable(params, "params")
        self._check_params(params)
        _check_gradients(gradients, params)
        self._checked(self._settings())
        lr = self.current_lr()
        size = max((param.size * _work_dtype(param).itemsize for param in params.values()), default=0)
        scratch = (np.empty(size, np.uint8), np.empty(size, np.uint8))  # memory is taken before anything changes
        for name, param in params.items():
            state, dtype = self._state[name], _work_dtype(param)
            work = tuple(s[: param.size * dtype.itemsize].view(dtype).reshape(param.shape) for s in scratch)
            decay = self.weight_decay if self._decays[name] else 0.0
            rate = lr * self._multiplier[name]
            master = state.get("master")
            if master is None:
                self._update(param, gradients[name], state, rate, decay, work)
                continue
            np.copyto(master, param, where=master.astype(param.dtype) != param)  # what the user has changed since
            self._update(master, gradients[name], state, rate, decay, work)
            param[...] = master
        self.step_count += 1

    @abc.abstractmethod
    def _update(
        self,
        param: Array,
        grad: Array,
        state: dict[str, Array],
        lr: float,
        decay: float,
        work: tuple[Array, ...],
    ) -> None:
        """One array's step, in place; `work` is memory for two arrays of its shape and dtype."""

    def _check_params(self, params: Mapping[str, Array]) -> None:
        """The dict still holds the parameters this optimiser was made for."""
        if list(params) != list(self._state) and set(params) != set(self._state):
            raise ValueError(
                f"params has changed: the optimiser was made for {', '.join(map(repr, self._state))}; "
                f"the dict now holds {', '.join(map(repr, params))}.  Make a new optimiser."
            )
        for name, slots in self._state.items():
            for slot in slots.values():
                if (slot.shape, slot.dtype) != (params[name].shape, _work_dtype(params[name])):
                    raise ValueError(
                        f"params[{name!r}] was {slot.dtype} {slot.shape} when the optimiser was made and is "
                        f"now {params[name].dtype} {params[name].shape}.  Make a new optimiser."
                    )

    def state_dict(self) -> dict[str, Array]:
        """Everything needed to continue with identical numbers, as a flat dict of arrays (copies).

        Names are ``step_count``, the settings (``lr``, ``weight_decay``, …; 0-d float64) and
        ``<slot>.<parameter>``.
        Schedule, multipliers and exclusions are code: give them to the constructor again.
        """
        numbers = {name: np.array(value, np.float64) for name, value in self._settings().items()}
        arrays = {f"{slot}.{name}": a.copy() for name, s in self._state.items() for slot, a in s.items()}
        return {"step_count": np.array(self.step_count, np.int64), **numbers, **arrays}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`, made by `state_dict` of such an optimiser for parameters of the same shapes.

        Raises
        ------
        TypeError, ValueError
            For missing or unknown names, wrong shapes, dtypes or numbers.  Nothing has changed then.
        """
        expected, given = self.state_dict(), flatten(state, "state")
        missing, unknown = [n for n in expected if n not in given], [n for n in given if n not in expected]
        if missing or unknown:
            raise ValueError(
                f"state must come from {type(self).__name__} with these parameters; "
                f"missing {missing}, unknown {unknown}."
            )
        for name, array in expected.items():
            if given[name].shape != array.shape:
                raise ValueError(f"state[{name!r}] must have shape {array.shape}; got {given[name].shape}.")
            if given[name].dtype != array.dtype:
                raise TypeError(f"state[{name!r}] must have dtype {array.dtype}; got {given[name].dtype}.")
        step_count = checked_int("state['step_count']", given["step_count"].item(), 0)
        settings = self._checked({name: given[name].item() for name in self._highs})
        self.step_count = step_count
        self._set(settings)
        for name, slots in self._state.items():
            for slot, array in slots.items():
                array[...] = given[f"{slot}.{name}"]


def _patterns(no_decay: Any) -> tuple[str, ...]:
    patterns = (no_decay,) if isinstance(no_decay, str) or not isinstance(no_decay, Iterable) else tuple(no_decay)
    for pattern in patterns:
        if not isinstance(pattern, str):
            got = type(pattern).__name__ if pattern is no_decay else repr(pattern)
            raise TypeError(f"no_decay must be patterns, e.g. ('*bias*',); got {got}.")
    return patterns


def _multipliers(names: list[str], patterns: Mapping[str, float], argument: str = "lr_multipliers") -> dict[str, float]:
    """Factor of each name: of the first pattern that matches, else 1.  Each pattern must match something."""
    if not isinstance(patterns, Mapping):
        raise TypeError(
            f"{argument} must map patterns to factors, e.g. {{'*router*': 0.1}}; got {type(patterns).__name__}."
        )
    factors = {pattern: checked_real(f"{argument}[{pattern!r}]", factor) for pattern, factor in patterns.items()}
    for pattern in factors:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"{argument}: {pattern!r} matches no parameter; there are {', '.join(map(repr, names))}.")
    return {n: next((f for p, f in factors.items() if fnmatchcase(n, p)), 1.0) for n in names}


class SGD(_Optimizer):
    r"""Stochastic gradient descent with momentum.

    .. math:: g \leftarrow g + \lambda w, \quad v \leftarrow \mu v + g, \quad w \leftarrow w - \eta v

    With ``nesterov=True`` the last step uses ``g + μ v`` instead of v.  These are the conventions of PyTorch:
    the learning rate is outside the momentum and the decay λ is added to the gradient.

    Parameters
    ----------
    params : dict of arrays, may be nested
        float32, float64 or bfloat16; changed in place by `step`.  The dict is kept, not copied.
    lr : float
        η, >= 0; multiplied by ``schedule(step)`` and by the parameter's multiplier.
    momentum : float
        μ in 0…1.
    nesterov : bool
        Needs ``momentum > 0``.
    weight_decay : float
        λ.
    schedule : function of int to float, optional
        Factor on `lr` at step 0, 1, …; e.g. `cosine`.
    lr_multipliers : dict of pattern to float, optional
        E.g. ``{"*router*": 0.1}``; shell-style patterns (`fnmatch`), the first match counts.
    no_decay : patterns
        Parameters without weight decay, e.g. ``("*bias*", "*norm*")``.

    Raises
    ------
    TypeError, ValueError
        For a setting out of range, a parameter that is no writable float array, shared memory, or a pattern
        that matches nothing.

    Examples
    --------
    >>> w = np.array([1.0])
    >>> optimizer = SGD({"w": w}, lr=0.5, momentum=0.5)
    >>> optimizer.step({"w": np.array([1.0])})  # v = 1
    >>> optimizer.step({"w": np.array([1.0])})  # v = 1.5
    >>> w
    array([-0.25])
    """

    _highs: ClassVar[dict[str, float]] = {"lr": math.inf, "weight_decay": math.inf, "momentum": 1.0}
    momentum: float

    def __init__(
        self,
        params: Mapping[str, Any],
        lr: float,
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        schedule: Schedule | None = None,
        lr_multipliers: Mapping[str, float] | None = None,
        no_decay: Iterable[str] = (),
    ) -> None:
        self.nesterov = checked_flag("nesterov", nesterov)
        momentum = checked_real("momentum", momentum, high=1.0)
        if self.nesterov and momentum == 0:
            raise ValueError("nesterov=True needs momentum > 0; got momentum = 0.")
        self._slots = ("velocity",) if momentum else ()
        settings = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, settings, schedule, lr_multipliers, no_decay)

    def _update(
        self,
        param: Array,
        grad: Array,
        state: dict[str, Array],
        lr: float,
        decay: float,
        work: tuple[Array, ...],
    ) -> None:
        move, scratch = work
        np.copyto(move, grad)
        if decay:
            move += np.multiply(param, decay, out=scratch)  # g + λ w
        if self._slots:
            velocity = state["velocity"]
            velocity *= self.momentum
            velocity += move
            if self.nesterov:
                move += np.multiply(velocity, self.momentum, out=scratch)  # g + μ v
            else:
                np.copyto(move, velocity)
        move *= lr
        param -= move


class AdamW(_Optimizer):
    r"""Adam with decoupled weight decay.

    .. math::
        w &\leftarrow (1 - \eta\lambda) w \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad s \leftarrow \beta_2 s + (1 - \beta_2) g^2 \\
        w &\leftarrow w - \eta \frac{m / (1 - \beta_1^t)}{\sqrt{s / (1 - \beta_2^t)} + \epsilon}

    The decay is scaled by the current learning rate, multiplier included, as in PyTorch.  Kingma, Ba 2015
    (arXiv:1412.6980); Loshchilov, Hutter 2019 (arXiv:1711.05101).

    Parameters
    ----------
    params, lr, schedule, lr_multipliers, no_decay
        As in `SGD`.
    betas : (float, float)
        β₁ and β₂, 0 <= β < 1.
    eps : float
        ε > 0.
    weight_decay : float
        λ.

    Raises
    ------
    TypeError, ValueError
        As in `SGD`.

    Examples
    --------
    >>> w = np.array([1.0, 1.0])
    >>> optimizer = AdamW({"w": w}, lr=0.1, weight_decay=0.0)
    >>> optimizer.step({"w": np.array([3.0, -0.01])})  # the first step is lr * sign(g), up to eps
    >>> w.round(6)
    array([0.9, 1.1])
    """

    _slots = ("first_moment", "second_moment")
    _highs: ClassVar = {"lr": math.inf, "weight_decay": math.inf, "beta1": 1.0, "beta2": 1.0, "eps": math.inf}
    beta1: float
    beta2: float
    eps: float

    def __init__(
        self,
        params: Mapping[str, Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        schedule: Schedule | None = None,
        lr_multipliers: Mapping[str, float] | None = None,
        no_decay: Iterable[str] = (),
    ) -> None:
        try:
            beta1, beta2 = betas
        except (TypeError, ValueError):
            raise TypeError(f"betas must be a pair of floats; got {betas!r}.") from None
        settings = {"lr": lr, "weight_decay": weight_decay, "beta1": beta1, "beta2": beta2, "eps": eps}
        super().__init__(params, settings, schedule, lr_multipliers, no_decay)

    def _checked(self, settings: Mapping[str, float]) -> dict[str, float]:
        numbers = super()._checked(settings)
        for name in ("beta1", "beta2"):
            if numbers[name] == 1.0:
                raise ValueError(f"{name} must be < 1; got 1.0.")
        return numbers | {"eps": checked_real("eps", settings["eps"], strict=True)}

    def _update(
        self,
        param: Array,
        grad: Array,
        state: dict[str, Array],
        lr: float,
        decay: float,
        work: tuple[Array, ...],
    ) -> None:
        first, second, t = state["first_moment"], state["second_moment"], self.step_count + 1
        move, scratch = work
        if decay:
            param *= 1 - lr * decay
        first *= self.beta1
        first += np.multiply(grad, 1 - self.beta1, out=scratch)
        second *= self.beta2
        np.multiply(grad, 1 - self.beta2, out=scratch)
        second += np.multiply(scratch, grad, out=scratch)
        np.sqrt(second, out=scratch)
        scratch /= math.sqrt(1 - self.beta2**t)
        scratch += self.eps
        np.divide(first, scratch, out=move)
        move *= lr / (1 - self.beta1**t)
        param -= move
