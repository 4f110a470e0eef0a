"""The index decides which files belong to a checkpoint; a stale one is ignored."""

import shutil

import mlx.core as mx
import pytest
import tiny

from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.models.checkpoint import open_checkpoint
from splitquant_mlx.models.loader import load_model
from splitquant_mlx.models.shards import shard_names

TOKENS = mx.array([[3, 1, 4]])


def numbered(count, *numbers):
    return [f"model-{n:05d}-of-{count:05d}.safetensors" for n in numbers]


def index(directory, files):
    names = sorted(tiny.make_shapes(tiny.make_config()))
    tiny.write_index(directory, {name: files[n % len(files)] for n, name in enumerate(names)})


@pytest.mark.parametrize("shards", [1, 2])
def test_an_index_of_another_sharding_is_ignored(tmp_path, shards):
    source = tiny.write_checkpoint(tmp_path / "source", shards=shards, index=False)
    expected = load_model(source)(TOKENS)
    index(source, numbered(3, 1, 2, 3))
    assert mx.array_equal(load_model(source)(TOKENS), expected)


def test_a_stale_index_with_missing_tensors_is_refused(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "source", replace={"model.norm.weight": None})
    index(source, numbered(2, 1, 2))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(source)
    message = str(caught.value)
    assert "do not have its tensors (model.norm.weight)" in message
    assert "model-0000" in message and "which is missing" in message


def test_the_index_decides_if_its_files_exist(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "source", shards=2)
    expected = load_model(source)(TOKENS)
    stray = {name: w * 0 for name, w in tiny.make_tensors(tiny.make_config()).items()}
    mx.save_safetensors(str(source / "model.safetensors"), stray)
    assert mx.array_equal(load_model(source)(TOKENS), expected)
    (source / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="is in both"):
        open_checkpoint(source)


def test_a_missing_shard_of_the_index_is_named(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "source", shards=3)
    (source / numbered(3, 2)[0]).unlink()
    with pytest.raises(CheckpointError, match="shard model-00002-of-00003"):
        open_checkpoint(source)


@pytest.mark.parametrize(
    ("there", "indexed", "expected"),
    [
        (["model.safetensors"], [], ["model.safetensors"]),
        (["model.safetensors", "adapter_model.safetensors"], [], ["model.safetensors"]),
        (["consolidated.safetensors"], [], []),
        (numbered(2, 1), [], numbered(2, 1, 2)),
        (numbered(3, 1, 3), numbered(3, 1, 2, 3), numbered(3, 1, 2, 3)),
        ([*numbered(2, 1, 2), *numbered(3, 1)], numbered(3, 1, 2, 3), numbered(2, 1, 2)),
        (["a.safetensors"], ["a.safetensors", "b.safetensors"], ["a.safetensors", "b.safetensors"]),
        ([], ["a.safetensors"], ["a.safetensors"]),
    ],
)
def test_files_of_a_checkpoint(there, indexed, expected):
    assert shard_names(there, indexed) == set(expected)


def test_links_to_weights_are_followed(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "source")
    elsewhere = shutil.move(source / "model.safetensors", tmp_path / "blob")
    (source / "model.safetensors").symlink_to(elsewhere)
    assert open_checkpoint(source).weights
