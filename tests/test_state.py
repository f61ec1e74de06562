"""Saving, loading, pickling, copying: exact round trips, refusals that leave everything as it was, atomic files."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import os
import pickle
import resource
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import weakref
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numoe
import numpy as np
import pytest
import safetensors.numpy
from layers import layer_of, snapshot
from numoe import CheckpointError, checkpoint
from numoe.testing import assert_bitwise_equal, random_problem

LAYERS: dict[str, dict[str, Any]] = {
    "default": {},
    "float64": {"dtype": "float64"},
    "everything": {
        "score": "sigmoid", "scale": 2.5, "linear_bias": True, "choice_bias": True, "num_groups": 2, "jitter": 0.1,
        "noise_std": 0.3, "bias": True, "activation": "gelu_tanh", "capacity_factor": 1.25, "capacity_per": "sequence",
        "shared": numoe.SharedExpertConfig(d_ff=5, gate="sigmoid"), "aux_losses": {"switch": 0.1, "load": 0.2},
    },
}  # fmt: skip


def make(name: str = "everything") -> numoe.MoELayer:
    problem = random_problem(0, **({"dtype": "float32"} | LAYERS[name]))
    return layer_of(problem)


def tokens(layer: numoe.MoELayer) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((3, 5, 8)).astype(layer.dtype)


def assert_same_layer(twin: numoe.MoELayer, layer: numoe.MoELayer) -> None:
    """Configuration, numbers and behaviour; every array of its own, writable and ready for the core."""
    assert twin.config == layer.config
    assert list(twin.params) == list(layer.params) and list(twin.buffers) == list(layer.buffers)
    assert snapshot(twin) == snapshot(layer)
    for name, value in twin.state_dict().items():
        assert value.flags.writeable and value.flags.c_contiguous and value.flags.aligned
        assert value.dtype == layer.dtype and value.dtype.isnative
        assert not np.shares_memory(value, layer.state_dict()[name])
    x = tokens(layer)
    out, expected = twin.forward(x, rng=3), layer.forward(x, rng=3)
    assert_bitwise_equal(out.y, expected.y)
    assert_bitwise_equal(twin.backward(x, out).params["w_up"], layer.backward(x, expected).params["w_up"])


def saved_and_loaded(layer: numoe.MoELayer, path: Path) -> numoe.MoELayer:
    layer.save(path)
    return numoe.MoELayer.load(path)


def from_state(layer: numoe.MoELayer, _: Path) -> numoe.MoELayer:
    twin = numoe.MoELayer(config=layer.config, rng=9)
    assert twin.load_state_dict(layer.state_dict()) == []
    return twin


COPIES: dict[str, Callable[[numoe.MoELayer, Path], numoe.MoELayer]] = {
    "file": saved_and_loaded,
    "state_dict": from_state,
    "deepcopy": lambda layer, _: copy.deepcopy(layer),
    **{f"pickle {n}": lambda layer, _, n=n: pickle.loads(pickle.dumps(layer, n)) for n in range(2, 6)},
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", LAYERS)
def test_round_trip(name: str, way: str, tmp_path: Path) -> None:
    layer = make(name)
    before = snapshot(layer)
    assert_same_layer(COPIES[way](layer, tmp_path / "layer.safetensors"), layer)
    assert snapshot(layer) == before


def test_a_shallow_copy_shares_the_arrays_but_not_the_dict() -> None:
    layer = make()
    twin = copy.copy(layer)
    assert all(twin.params[name] is value for name, value in layer.params.items())
    twin.params["w_up"] = twin.params["w_up"] + 1
    assert twin.params["w_up"] is not layer.params["w_up"]


class Tagged(numoe.MoELayer):
    """What a user's subclass may keep: ordinary attributes and slots."""

    __slots__ = ("__dict__", "tag")

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.tag, self.history, self.self = "a", [self.params["w_up"]], self


