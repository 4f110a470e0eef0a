import subprocess
import sys
import threading
import time
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from splitquant_mlx.calibration import blocks
from splitquant_mlx.calibration.statistics import iterate_blocks
from splitquant_mlx.calibration.sums import hessian
from splitquant_mlx.models.loader import load_model
from splitquant_mlx.runtime import cores


@pytest.fixture
def three_cores(monkeypatch):
    monkeypatch.setattr(cores, "cores", lambda: 3)
    cores._queue.cache_clear()
    yield
    cores._queue.cache_clear()


def test_functions_run_in_parallel_and_return_in_order(three_cores):
    barrier = threading.Barrier(3, timeout=10)

    def function(number):
        barrier.wait()
        return (mx.array(number) + 1).item()

    results = cores.run_parallel([partial(function, number) for number in range(3)])
    assert results == [1, 2, 3]


def test_nested_calls_do_not_deadlock(three_cores):
    def inner():
        return sum(cores.run_parallel([lambda: 1, lambda: 2]))

    assert cores.run_parallel([inner] * 7) == [3] * 7


def test_an_error_is_raised_after_all_functions_ended(three_cores):
    begun, ended = threading.Event(), []

    def slow():
        begun.set()
        time.sleep(0.2)
        ended.append(True)

    def wrong():
        begun.wait(10)
        raise ValueError("no such batch")

    with pytest.raises(ValueError, match="no such batch"):
        cores.run_parallel([wrong, slow])
    assert ended


def test_statistics_do_not_depend_on_the_number_of_cores(stories, three_cores, monkeypatch):
    tokens = np.random.default_rng(0).integers(3, 500, (7, 16)).astype(np.int32)
    monkeypatch.setattr(blocks, "CPU_BATCH_TOKENS", 32)
    paths = "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"
    statistics = dict.fromkeys(paths, hessian)

    def means():
        run = iterate_blocks(lambda: load_model(stories, lazy=True), tokens, statistics)
        return {k: np.array(v) for block in run for k, v in block.means.items()}

    parallel = means()
    monkeypatch.setattr(cores, "cores", lambda: 1)
    sequential = means()
    assert sequential.keys() == set(paths)
    for path in paths:
        np.testing.assert_allclose(parallel[path], sequential[path], rtol=1e-5, atol=1e-6)


def test_threads_may_call_a_module_that_modifies_itself(three_cores):
    class Widening(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = mx.ones((64, 64), mx.float16) / 64

        def __call__(self, x):
            self.weight = self.weight.astype(mx.float32) * 1
            return x @ self.weight

    module = Widening()
    call = cores.serialized(module, module)
    x = mx.ones((1, 64))
    mx.eval(x)

    def several():
        y = x
        for _ in range(50):
            y = call(y)
        return y.sum().item()

    assert cores.run_parallel([several] * 3) == [64.0] * 3
    tasks = [partial(cores.serialized_eval(module, module), x)] * 9
    results = [y for batch in cores.run_rounds(tasks) for y in batch]
    assert [y.sum().item() for y in results] == [64.0] * 9


def test_a_process_with_threads_exits_cleanly():
    code = (
        "import mlx.core as mx\n"
        "from splitquant_mlx.runtime import cores\n"
        "cores.cores = lambda: 2\n"
        "cores.run_parallel([lambda: mx.eval(mx.ones((64, 64)) @ mx.ones((64, 64)))] * 4)\n"
    )
    for _ in range(8):  # ending threads aborted one process in four
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
