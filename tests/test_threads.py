"""Many Python threads, fork and spawn, Ctrl-C, the environment's variables, and the end of the interpreter."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numoe
import numpy as np
import pytest
from numoe.testing import assert_bitwise_equal


def make(dtype: str = "float32") -> numoe.MoELayer:
    return numoe.MoELayer(d_model=33, d_ff=47, num_experts=6, top_k=2, rng=0, dtype=dtype)


def tokens(seed: int, count: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 33)).astype(np.float32)


def python(code: str, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a fresh interpreter, with this module's `make` and `tokens` if it names them."""
    start = "import os, sys, threading\nimport numpy as np, numoe\n"
    if any(name in code for name in ("make(", "tokens(", "forward_in_child")):
        start += f"sys.path.insert(0, {os.path.dirname(os.path.abspath(__file__))!r})\nfrom test_threads import *\n"
    command = [sys.executable, "-X", "faulthandler", "-c", start + textwrap.dedent(code)]
    environ = os.environ | environment
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=timeout, check=False)


# ── many Python threads


@pytest.fixture
def _short_switches(restored_threads: None) -> Any:
    """Python hands the GIL over every microsecond."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


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


def test_a_thread_computes_while_the_main_thread_keeps_the_gil() -> None:
    """Signals are the main thread's business; another one does not wait for the GIL to look for them."""
    done = python("""
        import time
        numoe.set_num_threads(1)
        layer = numoe.MoELayer(d_model=256, d_ff=512, num_experts=1, top_k=1, rng=0)
        x = np.ones((10_000, 256), np.float32)  # far more than the 20 ms between two looks
        out = layer.forward(x)
        grads = layer.backward(x, out)
        for grad in grads.params.values():
            grad.fill(0)
        first, last = grads.params["w_down"].ravel()[:1], grads.params["w_up"].ravel()[-1:]
        worker = threading.Thread(target=layer.backward, args=(x, out), kwargs={"into": grads})
        sys.setswitchinterval(1000)
        worker.start()
        while not first:  # until it computes
            time.sleep(0)
        assert not last
        end = time.monotonic() + 20
        while not last and time.monotonic() < end:
            pass
        assert last
        worker.join()
    """)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("written", ["indices", "weights", "row_token"])
def test_writing_while_another_thread_computes_crashes_nothing(written: str) -> None:
    """The core reads and writes memory at positions that it has from these arrays."""
    done = python(f"""
        E, tokens = 64, 100_000
        numoe.set_num_threads(1)
        layer = numoe.MoELayer(d_model=4, d_ff=4, num_experts=E, top_k=1, rng=0)
        limit = numoe.DispatchConfig(capacity=tokens, drop_priority="probability")
        fast, x = layer.pack(), np.ones((tokens, 4), np.float32)
        router, experts = layer.config.router, layer.config.experts
        indices, weights = np.zeros((tokens, 1), np.int32), np.ones((tokens, 1), np.float32)
        plan = numoe.dispatch(numoe.Routing(indices=indices, weights=weights), router)
        noise = np.random.default_rng(0).random((tokens, 1), np.float32)
        changes = dict(
            indices=(indices, [np.zeros_like(indices), np.full_like(indices, E - 1)]),
            weights=(weights, [noise, noise[::-1].copy()]),
            row_token=(plan.row_token, [plan.row_token.copy(), np.full_like(plan.row_token, 2**31 - 1)]),
        )
        array, values = changes[{written!r}]
        stop = threading.Event()
        def change():
            while not stop.is_set():
                for value in values:
                    array[...] = value
        changer = threading.Thread(target=change)
        changer.start()
        try:
            for _ in range(30):
                if {written!r} == "row_token":
                    try:
                        numoe.experts_forward(x, plan, layer.params, experts, weights=weights, combined=True)
                    except ValueError:
                        pass  # it saw what was wrong
                else:
                    fast.forward_routed(x, indices, weights)
                    numoe.dispatch(numoe.Routing(indices=indices, weights=weights), router, limit)
        finally:
            stop.set()
            changer.join()
    """)
    assert done.returncode == 0, done.stdout + done.stderr


# ── other processes


