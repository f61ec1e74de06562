"""Settings of an MoE layer: frozen, keyword-only, checked once here and assumed valid everywhere else.

The options are orthogonal; a published model is a *value* of them, never a branch in the code.  Letters are those of
the legend in :mod:`numoe`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import ml_dtypes  # noqa: F401  makes NumPy know "bfloat16"
import numpy as np

SCORES = ("softmax", "softmax_chosen", "sigmoid", "sqrt_softplus")
NORMALIZATIONS = ("none", "sum", "l2")
EPS_MODES = ("add", "max")
GROUP_SCORES = ("max", "top2_sum")
ROUNDINGS = ("ceil", "floor", "nearest")
PRIORITIES = ("position", "choice", "probability", "batch")
FORMS = ("glu", "mlp")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu")
WEIGHT_ON = ("output", "input")
SHARED_GATES = ("none", "sigmoid")
AUX_LOSSES = ("switch", "gshard", "megatron", "hf", "deepseek-sequence", "importance", "load", "z")
DTYPES = ("float32", "float64", "bfloat16")
_ARRAY_DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(name) for name in DTYPES}  # made once: calls ask often

_MAX_ELEMENTS = 2**46  # of one parameter; far beyond memory, far below what overflows 64-bit byte counts


def checked_int(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """`value` as an int in ``low..high``; bools, floats and strings are refused."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int; got {value!r} ({type(value).__name__}).") from None
    if low is not None and high is None and number < low:
        raise ValueError(f"{name} must be >= {low}; got {number}.")
    if low is not None and high is not None and not low <= number <= high:
        raise ValueError(f"{name} must be in {low}..{high}; got {number}.")
    return number


def checked_real(name: str, value: Any, *, low: float = 0.0, strict: bool = False, high: float = math.inf) -> float:
    """`value` as a finite float with ``low <= value <= high`` (``low < value`` if `strict`)."""
    if isinstance(value, bool | np.bool_ | str | bytes) or not np.isscalar(value):
        raise TypeError(f"{name} must be a real number; got {value!r} ({type(value).__name__}).")
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:
        number = math.inf
    except TypeError:
        raise TypeError(f"{name} must be a real number; got {value!r} ({type(value).__name__}).") from None
    if not math.isfinite(number) or number < low or (strict and number == low) or number > high:
        bound = f"{'>' if strict else '>='} {low:g}" + (f" and <= {high:g}" if math.isfinite(high) else "")
        raise ValueError(f"{name} must be finite and {bound}; got {number}.")
    return number


def checked_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """`value` if it is one of `choices`; the message lists them and suggests the closest."""
    if isinstance(value, str) and value in choices:
        return value
    close = difflib.get_close_matches(str(value), choices, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    kind: type[Exception] = ValueError if isinstance(value, str) else TypeError
    raise kind(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}.{hint}")


def checked_flag(name: str, value: Any) -> bool:
    """`value` if it is a bool; nothing else counts as one."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False; got {value!r} ({type(value).__name__}).")
    return bool(value)


def checked_rng(value: Any) -> np.random.Generator:
    """The generator meant by ``rng=``; what NumPy does not take gets a sentence with the argument's name."""
    try:
        return np.random.default_rng(value)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"rng must be what numpy.random.default_rng takes, e.g. an int >= 0 or a Generator; got {value!r}."
        ) from None


def as_dtype(value: Any) -> np.dtype[Any]:
    """The layer dtype meant by `value`: one of `DTYPES` in native byte order; anything else gets a sentence."""
    try:
        dtype: np.dtype[Any] = np.dtype(value)
    except TypeError:
        raise TypeError(f"dtype must be one of {', '.join(DTYPES)}; got {value!r}.") from None
    dtype = np.dtype(dtype.newbyteorder("="))
    if dtype.name not in DTYPES or value is None:
        raise TypeError(f"dtype must be one of {', '.join(DTYPES)}; got {value!r}.")
    return dtype


