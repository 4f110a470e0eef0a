"""On a GPU, conversions and models give the same results as on the CPU."""

import mlx.core as mx
import pytest

from splitquant_mlx import Recipe, convert
from splitquant_mlx.evaluation.divergence import divergence, log_probabilities
from splitquant_mlx.inspection.doctor import self_check
from splitquant_mlx.models.loader import load_model
from splitquant_mlx.recipe import Calibration

METHODS = (
    {"method": "imatrix"},
    {"method": "gptq"},
    {"method": "auto", "target_bpw": 5.5},
    {"method": "gptq", "refine": True},
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not mx.is_available(mx.gpu), reason="no GPU that mlx supports"),
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


def test_model_converted_on_the_gpu_matches_the_cpu(stories, tmp_path):
    convert(stories, tmp_path / "gpu")
    on_cpu(lambda: convert(stories, tmp_path / "cpu"))
    tokens = mx.array([list(range(1, 64))])
    actual = load_model(tmp_path / "gpu")(tokens)
    expected = on_cpu(lambda: load_model(tmp_path / "cpu")(tokens))
    mx.eval(actual, expected)
    assert (mx.abs(actual - expected).max() / mx.abs(expected).max()).item() < 0.02


@pytest.mark.parametrize("settings", METHODS, ids=str)
def test_every_method_has_the_divergence_of_the_cpu(stories, tmp_path, monkeypatch, settings):
    monkeypatch.setenv("SPLITQUANT_CACHE", str(tmp_path / "cache"))
    recipe = Recipe(**settings, group_size=32, calibration=Calibration(num_samples=32))
    convert(stories, tmp_path / "gpu", recipe=recipe)
    on_cpu(lambda: convert(stories, tmp_path / "cpu", recipe=recipe))

    def kl(name):
        tokens = list(range(1, 256))
        original, model = (load_model(path) for path in (stories, tmp_path / name))
        return divergence(
            [log_probabilities(original, tokens)], [log_probabilities(model, tokens)]
        ).kl_mean

    expected, actual = (on_cpu(lambda name=name: kl(name)) for name in ("cpu", "gpu"))
    assert actual < 1.3 * expected
    assert kl("gpu") == pytest.approx(actual, rel=0.05)
