"""Damage a checkpoint in every way, and look at what lies in a directory."""

import json
import os
from pathlib import Path

import mlx.core as mx
import pytest
import tiny

UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"
EMBED = "model.embed_tokens.weight"
BIAS = "model.layers.1.self_attn.q_proj.bias"


def tree(root: Path) -> dict[str, object]:
    """Return what lies under `root`: every path with its content's size and time."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        found[str(path)] = None if path.is_dir() else (status.st_size, status.st_mtime_ns)
    return found


def edit_config(**changes):
    def edit(directory):
        file = directory / "config.json"
        config = {**json.loads(file.read_text()), **changes}
        config = {key: value for key, value in config.items() if value is not ...}
        file.write_text(json.dumps(config))

    return edit


def write(name, content):
    def edit(directory):
        file = directory / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())

    return edit


def edit_header(change):
    """Change the header of model.safetensors; `change` gets and may return it."""

    def edit(directory):
        file = directory / "model.safetensors"
        header, data = tiny.read_raw(file)
        tiny.write_raw(file, change(header) or header, data)

    return edit


def edit_entry(**changes):
    return edit_header(lambda header: header[UP].update(changes))


def refile(**options):
    """Write the weights anew, as `tiny.write_weights` does with these options."""

    def edit(directory):
        tensors = dict(mx.load(str(directory / "model.safetensors")))
        (directory / "model.safetensors").unlink()
        tiny.write_weights(directory, tensors, **options)

    return edit


def both(*edits):
    def edit(directory):
        for one in edits:
            one(directory)

    return edit


def remove(name):
    return lambda directory: (directory / name).unlink()


def replace(name, kind):
    def edit(directory):
        (directory / name).unlink(missing_ok=True)
        if kind == "fifo":
            os.mkfifo(directory / name)
        elif kind == "directory":
            (directory / name).mkdir()
        else:
            (directory / name).symlink_to(kind)

    return edit


def index(weight_map):
    return lambda directory: tiny.write_index(directory, weight_map)


def table(cases):
    """Parametrize (edit, wanted) over a dict of cases, one id each."""
    params = [pytest.param(*case, id=name) for name, case in cases.items()]
    return pytest.mark.parametrize(("edit", "wanted"), params)


def model_at(path):
    path.mkdir()
    (path / "config.json").write_text("{}")


def put_tensors(directory, changes):
    file = directory / "model.safetensors"
    tensors = {**mx.load(str(file)), **changes}
    kept = {name: array for name, array in tensors.items() if array is not None}
    mx.eval(kept)
    mx.save_safetensors(str(file), kept)


def tensor(name, array):
    return lambda directory: put_tensors(directory, {name: array})
