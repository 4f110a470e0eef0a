"""Manifests round-trip, and an invalid value is refused with its key in the message."""

import json

import pytest

from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.formats.manifest import LayerRecord, Manifest, load_manifest

LAYER = LayerRecord(
    path="model.layers.0.mlp.up_proj",
    kind="linear",
    action="split",
    shape=(64, 32),
    nbytes=3456,
    bits_per_weight=13.5,
    bits=4,
    group_size=64,
    mode="affine",
    clusters=3,
    cut_points=(-0.5, 0.25),
)
MANIFEST = Manifest(
    source="org/model",
    revision=None,
    recipe={"method": "splitquant"},
    versions={"mlx": "0.32.2"},
    device="cpu",
    layers=(LAYER,),
    linear_bits_per_weight=13.5,
    bits_per_weight=14.0,
    source_bytes=4096,
    stored_bytes=3456,
    seconds={"total": 1.5},
)
LAYERS = {
    "path of escapes": {"path": "\x1b]0;owned\x07"},
    "path of markup": {"path": "[/red]"},
    "path of nothing": {"path": ""},
    "path a number": {"path": 1},
    "action of markup": {"action": "[blink]split"},
    "mode a list": {"mode": ["affine"]},
    "shape of texts": {"shape": ["a"]},
    "shape negative": {"shape": [-1, 2]},
    "nbytes a table": {"nbytes": {}},
    "nbytes of 400 digits": {"nbytes": 10**400},
    "bits_per_weight null": {"bits_per_weight": None},
    "bits_per_weight NaN": {"bits_per_weight": float("nan")},
    "snr_db text": {"snr_db": "28"},
    "cut points of lists": {"cut_points": [[]]},
}


@pytest.fixture
def content(tmp_path):
    """Return the JSON content of a manifest in `tmp_path`."""
    MANIFEST.save(tmp_path)
    return json.loads((tmp_path / "splitquant.json").read_text())


def refusal(directory, content):
    (directory / "splitquant.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="is not a splitquant-mlx manifest") as caught:
        load_manifest(directory)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500
    return str(caught.value)


def test_a_manifest_round_trips(tmp_path, content):
    assert load_manifest(tmp_path) == MANIFEST
    assert load_manifest(tmp_path / "none") is None


@pytest.mark.parametrize("changes", LAYERS.values(), ids=LAYERS)
def test_an_invalid_layer_is_refused(tmp_path, content, changes):
    content["layers"][0].update(changes)
    assert f"layers.0.{next(iter(changes))}" in refusal(tmp_path, content)


@pytest.mark.parametrize("name", ["bits_per_weight", "stored_bytes", "linear_bits_per_weight"])
@pytest.mark.parametrize("value", [None, "1", {}, float("inf"), 10**400], ids=lambda v: str(v)[:5])
def test_an_invalid_total_is_refused(tmp_path, content, name, value):
    assert f" {name}: expected " in refusal(tmp_path, {**content, name: value})


def test_missing_and_unknown_keys_are_refused(tmp_path, content):
    assert "moods: unknown key" in refusal(tmp_path, {**content, "moods": 1})
    del content["layers"]
    assert "layers: expected a value, got none" in refusal(tmp_path, content)
