"""Layers learned block by block have a lower error than rounded ones, and are mlx layers."""

import mlx.core as mx
import numpy as np
import pytest

from splitquant_mlx import Recipe, convert, load, verify
from splitquant_mlx.inspection.estimate import estimate
from splitquant_mlx.models.source import resolve
from splitquant_mlx.recipe import Calibration

SIZES = {"bits": 2, "group_size": 32, "include": ("model.layers.0.*",), "dtype": "float16"}
LEARNED = {**SIZES, "sweeps": 20, "calibration": Calibration(num_samples=16, sequence_length=64)}
RECIPES = {
    "rtn": Recipe(method="rtn", **SIZES),
    "omniquant": Recipe(method="omniquant", **LEARNED),
    "efficientqat": Recipe(method="efficientqat", **LEARNED),
}


@pytest.fixture(scope="module")
def converted(stories, tmp_path_factory):
    """Return the directories of `stories`, its first block converted by each method."""
    home = tmp_path_factory.mktemp("learned")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPLITQUANT_CACHE", str(home / "cache"))
        for name, recipe in RECIPES.items():
            convert(stories, home / name, recipe=recipe)
    return {name: home / name for name in RECIPES}


def test_divergence_is_lower_than_with_rtn(converted, stories, story_text):
    """With a thousand tokens; comparing the two methods would need more."""
    original, tokenizer = load(stories)
    tokens = mx.array(np.array(tokenizer.encode(story_text[:8000])[:512]).reshape(4, 128))
    p = mx.softmax(original(tokens), axis=-1)
    kl = {
        name: (p * mx.log(p / mx.softmax(load(path)[0](tokens), axis=-1))).sum(-1).mean().item()
        for name, path in converted.items()
    }
    assert kl["omniquant"] < 0.85 * kl["rtn"] and kl["efficientqat"] < 0.95 * kl["rtn"]


@pytest.mark.parametrize("method", ["omniquant", "efficientqat"])
def test_result_is_a_plain_mlx_model(converted, stories, method):
    directory = converted[method]
    assert not (directory / "splitquant_model.py").exists()
    for check in verify(directory, source=resolve(str(stories))):
        assert not check.problems
    sizes = [(converted[name] / "model.safetensors").stat().st_size for name in ("rtn", method)]
    assert abs(sizes[0] - sizes[1]) < 1000


@pytest.mark.parametrize("method", ["lut", "salience", "omniquant", "efficientqat"])
def test_time_and_size_are_estimated(stories, method):
    result = estimate(stories, Recipe(method=method, bits=3, group_size=32))
    assert result.seconds > 2 and result.stored_bytes < result.source_bytes
