"""Many Python threads, fork and spawn, Ctrl-C, the environment's variables, and the end of the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import numoe
from numoe.testing import assert_bitwise_equal


def make(dtype: str = "float32") -> numoe.MoELayer:
    return numoe.MoELayer(d_model=33, d_ff=47, num_experts=6, top_k=2, rng=0, dtype=dtype)


def tokens(seed: int, count: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 33)).astype(np.float32)


def python(code: str, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `code`, with `make` and `tokens` at hand, in a fresh interpreter."""
    directory = os.path.dirname(os.path.abspath(__file__))
    start = f"import sys; sys.path.insert(0, {directory!r})\nfrom test_threads import *\n"
    command = [sys.executable, "-X", "faulthandler", "-c", start + textwrap.dedent(code)]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=timeout, check=False
    )


# ── many Python threads


@pytest.fixture
def _short_switches() -> Any:
    """Python hands the GIL over every microsecond."""
    interval, threads = sys.getswitchinterval(), numoe.num_threads()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)
    numoe.set_num_threads(threads)


def one_step(layer: numoe.MoELayer, seed: int) -> tuple[np.ndarray, np.ndarray]:
    x = tokens(seed, count=7 * seed + 1)
    out = layer.forward(x)
    return out.y, layer.backward(x, out).params["w_gate"]


@pytest.mark.usefixtures("_short_switches")
def test_eight_threads_on_one_layer_equal_serial() -> None:
    layer = make()
    jobs = [seed for seed in range(25) for _ in range(8)]
    serial = {seed: one_step(layer, seed) for seed in set(jobs)}
    before = {name: value.tobytes() for name, value in layer.params.items()}
    with ThreadPoolExecutor(8) as pool:
        for seed, found in zip(jobs, pool.map(lambda seed: one_step(layer, seed), jobs), strict=True):
            for a, b in zip(found, serial[seed], strict=True):
                assert_bitwise_equal(a, b)
    assert before == {name: value.tobytes() for name, value in layer.params.items()}


@pytest.mark.usefixtures("_short_switches")
def test_the_number_of_threads_may_change_while_others_compute() -> None:
    layer, x, done = make(), tokens(1, 400), threading.Event()

    def change() -> None:
        while not done.is_set():
            for n in (1, 2, 3, 8):
                numoe.set_num_threads(n)

    expected = layer(x)
    changer = threading.Thread(target=change)
    changer.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            for y in pool.map(lambda _: layer(x), range(100)):
                assert_bitwise_equal(y, expected)
    finally:
        done.set()
        changer.join()


def test_two_layers_in_two_threads_train_as_alone() -> None:
    def train(seed: int) -> np.ndarray:
        layer, x = make(), tokens(seed)
        for _ in range(20):
            out = layer.forward(x)
            for name, gradient in layer.backward(out.y / out.y.size, out).params.items():
                layer.params[name] -= gradient
        return layer.params["w_down"]

    alone = [train(1), train(2)]
    with ThreadPoolExecutor(2) as pool:
        for together, expected in zip(pool.map(train, (1, 2)), alone, strict=True):
            assert_bitwise_equal(together, expected)


def test_many_short_lived_threads_give_their_scratch_back() -> None:
    """300 threads with 2 MB of scratch each: the peak grows by far less than their sum."""
    done = python("""
        import resource
        layer = numoe.MoELayer(d_model=256, d_ff=512, num_experts=1, top_k=1, rng=0)
        x = np.ones((64, 256), np.float32)
        numoe.set_num_threads(1)
        def peak(count):
            for _ in range(count):
                thread = threading.Thread(target=layer, args=(x,))
                thread.start()
                thread.join()
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        first = peak(20)
        print(peak(300) - first)
    """)
    assert float(done.stdout) < 50, done.stderr


# ── other processes


