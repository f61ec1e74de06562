"""``python -m numoe bench``: the layer against this machine's limits, a NumPy loop, and other libraries.

Every number is a share of something measured in the same run: the machine's peak on registers, and its read
rate right before and after each cell.  Losing rows are shown like all others.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numoe import _core
from numoe.bench.compare import comparison_lines
from numoe.bench.peers import PEERS, parse_peer
from numoe.bench.products import print_products
from numoe.bench.report import Row
from numoe.bench.scaling import print_scaling
from numoe.bench.suite import FORMAT, PASSES, Settings, run_bench
from numoe.bench.workloads import (
    DEFAULT_LAYERS,
    DTYPES,
    LAYERS,
    QUICK_LAYERS,
    ROUTINGS,
    fit_default_run,
    parse_layer,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""

    def checked(parse: Callable[[str], Any]) -> Callable[[str], Any]:
        def convert(text: str) -> Any:
            try:
                return parse(text)
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from None

        return convert

    layers = ", ".join(LAYERS)
    add = parser.add_argument
    add(
        "--layers",
        nargs="+",
        type=checked(parse_layer),
        metavar="NAME",
        help=f"in their published sizes {layers}; or sizes ExKxDxF",
    )
    add("--tokens", nargs="+", type=checked(_positive), metavar="T", help="token counts (default 1 16 256)")
    add("--routing", nargs="+", choices=tuple(ROUTINGS), help="default: uniform; all for the largest forward")
    add("--passes", nargs="+", choices=PASSES, default=list(PASSES), help="default: both")
    peers = f"other libraries too: {', '.join(PEERS)} (default: all of them); pip install '.[bench]'"
    add("--peers", nargs="*", type=checked(parse_peer), metavar="NAME", help=peers)
    add("--dtype", choices=tuple(DTYPES), default="float32")
    add(
        "--threads",
        type=checked(_positive),
        metavar="N",
        help="of numoe, of NumPy's OpenBLAS and of the peers (default: numoe's)",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small layers, half a minute at most")
    size.add_argument("--full", action="store_true", help="all layers in their published sizes, 1 to 4096 tokens")
    add("--seconds", type=checked(_seconds), help="of undisturbed calls per measurement (default 0.3)")
    add("--scaling", action="store_true", help="then also: many experts, threads, skew, on layers of its own")
    add("--products", action="store_true", help="then also: the bare products of the kernels, on one thread")
    add("--json", type=Path, metavar="FILE", help="also write everything measured to FILE")
    add("--compare", nargs=2, type=Path, metavar=("A", "B"), help="compare two such files and measure nothing")


def _positive(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise ValueError(f"{text!r} must be a whole number >= 1.")
    return number


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value <= 3600:
        raise ValueError(f"{text!r} must be a number of seconds > 0 and <= 3600.")
    return value


def run(args: argparse.Namespace) -> int:
    """The command's body; 0 for success, 2 for files that cannot be used."""
    try:
        if args.compare:
            for line in comparison_lines(*(load_run(path) for path in args.compare)):
                print(line)
            return 0
        if args.json is not None:
            _check_writable(args.json)
    except (OSError, ValueError) as error:
        print(f"numoe bench: {error}", file=sys.stderr)
        return 2
    result: Row = {}
    try:
        run_bench(settings_of(args), result)
        if args.scaling:
            print_scaling(settings_of(args), result)
        if args.products:
            print_products(args.dtype, settings_of(args).seconds, result)
    finally:  # an interrupted run keeps what it has
        if args.json is not None and result.get("cells"):
            args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
            print(f"written: {args.json}")
    return 0


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that the options mean."""
    names = QUICK_LAYERS if args.quick else tuple(LAYERS) if args.full else DEFAULT_LAYERS
    tokens = (1, 64) if args.quick else (1, 4, 16, 64, 256, 1024, 4096) if args.full else (1, 16, 256)
    layers = args.layers or [LAYERS[name] if args.full else fit_default_run(LAYERS[name]) for name in names]
    peers = tuple(PEERS) if args.peers == [] else tuple(args.peers or ())
    return Settings(
        layers=tuple(layers),
        tokens=tuple(args.tokens or tokens),
        routings=tuple(args.routing) if args.routing else tuple(ROUTINGS) if args.full else None,
        passes=tuple(args.passes),
        peers=peers,
        dtype=args.dtype,
        threads=args.threads or _core.num_threads(),
        seconds=args.seconds or (0.1 if args.quick else 1.0 if args.full else 0.3),
        probe_seconds=0.02 if args.quick else 0.05,
    )


def load_run(path: Path) -> Row:
    """A file written by ``--json``; ``ValueError`` says what is wrong with it."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
    if not isinstance(result, dict) or result.get("format") != FORMAT or "cells" not in result:
        raise ValueError(f"{path} was not written by this version's 'numoe bench --json' (format {FORMAT}).")
    return result


def _check_writable(path: Path) -> None:
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"--json {path} cannot be written; give a file in a directory that exists and is writable.")