@pytest.mark.parametrize("way", ["deepcopy", "pickle 2", "pickle 5"])
def test_a_subclass_keeps_its_attributes(way: str, tmp_path: Path) -> None:
    layer = Tagged(config=make().config, rng=0)
    twin = COPIES[way](layer, tmp_path)
    assert isinstance(twin, Tagged)
    assert twin.tag == "a" and twin.self is twin
    assert twin.history[0] is twin.params["w_up"] and twin.history[0] is not layer.history[0]
    assert_same_layer(twin, layer)
    shallow = copy.copy(layer)
    assert shallow.tag == "a" and shallow.history is layer.history and shallow.params is not layer.params


def test_a_layer_can_be_referred_to_weakly() -> None:
    layer = make("default")
    packed = layer.pack()
    references = weakref.ref(layer), weakref.ref(packed)
    assert [reference() for reference in references] == [layer, packed]
    del layer, packed
    assert [reference() for reference in references] == [None, None]


def test_a_packed_layer_is_its_own_copy_and_not_pickled() -> None:
    packed = make("default").pack()
    assert copy.copy(packed) is packed and copy.deepcopy([packed])[0] is packed
    with pytest.raises(TypeError, match=r"PackedMoELayer.* of this CPU.*pickle the layer and pack it there"):
        pickle.dumps(packed)


def test_an_output_can_be_used_after_the_layer_is_gone() -> None:
    layer = make()
    y, expected = layer.forward(tokens(layer)).y, layer(tokens(layer))
    del layer
    assert_bitwise_equal(y, expected)


def test_special_numbers_survive_the_file(tmp_path: Path) -> None:
    layer = make()
    layer.params["w_up"].reshape(-1)[:6] = [np.nan, -np.inf, np.inf, -0.0, 1e-45, 3.4e38]
    assert snapshot(saved_and_loaded(layer, tmp_path / "a.safetensors")) == snapshot(layer)


def test_the_file_is_plain_safetensors_with_the_config_inside(tmp_path: Path) -> None:
    layer = make()
    layer.save(tmp_path / "a.safetensors")
    state = safetensors.numpy.load_file(tmp_path / "a.safetensors")
    assert {name: value.tobytes() for name, value in state.items()} == snapshot(layer)
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="np") as file:
        metadata = file.metadata()
    assert numoe.MoEConfig.from_dict(json.loads(metadata["config"])) == layer.config


@pytest.mark.parametrize("kind", [str, Path, os.fspath])
def test_paths_of_any_kind(kind: Any, tmp_path: Path) -> None:
    layer = make()
    name = kind(tmp_path / "Größe ü.safetensors")
    layer.save(name)
    assert snapshot(numoe.MoELayer.load(name)) == snapshot(layer)


# ── configurations


def test_a_configuration_is_one_value(tmp_path: Path) -> None:
    """Immutable to the last field, so that it can be hashed, and the same after every journey."""
    config = make().config
    given = {"switch": 0.1, "load": 0.2}
    other = config.replace(aux_losses=given)
    given["switch"] = 7.0
    assert other == config and hash(other) == hash(config) and other.aux_losses == {"load": 0.2, "switch": 0.1}
    assert config.replace(aux_losses={}) != config
    for twin in (
        numoe.MoEConfig.from_dict(json.loads(json.dumps(config.to_dict()))),
        dataclasses.replace(config, d_model=8),
        copy.deepcopy(config),
        *(pickle.loads(pickle.dumps(config, n)) for n in range(2, 6)),
    ):
        assert twin == config and hash(twin) == hash(config) and repr(twin) == repr(config)
        assert list(twin.aux_losses.items()) == list(config.aux_losses.items())
    for name in ("d_model", "router", "experts", "dispatch"):
        given = {key: value for key, value in config.to_dict().items() if key != name}
        with pytest.raises(TypeError, match=f"a configuration needs '{name}'; got '"):
            numoe.MoEConfig.from_dict(given)
    assert "aux_losses={'switch': 0.1, 'load': 0.2}" in repr(config)
    assert type(config.to_dict()["aux_losses"]) is dict
    with pytest.raises(TypeError, match="does not support item assignment"):
        config.aux_losses["switch"] = 1.0  # type: ignore[index]
    with pytest.raises(AttributeError):
        config.aux_losses.update(switch=1.0)  # type: ignore[attr-defined]


# ── state dicts


