"""What the tests of `numoe.bench` share: its smallest layer, its settings, results as a run writes them."""

import argparse

from numoe import bench
from numoe.bench import suite
from numoe.bench.workloads import parse_layer

TINY = parse_layer("8x2x16x32")


def settings(*arguments):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.settings_of(parser.parse_args(arguments))


def cell(median, share=0.5, *, clean=True, spread=0.01, tokens=1, **others):
    def result(seconds):
        return {
            "median": seconds,
            "minimum": seconds,
            "share": share,
            "clean": clean,
            "spread": spread,
            "drifted": False,
            "wrong": False,
        }

    return {
        "layer": "tiny",
        "dtype": "float32",
        "tokens": tokens,
        "passes": "forward",
        "routing": "uniform",
        "threads": 2,
        "contenders": {"numoe": result(median), **{name: result(value) for name, value in others.items()}},
    }


def of_run(*cells):
    facts = dict.fromkeys(("cpu", "target", "threads", "numoe", "numpy", "blas"), "x")
    return {"format": suite.FORMAT, "machine": facts, "cells": list(cells)}