def forward_in_child(threads: int) -> bytes:
    numoe.set_num_threads(threads)
    layer, x = make(), tokens(1, 300)
    out = layer.forward(x)
    return out.y.tobytes() + layer.backward(x, out).x.tobytes()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_child_processes_compute_the_same(method: str) -> None:
    """The parent's pool is up; a forked child inherits its locks but none of its threads."""
    done = python(f"""
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork with threads
        if __name__ == "__main__":
            expected = forward_in_child(2)
            context = multiprocessing.get_context({method!r})
            with ProcessPoolExecutor(2, mp_context=context) as pool:
                assert list(pool.map(forward_in_child, [1, 2, 3, 2])) == [expected] * 4
            assert forward_in_child(2) == expected
    """)
    assert done.returncode == 0, done.stderr


def test_fork_while_other_threads_compute() -> None:
    done = python("""
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        layer, x, stop = make(), tokens(1, 300), threading.Event()
        expected = layer(x).tobytes()
        def work():
            while not stop.is_set():
                layer(x)
        workers = [threading.Thread(target=work) for _ in range(3)]
        for worker in workers: worker.start()
        for _ in range(20):
            pid = os.fork()
            if pid == 0:
                os._exit(0 if make()(x).tobytes() == expected else 3)
            assert os.waitpid(pid, 0)[1] == 0
        stop.set()
        for worker in workers: worker.join()
    """)
    assert done.returncode == 0, done.stderr


# ── Ctrl-C: 0.3 s promised, and 0.3 s more for a machine on which other tests run

SIGNAL = """
    import signal, time
    layer = numoe.MoELayer(d_model={D}, d_ff={F}, num_experts={E}, top_k=1, rng=0)
    x = np.random.default_rng(0).standard_normal(({T}, {D}), dtype=np.float32)
    numoe.set_num_threads({threads})
    out = layer.forward(x[:{T_backward}])
    before = {{name: value.tobytes() for name, value in layer.params.items()}}
    sent, latencies = [0.0], []
    def press():
        sent[0] = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)
    for delay in {delays}:
        timer = threading.Timer(delay, press)
        timer.start()
        started = time.monotonic()
        try:
            {call}
            print("finished after", time.monotonic() - started, "s, before the signal")
            sys.exit(3)
        except KeyboardInterrupt:
            latencies.append(time.monotonic() - sent[0])
        timer.join()
    small = layer(x[:50])
    assert before == {{name: value.tobytes() for name, value in layer.params.items()}}
    twin = numoe.MoELayer(config=layer.config, rng=0)
    assert np.array_equal(twin(x[:50]), small)
    print(max(latencies))
"""