def replaced(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: state | values


BAD_STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda s: {k: v for k, v in s.items() if k != "w_up"}, "missing: 'w_up'.*strict=False"),
    "many missing": (lambda s: {}, "missing: 'w_router', .* and 8 more"),
    "unexpected": (replaced(w_extra=1), "unexpected: 'w_extra'"),
    "unexpected number": (lambda s: s | {7: 1}, "unexpected: 7"),
    "long name": (replaced(**{"x" * 10_000: 1}), "^.{0,400}$"),
    "last shape": (lambda s: s | {"choice_bias": np.ones(5)}, r"'choice_bias' must have shape \(6,\); got \(5,\)"),
    "transposed": (lambda s: s | {"w_down": s["w_down"].swapaxes(1, 2)}, "'w_down' .* transposed"),
    "fewer experts": (lambda s: s | {"w_down": s["w_down"][1:]}, r"'w_down' .*\(6, 12, 8\); got \(5, 12, 8\)"),
    "ints": (lambda s: s | {"w_router": np.ones((8, 6), int)}, "'w_router' has dtype int64"),
    "complex": (lambda s: s | {"w_router": np.ones((8, 6), complex)}, "'w_router' has dtype"),
    "objects": (lambda s: s | {"w_router": np.full((8, 6), None)}, "'w_router' has dtype"),
    "raw bytes": (lambda s: s | {"w_router": np.zeros((8, 6), "V4")}, "'w_router' has dtype"),
    "ragged": (replaced(w_router=[[1.0], [1.0, 2.0]]), "'w_router'"),
    "masked": (lambda s: s | {"w_router": np.ma.masked_array(s["w_router"], True)}, "'w_router' is a masked"),
    "too large": (lambda s: s | {"w_router": np.full((8, 6), 1e39)}, "'w_router' .*float32"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("fault", BAD_STATES)
def test_a_refused_state_changes_nothing(fault: str, strict: bool) -> None:
    """All other arrays differ from the layer's, so that one that was copied too early shows."""
    layer = make()
    before = snapshot(layer)
    spoil, message = BAD_STATES[fault]
    state = spoil({name: value + 1 for name, value in layer.state_dict().items()})
    odd_names = fault.split()[-1] in {"missing", "unexpected", "number", "name"}
    if not strict and odd_names:
        assert len(layer.load_state_dict(state, strict=False)) >= 1  # the odd names, and the rest is loaded
        assert (snapshot(layer) == before) == (state == {})
        return
    with pytest.raises((CheckpointError, TypeError), match=message):
        layer.load_state_dict(state, strict=strict)
    assert snapshot(layer) == before


def test_odd_names_are_returned_if_not_strict() -> None:
    layer = make("default")
    odd = layer.load_state_dict({"w_router": np.ones((8, 6)), "w_foreign": np.ones(1)}, strict=False)
    assert sorted(odd) == ["w_down", "w_foreign", "w_gate", "w_up"]
    assert np.all(layer.params["w_router"] == 1)


def test_a_state_may_alias_the_layer() -> None:
    layer = make("default")
    gate, up = layer.params["w_gate"].copy(), layer.params["w_up"].copy()
    layer.load_state_dict(layer.state_dict() | {"w_gate": layer.params["w_up"], "w_up": layer.params["w_gate"]})
    assert_bitwise_equal(layer.params["w_gate"], up)
    assert_bitwise_equal(layer.params["w_up"], gate)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_start_on_cache_lines(dtype: str, tmp_path: Path) -> None:
    layer = numoe.MoELayer(d_model=37, d_ff=11, num_experts=3, top_k=1, dtype=dtype, rng=0)
    layer.save(tmp_path / "layer.safetensors")
    for one in (layer, numoe.MoELayer.load(tmp_path / "layer.safetensors")):
        assert {value.ctypes.data % 64 for value in one.params.values()} == {0}


def test_loading_keeps_the_arrays_in_place() -> None:
    """Whoever holds a parameter - an optimiser, a view - goes on holding it."""
    layer = make("default")
    held = dict(layer.params)
    layer.load_state_dict({name: value * 2 for name, value in layer.state_dict().items()})
    assert all(layer.params[name] is value for name, value in held.items())


# ── files that do not fit


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def with_header(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    header, body = header_of(data)
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def with_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def edit(header: dict[str, Any]) -> None:
        config = json.loads(header["__metadata__"]["config"])
        header["__metadata__"]["config"] = json.dumps(change(config) or config)

    return lambda data: with_header(data, edit)


def with_text(text: str) -> Callable[[bytes], bytes]:
    return lambda data: with_header(data, lambda header: header["__metadata__"].update(config=text))


def with_router(**values: Any) -> Callable[[bytes], bytes]:
    return with_config(lambda config: config["router"].update(values))


def zip_file(_: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("data.pkl", b"x")
    return buffer.getvalue()


BAD_FILES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda d: b"", "not a complete safetensors file"),
    "7 bytes": (lambda d: d[:7], "not a complete safetensors file"),
    "no header": (lambda d: d[:8], "not a complete safetensors file"),
    "header cut": (lambda d: d[:100], "not a complete safetensors file"),
    "one byte short": (lambda d: d[:-1], "not a complete safetensors file"),
    "half": (lambda d: d[: len(d) // 2], "not a complete safetensors file"),
    "one byte too many": (lambda d: d + b"\0", "not a complete safetensors file"),
    "huge header": (lambda d: b"\xff" * 8 + d[8:], "not a complete safetensors file"),
    "bit flip in the header": (lambda d: d[:9] + bytes([d[9] ^ 0xFF]) + d[10:], "not a complete safetensors file"),
    "pickle": (lambda d: pickle.dumps({"a": 1}), "not a complete safetensors file"),
    "zip": (zip_file, "not a complete safetensors file"),
    "foreign": (lambda d: with_header(d, lambda h: h.pop("__metadata__")), "not written by numoe.MoELayer.save"),
    "other format": (lambda d: with_header(d, lambda h: h["__metadata__"].update(format="pt")), "format 'pt'"),
    "no config": (
        lambda d: with_header(d, lambda h: h["__metadata__"].pop("config")),
        "the configuration inside is not valid",
    ),
    "config text": (with_text("{"), "the configuration inside is not valid"),
    "config list": (with_text("[]"), "the configuration inside is not valid"),
    "config nested": (with_text("[" * 100_000), "the configuration inside is not valid"),
    "config long int": (with_text('{"d_model": 1' + "0" * 5000 + "}"), "the configuration inside is not valid"),
    "config unknown": (with_config(lambda c: c.update(new_option=1)), "configuration .*new_option"),
    "config missing": (with_config(lambda c: c.pop("router") and None), "configuration .*router"),
    "config router": (with_config(lambda c: c.update(router=3)), "configuration"),
    "config shared": (with_config(lambda c: c.update(shared=[1])), "configuration"),
    "config float": (with_router(num_experts=6.0), "configuration .*num_experts must be an int"),
    "config infinite": (with_router(scale=float("inf")), "configuration .*scale must be finite"),
    "config beyond floats": (with_router(scale=10**400), "configuration .*scale"),
    "config dtype": (with_config(lambda c: c.update(dtype="object")), "configuration .*dtype"),
    "other experts": (with_router(num_experts=8), r"'w_router' must have shape \(8, 8\); got \(8, 6\)"),
    "many experts": (with_router(num_experts=2**30), r"'w_router' must have shape \(8, 1073741824\)"),
    "other dtype": (with_config(lambda c: c.update(dtype="float64")), "float64"),
    "extra tensor": (with_config(lambda c: c["experts"].update(bias=False)), "unexpected: 'b_"),
    "missing tensor": (with_config(lambda c: c["experts"].update(form="mlp")), "unexpected: .*'w_gate'"),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_a_file_that_does_not_fit(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    make().save(path)
    spoil, message = BAD_FILES[fault]
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as caught:
        numoe.MoELayer.load(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 2000
    assert "strict" not in str(caught.value)  # `load` has no such argument


@pytest.mark.parametrize("fault", ["other experts", "other dtype", "extra tensor", "missing tensor"])
def test_what_does_not_fit_is_refused_unread(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the arrays not a byte: the memory they would need is not asked for."""
    path = tmp_path / "a.safetensors"
    make().save(path)
    path.write_bytes(BAD_FILES[fault][0](path.read_bytes()))
    monkeypatch.setattr(checkpoint, "_check_memory", lambda source: pytest.fail("arrays were about to be read"))
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        numoe.MoELayer.load(path)


def test_a_file_larger_than_memory_is_a_memory_error(tmp_path: Path) -> None:
    """safetensors panics there: no `Exception`, and sometimes the end of the process."""
    numoe.MoELayer(d_model=256, d_ff=1024, num_experts=16, top_k=2, rng=0).save(tmp_path / "a.safetensors")
    script = [sys.executable, __file__, "load_without_memory", str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def load_without_memory(directory: str) -> None:
    """The file can be mapped, its arrays find no place."""
    path = Path(directory) / "a.safetensors"
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + path.stat().st_size * 3 // 2
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with pytest.raises(MemoryError, match=r"a\.safetensors: its [0-9,]+ bytes do not fit into memory"):
        numoe.MoELayer.load(path)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"])
def test_files_that_may_run_code_are_refused_unread(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=r"may run code.*safetensors\.torch\.save_file"):
        numoe.MoELayer.load(path)
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError):
        numoe.MoELayer.load(tmp_path / "model.safetensors")


class Bomb:
    def __reduce__(self) -> Any:
        return (os._exit, (66,))


def test_missing_files_and_directories(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        numoe.MoELayer.load(tmp_path / "none.safetensors")
    (tmp_path / "dir.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match=r"dir\.safetensors"):
        numoe.MoELayer.load(tmp_path / "dir.safetensors")
    with pytest.raises(OSError, match=r"dir\.safetensors"):
        make().save(tmp_path / "dir.safetensors")
    with pytest.raises(FileNotFoundError, match="no-such"):
        make().save(tmp_path / "no-such" / "a.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dir.safetensors"]


@pytest.mark.parametrize("name", ["layer", "layer.npz", "layer.pt", ".safetensors"])
def test_other_suffixes_are_not_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path must end in \.safetensors; got"):
        make().save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def ordinary_directory() -> Iterator[Path]:
    """A directory of a user who is not root, for whom permissions are void; the test runs as that user."""
    nobody = 65534
    is_root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:
        if is_root:
            os.chown(name, nobody, nobody)
            os.seteuid(nobody)
        try:
            yield Path(name)
        finally:
            Path(name).chmod(0o700)
            if is_root:
                os.seteuid(0)


def test_permissions(ordinary_directory: Path) -> None:
    path, layer = ordinary_directory / "a.safetensors", make()
    layer.save(path)
    path.chmod(0)
    with pytest.raises(PermissionError, match=r"a\.safetensors"):
        numoe.MoELayer.load(path)
    path.chmod(0o600)
    ordinary_directory.chmod(0o500)
    with pytest.raises(PermissionError, match="safetensors"):
        make("default").save(path)
    assert snapshot(numoe.MoELayer.load(path)) == snapshot(layer)


def test_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    code = f"import numoe; numoe.MoELayer.load({str(tmp_path / 'a.safetensors')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=5, check=False)
    assert "CheckpointError" in done.stderr or "OSError" in done.stderr


SPOILED: dict[str, tuple[Callable[[numoe.MoELayer], Any], str]] = {
    "extra": (lambda y: y.params.update(w_extra=np.ones(3)), r"layer\.params .* unexpected: 'w_extra'"),
    "extra buffer": (lambda y: y.buffers.update(mean=np.ones(3)), r"layer\.buffers .* unexpected: 'mean'"),
    "missing": (lambda y: y.params.pop("w_up"), r"layer\.params\['w_up'\] must be .*; got NoneType"),
    "shape": (lambda y: y.params.update(w_router=np.ones((3, 3), np.float32)), r"params\['w_router'\] must .*\(3, 3\)"),
    "dtype": (lambda y: y.params.update(w_router=np.ones((8, 6))), r"layer\.params\['w_router'\] must .*got float64"),
    "list": (lambda y: y.params.update(w_up=[1.0]), r"layer\.params\['w_up'\] must .*; got list"),
}


@pytest.mark.parametrize("fault", SPOILED)
def test_a_layer_that_does_not_fit_its_configuration_is_not_used(fault: str, tmp_path: Path) -> None:
    """Above all not saved: `load` would refuse the file."""
    layer = make()
    state = layer.state_dict()
    spoil, message = SPOILED[fault]
    spoil(layer)
    uses = (
        lambda: layer.save(tmp_path / "a.safetensors"),
        lambda: layer.load_state_dict(state, strict=False),
        lambda: layer(tokens(layer)),
        lambda: layer.forward(tokens(layer)),
    )
    for use in uses:
        with pytest.raises(ValueError, match=message):
            use()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_choice_bias_that_no_call_takes_is_neither_kept_nor_packed(value: float, tmp_path: Path) -> None:
    path, layer = (
        tmp_path / "a.safetensors",
        numoe.MoELayer(d_model=8, d_ff=12, num_experts=6, top_k=2, choice_bias=True, rng=0),
    )
    state = layer.state_dict() | {"choice_bias": np.array([0, 0, value, 0, 0, 0], np.float32)}
    checkpoint.save(path, state, config=layer.config.to_dict())
    with pytest.raises(CheckpointError, match=r"a\.safetensors: choice_bias must be finite; entry 2 is not"):
        numoe.MoELayer.load(path)
    before = path.read_bytes()
    layer.buffers["choice_bias"][2] = value
    for use in (layer.pack, lambda: layer.save(path)):
        with pytest.raises(ValueError, match=r"^choice_bias must be finite; entry 2 is not"):
            use()
    assert path.read_bytes() == before


# ── atomic saving


@pytest.mark.parametrize("step", ["os.open", "safetensors.numpy.save_file", "os.fsync", "os.chmod", "os.replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()])
def test_a_failed_save_leaves_the_old_file(
    step: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = make("default"), make()
    path = tmp_path / "a.safetensors"
    old.save(path)
    before = path.read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(step, fail)
    with pytest.raises(type(error)):
        new.save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]
    new.save(path)
    assert snapshot(numoe.MoELayer.load(path)) == snapshot(new)


def test_a_full_disk_is_an_os_error(tmp_path: Path) -> None:
    """Files of this process may hold 1,000 bytes: the write itself fails, half way."""
    make("default").save(tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    script = [sys.executable, __file__, "save_on_a_full_disk", str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def save_on_a_full_disk(directory: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    with pytest.raises(OSError, match=r"a\.safetensors|too large"):
        make().save(Path(directory) / "a.safetensors")


def test_a_saved_file_has_ordinary_permissions(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        make().save(tmp_path / "a.safetensors")
    finally:
        assert os.umask(mask) == 0o027  # and the process's mask is as it was
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640


def test_saving_never_touches_the_mask_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread that makes a file meanwhile would get it with the wrong permissions."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the mask was changed"))
    make().save(tmp_path / "a.safetensors")


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_saving_over_a_file_keeps_its_permissions(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    make("default").save(path)
    path.chmod(mode)
    make().save(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert snapshot(numoe.MoELayer.load(path)) == snapshot(make())


def test_saving_through_a_link_replaces_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    link, target = tmp_path / "latest.safetensors", tmp_path / "store" / "step-7"
    link.symlink_to(Path("store") / "step-7")
    for name in ("default", "everything"):  # the target appears, then is replaced
        make(name).save(link)
        assert link.is_symlink() and target.is_file() and not target.is_symlink()
        assert snapshot(numoe.MoELayer.load(link)) == snapshot(make(name))
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["step-7"]


def test_checkpoints_of_other_things(tmp_path: Path) -> None:
    """`checkpoint.save` and `load` serve optimisers too; a non-numoe file is refused by both."""
    state = {"m": np.arange(6.0).reshape(2, 3)[:, ::-1], "step": np.array(3)}
    checkpoint.save(tmp_path / "a.safetensors", state, config={"lr": 0.5, "names": ["a", "b"]})
    loaded, config = checkpoint.load(tmp_path / "a.safetensors")
    assert config == {"lr": 0.5, "names": ["a", "b"]}
    assert all(np.array_equal(loaded[name], value) for name, value in state.items())
    with pytest.raises(CheckpointError, match="configuration"):
        numoe.MoELayer.load(tmp_path / "a.safetensors")


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2])
