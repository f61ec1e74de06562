"""`PackedMoELayer`: a layer's weights in the order in which the kernels read them, for inference."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from numoe import _core
from numoe._arrays import BFLOAT16, FLOAT32, FLOAT64, FloatArray, as_bits, as_float, as_indices, converted
from numoe._inputs import check_count
from numoe.config import MoEConfig, as_dtype
from numoe.experts import expert_options
from numoe.routing import Dispatch, check_kind, router_options

if TYPE_CHECKING:
    from numoe.layer import MoELayer

_PACKS_TO = {"float32": ("float32", "bfloat16"), "float64": ("float64",), "bfloat16": ("bfloat16",)}  # a layer's dtype
_CLASSES = {
    "float32": _core.PackedLayerFloat32,
    "float64": _core.PackedLayerFloat64,
    "bfloat16": _core.PackedLayerBfloat16,
}


class PackedMoELayer:
    r"""An immutable copy of a layer, packed for speed; made by `MoELayer.pack`.

    .. math:: y_t = \sum_k w_{tk}\, f_{e(t,k)}(x_t)\; (+\; f_{shared}(x_t))

    The panels are those of the CPU target in use.  They give the bits of ``layer(x)`` for an x of the layer's dtype; a
    float32 layer packed as ``bfloat16`` those of a layer with its experts' weights rounded to bfloat16, in half the
    memory traffic.

    Any other x is converted to the dtype of the arithmetic - float32, or float64 in a float64 layer - and the result
    stays in it, unless x is bfloat16: then it is rounded to bfloat16.  A bfloat16 `MoELayer` rounds x and y to its own
    dtype first and last; packed, it takes a float32 x as it is and returns float32.

    CPUs that multiply bfloat16 numbers in pairs (``python -m numoe info`` says so) do so for any number of tokens, in
    packed layers as in `MoELayer`.  Then what the experts' matrices multiply is rounded to bfloat16 too - x, after its
    weight where ``weight_on="input"``, and the rows after the activation - and subnormal numbers count as 0 in these
    products.  Sums, router, biases, activation and the weighted sum of the experts stay float32.  A token's bits depend
    as little as ever on threads and on the batch around it.

    A call needs memory beside its result, which its threads keep for the next one: the gathered and the hidden rows of
    the experts at work, (D + F) numbers each and up to 4 MB per thread (32 at most) or one expert's; with several
    threads also their output rows, D numbers each and 16 MB per thread (256 at most) or one expert's; and a panel,
    blocks and sums, less than 1 MB per thread.  Above 64 MB of one kind are given back.

    Attributes
    ----------
    config : MoEConfig
    dtype : str
        How the experts' weights are stored.
    nbytes : int
        Bytes of all packed weights.
    packing_seconds : float
        How long packing took.

    Examples
    --------
    >>> import numpy as np, numoe
    >>> layer = numoe.MoELayer(d_model=8, d_ff=16, num_experts=4, top_k=2, rng=0)
    >>> fast = layer.pack("float32")
    >>> x = np.ones((3, 8), np.float32)
    >>> bool(np.all(fast(x) == layer(x)))
    True
    """

    __slots__ = ("__weakref__", "_config", "_core", "_dtype", "_forward_ready", "_packing_seconds")

    def __init__(self, layer: MoELayer, dtype: Any) -> None:
        config = layer.config
        stored: str = as_dtype(dtype).name
        choices = _PACKS_TO[config.dtype]
        if stored not in choices:
            raise ValueError(f"a {config.dtype} layer packs to {' or '.join(choices)}; got {stored}.")
        if not config.dispatch.dropless:
            raise ValueError("pack serves dropless layers; this one has a capacity.  Use layer(x), or drop the limit.")
        self._config, self._dtype = config, stored
        start = time.perf_counter()
        self._core = _CLASSES[stored](
            _bits_of(layer.params),
            layer.buffers.get("choice_bias"),
            router_options(config.router),
            expert_options(config.experts),
            _shared_params(layer),
            expert_options(config.experts if config.shared is None else config.shared.experts),
        )
        self._packing_seconds = time.perf_counter() - start
        self._forward_ready = self._core.forward_ready  # bound once: a small call is mostly overhead

    @property
    def config(self) -> MoEConfig:
        """The settings of the layer that was packed."""
        return self._config

    @property
    def dtype(self) -> str:
        """How the experts' weights are stored."""
        return self._dtype

    @property
    def _compute_dtype(self) -> np.dtype[Any]:
        return FLOAT64 if self._dtype == "float64" else FLOAT32

    @property
    def nbytes(self) -> int:
        """Bytes of all packed weights."""
        return int(self._core.nbytes)

    @property
    def packing_seconds(self) -> float:
        """How long packing took."""
        return self._packing_seconds

    def __repr__(self) -> str:
        rate = self.nbytes / max(self._packing_seconds, 1e-9) / 1e9
        sizes = ", ".join(f"{name}={value}" for name, value in self._config.main_settings().items() if name != "dtype")
        return (
            f"PackedMoELayer({sizes}, dtype={self._dtype}: {self.nbytes / 1e6:,.1f} MB, "
            f"packed in {self._packing_seconds:.3f} s, {rate:.1f} GB/s)"
        )

    def __copy__(self) -> PackedMoELayer:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedMoELayer:
        return self  # immutable

    def __reduce__(self) -> NoReturn:
        raise TypeError("a PackedMoELayer is made for the kernels of this CPU; pickle the layer and pack it there.")

    def __call__(self, x: Any) -> FloatArray:
        """The layer's output.

        Parameters
        ----------
        x : (..., D)
            Of any floating dtype; converted to that of the arithmetic.

        Returns
        -------
        y : (..., D)
            bfloat16 if `x` is, else the dtype of the arithmetic.

        Raises
        ------
        TypeError, ValueError, OverflowError
            As `MoELayer.forward`.
        """
        ready = self._forward_ready(x)
        if ready is not None:
            return ready
        check_count(x, self._config.router.top_k)
        array = as_float(x, "x", self._compute_dtype)
        width = self._config.d_model
        if array.ndim == 0 or array.shape[-1] != width:
            raise ValueError(f"x must have shape (..., d_model) = (..., {width}); got {array.shape}.")
        y = self._core.forward(array.reshape(math.prod(array.shape[:-1]), width)).reshape(array.shape)
        return _rounded_like(y, x)

    def forward_routed(self, x: Any, indices: Any, weights: Any) -> FloatArray:
        """The layer's output for a routing from outside: bring your own router.

        Parameters
        ----------
        x : (T, D)
        indices : (T, K) of int
            Chosen experts, distinct within a token; -1 for "not routed".
        weights : (T, K)

        Returns
        -------
        y : (T, D)
            The shared expert included; bfloat16 if `x` is.

        Raises
        ------
        IndexError
            If an index is outside ``-1..E-1``.
        ValueError
            If shapes do not agree, or a token chooses an expert twice.

        Examples
        --------
        >>> import numpy as np, numoe
        >>> fast = numoe.MoELayer(d_model=8, d_ff=16, num_experts=4, top_k=2, rng=0).pack()
        >>> fast.forward_routed(np.ones((2, 8), np.float32), [[3, 0], [1, -1]], [[0.5, 0.5], [1.0, 0.0]]).shape
        (2, 8)
        """
        array = as_float(x, "x", self._compute_dtype, ndim=2)
        chosen = as_indices(indices, self._config.router.num_experts)
        y = self._core.forward_routed(array, chosen, as_float(weights, "weights", array.dtype, ndim=2))
        return _rounded_like(y, x)

    def experts(self, x: Any, plan: Dispatch, weights: Any = None) -> FloatArray:
        """The routed experts alone, for a routing from outside: `experts_forward` with ``combined=True``.

        Parameters
        ----------
        x : (T, D)
        plan : Dispatch
        weights : (T, K), optional
            Default 1.

        Returns
        -------
        y : (T, D)
        """
        check_kind(plan, Dispatch, "plan")
        array = as_float(x, "x", self._compute_dtype, ndim=2)
        if weights is not None:
            weights = as_float(weights, "weights", array.dtype, ndim=2)
        return self._core.experts(array, plan.offsets, plan.row_token, plan.row_assignment, plan.top_k, weights)


def _rounded_like(y: FloatArray, x: Any) -> FloatArray:
    """`y`, as bfloat16 if `x` is."""
    return converted(y, BFLOAT16) if getattr(x, "dtype", None) == BFLOAT16 else y


def _bits_of(params: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    return {name: as_bits(value) if value.dtype == BFLOAT16 else value for name, value in params.items()}


def _shared_params(layer: MoELayer) -> dict[str, FloatArray] | None:
    if layer.config.shared is None:
        return None
    params = _bits_of(
        {
            f"w_{name}": layer.params[f"w_shared_{name}"][None]
            for name in ("gate", "up", "down")
            if f"w_shared_{name}" in layer.params
        }
    )
    if "w_shared_score" in layer.params:
        params["score"] = layer.params["w_shared_score"]
    return params
