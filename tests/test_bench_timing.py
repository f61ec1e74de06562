"""The benchmark's clock: what counts as undisturbed, how often is measured, what a timing is worth."""

import dataclasses
import time

from numoe.bench import suite, timing
from numoe.bench.machine import Limits
from numoe.bench.workloads import Cost


def test_a_window_is_clean_if_the_cpus_were_ours():
    def usage(**changes):
        return dataclasses.replace(timing.Usage(wall=1.0, own=2.0, others=0.0), **changes)

    assert usage().clean(threads=2)
    assert usage(own=1.9).clean(threads=1)
    assert not usage(own=1.9).clean(threads=2)  # below 96 % of 2 CPUs
    assert usage(others=0.16).clean()  # 0.15 cores and two clock ticks
    assert not usage(others=0.18).clean()
    assert usage(own=1.5).cores == 1.5


def test_a_stopwatch_counts_own_cpu_time():
    watch = timing.Stopwatch()
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass
    usage = watch.usage()
    assert 0.05 <= usage.own <= 1
    assert usage.wall >= 0.04
    assert usage.others >= 0


def test_measuring_counts_every_call_once():
    seen = []
    result = timing.measure(seen.append, seconds=0.02)
    assert seen == list(range(len(seen)))
    assert 3 <= result.calls < len(seen)  # the first ones warm up
    assert 0 < result.minimum <= result.median
    assert result.spread >= 0


def measured_sleep(sleep, seconds):
    """The timing of calls that take `sleep` seconds each, and which calls there were."""
    seen = []

    def call(i):
        seen.append(i)
        time.sleep(sleep)

    return timing.measure(call, seconds=seconds), seen


def test_a_slow_call_is_measured_a_few_times_only():
    result, seen = measured_sleep(0.03, seconds=0.01)
    assert len(seen) <= 10
    assert result.minimum >= 0.03
    assert not result.clean  # asleep: the CPU was not ours


def test_a_very_slow_call_is_measured_once():
    result, seen = measured_sleep(0.1, seconds=0.001)
    assert (len(seen), result.calls) == (2, 1)  # the first one warms up


def test_windows_wait_for_others_and_add_up():
    seen = []
    measurement = timing.Measurement(seen.append, seconds=1e9)
    assert (measurement.windows, measurement.done) == (0, False)
    measurement.take_window()
    calls = len(seen)
    measurement.take_window()
    assert (measurement.windows, measurement.done) == (2, False)
    assert seen == list(range(len(seen)))
    assert calls < measurement.timing().calls < len(seen)  # those of both windows without their warm-up


def test_slow_calls_warm_up_once():
    seen = []

    def call(i):
        seen.append(i)
        time.sleep(0.12)

    measurement = timing.Measurement(call, seconds=1e9)
    for expected in (2, 3, 4):  # the first window has one call more
        measurement.take_window()
        assert len(seen) == expected


def test_medians_and_spreads_by_hand():
    window = ([], timing.Usage(wall=2.0, own=3.0, others=0.0))
    result = timing.summary([4.0, 1.0, 2.0, 3.0, 5.0], [window], clean=True)  # quartiles 2 and 4
    assert result == timing.Timing(median=3.0, minimum=1.0, spread=2 / 3, calls=5, clean=True, cores=1.5)


def test_judging_a_timing_by_hand():
    def limits(*bandwidths, peaks=(100.0, 100.0)):
        return tuple(Limits(peak, 0.25, bandwidth) for peak, bandwidth in zip(peaks, bandwidths, strict=True))

    work = Cost(flops=200.0, bytes=30.0, working_set=30.0, experts_hit=1.0)
    time_taken = timing.Timing(median=4.0, minimum=3.0, spread=0.0, calls=3, clean=True, cores=1.0)
    # bandwidth 10: memory 3 s, compute 2 s (8 s with the target's vectors)
    result = suite.judge(time_taken, work, limits(8.0, 12.0), 0.0, "float32")
    assert (result["roofline"], result["bound"], result["share"], result["target_share"]) == (3.0, "memory", 0.75, 2.0)
    assert result["drifted"]
    assert not suite.judge(time_taken, work, limits(10.0, 10.0), 0.0, "float32")["drifted"]
    assert suite.judge(time_taken, work, limits(10.0, 10.0), float("nan"), "float32")["wrong"]
    # a machine at half its speed: compute 4 s
    result = suite.judge(time_taken, work, limits(10.0, 10.0, peaks=(60.0, 40.0)), 0.0, "float32")
    assert (result["roofline"], result["bound"], result["share"]) == (4.0, "compute", 1.0)
    assert result["drifted"]