class _Checked:
    """Assigns checked values inside ``__post_init__`` of a frozen dataclass."""

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class RouterConfig(_Checked):
    r"""How a token chooses its experts and how much each of them counts.

    With router logits ``z = x @ w_router (+ b_router)``, shape (T, E), a score ``s(z)``, and the chosen set ``S`` of K
    experts with the largest ``s`` (plus ``choice_bias``, which never enters the weight):

    .. math:: weight_{tk} = scale \cdot norm_S(s(z))_{tk}

    Parameters
    ----------
    num_experts, top_k : int
        E and K, ``1 <= K <= E``.
    score : {"softmax", "softmax_chosen", "sigmoid", "sqrt_softplus"}
        Softmax over all E logits; softmax over the K chosen logits only; elementwise sigmoid (DeepSeek-V3); or
        ``sqrt(softplus(z))`` (DeepSeek-V4).
    normalize : {"sum", "none", "l2"}
        Divide the chosen scores by their sum, by nothing, or by their 2-norm.  ``softmax`` + ``sum`` is Mixtral and
        equals ``softmax_chosen``; with ``eps = 0`` it is computed in log space and cannot give 0/0.
    normalize_eps : float
        Added to the divisor (``eps_mode="add"``, 1e-20 in DeepSeek-V3) or a floor for it (``"max"``, 1e-12 in ERNIE).
    eps_mode : {"add", "max"}
    scale : float
        Factor on the weights (2.5 in DeepSeek-V3).
    linear_bias : bool
        Learn ``b_router`` (E,), added to the logits (GPT-OSS).
    choice_bias : bool
        Keep the buffer ``choice_bias`` (E,): added to the scores for *choosing* only (loss-free balancing).
    num_groups, groups_kept : int
        Group-limited routing (DeepSeek-V2/V3): E is cut into `num_groups` equal runs of experts, the best
        `groups_kept` groups stay, experts of the others cannot be chosen.
    group_score : {"top2_sum", "max"}
        A group's score: sum of its two best (biased) scores, or its best one.
    jitter : float
        The router's input is multiplied by U[1 - jitter, 1 + jitter] when ``rng=`` is given (Switch).
    noise_std : float
        N(0, noise_std²) is added to the logits when ``rng=`` is given.
    frozen : bool
        The gradients of ``w_router`` and ``b_router`` are exactly 0 (the router's input still gets its gradient).
    """

    num_experts: int
    top_k: int
    score: str = "softmax"
    normalize: str = "sum"
    normalize_eps: float = 0.0
    eps_mode: str = "add"
    scale: float = 1.0
    linear_bias: bool = False
    choice_bias: bool = False
    num_groups: int = 1
    groups_kept: int = 1
    group_score: str = "top2_sum"
    jitter: float = 0.0
    noise_std: float = 0.0
    frozen: bool = False

    def __post_init__(self) -> None:
        experts = checked_int("num_experts", self.num_experts, 1, 2**31 - 1)
        if not 1 <= checked_int("top_k", self.top_k) <= experts:
            raise ValueError(f"top_k must be in 1..num_experts ({experts}); got {self.top_k}.")
        self._set(
            num_experts=experts,
            top_k=int(self.top_k),
            score=checked_choice("score", self.score, SCORES),
            normalize=checked_choice("normalize", self.normalize, NORMALIZATIONS),
            normalize_eps=checked_real("normalize_eps", self.normalize_eps),
            eps_mode=checked_choice("eps_mode", self.eps_mode, EPS_MODES),
            scale=checked_real("scale", self.scale, strict=True),
            linear_bias=checked_flag("linear_bias", self.linear_bias),
            choice_bias=checked_flag("choice_bias", self.choice_bias),
            num_groups=checked_int("num_groups", self.num_groups, 1, experts),
            groups_kept=checked_int("groups_kept", self.groups_kept, 1),
            group_score=checked_choice("group_score", self.group_score, GROUP_SCORES),
            jitter=checked_real("jitter", self.jitter, high=1.0),
            noise_std=checked_real("noise_std", self.noise_std),
            frozen=checked_flag("frozen", self.frozen),
        )
        self._check_groups()

    def _check_groups(self) -> None:
        groups, kept, experts = self.num_groups, self.groups_kept, self.num_experts
        if experts % groups:
            raise ValueError(f"num_groups must divide num_experts ({experts}); got {groups}.")
        if kept > groups:
            raise ValueError(f"groups_kept must be in 1..num_groups ({groups}); got {kept}.")
        if self.top_k > kept * (experts // groups):
            raise ValueError(
                f"top_k must be <= groups_kept * experts per group ({kept} * {experts // groups} = "
                f"{kept * (experts // groups)}); got {self.top_k}."
            )
        if groups > 1 and self.group_score == "top2_sum" and experts // groups < 2:
            raise ValueError(
                f"group_score='top2_sum' needs at least 2 experts per group; num_experts / num_groups = "
                f"{experts // groups}.  Use group_score='max'."
            )


@dataclass(frozen=True, kw_only=True)
class DispatchConfig(_Checked):
    r"""How many rows an expert accepts, and who is dropped when more come.  The default drops nobody.

    .. math:: C = \max(min\_capacity,\; round(capacity\_factor \cdot K \cdot T / E))

    rounded up to a multiple of `capacity_multiple_of`; T counts the unmasked tokens of one capacity group.

    Parameters
    ----------
    capacity_factor : float, optional
        ``None``: no limit, unless `capacity` is given.
    capacity : int, optional
        A fixed C instead of a factor; 0 drops everything.
    min_capacity, capacity_multiple_of : int
    capacity_rounding : {"ceil", "floor", "nearest"}
    capacity_times_k : bool
        ``False`` leaves K out of the formula (T5X, Praxis).
    capacity_per : "batch", "sequence" or int
        The group of tokens that shares one C per expert: all tokens, one sequence (the last batch axis), or runs of
        this many tokens.
    drop_priority : {"position", "choice", "probability", "batch"}
        Who gets in first.  "position": token by token; "choice": all first choices, then all second choices (GShard);
        "probability": the largest weights of each expert (Megatron); "batch": tokens ordered by their largest weight,
        then choice by choice (batch-prioritised routing, V-MoE).  Ties go to the earlier token.
    renormalize_after_drop : bool
        Weights of the surviving choices are divided by their sum (NLLB) instead of keeping their values (GShard).
    """

    capacity_factor: float | None = None
    capacity: int | None = None
    min_capacity: int = 0
    capacity_rounding: str = "ceil"
    capacity_multiple_of: int = 1
    capacity_times_k: bool = True
    capacity_per: str | int = "batch"
    drop_priority: str = "position"
    renormalize_after_drop: bool = False

    def __post_init__(self) -> None:
        if self.capacity is not None and self.capacity_factor is not None:
            raise ValueError("capacity and capacity_factor exclude each other; give one of them.")
        if self.capacity_factor is not None:
            factor = checked_real("capacity_factor", self.capacity_factor, strict=True)
            self._set(capacity_factor=factor)
        if self.capacity is not None:
            self._set(capacity=checked_int("capacity", self.capacity, 0))
        per = self.capacity_per
        if not isinstance(per, str):
            per = checked_int("capacity_per", per, 1)
        elif per not in ("batch", "sequence"):
            raise ValueError(f"capacity_per must be 'batch', 'sequence' or a number of tokens; got {per!r}.")
        self._set(
            min_capacity=checked_int("min_capacity", self.min_capacity, 0),
            capacity_rounding=checked_choice("capacity_rounding", self.capacity_rounding, ROUNDINGS),
            capacity_multiple_of=checked_int("capacity_multiple_of", self.capacity_multiple_of, 1),
            capacity_times_k=checked_flag("capacity_times_k", self.capacity_times_k),
            capacity_per=per,
            drop_priority=checked_choice("drop_priority", self.drop_priority, PRIORITIES),
            renormalize_after_drop=checked_flag("renormalize_after_drop", self.renormalize_after_drop),
        )

    @property
    def dropless(self) -> bool:
        """True if no assignment can be dropped."""
        return self.capacity is None and self.capacity_factor is None

    def group_capacity(self, num_tokens: int, router: RouterConfig) -> int | None:
        """C for a capacity group of `num_tokens` unmasked tokens; ``None`` if dropless.

        >>> DispatchConfig(capacity_factor=1.25).group_capacity(64, RouterConfig(num_experts=8, top_k=2))
        20
        """
        if self.dropless:
            return None
        if self.capacity is not None:
            size = self.capacity
        else:
            assert self.capacity_factor is not None
            choices = router.top_k if self.capacity_times_k else 1
            exact = self.capacity_factor * choices * num_tokens / router.num_experts
            exact = min(exact, 2.0**62)  # a huge factor is no limit, and has no integer if it overflows
            whole = {"ceil": math.ceil(exact), "floor": math.floor(exact), "nearest": round(exact)}
            size = max(self.min_capacity, whole[self.capacity_rounding])
        step = self.capacity_multiple_of
        return -(-size // step) * step


@dataclass(frozen=True, kw_only=True)
class ExpertConfig(_Checked):
    r"""What one expert computes.

    ======  =================================================================
    "glu"   ``(act(x @ w_gate + b_gate) * (x @ w_up + b_up)) @ w_down + b_down``
    "mlp"   ``act(x @ w_up + b_up) @ w_down + b_down``
    ======  =================================================================

    Parameters
    ----------
    d_ff : int
        F, the width inside an expert.
    form : {"glu", "mlp"}
    activation : {"silu", "gelu", "gelu_tanh", "relu", "relu2", "quick_gelu"}
        ``relu2`` is relu(v)²; ``quick_gelu`` is v·sigmoid(1.702 v).
    bias : bool
        Learn ``b_gate`` (E, F), ``b_up`` (E, F) and ``b_down`` (E, D).
    weight_on : {"output", "input"}
        Multiply the expert's output by the routing weight, or its input (Llama-4).
    """

    d_ff: int
    form: str = "glu"
    activation: str = "silu"
    bias: bool = False
    weight_on: str = "output"

    def __post_init__(self) -> None:
        self._set(
            d_ff=checked_int("d_ff", self.d_ff, 1, 2**31 - 1),
            form=checked_choice("form", self.form, FORMS),
            activation=checked_choice("activation", self.activation, ACTIVATIONS),
            bias=checked_flag("bias", self.bias),
            weight_on=checked_choice("weight_on", self.weight_on, WEIGHT_ON),
        )


@dataclass(frozen=True, kw_only=True)
class SharedExpertConfig(_Checked):
    """An expert that every token visits; its output is added to the routed one.

    Several shared experts of width d are one shared expert of width n·d, which is how released models store them.

    Parameters
    ----------
    d_ff : int
        S, the width inside the shared expert.
    gate : {"none", "sigmoid"}
        "sigmoid" multiplies its output by ``sigmoid(x @ w_shared_score)`` (Qwen2-MoE).
    form, activation : str
        As in `ExpertConfig`.
    """

    d_ff: int
    gate: str = "none"
    form: str = "glu"
    activation: str = "silu"

    def __post_init__(self) -> None:
        self._set(
            d_ff=checked_int("shared d_ff", self.d_ff, 1, 2**31 - 1),
            gate=checked_choice("shared gate", self.gate, SHARED_GATES),
            form=checked_choice("shared form", self.form, FORMS),
            activation=checked_choice("shared activation", self.activation, ACTIVATIONS),
        )

    @functools.cached_property
    def experts(self) -> ExpertConfig:
        """What it computes, as the configuration of one routed expert.

        >>> SharedExpertConfig(d_ff=8, form="mlp").experts.form
        'mlp'
        """
        return ExpertConfig(d_ff=self.d_ff, form=self.form, activation=self.activation)


class Coefficients(Mapping[str, float]):
    """Loss name → coefficient.  A mapping that cannot change, so that its configuration can be hashed.

    >>> Coefficients({"z": 0.1}), Coefficients({"z": 0.1}) == {"z": 0.1}
    ({'z': 0.1}, True)
    """

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[str, float]) -> None:
        self._values = dict(values)

    def __getitem__(self, name: str) -> float:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(frozenset(self._values.items()))

    def __repr__(self) -> str:
        return repr(self._values)


_PARTS: dict[str, type] = {"router": RouterConfig, "experts": ExpertConfig, "dispatch": DispatchConfig}


@dataclass(frozen=True, kw_only=True)
class MoEConfig(_Checked):
    """Everything that defines an MoE layer except its numbers.

    Parameters
    ----------
    d_model : int
        D, the width of a token.
    router : RouterConfig
    experts : ExpertConfig
    dispatch : DispatchConfig
    shared : SharedExpertConfig, optional
    aux_losses : mapping of str to float
        Loss name → coefficient, e.g. ``{"switch": 1e-2, "z": 1e-3}``.  Names: see `numoe.losses`.
    dtype : dtype-like
        float32, float64 or bfloat16 (`ml_dtypes.bfloat16`), of parameters, activations and results.  bfloat16 layers
        compute in float32: routing, sums, losses and the parameters' gradients are float32, and so are the router's
        parameters, the biases and the buffers (as in the models that are trained that way).  CPUs that multiply
        bfloat16 numbers in pairs (``python -m numoe info`` says so) do so in the experts' products, forward and
        backward: both factors are rounded to bfloat16, as on a GPU, and added up in float32.
    """

    d_model: int
    router: RouterConfig
    experts: ExpertConfig
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    shared: SharedExpertConfig | None = None
    aux_losses: Mapping[str, float] = field(default_factory=dict)  # kept as Coefficients
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, kind in _PARTS.items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__}; got {type(getattr(self, name)).__name__}.")
        if self.shared is not None and not isinstance(self.shared, SharedExpertConfig):
            raise TypeError(f"shared must be a SharedExpertConfig or None; got {type(self.shared).__name__}.")
        if not isinstance(self.aux_losses, Mapping):
            raise TypeError(
                "aux_losses must map loss names to coefficients, e.g. {'switch': 0.01}; "
                f"got {type(self.aux_losses).__name__}."
            )
        self._set(d_model=checked_int("d_model", self.d_model, 1, 2**31 - 1), dtype=as_dtype(self.dtype).name)
        largest = float(np.finfo(self.compute_dtype).max)  # gradients are multiplied by it
        losses = {}
        for name, value in self.aux_losses.items():
            checked_choice("aux_losses name", name, AUX_LOSSES)
            losses[name] = checked_real(f"aux_losses[{name!r}]", value, high=largest)
        self._set(aux_losses=Coefficients(losses))
        self._check_combinations()

    def _check_combinations(self) -> None:
        if "load" in self.aux_losses and self.router.noise_std == 0.0:
            raise ValueError("aux_losses 'load' estimates the load under noise; it needs noise_std > 0.")
        if self.dispatch.renormalize_after_drop and self.router.normalize != "sum":
            raise ValueError(
                f"renormalize_after_drop=True needs normalize='sum'; got normalize={self.router.normalize!r}."
            )
        for name, shape in self.param_shapes().items():
            if math.prod(shape) > _MAX_ELEMENTS:
                raise ValueError(
                    f"{name} {shape} would hold {math.prod(shape):,} numbers "
                    f"({math.prod(shape) * self.param_dtype(name).itemsize:,} bytes), more than numoe can address."
                )

    def param_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of every learned parameter, in their documented order.

        >>> MoEConfig.from_options(d_model=4, d_ff=8, num_experts=2, top_k=1).param_shapes()
        {'w_router': (4, 2), 'w_gate': (2, 4, 8), 'w_up': (2, 4, 8), 'w_down': (2, 8, 4)}
        """
        return dict(self._param_shapes)

    @functools.cached_property
    def _param_shapes(self) -> dict[str, tuple[int, ...]]:
        D, E, F = self.d_model, self.router.num_experts, self.experts.d_ff
        shapes: dict[str, tuple[int, ...]] = {"w_router": (D, E)}
        if self.router.linear_bias:
            shapes["b_router"] = (E,)
        glu = self.experts.form == "glu"
        if glu:
            shapes["w_gate"] = (E, D, F)
        shapes |= {"w_up": (E, D, F), "w_down": (E, F, D)}
        if self.experts.bias:
            shapes |= ({"b_gate": (E, F)} if glu else {}) | {"b_up": (E, F), "b_down": (E, D)}
        if self.shared is not None:
            S = self.shared.d_ff
            if self.shared.form == "glu":
                shapes["w_shared_gate"] = (D, S)
            shapes |= {"w_shared_up": (D, S), "w_shared_down": (S, D)}
            if self.shared.gate == "sigmoid":
                shapes["w_shared_score"] = (D,)
        return shapes

    @functools.cached_property
    def array_dtype(self) -> np.dtype[Any]:
        """`dtype` as NumPy's object."""
        return _ARRAY_DTYPES[self.dtype]

    @functools.cached_property
    def compute_dtype(self) -> np.dtype[Any]:
        """float32 or float64, the dtype of the arithmetic, of routings and of gradients of parameters."""
        return _ARRAY_DTYPES["float32" if self.dtype == "bfloat16" else self.dtype]

    def param_dtype(self, name: str) -> np.dtype[Any]:
        """Of a parameter or buffer: `dtype` for the experts' matrices, `compute_dtype` for everything small.

        >>> config = MoEConfig.from_options(d_model=4, d_ff=8, num_experts=2, top_k=1, dtype="bfloat16")
        >>> config.param_dtype("w_up").name, config.param_dtype("w_router").name
        ('bfloat16', 'float32')
        """
        return self.array_dtype if name in EXPERT_MATRICES else self.compute_dtype

    def buffer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of the arrays that are state but have no gradient (the choice bias)."""
        return {"choice_bias": (self.router.num_experts,)} if self.router.choice_bias else {}

    @functools.cached_property
    def param_specs(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """Name → shape and dtype of every learned parameter; made once, because every call asks.

        >>> MoEConfig.from_options(d_model=4, d_ff=8, num_experts=2, top_k=1).param_specs["w_router"]
        ((4, 2), dtype('float32'))
        """
        return {name: (shape, self.param_dtype(name)) for name, shape in self.param_shapes().items()}

    @functools.cached_property
    def buffer_specs(self) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
        """The same for the buffers."""
        return {name: (shape, self.param_dtype(name)) for name, shape in self.buffer_shapes().items()}

    def num_params(self) -> int:
        """All learned numbers of the layer."""
        return sum(math.prod(shape) for shape in self.param_shapes().values())

    def num_active_params(self) -> int:
        """Learned numbers that one token uses: K of the E experts, and everything else."""
        shapes = self.param_shapes()
        of_experts = sum(math.prod(s) for n, s in shapes.items() if n in EXPERT_PARAMS)
        return self.num_params() - of_experts + of_experts // self.router.num_experts * self.router.top_k

    @classmethod
    def from_options(cls, **options: Any) -> MoEConfig:
        """The configuration from flat keywords: field names of the classes are unique, so each finds its place.

        >>> config = MoEConfig.from_options(d_model=4, d_ff=8, num_experts=2, top_k=1, capacity_factor=1.5)
        >>> config.dispatch.capacity_factor
        1.5
        """
        parts: dict[type, dict[str, Any]] = {part: {} for part in _PARTS.values()}
        own: dict[str, Any] = {}
        homes = {f.name: part for part in parts for f in dataclasses.fields(part)}
        known = [option.name for option in cls.option_fields()]
        for name, value in options.items():
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else f" Known options: {', '.join(known)}."
                raise TypeError(f"unknown option {name!r}.{hint}")
            (parts[homes[name]] if name in homes else own)[name] = value
        missing = [name for name in ("d_model", "d_ff", "num_experts", "top_k") if name not in options]
        if missing:
            raise TypeError(f"missing option{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))}.")
        return cls(**{name: part(**parts[part]) for name, part in _PARTS.items()}, **own)

    @staticmethod
    def option_fields() -> list[dataclasses.Field[Any]]:
        """What `from_options` takes: its own fields but for the parts, and the fields of these.

        >>> [option.name for option in MoEConfig.option_fields()][:4]
        ['d_model', 'shared', 'aux_losses', 'dtype']
        """
        own = [known for known in dataclasses.fields(MoEConfig) if known.name not in _PARTS]
        return own + [known for part in _PARTS.values() for known in dataclasses.fields(part)]

    def replace(self, **options: Any) -> MoEConfig:
        """A copy of the configuration with some flat options changed; the names are those of `from_options`.

        >>> config = MoEConfig.from_options(d_model=4, d_ff=8, num_experts=2, top_k=1)
        >>> config.replace(capacity_factor=1.0, dtype="float64").dispatch.capacity_factor
        1.0
        """
        settings = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for part in [settings.pop(name) for name in _PARTS]:
            settings |= {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
        return self.from_options(**(settings | options))

    def main_settings(self) -> dict[str, Any]:
        """What a reader wants to see first: the sizes, and every setting that is not the default."""
        sizes = {"d_model": self.d_model, "d_ff": self.experts.d_ff}
        settings: dict[str, Any] = {**sizes, "num_experts": self.router.num_experts, "top_k": self.router.top_k}
        for part in (self.router, self.experts, self.dispatch):
            for known in dataclasses.fields(part):
                value = getattr(part, known.name)
                if known.name not in settings and value != known.default:
                    settings[known.name] = value
        if self.shared is not None:
            settings["shared"] = f"{self.shared.form}({self.shared.d_ff})"
        if self.aux_losses:
            settings["aux_losses"] = dict(self.aux_losses)
        return {**settings, "dtype": self.dtype}

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dicts, ready for JSON; `from_dict` is the inverse."""
        return dataclasses.asdict(self) | {"aux_losses": dict(self.aux_losses)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MoEConfig:
        """The configuration saved by `to_dict`; unknown or missing keys raise ``TypeError``."""
        data = dict(data)
        missing = [name for name in ("d_model", *_PARTS) if name not in data]
        if missing:
            raise TypeError(f"a configuration needs {', '.join(map(repr, missing))}; got {', '.join(map(repr, data))}.")
        shared = data.pop("shared", None)
        return cls(
            **{name: part(**data.pop(name)) for name, part in _PARTS.items()},
            shared=None if shared is None else SharedExpertConfig(**shared),
            **data,
        )


EXPERT_PARAMS = ("w_gate", "w_up", "w_down", "b_gate", "b_up", "b_down")  # have a leading E axis
EXPERT_MATRICES = ("w_gate", "w_up", "w_down", "w_shared_gate", "w_shared_up", "w_shared_down")
READ_IN_PLACE = frozenset(EXPERT_PARAMS + EXPERT_MATRICES)  # never copied, because they may be gigabytes


_Function = TypeVar("_Function", bound=Callable[..., Any])


def show_options(function: _Function) -> _Function:
    """Lets ``help()`` and completion show the options of `MoEConfig.from_options` by name, not as ``**options``."""
    options = [
        inspect.Parameter(known.name, inspect.Parameter.KEYWORD_ONLY, default=_default(known), annotation=known.type)
        for known in MoEConfig.option_fields()
    ]
    shown = inspect.signature(function)
    others = [p for p in shown.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    required_first = sorted(others + options, key=lambda p: (p.kind, p.default is not p.empty))
    function.__signature__ = shown.replace(parameters=required_first)  # type: ignore[attr-defined]
    return function


def _default(known: dataclasses.Field[Any]) -> Any:
    if known.default_factory is not dataclasses.MISSING:
        return known.default_factory()
    return inspect.Parameter.empty if known.default is dataclasses.MISSING else known.default