def forward_in_child(threads: int) -> bytes:
    numoe.set_num_threads(threads)
    layer, x = make(), tokens(1, 300)
    out = layer.forward(x)
    result = out.y.tobytes() + layer.backward(x, out).x.tobytes()
    assert len(os.listdir("/proc/self/task")) >= threads  # a pool of its own, not the memory of its parent's
    return result


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_child_processes_compute_the_same(method: str) -> None:
    """The parent's pool is up; a forked child inherits its locks but none of its threads."""
    done = python(f"""
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: fork with threads
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor
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


# ── Ctrl-C: an answer within 0.3 s is promised.  Processor time per thread is measured, because other programs may
# hold the processor; 0.1 s more is allowed for what the test itself does.

CTRL_C = """
    import signal, time
    D, F, E, threads, work, backward = {sizes}
    layer = numoe.MoELayer(d_model=D, d_ff=F, num_experts=E, top_k=1, rng=0)
    numoe.set_num_threads(threads)
    few = np.random.default_rng(0).standard_normal((1000, D), dtype=np.float32)
    run = (lambda x, out: layer.backward(x, out)) if backward else (lambda x, out: {call})
    def seconds(x):
        out = layer.forward(x)
        start = time.monotonic()
        run(x, out)
        return time.monotonic() - start
    seconds(few)
    x = np.resize(few, (int(1000 * work / seconds(few)), D))
    out = layer.forward(x) if backward else None
    before = {{name: value.tobytes() for name, value in layer.params.items()}}
    sent, latencies = [0.0], []
    def press():
        sent[0] = time.process_time()
        os.kill(os.getpid(), signal.SIGINT)
    for delay in (0.1, 0.4, 0.7):
        timer = threading.Timer(delay, press)
        timer.start()
        try:
            run(x, out)
            sys.exit("it ended before the signal")
        except KeyboardInterrupt:
            latencies.append((time.process_time() - sent[0]) / threads)
        timer.join()
    assert before == {{name: value.tobytes() for name, value in layer.params.items()}}
    twin = numoe.MoELayer(config=layer.config, rng=0)
    assert np.array_equal(twin(few), layer(few))
    print(max(latencies))
"""


@pytest.mark.parametrize(
    ("call", "experts", "threads", "work"),
    [
        pytest.param("layer.forward(x)", 1, 1, 1.6, id="forward, one expert"),
        pytest.param("layer(x)", 8, 2, 1.6, id="inference"),
        pytest.param("backward", 8, 1, 1.6, id="backward"),
        pytest.param("backward", 1, 2, 8.0, id="long backward, one expert"),
        pytest.param("backward", 2, 2, 8.0, id="long backward, an expert for each thread"),
    ],
)
def test_ctrl_c(call: str, experts: int, threads: int, work: float) -> None:
    """`work` is how many seconds the call would take."""
    sizes = (256, 768, experts, threads, work, call == "backward")
    code = CTRL_C.format(sizes=sizes, call=call if call != "backward" else "None")
    done = python(code, NUMOE_TARGET="portable")
    assert done.returncode == 0, done.stdout + done.stderr
    assert float(done.stdout) < 0.3 + 0.1


@pytest.mark.parametrize("priority", ["probability", "batch"])
def test_ctrl_c_while_weights_are_sorted(priority: str) -> None:
    done = python(f"""
        import signal, time
        rng = np.random.default_rng(0)
        weights = rng.random((6_000_000, 2), np.float32)
        indices = np.stack([rng.integers(0, 4, len(weights)), rng.integers(4, 8, len(weights))], 1).astype(np.int32)
        router = numoe.RouterConfig(num_experts=8, top_k=2)
        limit = numoe.DispatchConfig(capacity=1000, drop_priority="{priority}")
        sent = [0.0]
        def press():
            sent[0] = time.process_time()
            os.kill(os.getpid(), signal.SIGINT)
        numoe.set_num_threads(1)
        threading.Timer(0.2, press).start()
        try:
            numoe.dispatch(numoe.Routing(indices=indices, weights=weights), router, limit)
            sys.exit("it ended before the signal")
        except KeyboardInterrupt:
            print(time.process_time() - sent[0])
    """)
    assert done.returncode == 0, done.stdout + done.stderr
    assert float(done.stdout) < 0.3 + 0.1


def test_an_exception_of_another_signal_comes_through() -> None:
    done = python("""
        import signal
        class Alarm(Exception): pass
        def ring(*_): raise Alarm
        signal.signal(signal.SIGALRM, ring)
        layer = numoe.MoELayer(d_model=256, d_ff=768, num_experts=8, top_k=1, rng=0)
        x = np.ones((60_000, 256), np.float32)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        try:
            while True: layer(x)  # one call may be over before
        except Alarm: print("rang", layer(x[:2]).shape)
    """)
    assert done.stdout == "rang (2, 256)\n", done.stderr


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("width", [16, 600])
def test_a_handler_may_use_the_library(width: int, threads: int) -> None:
    """The handler's call runs in the middle of another one on the same thread: they may not share memory."""
    done = python(f"""
        import signal
        numoe.set_num_threads({threads})
        inner = numoe.MoELayer(d_model={width}, d_ff={width}, num_experts=4, top_k=2, rng=1)
        layer = numoe.MoELayer(d_model=256, d_ff=512, num_experts=8, top_k=1, rng=0)
        rng, seen = np.random.default_rng(0), []
        small, x = (rng.standard_normal(shape, dtype=np.float32) for shape in ((50, {width}), (5_000, 256)))
        def step(layer, x):
            out = layer.forward(x)
            return out.y.tobytes() + layer.backward(x, out).x.tobytes()
        expected = step(inner, small), step(layer, x)
        def ring(*_):
            seen.append(step(inner, small))
            signal.setitimer(signal.ITIMER_REAL, 0.03)
        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.03)
        results = [step(layer, x) for _ in range(2)]
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        assert len(seen) > 1 and set(seen) == {{expected[0]}}, "the inner calls differ"
        assert set(results) == {{expected[1]}}, "the outer calls differ"
    """)
    assert done.returncode == 0, done.stderr


# ── the environment


@pytest.mark.parametrize(("value", "threads"), [("1", 1), ("3", 3), ("64", 64), ("", None)])
def test_number_of_threads_from_the_environment(value: str, threads: int | None) -> None:
    done = python("print(numoe.num_threads(), numoe._core.available_cpus())", NUMOE_NUM_THREADS=value)
    found, cpus = map(int, done.stdout.split())
    assert found == (threads or cpus) and done.stderr == ""


@pytest.mark.parametrize("value", ["0", "-1", "abc", "2.5", " 2", "1e1", "99999999999999999999"])
def test_a_bad_number_of_threads_is_reported_once_and_ignored(value: str) -> None:
    done = python("print(numoe.num_threads() == numoe._core.available_cpus())", NUMOE_NUM_THREADS=value)
    assert done.stdout == "True\n"
    assert done.stderr.count("RuntimeWarning") == 1
    assert f"NUMOE_NUM_THREADS={value!r} is not a whole number >= 1; using" in done.stderr


def test_set_num_threads_overrules_the_environment() -> None:
    assert python("numoe.set_num_threads(2); print(numoe.num_threads())", NUMOE_NUM_THREADS="7").stdout == "2\n"


def test_targets_are_listed_and_one_of_them_is_used() -> None:
    targets = {t["name"]: t["supported"] for t in [*numoe._core.targets(), *numoe._core.emulated_targets()]}
    assert targets["portable"] and targets[numoe._core.target()]


@pytest.mark.parametrize("name", [t["name"] for t in numoe._core.targets() if t["supported"]])
def test_a_target_can_be_forced(name: str) -> None:
    done = python("print(numoe._core.target(), np.isfinite(make()(tokens(1))).all())", NUMOE_TARGET=name)
    assert done.stdout == f"{name} True\n", done.stderr


@pytest.mark.parametrize("name", ["avx99", "PORTABLE", " portable"])
def test_an_unknown_target_is_refused_at_import(name: str) -> None:
    done = python("", NUMOE_TARGET=name)
    assert done.returncode == 1
    usable = ", ".join(t["name"] for t in numoe._core.targets() if t["supported"])
    assert f"NUMOE_TARGET='{name}' is not a target" in done.stderr  # as it was given
    assert done.stderr.endswith(f"set it to one of: {usable}, or unset it\n")


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


def test_importing_and_calling_leave_the_floating_point_mode_alone() -> None:
    """Directed rounding is set before; subnormal numbers must stay numbers."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("FE_UPWARD has another number elsewhere")
    code = """
        import ctypes, ctypes.util, sys
        import numpy as np
        libm, upward = ctypes.CDLL(ctypes.util.find_library("m")), 0x800
        assert libm.fesetround(upward) == 0
        import numoe
        layer = numoe.MoELayer(d_model=8, d_ff=16, num_experts=4, top_k=2, rng=0)
        x = np.ones((5, 8), np.float32)
        layer.backward(x, layer.forward(x))
        layer.pack()(x)
        assert libm.fegetround() == upward
        tiny = np.array([1e-38], np.float32)
        assert tiny * np.float32(1e-3) > 0
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_starts_no_thread_and_changes_no_signal() -> None:
    code = """
        import os, signal, numpy
        before = len(os.listdir("/proc/self/task"))  # NumPy's BLAS may have started some
        import numoe
        assert len(os.listdir("/proc/self/task")) == before
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
