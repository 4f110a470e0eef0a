"""Write the scales and biases of a tied embedding a second time, as those of an output head.

mlx-vlm 0.7 builds Gemma 3 with a separate head and copies only the embedding's `weight` to it,
which for a quantized embedding is the codes without scales and biases. Those are in a file that
mlx-vlm reads, since it is in the index, and mlx-lm, which reads model*.safetensors, does not.
"""

import json
from collections.abc import Collection
from pathlib import Path

import mlx.core as mx

HEAD_FILE = "head.safetensors"
INDEX = "model.safetensors.index.json"
COPIED = ("scales", "biases")


def is_copy(name: str, file: str, names: Collection[str]) -> bool:
    """Return whether a tensor is one of the copies, which are not parameters of the model.

    Args:
        name: name of the tensor.
        file: name of its file.
        names: all tensors of the checkpoint; a head that has a weight is a separate head.
    """
    path, _, leaf = name.rpartition(".")
    return file == HEAD_FILE and leaf in COPIED and f"{path}.weight" not in names


def write_head(directory: Path, embedding: str, head: str) -> int:
    """Write HEAD_FILE next to the finished shards of a checkpoint and add it to their index.

    Args:
        directory: the checkpoint.
        embedding: path of the quantized embedding.
        head: path of the head.

    Returns:
        Size of the copies, bytes.
    """
    file = directory / INDEX
    index = json.loads(file.read_text(encoding="utf-8"))
    names = {f"{embedding}.{leaf}": f"{head}.{leaf}" for leaf in COPIED}
    copies: dict[str, mx.array] = {}
    for name in names.keys() & index["weight_map"].keys():
        shard: dict[str, mx.array] = mx.load(str(directory / index["weight_map"][name]))  # type: ignore[assignment]
        copies[names[name]] = shard[name]
    mx.save_safetensors(str(directory / HEAD_FILE), copies, {"format": "mlx"})
    nbytes = sum(array.nbytes for array in copies.values())
    index["weight_map"] |= dict.fromkeys(sorted(copies), HEAD_FILE)
    index["metadata"]["total_size"] += nbytes
    file.write_text(json.dumps(index, indent=2), encoding="utf-8")
    return nbytes