LONG = {
    "forward": {"call": "layer.forward(x)", "T": 60_000, "T_backward": 1, "delays": (0.1, 0.4, 0.7)},
    "inference": {"call": "layer(x)", "T": 60_000, "T_backward": 1, "delays": (0.2, 0.5)},
    "backward": {"call": "layer.backward(x, out)", "T": 25_000, "T_backward": 25_000, "delays": (0.1, 0.3, 0.5, 0.7)},
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("experts", [1, 8])
@pytest.mark.parametrize("name", LONG)
def test_ctrl_c(name: str, experts: int, threads: int) -> None:
    sizes = {"D": 256, "F": 768, "E": experts, "threads": threads}
    done = python(SIGNAL.format(**(LONG[name] | sizes)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert float(done.stdout) < 0.3 + 0.3


def test_an_exception_of_another_signal_comes_through() -> None:
    done = python("""
        import signal
        class Alarm(Exception): pass
        def ring(*_): raise Alarm
        signal.signal(signal.SIGALRM, ring)
        layer = numoe.MoELayer(d_model=256, d_ff=768, num_experts=8, top_k=1, rng=0)
        x = np.ones((60_000, 256), np.float32)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        try: layer(x)
        except Alarm: print("rang", layer(x[:2]).shape)
    """)
    assert done.stdout == "rang (2, 256)\n", done.stderr


def test_a_handler_may_use_the_library() -> None:
    done = python("""
        import signal
        small, seen = make(), []
        signal.signal(signal.SIGALRM, lambda *_: seen.append(small(tokens(1)).tobytes()))
        layer = numoe.MoELayer(d_model=256, d_ff=512, num_experts=8, top_k=1, rng=0)
        x = np.random.default_rng(0).standard_normal((10_000, 256), dtype=np.float32)
        expected = layer(x)
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
        y = layer(x)
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert np.array_equal(y, expected)
        assert seen and set(seen) == {small(tokens(1)).tobytes()}
    """)
    assert done.returncode == 0, done.stderr


# ── the environment


@pytest.mark.parametrize(("value", "threads"), [("1", 1), ("3", 3), ("64", 64), ("", None)])
def test_number_of_threads_from_the_environment(value: str, threads: int | None) -> None:
    done = python("print(numoe.num_threads(), numoe._core.available_cpus())", NUMOE_NUM_THREADS=value)
    found, cpus = map(int, done.stdout.split())
    assert found == (threads or cpus) and done.stderr == ""


@pytest.mark.parametrize("value", ["0", "-1", "abc", "2.5", " 2", "2 ", "1e1", "99999999999999999999", "0x2"])
def test_a_bad_number_of_threads_is_reported_once_and_ignored(value: str) -> None:
    done = python("print(numoe.num_threads() == numoe._core.available_cpus())", NUMOE_NUM_THREADS=value)
    assert done.stdout == "True\n"
    assert done.stderr.count("RuntimeWarning") == 1
    assert f"NUMOE_NUM_THREADS={value!r} is not a whole number >= 1; using" in done.stderr


def test_set_num_threads_overrules_the_environment() -> None:
    assert python("numoe.set_num_threads(2); print(numoe.num_threads())", NUMOE_NUM_THREADS="7").stdout == "2\n"


def test_targets_are_listed_and_one_of_them_is_used() -> None:
    targets = {t["name"]: t["supported"] for t in numoe._core.targets()}
    assert targets["portable"] and targets[numoe._core.target()]


@pytest.mark.parametrize("name", [t["name"] for t in numoe._core.targets() if t["supported"]])
def test_a_target_can_be_forced(name: str) -> None:
    done = python("print(numoe._core.target(), np.isfinite(make()(tokens(1))).all())", NUMOE_TARGET=name)
    assert done.stdout == f"{name} True\n", done.stderr


@pytest.mark.parametrize("name", ["avx99", "PORTABLE", " portable"])
def test_an_unknown_target_is_refused_at_import(name: str) -> None:
    done = python("", NUMOE_TARGET=name)
    assert done.returncode == 1
    assert (
        f"NUMOE_TARGET='{name}' is not a target" in done.stderr and "'portable'" not in done.stderr.split(" one of")[0]
    )
    assert "set it to one of: " in done.stderr and "portable" in done.stderr.split("one of: ")[1]


# ── the end


@pytest.mark.parametrize("call", ["layer(x)", "layer.backward(x, layer.forward(x))"])
def test_daemon_threads_do_not_disturb_the_end(call: str) -> None:
    done = python(
        f"""
        import time
        layer = numoe.MoELayer(d_model=64, d_ff=128, num_experts=8, top_k=2, rng=0)
        x = np.random.default_rng(0).standard_normal((5_000, 64), dtype=np.float32)
        def work():
            while True:
                {call}
        for _ in range(3): threading.Thread(target=work, daemon=True).start()
        time.sleep(0.4)
        print("end", flush=True)
    """,
        timeout=20,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_importing_starts_no_thread_and_changes_no_signal() -> None:
    done = python(
        """
        import signal
        print(len(os.listdir("/proc/self/task")) - before, signal.getsignal(signal.SIGINT) is signal.default_int_handler)
    """.replace("before", str(threads_of_numpy()))
    )
    assert done.stdout == "0 True\n", done.stderr


def threads_of_numpy() -> int:
    """How many threads a process has that has imported NumPy (its BLAS may start some)."""
    code = "import numpy, os; print(len(os.listdir('/proc/self/task')))"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
