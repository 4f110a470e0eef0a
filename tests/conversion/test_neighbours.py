"""A conversion says where another program does not run it."""

import json

import mlx.core as mx
import pytest
import tiny

from splitquant_mlx import Recipe, convert
from splitquant_mlx.conversion.save import neighbour_notes


@pytest.mark.parametrize(
    ("architecture", "changes", "said"),
    [
        ("gemma3_text", {}, ""),
        ("gemma3_text", {"tie_word_embeddings": False}, "takes the embedding for the head"),
        ("llama", {}, ""),
    ],
)
def test_a_head_that_mlx_vlm_takes_from_the_embedding(tmp_path, architecture, changes, said):
    source = tiny.write_checkpoint(tmp_path / "source", architecture, **changes)
    manifest = convert(source, tmp_path / "out", recipe=Recipe(method="rtn"))
    assert len(manifest.warnings) == bool(said)
    assert said in "".join(manifest.warnings)


@pytest.mark.parametrize(("kind", "said"), [("lfm2_moe", "softmax"), ("internlm3", "twice as far")])
def test_a_model_that_mlx_vlm_computes_otherwise(kind, said):
    (note,) = neighbour_notes({"model_type": kind}, [])
    assert note.startswith(f"mlx-vlm's {kind}") and said in note and note.endswith("use mlx-lm")


def test_numbers_that_are_not_finite_are_written_so_that_every_program_reads_them(tmp_path):
    limits = [0.0, float("inf"), float("-inf")]
    source = tiny.write_checkpoint(tmp_path / "source", time_step_limit=limits)
    convert(source, tmp_path / "out", recipe=Recipe(method="rtn"))
    written = json.loads((tmp_path / "out" / "config.json").read_text())["time_step_limit"]
    largest = mx.finfo(mx.float32).max
    assert written == [0.0, largest, -largest]
