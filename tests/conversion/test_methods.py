"""Calibrated methods lower the KL divergence of a real checkpoint on unseen text."""

import mlx.core as mx
import numpy as np
import pytest
import tiny

from splitquant_mlx import Recipe, convert, load
from splitquant_mlx.conversion.bits import choose_bits
from splitquant_mlx.evaluation.divergence import divergence, log_probabilities
from splitquant_mlx.models.lazy import LazyModel
from splitquant_mlx.progress import Silent
from splitquant_mlx.recipe import Calibration

CALIBRATION = Calibration(num_samples=16, sequence_length=96)
SIZES = {"bits": 3, "group_size": 32, "dtype": "float16"}
CALIBRATED = {**SIZES, "embedding_bits": 3, "calibration": CALIBRATION}
RECIPES = {
    "rtn": Recipe(method="rtn", **SIZES),
    "imatrix": Recipe(method="imatrix", **CALIBRATED),
    "gptq": Recipe(method="gptq", **CALIBRATED),
    "auto": Recipe(method="auto", target_bpw=4.0, dtype="float16", calibration=CALIBRATION),
    "splitquant": Recipe(**{**SIZES, "bits": 2}),
    "splitquant, calibrated": Recipe(**{**SIZES, "bits": 2}, calibration=CALIBRATION),
}


def measure_on(source, text, directory):
    """Return a function that converts and returns the KL divergence and the manifest."""
    original, tokenizer = load(source)
    tokens = np.array(tokenizer.encode(text[:20_000])[: 8 * 256]).reshape(8, 256).tolist()
    expected = [log_probabilities(original, row) for row in tokens]

    def measure(recipe):
        manifest = convert(source, directory / "model", recipe=recipe, overwrite=True)
        model = load(directory / "model")[0]
        actual = (log_probabilities(model, row) for row in tokens)
        return divergence(expected, actual).kl_mean, manifest

    return measure


@pytest.fixture(scope="module")
def measure(story_text, stories, tmp_path_factory):
    directory = tmp_path_factory.mktemp("methods")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPLITQUANT_CACHE", str(directory / "cache"))
        yield measure_on(stories, story_text, directory)


@pytest.fixture(scope="module")
def results(measure):
    return {name: measure(recipe) for name, recipe in RECIPES.items()}


def test_each_method_has_a_lower_divergence_than_the_previous(results):
    kl = {name: value for name, (value, _) in results.items()}
    assert kl["imatrix"] < 0.8 * kl["rtn"]
    assert kl["gptq"] < 0.95 * kl["imatrix"]
    assert kl["auto"] < kl["gptq"]


@pytest.mark.slow
def test_refinement_lowers_the_divergence_at_the_same_size(measure):
    recipes = (Recipe(method="gptq", refine=refine, **CALIBRATED) for refine in (False, True))
    (plain, before), (refined, after) = map(measure, recipes)
    assert refined < plain
    assert after.stored_bytes == before.stored_bytes


def test_sizes_are_equal(results):
    bits = {name: manifest.bits_per_weight for name, (_, manifest) in results.items()}
    assert bits["imatrix"] == bits["gptq"] == pytest.approx(bits["rtn"])
    assert bits["auto"] <= bits["rtn"]
    assert bits["splitquant, calibrated"] == bits["splitquant"]


def test_calibration_improves_split_layers(results):
    plain, fitted = (results[name][0] for name in ("splitquant", "splitquant, calibrated"))
    assert fitted < 0.9 * plain


@pytest.mark.slow
@pytest.mark.parametrize("bits", [3, 4])
def test_auto_divides_the_divergence_of_a_mixture_by_three(
    mixture, story_text, tmp_path, monkeypatch, bits
):
    monkeypatch.setenv("SPLITQUANT_CACHE", str(tmp_path / "cache"))
    measure = measure_on(mixture, story_text, tmp_path)
    plain, before = measure(Recipe(method="rtn", bits=bits, dtype="float16"))
    allocated, after = measure(Recipe(method="auto", target_bpw=bits + 0.5, dtype="float16"))
    assert allocated < 0.35 * plain
    assert after.stored_bytes <= before.stored_bytes


@pytest.mark.slow
def test_experts_are_calibrated(tmp_path, monkeypatch):
    monkeypatch.setenv("SPLITQUANT_CACHE", str(tmp_path / "cache"))
    source = tiny.write_checkpoint(tmp_path / "source", "qwen3_moe")
    tokens = mx.array(np.random.default_rng(0).integers(2, tiny.VOCAB, (16, 48)))
    p, kl = mx.softmax(load(source)[0](tokens), axis=-1), {}
    calibrated = {"group_size": 32, "embedding_bits": 4, "calibration": CALIBRATION}
    for method in ("rtn", "imatrix", "gptq"):
        recipe = Recipe(method=method, **(calibrated if method != "rtn" else {"group_size": 32}))
        manifest = convert(source, tmp_path / method, recipe=recipe)
        q = mx.softmax(load(tmp_path / method)[0](tokens), axis=-1)
        kl[method] = (p * mx.log(p / q)).sum(-1).mean().item()
    assert kl["gptq"] < 0.95 * kl["imatrix"] < 0.9 * kl["rtn"]
    plan = choose_bits(LazyModel(source), Recipe(method="auto", calibration=CALIBRATION), Silent())
    experts = [layer.path for layer in manifest.layers if layer.kind == "experts"]
    assert len(experts) == 3 * tiny.LAYERS and set(experts) <= plan.recipe.layers.keys()


def test_the_number_of_texts_is_recorded(stories, tmp_path, monkeypatch):
    monkeypatch.setenv("SPLITQUANT_CACHE", str(tmp_path / "cache"))
    recipe = Recipe(method="imatrix", group_size=32, calibration=Calibration(sequence_length=4))
    manifest = convert(stories, tmp_path / "out", recipe=recipe)
    assert manifest.recipe["calibration"]["num_samples"] == 128
    (sampled,) = (tmp_path / "cache/calibration").iterdir()
    assert sampled.stat().st_size == 4 * 128 * 4
