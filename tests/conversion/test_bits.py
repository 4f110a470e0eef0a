"""Bits chosen for every layer of a tiny trained checkpoint."""

import pytest
import tiny

from splitquant_mlx import Recipe, convert
from splitquant_mlx.conversion.bits import choose_bits
from splitquant_mlx.conversion.budget import OPTIONS, find_budget, measure_sizes
from splitquant_mlx.errors import RecipeError
from splitquant_mlx.models.checkpoint import open_checkpoint
from splitquant_mlx.models.lazy import LazyModel
from splitquant_mlx.progress import Silent
from splitquant_mlx.recipe import BITS, Calibration

CALIBRATION = Calibration(num_samples=4, sequence_length=32)


def auto(**target):
    return Recipe(method="auto", dtype="float16", calibration=CALIBRATION, **target)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPLITQUANT_CACHE", str(tmp_path))
    return tmp_path


def test_targets_are_met_and_sensitivities_are_cached(stories, cache, monkeypatch):
    small = choose_bits(LazyModel(stories), auto(target_bpw=4.5), Silent())
    assert small.bits_per_weight <= 4.5
    monkeypatch.setattr("splitquant_mlx.conversion.bits.predict_divergence", None)
    large = choose_bits(LazyModel(stories), auto(target_bpw=6.5), Silent())
    assert 4.5 < large.bits_per_weight <= 6.5
    kl = [sum(result.divergence.values()) for result in (small, large)]
    assert kl[1] < kl[0] / 2
    close = choose_bits(LazyModel(stories), auto(max_kl=kl[1]), Silent())
    assert sum(close.divergence.values()) <= kl[1]
    assert close.bits_per_weight == pytest.approx(large.bits_per_weight, rel=0.02)
    (cached,) = (cache / "sensitivity").iterdir()
    cached.write_text('{"damaged": []}')
    with pytest.raises(TypeError):
        choose_bits(LazyModel(stories), auto(target_bpw=4.5), Silent())


def test_settings_of_a_layer_are_respected(stories, cache):
    path = "model.layers.0.mlp.up_proj"
    recipe = auto(target_bpw=5.0, layers={path: {"bits": 8, "group_size": 32}})
    layers = choose_bits(LazyModel(stories), recipe, Silent()).recipe.layers
    assert layers[path]["bits"] == 8
    assert len({layer["bits"] for layer in layers.values()}) > 1


def test_groups_of_32_may_have_any_bits():
    assert {bits for bits, size in OPTIONS if size == 32} == set(BITS)


@pytest.mark.parametrize(
    ("architecture", "kilobytes", "shard_bytes"),
    [("llama", 90, 10**9), ("llama", 150, 40_000), ("qwen3_moe", 200, 10**9)],
)
def test_files_have_the_target_size(
    tmp_path, cache, monkeypatch, architecture, kilobytes, shard_bytes
):
    def predict(model, tokens, options, **settings):
        return {path: {o: o[1] / 4 ** o[0] for o in x} for path, x in options.items()}

    monkeypatch.setattr("splitquant_mlx.conversion.bits.predict_divergence", predict)
    source = tiny.write_checkpoint(tmp_path / "source", architecture)
    recipe = auto(target_size=f"{kilobytes}kB")
    forecasts = []
    settings = {"max_shard_bytes": shard_bytes, "on_forecast": forecasts.append}
    manifest = convert(source, tmp_path / "target", recipe=recipe, **settings)
    files = list((tmp_path / "target").glob("*.safetensors"))
    nbytes, target = sum(file.stat().st_size for file in files), 1000 * kilobytes
    assert manifest.recipe["target_size"] == f"{kilobytes}kB"
    assert 0.98 * target < forecasts[0].total_bytes <= target
    assert nbytes <= forecasts[0].total_bytes
    assert len(files) > 1 if shard_bytes < target else nbytes > 0.98 * target
    larger = forecasts[0].next_size
    assert forecasts[0].mixture == (architecture == "qwen3_moe")
    assert forecasts[0].total_bytes < larger.total_bytes
    assert larger.divergence < sum(forecasts[0].divergence.values())
    routers = [layer for layer in manifest.layers if layer.path.endswith(".gate")]
    assert {layer.bits for layer in routers} == ({8} if architecture == "qwen3_moe" else set())


def test_no_next_size_after_the_best(tmp_path, cache, monkeypatch):
    def predict(model, tokens, options, **settings):  # groups of 64 are best
        return {path: {o: abs(o[1] - 64) + 4.0 ** -o[0] for o in x} for path, x in options.items()}

    monkeypatch.setattr("splitquant_mlx.conversion.bits.predict_divergence", predict)
    source = tiny.write_checkpoint(tmp_path / "source", "llama")
    result = choose_bits(LazyModel(source, progress=Silent()), auto(target_size="1TB"), Silent())
    assert result.next_size is None


def test_budget_for_the_memory_of_a_machine(stories):
    checkpoint = open_checkpoint(stories)

    def budget(memory):
        recipe = auto(fits=memory)
        return find_budget(recipe, measure_sizes(recipe, checkpoint), checkpoint)

    small, large = budget("16GB"), budget("64 GiB")
    # 5 layers of 4 heads of 8 for keys, as many for values, 2 bytes each, 512 tokens
    context = 2 * 5 * 4 * 8 * 2 * 512
    assert small.total_bytes == pytest.approx(16e9 * 2 / 3 - 0.3e9 - context, abs=1)
    assert large.total_bytes == pytest.approx(64 * 2**30 * 3 / 4 - 0.3e9 - context, abs=1)
    assert "16.00 GB of memory less 5.63 GB for the system" in small.explanation
    assert "327.7 kB for a context of 512 tokens leave 10.37 GB for the model" in small.explanation


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"target_size": "150kB"}, r"target_size: 150kB is too small .* takes 19\d.\d kB, 13\d"),
        ({"fits": "450.6MB"}, r"fits: .* leave 7\d.\d kB for the model: .* takes 19\d.\d kB"),
    ],
)
def test_target_that_is_too_small(stories, target, message):
    with pytest.raises(RecipeError, match=message):
        choose_bits(LazyModel(stories), auto(**target), Silent())
