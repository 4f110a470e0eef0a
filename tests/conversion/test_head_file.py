"""Gemma 3 conversions have a file with the head's copies of embedding scales, for mlx-vlm."""

import json
import shutil

import mlx.core as mx
import pytest
import tiny

from splitquant_mlx import Recipe, convert, load
from splitquant_mlx.conversion.verify import verify
from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.formats.head_file import HEAD_FILE, INDEX
from splitquant_mlx.inspection.estimate import estimate
from splitquant_mlx.models.checkpoint import open_checkpoint
from splitquant_mlx.models.source import resolve
from splitquant_mlx.publish.files import check_converted
from splitquant_mlx.recipe import Calibration

TOKENS = mx.array([list(range(2, 40))])
RTN = Recipe(method="rtn")


@pytest.fixture
def source(tmp_path):
    return tiny.write_checkpoint(tmp_path / "source", "gemma3_text")


def problems(out, source=None):
    checks = verify(out, source=source and resolve(str(source)))
    return [problem for check in checks for problem in check.problems]


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "rtn"},
        {"method": "rtn", "embedding_bits": 8},
        {"method": "rtn", "mode": "mxfp4"},
        {"method": "rtn", "refine": True, "calibration": Calibration(num_samples=2)},
        {"method": "auto", "target_bpw": 6.0, "calibration": Calibration(num_samples=2)},
        {"method": "splitquant", "embeddings": "quantize"},
        {"method": "lut", "calibration": Calibration(num_samples=2)},
    ],
)
def test_scales_and_biases_of_the_embedding_are_copied_for_the_head(source, tmp_path, settings):
    out = tmp_path / "out"
    manifest = convert(source, out, recipe=Recipe(**settings))
    assert manifest.warnings == ()
    shard, copies = (mx.load(str(out / name)) for name in ("model.safetensors", HEAD_FILE))
    index = json.loads((out / INDEX).read_text())
    leaves = [leaf for leaf in ("scales", "biases") if f"model.embed_tokens.{leaf}" in shard]
    assert copies.keys() == {f"lm_head.{leaf}" for leaf in leaves}
    for leaf in leaves:
        assert mx.array_equal(copies[f"lm_head.{leaf}"], shard[f"model.embed_tokens.{leaf}"])
        assert index["weight_map"][f"lm_head.{leaf}"] == HEAD_FILE
    table = json.loads((out / "config.json").read_text())["quantization"]
    assert table.get("lm_head") == table.get("model.embed_tokens")
    assert index["metadata"]["total_size"] == manifest.stored_bytes
    stored = sum(array.nbytes for array in (*shard.values(), *copies.values()))
    assert check_converted(out).manifest.stored_bytes == stored
    assert out / HEAD_FILE in check_converted(out).files
    assert problems(out, source) == []
    if settings["method"] == "rtn":
        assert estimate(source, Recipe(**settings)).stored_bytes == stored


def test_other_programs_do_not_need_the_file(source, tmp_path):
    """mlx-lm neither reads nor downloads it."""
    from mlx_lm.utils import load_model

    out = tmp_path / "out"
    convert(source, out, recipe=RTN)
    expected = load(out)[0](TOKENS)
    assert mx.array_equal(load_model(out)[0](TOKENS), expected)
    (out / HEAD_FILE).unlink()
    assert mx.array_equal(load(out)[0](TOKENS), expected)
    assert "is not a file" in problems(out)[0]


def test_changed_copy_is_detected(source, tmp_path):
    out = tmp_path / "out"
    convert(source, out, recipe=RTN)
    copies = mx.load(str(out / HEAD_FILE))
    copies["lm_head.scales"] += 1
    mx.save_safetensors(str(out / HEAD_FILE), copies)
    assert any("lm_head.scales differs from" in problem for problem in problems(out))


def test_file_is_ignored_in_an_original(source, tmp_path):
    out = tmp_path / "out"
    convert(source, out, recipe=RTN)
    again = open_checkpoint(out)
    assert not any("lm_head" in name for name in again.weights)
    convert(out, tmp_path / "again", recipe=Recipe(method="rtn", bits=8))
    assert problems(tmp_path / "again", out) == []


def test_untied_head_in_a_file_of_that_name_is_used(source, tmp_path):
    head = mx.random.normal((tiny.VOCAB, tiny.HIDDEN))
    mx.save_safetensors(str(source / HEAD_FILE), {"lm_head.weight": head})
    names = mx.load(str(source / "model.safetensors"))
    weight_map = dict.fromkeys(names, "model.safetensors")
    tiny.write_index(source, {**weight_map, "lm_head.weight": HEAD_FILE})
    assert mx.array_equal(open_checkpoint(source).weights["lm_head.weight"], head)
    (source / HEAD_FILE).unlink()
    with pytest.raises(CheckpointError, match=HEAD_FILE):
        open_checkpoint(source)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("gemma3_text", {"exclude": ("*embed_tokens",), "method": "rtn"}),
        ("gemma3_text", {"method": "splitquant"}),
        ("qwen3", {"method": "rtn"}),
    ],
)
def test_no_file_where_none_is_needed(tmp_path, architecture, settings):
    source = tiny.write_checkpoint(tmp_path / "source", architecture)
    manifest = convert(source, tmp_path / "out", recipe=Recipe(**settings))
    assert not (tmp_path / "out" / HEAD_FILE).exists() and manifest.warnings == ()


def test_snapshot_downloaded_by_mlx_lm_is_complete(source, tmp_path, monkeypatch):
    from huggingface_hub import constants

    from splitquant_mlx.models.source import cached

    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / ("a" * 40)
    convert(source, tmp_path / "out", recipe=RTN)
    shutil.copytree(tmp_path / "out", snapshot, ignore=shutil.ignore_patterns(HEAD_FILE))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert cached("org/name").path == snapshot
