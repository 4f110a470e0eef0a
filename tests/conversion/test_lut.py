"""Checkpoints of lookup tables: converted, resumed, inspected, verified, run or rejected."""

import json

import mlx.core as mx
import pytest

from splitquant_mlx import LUTLinear, Recipe, RecipeError, convert, load, load_manifest, verify
from splitquant_mlx.conversion import converter, quantizers, resume
from splitquant_mlx.inspection.layers import layer_histogram
from splitquant_mlx.inspection.overview import describe
from splitquant_mlx.models.loader import load_model
from splitquant_mlx.models.sharding import divide
from splitquant_mlx.models.source import resolve
from splitquant_mlx.publish.files import check_converted
from splitquant_mlx.recipe import Calibration

RECIPE = Recipe(
    method="lut",
    bits=3,
    outliers="1%",
    sweeps=1,
    dtype="float16",
    include=("model.layers.0.*", "model.embed_tokens"),
    layers={"model.layers.0.self_attn.q_proj": {"bits": 4}},
    calibration=Calibration(num_samples=8, sequence_length=64),
)
PATH = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def tables(stories, tmp_path_factory):
    """Return `stories` converted to lookup tables."""
    directory = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPLITQUANT_CACHE", str(directory / "cache"))
        convert(stories, directory / "lut", recipe=RECIPE)
    return directory / "lut"


def test_manifest_matches_the_files(tables, stories):
    for check in verify(tables, source=resolve(str(stories))):
        assert not check.problems
    layers = {layer.path: layer for layer in load_manifest(tables).layers}
    out, width = layers[PATH].shape
    assert layers[PATH].nbytes == out * (width * 3 // 8 + 2 * 8 + (2 + 2) * 1)
    assert (layers[PATH].mode, layers[PATH].outliers) == ("lut", 1)
    assert layers["model.layers.0.self_attn.q_proj"].bits == 4
    odd = layers["model.layers.0.mlp.down_proj"]
    assert (odd.action, odd.note) == ("keep", "no group size fits its width 172")
    assert layers["model.embed_tokens"].mode == "affine"


def test_changed_record_is_detected(tables, tmp_path):
    manifest = json.loads((tables / "splitquant.json").read_text())
    next(x for x in manifest["layers"] if x["path"] == PATH)["outliers"] = 2
    for file in tables.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "splitquant.json").write_text(json.dumps(manifest))
    problems = {check.name: check.problems for check in verify(tmp_path)}
    assert PATH in problems["tensors"][0] and problems["config.json"]


def test_model_runs_and_is_described(tables):
    model, tokenizer = load(tables)
    assert isinstance(model.model.layers[0].mlp.up_proj, LUTLinear)
    logits = model(mx.array([tokenizer.encode("Once upon a time")]))
    assert mx.all(mx.isfinite(logits)).item()
    overview = describe(tables)
    assert overview.method == "lut" and "trust-remote-code" in overview.runs_in
    weights = model.layers[0].mlp.up_proj.dense().size
    assert layer_histogram(tables, PATH).counts.sum() == weights
    assert check_converted(tables).needs_code


def test_interrupted_conversion_is_resumed(tables, stories, tmp_path, monkeypatch):
    monkeypatch.setenv("SPLITQUANT_CACHE", str(tables.parent / "cache"))
    monkeypatch.setattr(resume, "SAVE_S", 0.0)
    convert_weight = converter.convert_weight

    def convert_or_stop(w, layer, inputs):
        if layer.path.startswith("model.layers.1"):
            raise KeyboardInterrupt
        return convert_weight(w, layer, inputs)

    monkeypatch.setattr(converter, "convert_weight", convert_or_stop)
    with pytest.raises(KeyboardInterrupt):
        convert(stories, tmp_path / "out", recipe=RECIPE)
    monkeypatch.setattr(converter, "convert_weight", convert_weight)
    monkeypatch.setattr(quantizers, "lut_quantize", lambda *args, **kwargs: pytest.fail("again"))
    convert(stories, tmp_path / "out", recipe=RECIPE)
    written = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert written == (tables / "model.safetensors").read_bytes()


def test_sharding_is_rejected_in_one_line(tables):
    class TwoRanks:
        def size(self):
            return 2

        def rank(self):
            return 0

    config = json.loads((tables / "config.json").read_text())
    model = load_model(tables, lazy=True)
    with pytest.raises(RecipeError, match="cannot be sharded: convert with another") as caught:
        divide(model, config, TwoRanks(), pipeline=False, path=tables)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "bits: expected 2, 3, 4 with method 'lut', got 5"),
        ({"outliers": "20%"}, "outliers: expected a share from 0% to 10%, such as 0.5%, got '20%'"),
        *(
            ({"outliers": share}, f"outliers: expected a share from 0% to 10%.*got '{share}'")
            for share in ("0.5", "100%", "10.1%", "-1%", "nan%", "1e0%", "%", "", "0.5%%", " 1%")
        ),
        ({"refine": True}, "refine: not for method 'lut'"),
        ({"method": "gptq", "outliers": "1%"}, "outliers: not for method 'gptq'"),
        ({"method": "gptq", "codebook": "powers"}, "codebook: not for method 'gptq'"),
    ],
)
def test_bad_settings_are_rejected(settings, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(**{"method": "lut", **settings})


def test_bits_without_codebooks_are_rejected(stories, tmp_path):
    recipe = Recipe(method="lut", layers={PATH: {"bits": 6}})
    with pytest.raises(RecipeError, match=r"up_proj.bits: expected 2, 3, 4 with method 'lut'"):
        convert(stories, tmp_path / "lut", recipe=recipe)
