"""Store the scales and biases of a tied embedding once more, as those of a head.

mlx-vlm 0.7 builds Gemma 3 with a head of its own and takes the embedding's `weight` for it: of a
quantized embedding the codes alone. What it lacks is in a file that mlx-vlm reads, as the index
names it, and mlx-lm, which reads model*.safetensors, does not.
"""

import json
from collections.abc import Collection
from pathlib import Path

import mlx.core as mx

HEAD_FILE = "head.safetensors"
INDEX = "model.safetensors.index.json"
COPIED = ("scales", "biases")


def is_copy(name: str, file: str, names: Collection[str]) -> bool:
    """Tell whether a tensor of `file` is one of the copies, and no part of a model.

    Args:
        name: of the tensor.
        file: name of its file.
        names: of all tensors of the checkpoint; a head that has a weight is a head of its own.
    """
    path, _, leaf = name.rpartition(".")
    return file == HEAD_FILE and leaf in COPIED and f"{path}.weight" not in names


def write_head(directory: Path, embedding: str, head: str) -> int:
    """Write HEAD_FILE beside the finished shards of a checkpoint, and enter it in their index.

    Args:
        directory: of the checkpoint.
        embedding: path of the embedding, which is quantized.
        head: path that its copies have.

    Returns:
        The size of the copies, bytes.
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
