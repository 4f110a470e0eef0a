"""What only an Apple GPU can show: it computes what the CPU computes."""

import mlx.core as mx
import pytest

from splitquant_mlx import convert
from splitquant_mlx.doctor import self_check
from splitquant_mlx.loader import load_model

pytestmark = [
    pytest.mark.metal,
    pytest.mark.skipif(not mx.metal.is_available(), reason="this machine has no Apple GPU"),
]


@pytest.fixture(autouse=True)
def on_gpu():
    mx.set_default_device(mx.Device(mx.gpu))
    yield
    mx.set_default_device(mx.Device(mx.cpu))


def on_cpu(compute):
    mx.set_default_device(mx.Device(mx.cpu))
    try:
        return compute()
    finally:
        mx.set_default_device(mx.Device(mx.gpu))


def test_self_check_passes_on_every_device():
    checks = self_check()
    assert any(check.name.startswith("gpu") for check in checks)
    assert [check for check in checks if not check.passed] == []


def test_a_model_converted_on_the_gpu_computes_as_on_the_cpu(stories, tmp_path):
    convert(stories, tmp_path / "gpu")
    on_cpu(lambda: convert(stories, tmp_path / "cpu"))
    tokens = mx.array([list(range(1, 64))])
    found = load_model(tmp_path / "gpu")(tokens)
    wanted = on_cpu(lambda: load_model(tmp_path / "cpu")(tokens))
    mx.eval(found, wanted)
    assert (mx.abs(found - wanted).max() / mx.abs(wanted).max()).item() < 0.02
