"""The shard writer, compared with the safetensors library and mlx."""

import json

import mlx.core as mx
import numpy as np
import pytest

from splitquant_mlx.formats import shard_writer
from splitquant_mlx.formats.safetensors import read_header
from splitquant_mlx.formats.shard_writer import SAFETENSORS_NAMES, ShardWriter
from splitquant_mlx.runtime.disk import sha256


def tensors():
    arrays = {
        f"t.{SAFETENSORS_NAMES[dtype]}": (mx.random.normal((3, 5)) * 9).astype(dtype)
        for dtype in SAFETENSORS_NAMES
    }
    arrays["scalar"] = mx.array(1.5)
    arrays["empty"] = mx.zeros((0, 4))
    arrays['quoted "ü"\n'] = mx.ones((2,))
    arrays["transposed"] = mx.arange(6).reshape(2, 3).T
    return arrays


def described(arrays):
    return {name: (tensor.dtype, tensor.shape) for name, tensor in arrays.items()}


@pytest.mark.parametrize("limit", [10**9, 64, 1])
def test_mlx_reads_back_what_was_written(tmp_path, limit):
    arrays = tensors()
    with ShardWriter(tmp_path, described(arrays), limit) as writer:
        for name, tensor in arrays.items():
            writer.add(name, tensor)
        weight_map = writer.close()
    assert weight_map.keys() == arrays.keys()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == weight_map
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in arrays.values())
    for name, tensor in arrays.items():
        loaded = mx.load(str(tmp_path / weight_map[name]))[name]
        assert loaded.dtype == tensor.dtype and mx.array_equal(loaded, tensor)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert files == sorted(set(weight_map.values()))
    assert not list(tmp_path.glob("*.partial"))
    if limit == 10**9:
        assert files == ["model.safetensors"]
    else:
        sizes = [sum(header.nbytes for header in read_header(tmp_path / f).values()) for f in files]
        assert len(files) > 1 and all(size <= max(limit, 120) for size in sizes)


def test_the_safetensors_library_reads_it_too(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    arrays = {"a": mx.arange(12).reshape(3, 4), "b": mx.array([0.5, -2.0], mx.float16)}
    with ShardWriter(tmp_path, described(arrays)) as writer:
        for name, tensor in arrays.items():
            writer.add(name, tensor)
        writer.close()
    loaded = safetensors.load_file(tmp_path / "model.safetensors")
    assert np.array_equal(loaded["a"], np.arange(12, dtype=np.int32).reshape(3, 4))
    assert np.array_equal(loaded["b"], np.array([0.5, -2.0], np.float16))


def test_a_name_must_be_declared_and_is_written_once(tmp_path):
    with ShardWriter(tmp_path, described({"a": mx.zeros(1)})) as writer:
        writer.add("a", mx.zeros(1))
        for name in ("a", "b"):
            with pytest.raises(ValueError, match=name):
                writer.add(name, mx.zeros(1))


@pytest.mark.parametrize("limit", [10**9, 64])
@pytest.mark.parametrize("change", [None, "dtype", "order", "missing"])
def test_the_recorded_hash_is_that_of_the_file(tmp_path, limit, change, monkeypatch):
    """Shards are hashed while they are written; again only if they are not as expected."""
    arrays = {"a": mx.zeros((4, 8)), "b": mx.ones((4, 8), mx.float16), "c": mx.arange(40)}
    expected = described(arrays)
    if change == "dtype":
        expected["b"] = mx.bfloat16, (4, 8)
    elif change == "order":
        expected = dict(reversed(expected.items()))
    elif change == "missing":
        expected = {"d": (mx.float32, (1,)), **expected}
    read_again = []

    def hashed(file):
        read_again.append(file)
        return sha256(file)

    monkeypatch.setattr(shard_writer, "sha256", hashed)
    with ShardWriter(tmp_path, expected, limit) as writer:
        writer.on_finished = lambda number, digest: None
        for name, tensor in arrays.items():
            writer.add(name, tensor)
        writer.close()
    assert writer.hashes == {file.name: sha256(file) for file in tmp_path.glob("*.safetensors")}
    assert bool(read_again) == bool(change)


def test_an_unfinished_shard_is_continued_with_its_hash(tmp_path):
    arrays = {name: mx.random.normal((5, 7)) for name in "abc"}
    expected = described(arrays)
    with ShardWriter(tmp_path, expected) as writer:
        writer.on_finished = lambda number, digest: None
        writer.add("a", arrays["a"])
        unfinished = writer.save_point()
        writer.add("b", -arrays["b"])  # not recorded, therefore written again
    with ShardWriter(tmp_path, expected) as writer:
        assert writer.resume([], unfinished) == 1 and writer.missing == {"b", "c"}
        writer.on_finished = lambda number, digest: None
        for name, tensor in arrays.items():
            writer.add(name, tensor)
        writer.close()
    (file,) = tmp_path.glob("*.safetensors")
    assert writer.hashes == {file.name: sha256(file)}
    assert all(mx.array_equal(mx.load(str(file))[name], arrays[name]) for name in arrays)
