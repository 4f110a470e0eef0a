"""Bits chosen for every layer of a real tiny checkpoint."""

import pytest

from splitquant_mlx import Recipe
from splitquant_mlx.conversion.bits import OPTIONS, choose_bits
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


def test_targets_are_kept_and_what_was_measured_is_kept_for_the_next(stories, cache, monkeypatch):
    small = choose_bits(LazyModel(stories), auto(target_bpw=4.5), Silent())
    assert small.bits_per_weight <= 4.5
    monkeypatch.setattr("splitquant_mlx.conversion.bits.predict_divergence", None)
    large = choose_bits(LazyModel(stories), auto(target_bpw=6.5), Silent())
    assert 4.5 < large.bits_per_weight <= 6.5
    lost = [sum(found.divergence.values()) for found in (small, large)]
    assert lost[1] < lost[0] / 2
    close = choose_bits(LazyModel(stories), auto(max_kl=lost[1]), Silent())
    assert sum(close.divergence.values()) <= lost[1]
    assert close.bits_per_weight == pytest.approx(large.bits_per_weight, rel=0.02)
    (kept,) = (cache / "sensitivity").iterdir()
    kept.write_text('{"damaged": []}')
    with pytest.raises(TypeError):
        choose_bits(LazyModel(stories), auto(target_bpw=4.5), Silent())


def test_what_the_recipe_says_of_a_layer_stands(stories, cache):
    path = "model.layers.0.mlp.up_proj"
    recipe = auto(target_bpw=5.0, layers={path: {"bits": 8, "group_size": 32}})
    found = choose_bits(LazyModel(stories), recipe, Silent()).recipe.layers
    assert found[path]["bits"] == 8
    assert len({layer["bits"] for layer in found.values()}) > 1


def test_a_width_that_64_does_not_divide_may_have_any_bits():
    assert {bits for bits, size in OPTIONS if size == 32} == set(BITS)
