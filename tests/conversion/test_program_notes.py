"""Warnings about programs that do not run a conversion correctly."""

import json

import mlx.core as mx
import pytest
import tiny

from splitquant_mlx import Recipe, convert
from splitquant_mlx.conversion.save import program_notes


@pytest.mark.parametrize(
    ("architecture", "changes", "expected"),
    [
        ("gemma3_text", {}, ""),
        ("gemma3_text", {"tie_word_embeddings": False}, "uses the embedding as head"),
        ("llama", {}, ""),
    ],
)
def test_head_that_mlx_vlm_ignores(tmp_path, architecture, changes, expected):
    source = tiny.write_checkpoint(tmp_path / "source", architecture, **changes)
    manifest = convert(source, tmp_path / "out", recipe=Recipe(method="rtn"))
    assert len(manifest.warnings) == bool(expected)
    assert expected in "".join(manifest.warnings)


@pytest.mark.parametrize(
    ("kind", "expected"), [("lfm2_moe", "softmax"), ("internlm3", "doubles the angles")]
)
def test_models_that_mlx_vlm_computes_differently(kind, expected):
    (note,) = program_notes({"model_type": kind}, [])
    assert note.startswith(f"mlx-vlm's {kind}") and expected in note and note.endswith("use mlx-lm")


def test_infinite_numbers_are_written_as_valid_json(tmp_path):
    limits = [0.0, float("inf"), float("-inf")]
    source = tiny.write_checkpoint(tmp_path / "source", time_step_limit=limits)
    convert(source, tmp_path / "out", recipe=Recipe(method="rtn"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())["time_step_limit"]
    largest = mx.finfo(mx.float32).max
    assert written == [0.0, largest, -largest]
