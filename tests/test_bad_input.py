"""Convert what cannot be converted: one line that says why, exit code 2, nothing left behind."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import tiny

from splitquant_mlx import CheckpointError, Recipe, SplitQuantError, TargetError, convert, load
from splitquant_mlx.cli import console, run

UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"
EMBED = "model.embed_tokens.weight"
BIAS = "model.layers.1.self_attn.q_proj.bias"


def known(where, *values):
    """Mark a case that fails for a bug elsewhere; strict, so that a fix asks to remove the mark."""
    mark = pytest.mark.xfail(strict=True, reason=f"known bug in {where}")
    return pytest.param(*values, marks=mark) if values else mark


def tree(root: Path) -> dict[str, object]:
    """Return what lies under `root`: every path with its content's size and time."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        found[str(path)] = None if path.is_dir() else (status.st_size, status.st_mtime_ns)
    return found


@pytest.fixture
def refusal(tmp_path, capsys, monkeypatch):
    """Return a function that runs `convert`, which must fail cleanly, and returns its message."""
    started = []

    class Recorder:
        @contextmanager
        def task(self, label, total=None):
            started.append(label)
            yield lambda amount: None

    monkeypatch.setattr(console, "Bars", Recorder)
    handler = signal.getsignal(signal.SIGTERM)

    def refuse(source=None, *options, target=None, late=False, forget=()):
        source = tmp_path / "source" if source is None else source
        target = tmp_path / "deep" / "target" if target is None else target
        before = tree(tmp_path)
        began = time.monotonic()
        code = run(["convert", "--model", str(source), "--mlx-path", str(target), *options])
        seconds = time.monotonic() - began
        out, err = capsys.readouterr()
        after = tree(tmp_path)
        for path in forget:
            before.pop(str(path), None), after.pop(str(path), None)
        assert code == 2
        assert out == ""
        assert err.startswith("splitquant-mlx: error: ")
        assert err.count("\n") == 1 and err.endswith("\n") and err.rstrip("\n").isprintable()
        assert "Traceback" not in err and "unexpected" not in err
        assert after == before
        assert bool(started) == late, "found before the work" if late else "found too late"
        assert seconds < 10
        return err.removeprefix("splitquant-mlx: error: ").strip()

    yield refuse
    signal.signal(signal.SIGTERM, handler)


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


PATHS = {
    "absent": (lambda path: None, "no such path"),
    "empty directory": (lambda path: path.mkdir(), "it has no config.json"),
    "file": (lambda path: path.write_text("x"), "is a file: give the model's directory"),
    "broken symlink": (lambda path: path.symlink_to("nowhere"), "no such path"),
    "fifo": (os.mkfifo, "is a file"),
}


@table(PATHS)
def test_path_that_is_no_model(refusal, tmp_path, edit, wanted):
    edit(tmp_path / "source")
    assert wanted in refusal()


FILES = {
    "no weights": (remove("model.safetensors"), "it has no .safetensors file"),
    "pickles": (
        both(remove("model.safetensors"), write("pytorch_model.bin", "pickle")),
        "only pickled weights (pytorch_model.bin)",
    ),
    "fifo for weights": (replace("model.safetensors", "fifo"), "model.safetensors is not a file"),
    "directory for weights": (
        replace("model.safetensors", "directory"),
        "model.safetensors is not a file",
    ),
    "broken symlink for weights": (
        replace("model.safetensors", "nowhere"),
        "model.safetensors is not a file",
    ),
    "no config": (remove("config.json"), "it has no config.json"),
    "fifo for config": (replace("config.json", "fifo"), "config.json is not a file"),
    "directory for config": (replace("config.json", "directory"), "config.json is not a file"),
    "fifo for index": (
        replace("model.safetensors.index.json", "fifo"),
        "model.safetensors.index.json is not a file",
    ),
    "config in a loop of symlinks": (replace("config.json", "config.json"), "config.json"),
}

CONFIGS = {
    "empty": (write("config.json", ""), "config.json is not valid JSON"),
    "not JSON": (write("config.json", "{'model_type'"), "config.json is not valid JSON"),
    "not UTF-8": (write("config.json", b'{"a": "\xff"}'), "config.json is not valid JSON"),
    "deep JSON": (write("config.json", "[" * 200_000), "config.json is not valid JSON"),
    "deeper value": (
        write("config.json", '{"model_type":' * 5_000 + "1" + "}" * 5_000),
        "config.json",
    ),
    "endless number": (
        write("config.json", '{"model_type": "llama", "a": ' + "9" * 5_000 + "}"),
        "config.json is not valid JSON",
    ),
    "list": (write("config.json", "[]"), "wanted a table with a model_type"),
    "no model_type": (edit_config(model_type=...), "wanted a table with a model_type"),
    "model_type a number": (edit_config(model_type=1), "wanted a table with a model_type"),
    **{
        f"model_type {name!r}": (edit_config(model_type=name), "unknown architecture")
        for name in ("", "nosuch", "../x", "os", "llama.foo", "base", "cache", ".", "/tmp/evil")
    },
    "architectures of lists": (edit_config(architectures=[["x"]]), "architectures"),
    "architectures a number": (edit_config(architectures=3), "architectures"),
    "no hidden_size": (edit_config(hidden_size=...), "'hidden_size'"),
    "hidden_size a string": (edit_config(hidden_size="64"), "hidden_size is '64'"),
    "hidden_size negative": (edit_config(hidden_size=-64), "hidden_size is -64"),
    "hidden_size true": (edit_config(hidden_size=True), "hidden_size is True"),
    "hidden_size a fraction": (edit_config(hidden_size=64.5), "hidden_size is 64.5"),
    "intermediate_size 0": (edit_config(intermediate_size=0), "intermediate_size 0"),
    "no heads": (edit_config(num_attention_heads=0), "num_attention_heads 0"),
    "negative heads": (
        edit_config(num_attention_heads=-4, num_key_value_heads=-2, head_dim=-16),
        "-4",
    ),
    "rms_norm_eps a string": (edit_config(rms_norm_eps="1e-5"), "rms_norm_eps is '1e-5'"),
    "rope_theta a string": (edit_config(rope_theta="x"), "rope_theta is 'x'"),
    "10**9 layers": (edit_config(num_hidden_layers=10**9), "num_hidden_layers 1000000000"),
    "10**9 layers, deeper": (
        edit_config(model_type="gemma3", text_config={"num_hidden_layers": 10**9}),
        "num_hidden_layers 1000000000",
    ),
    "10**9 layers of gpt2": (
        edit_config(
            model_type="gpt2",
            n_layer=10**9,
            n_ctx=8,
            n_embd=64,
            n_head=4,
            n_positions=8,
            layer_norm_epsilon=1e-5,
        ),
        "n_layer 1000000000",
    ),
    "10**9 experts": (
        edit_config(
            model_type="dbrx",
            d_model=64,
            ffn_config={"moe_num_experts": 10**9},
            attn_config={},
            n_layers=2,
            n_heads=4,
        ),
        "moe_num_experts 1000000000",
    ),
    "-1 layers": (edit_config(num_hidden_layers=-1), "num_hidden_layers is -1"),
    "too many layers": (edit_config(num_hidden_layers=3), "tensors are missing: model.layers.2."),
    "too few layers": (
        edit_config(num_hidden_layers=1),
        "tensors have no place in this model: model.layers.1.",
    ),
    "vocab_size 10**15": (edit_config(vocab_size=10**15), "vocab_size 1000000000000000"),
    "vocab_size 2**31 - 1": (edit_config(vocab_size=2**31 - 1), "'model.embed_tokens.weight'"),
    "rope_scaling of a wrong type": (edit_config(rope_scaling=[1]), "config.json does not"),
    "quantized by mlx": (edit_config(quantization={"bits": 4}), "is quantized already"),
    "quantized by gptq": (
        edit_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "is quantized already",
    ),
    "quantized inside": (
        edit_config(text_config={"quantization_config": {"quant_method": "fp8"}}),
        "is quantized already",
    ),
    "quantized by us": (edit_config(splitquant={"layers": {}}), "is quantized already"),
}

HEADERS = {
    "no bytes": (write("model.safetensors", b""), "0 bytes are no safetensors file"),
    "5 bytes": (write("model.safetensors", b"12345"), "5 bytes are no safetensors file"),
    "length alone": (write("model.safetensors", b"\x10" + bytes(7)), "header of 16 bytes"),
    "huge length": (write("model.safetensors", b"\xff" * 8 + b"{}"), "header of 18446744073"),
    "a web page": (write("model.safetensors", "<!DOCTYPE html>" * 99), "not a safetensors file"),
    "a git-lfs pointer": (
        write("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        "not a safetensors file",
    ),
    "half the header": (
        lambda d: os.truncate(d / "model.safetensors", 99),
        "not a safetensors file or truncated",
    ),
    "half the data": (
        lambda d: os.truncate(d / "model.safetensors", 99_999),
        "truncated or corrupt: tensors need",
    ),
    "last byte gone": (
        lambda d: os.truncate(
            d / "model.safetensors", (d / "model.safetensors").stat().st_size - 1
        ),
        "truncated or corrupt: tensors need",
    ),
    "a byte too much": (
        lambda d: os.truncate(
            d / "model.safetensors", (d / "model.safetensors").stat().st_size + 1
        ),
        "truncated or corrupt: tensors need",
    ),
    "not JSON": (edit_header(lambda header: b"{not json}"), "corrupt safetensors header"),
    "not UTF-8": (edit_header(lambda header: b'{"\xff": 1}'), "corrupt safetensors header"),
    "deep JSON": (edit_header(lambda header: b"[" * 200_000), "corrupt safetensors header"),
    "list": (edit_header(lambda header: b"[]"), "corrupt safetensors header (no table)"),
    "nothing": (edit_header(lambda header: b"{}"), "tensors need 0 bytes of data"),
    "entry a list": (edit_header(lambda header: header.update({UP: []})), UP),
    "entry null": (edit_header(lambda header: header.update({UP: None})), UP),
    "metadata a number": (edit_header(lambda header: header.update(__metadata__=1)), "metadata"),
    "metadata of numbers": (
        edit_header(lambda header: header.update(__metadata__={"a": 1})),
        "metadata",
    ),
    "shape a string": (edit_entry(shape="12"), UP),
    "shape null": (edit_entry(shape=None), UP),
    "shape negative": (edit_entry(shape=[-128, -64]), UP),
    "shape of floats": (edit_entry(shape=[128.0, 64]), UP),
    "shape of booleans": (edit_entry(shape=[True, 8192]), UP),
    "shape of strings": (edit_entry(shape=["128", "64"]), UP),
    "shape enormous": (edit_entry(shape=[10**4000, 10**4000]), UP),
    "shape of many ones": (edit_entry(shape=[128, 64] + [1] * 100_000), UP),
    "shape of many sizes": (edit_entry(shape=[10**18] * 200_000), UP),
    "offsets negative": (edit_entry(data_offsets=[-32768, 0]), UP),
    "offsets a string": (edit_entry(data_offsets="ab"), UP),
    "offsets of floats": (edit_entry(data_offsets=[0.0, 32768.0]), UP),
    "offsets, one only": (edit_entry(data_offsets=[0]), UP),
    "offsets reversed": (edit_entry(data_offsets=[32768, 0]), UP),
    "offsets overlapping": (edit_entry(data_offsets=[0, 32768]), "starts at byte"),
    "offsets beyond the file": (edit_entry(data_offsets=[10**12, 10**12 + 32768]), "starts at"),
    "dtype unknown": (edit_entry(dtype="F31"), "unknown dtype F31"),
    "dtype null": (edit_entry(dtype=None), UP),
    "dtype a list": (edit_entry(dtype=["F32"]), UP),
    "dtype F8": (
        edit_header(lambda h: h[UP].update(dtype="F8_E4M3", shape=[128, 256])),
        "dtype F8_E4M3, wanted one of F16, BF16, F32",
    ),
    "dtype F8_E8M0": (edit_entry(dtype="F8_E8M0", shape=[128, 256]), "dtype F8_E8M0"),
    "dtype F64": (edit_entry(dtype="F64", shape=[64, 64]), "dtype F64, wanted one of"),
    "dtype I32": (edit_entry(dtype="I32"), "dtype int32, wanted one of F16, BF16, F32"),
    "dtype I32 of a norm": (
        edit_header(lambda header: header[NORM].update(dtype="I32")),
        "dtype int32, wanted one of F16, BF16, F32",
    ),
    "dtype U8": (edit_entry(dtype="U8", shape=[128, 256]), UP),
}


def tensor(name, array):
    return lambda directory: _put(directory, {name: array})


def _put(directory, changes):
    file = directory / "model.safetensors"
    tensors = {**mx.load(str(file)), **changes}
    kept = {name: array for name, array in tensors.items() if array is not None}
    mx.eval(kept)
    mx.save_safetensors(str(file), kept)


TENSORS = {
    "wider": (tensor(UP, mx.zeros((128, 96))), f"{UP!r} has shape [128, 96], config.json wants"),
    "transposed": (tensor(UP, mx.zeros((64, 128))), "has shape [64, 128], config.json wants [128,"),
    "flat": (tensor(UP, mx.zeros((128 * 64,))), "has shape [8192], config.json wants"),
    "of no dimension": (tensor(NORM, mx.array(1.0)), f"{NORM!r} has shape []"),
    "missing": (tensor(UP, None), f"tensors are missing: {UP}"),
    "extra": (tensor("extra.weight", mx.zeros((2, 2))), "have no place in this model: extra.w"),
    "extra of the format": (tensor("model.layers.0.mlp.up_proj.scales", mx.zeros(2)), "no place"),
    "extra bias": (tensor("model.layers.0.mlp.up_proj.bias", mx.zeros(128)), "have no place"),
}

SHARDS = {
    "one of numbered shards missing": (
        both(refile(shards=3), remove("model-00002-of-00003.safetensors")),
        "shard model-00002-of-00003.safetensors is missing",
    ),
    "all but one of 99999 shards missing": (
        lambda d: (d / "model.safetensors").rename(d / "model-00001-of-99999.safetensors"),
        "shard model-00002-of-99999.safetensors is missing",
    ),
    "a tensor in two shards": (
        both(
            refile(shards=2, index=True),
            lambda d: mx.save_safetensors(
                str(d / "model-00002-of-00002.safetensors"),
                dict(mx.load(str(d / "model-00001-of-00002.safetensors"))),
            ),
        ),
        "is in both model-00001-of-00002.safetensors and model-00002-of-00002.safetensors",
    ),
    "index names a missing shard": (
        both(refile(shards=2, index=True), remove("model-00002-of-00002.safetensors")),
        "shard model-00002-of-00002.safetensors is missing",
    ),
    "index empty": (write("model.safetensors.index.json", ""), "is not a valid index"),
    "index not JSON": (write("model.safetensors.index.json", "{"), "is not a valid index"),
    "index a list": (write("model.safetensors.index.json", "[]"), "is not a valid index"),
    "index deep": (write("model.safetensors.index.json", "[" * 200_000), "is not a valid index"),
    "index of no map": (write("model.safetensors.index.json", "{}"), "is not a valid index"),
    "map a list": (index([]), "is not a valid index"),
    "map of lists": (index({UP: []}), "is not a valid index"),
    "map of numbers": (index({UP: 1}), "1 is not a .safetensors file"),
    "map empty": (index({}), "names no file"),
    "map names the parent": (
        index({UP: "../source/model.safetensors"}),
        "is not a .safetensors file of",
    ),
    "map names an absolute path": (index({UP: "/etc/passwd"}), "is not a .safetensors file of"),
    "map names '..'": (index({UP: ".."}), "'..' is not a .safetensors file"),
    "map names nothing": (index({UP: ""}), "'' is not a .safetensors file of this directory"),
    "map names config.json": (
        index({UP: "config.json"}),
        "'config.json' is not a .safetensors file",
    ),
    "map names a NUL": (index({UP: "a\0.safetensors"}), "shard a .safetensors is missing"),
    "map and shards lack a tensor": (
        both(tensor(UP, None), index(dict.fromkeys((UP, NORM), "model.safetensors"))),
        f"tensors are missing: {UP}",
    ),
    "map and shards have one too many": (
        both(
            tensor("extra", mx.zeros(3)),
            index(dict.fromkeys((UP, NORM, "extra"), "model.safetensors")),
        ),
        "have no place in this model: extra",
    ),
}


@table(
    {
        f"{name}: {case}": value
        for name, cases in {
            "files": FILES,
            "config": CONFIGS,
            "header": HEADERS,
            "tensor": TENSORS,
            "shards": SHARDS,
        }.items()
        for case, value in cases.items()
    }
)
def test_checkpoint_that_cannot_be_used(refusal, tmp_path, edit, wanted):
    source = tiny.write_checkpoint(tmp_path / "source", tokenizer=False)
    edit(source)
    assert wanted in refusal()


# --- found only when the weights are read -----------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [UP, NORM, EMBED, BIAS])
@pytest.mark.parametrize("method", ["splitquant", "rtn"])
def test_weight_that_is_not_finite_is_named(refusal, tmp_path, name, value, method):
    source = tiny.write_checkpoint(tmp_path / "source", "qwen2")
    w = mx.load(str(source / "model.safetensors"))[name]
    flat = w.flatten()
    flat[w.size - 1] = value
    tensor(name, flat.reshape(w.shape))(source)
    message = refusal(None, "--method", method, late=True)
    assert f"tensor {name!r} holds NaN or infinite values as float32" in message


def test_weight_too_large_for_float16_is_named(refusal, tmp_path):
    source = tiny.write_checkpoint(tmp_path / "source", dtype=mx.bfloat16)
    tensor(UP, mx.full((128, 64), 1e5, mx.bfloat16))(source)
    message = refusal(None, "--dtype", "float16", late=True)
    assert f"tensor {UP!r} holds NaN or infinite values as float16" in message
    assert "--dtype bfloat16 or float32" in message


def blocks(value):
    """Return a weight of random signs times `value`."""
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (128, 64))
    return mx.array(signs * value)


VALID = {
    "zero": mx.zeros((128, 64)),
    "minus zero": mx.full((128, 64), -0.0),
    "constant": mx.full((128, 64), 0.25),
    "constant below zero": mx.full((128, 64), -0.25),
    "one entry": mx.zeros((128, 64)).at[5, 7].add(3.0),
    "two values": blocks(0.1),
    "1e-30": blocks(1e-30),
    "subnormal": blocks(1e-41),
    "1e-7 beside 1": mx.concatenate([blocks(1e-7)[:64], mx.ones((64, 64))]),
    "1e18": mx.random.normal((128, 64), key=mx.random.key(0)) * 1e18,
    "1e30": mx.random.normal((128, 64), key=mx.random.key(0)) * 1e30,
    "two values of 1e30": blocks(1e30),
    "1e30 beside 1": mx.concatenate([blocks(1e30)[:64], mx.ones((64, 64))]),
    "3e38": blocks(3e38),
}


HUGE = ("1e18", "1e30", "two values of 1e30", "1e30 beside 1", "3e38")  # their squares overflow


def unusual():
    """Return parameters for every valid weight in every dtype that can hold it."""
    params = []
    for case, dtype, settings in product(
        VALID,
        (mx.float16, mx.bfloat16, mx.float32),
        ({}, {"granularity": "tensor"}, {"method": "rtn"}),
    ):
        held = mx.all(mx.isfinite(VALID[case].astype(dtype))).item()
        overflows = case == "3e38" and settings.get("method") == "rtn"  # in mlx's own formula
        if held and not overflows:
            marks = known("pipeline._snr_db") if case in HUGE else ()
            name = "-".join([case, str(dtype).rpartition(".")[2], *settings.values()])
            params.append(pytest.param(case, dtype, settings, id=name, marks=marks))
    return params


@pytest.mark.parametrize(("case", "dtype", "settings"), unusual())
def test_unusual_weights_are_valid(tmp_path, case, dtype, settings):
    w = VALID[case].astype(dtype)
    source = tiny.write_checkpoint(tmp_path / "source", dtype=dtype, replace={UP: w})
    convert(source, tmp_path / "target", recipe=Recipe(**settings))
    for name, array in mx.load(str(tmp_path / "target" / "model.safetensors")).items():
        if mx.issubdtype(array.dtype, mx.floating):
            assert mx.all(mx.isfinite(array)).item(), name
    model, _ = load(tmp_path / "target")
    layer = model.layers[0].mlp.up_proj
    parts = getattr(layer, "clusters", 1)
    w_hat = mx.dequantize(layer.weight, layer.scales, layer.biases, group_size=64, bits=4).reshape(
        128, parts, 64
    )
    assert mx.all(mx.isfinite(w_hat)).item()
    error = mx.abs(w_hat.sum(axis=1) - w.astype(mx.float32)).max().item()
    assert error <= 0.15 * mx.abs(w.astype(mx.float32)).max().item() + 1e-6


@known("pipeline._snr_db")
def test_weight_too_large_for_mlx_to_quantize_is_named(refusal, tmp_path):
    tiny.write_checkpoint(tmp_path / "source", replace={UP: VALID["3e38"]})
    assert repr(UP) in refusal(None, "--method", "rtn", late=True)


def test_model_of_zeros_runs(tmp_path):
    config = tiny.make_config()
    zeros = {name: mx.zeros(shape) for name, shape in tiny.make_shapes(config).items()}
    source = tiny.write_checkpoint(tmp_path / "source", replace=zeros)
    convert(source, tmp_path / "target")
    model, _ = load(tmp_path / "target")
    assert mx.array_equal(model(mx.array([[1, 2]])), mx.zeros((1, 2, tiny.VOCAB))).item()


# --- a file that changes meanwhile ------------------------------------------------------------


def vanish(file):
    file.unlink()


def shrink(file):
    os.truncate(file, file.stat().st_size // 2)


def empty(file):
    os.truncate(file, 0)


@pytest.mark.parametrize("change", [vanish, shrink, empty])
def test_source_that_changes_after_the_headers_were_read(refusal, tmp_path, monkeypatch, change):
    from splitquant_mlx import checkpoint

    source = tiny.write_checkpoint(tmp_path / "source")
    file = source / "model.safetensors"
    build = checkpoint.build_model

    def build_and_change(*args):
        change(file)
        return build(*args)

    monkeypatch.setattr(checkpoint, "build_model", build_and_change)
    assert "model.safetensors cannot be read" in refusal(forget=[file])


def test_source_that_shrinks_after_it_was_opened(refusal, tmp_path, monkeypatch):
    from splitquant_mlx import pipeline

    source = tiny.write_checkpoint(tmp_path / "source")
    file = source / "model.safetensors"
    plan = pipeline.make_plan

    def plan_and_change(*args):
        shrink(file)
        return plan(*args)

    monkeypatch.setattr(pipeline, "make_plan", plan_and_change)
    assert "cannot be read" in refusal(late=True, forget=[file])


# --- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--bits", "7"], "bits: wanted one of 2, 3, 4, 5, 6, 8, got 7"),
        (["--bits", "four"], "Invalid value for '--bits' / '--q-bits'"),
        (["--group-size", "48"], "group_size: wanted one of 32, 64, 128, got 48"),
        (["--group-size", "128"], "group size 128 divides the width of no layer"),
        (["--clusters", "1"], "clusters: wanted a whole number from 2 to 8, got 1"),
        (["--clusters", "9"], "clusters: wanted a whole number from 2 to 8, got 9"),
        (["--q-mode", "mxfp4"], "mode 'mxfp4' is for method 'rtn'"),
        (["--q-mode", "mxfp4", "--method", "rtn", "--bits", "8"], "leave both out"),
        (["--q-mode", "nosuch"], "mode: wanted one of affine, mxfp4"),
        (["--method", "gptq"], "method: wanted one of splitquant, rtn"),
        (["--method", "rtn", "--lm-head", "split"], "lm_head 'split' is for method 'splitquant'"),
        (["--dtype", "int8"], "dtype: wanted one of float16, bfloat16, float32"),
        (["--include", "nothing.*"], "include and exclude leave no layer to convert"),
        (["--exclude", "*"], "include and exclude leave no layer to convert"),
        (["--revision", "main"], "is a local path: a revision (main) is for hub repos only"),
        (["--device", "tpu"], "--device: wanted cpu or gpu, got 'tpu'"),
        (["--nosuch"], "No such option: --nosuch"),
        (["--recipe", "/nosuch.toml"], "recipe /nosuch.toml: No such file or directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_settings_that_do_not_fit(refusal, tmp_path, options, wanted):
    source = tiny.write_checkpoint(
        tmp_path / "source", replace={"model.layers.0.mlp.down_proj.weight": mx.zeros((64, 128))}
    )
    if options[-1] == "128":  # the one layer that is 128 wide goes
        options = [*options, "--exclude", "*.down_proj"]
    assert wanted in refusal(source, *options)


RECIPES = {
    b"bites = 4": "unknown recipe key 'bites'",
    b"bits = ": "is not valid TOML",
    b"bits = '4'": "bits: wanted one of",
    b"bits = true": "bits: wanted one of",
    b"bits = 4.0": "bits: wanted one of",
    b"clusters = true": "clusters: wanted a whole number",
    b"clusters = [3]": "clusters: wanted a whole number",
    b"method = 1": "method: wanted one of",
    b"mode = []": "mode: wanted one of",
    b"[method]\na = 1": "method: wanted one of",
    b"include = 'mlp'": "include: wanted a list of glob patterns",
    b"include = [1]": "include: wanted a list of glob patterns",
    b"exclude = 3": "exclude: wanted a list of glob patterns",
    b"\x7fELF\x00\xff\xfe": "is not valid TOML",
}


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        known("recipe.load_recipe", b"bits = " + b"1" * 5_000, "is not valid TOML"),
        known("recipe.load_recipe", b"bits = " + b"[" * 100_000, "is not valid TOML"),
        *RECIPES.items(),
    ],
    ids=lambda value: repr(value[:20]) if isinstance(value, bytes) else None,
)
def test_recipe_file_that_is_wrong(refusal, tmp_path, content, wanted):
    tiny.write_checkpoint(tmp_path / "source")
    recipe = tmp_path / "recipe.toml"
    recipe.write_bytes(content)
    message = refusal(None, "--recipe", str(recipe))
    assert wanted in message and str(recipe) in message


# --- the target -------------------------------------------------------------------------------


def model_at(path):
    path.mkdir()
    (path / "config.json").write_text("{}")


TARGETS = {
    "a file": (lambda path: path.write_text("x"), [], "exists already"),
    "a file, overwrite": (lambda p: p.write_text("x"), ["--overwrite"], "is not a directory"),
    "an empty directory": (lambda path: path.mkdir(), [], "exists already"),
    "a model": (model_at, [], "exists already: choose another --mlx-path, or pass --overwrite"),
    "a broken symlink": (lambda path: path.symlink_to("nowhere"), [], "exists already"),
    "a symlink, overwrite": (
        lambda path: (model_at(path.with_name("model")), path.symlink_to("model")),
        ["--overwrite"],
        "is not a directory",
    ),
    "no model, overwrite": (
        lambda path: (path.mkdir(), (path / "diary.txt").write_text("dear")),
        ["--overwrite"],
        "is not a model directory",
    ),
}


@pytest.mark.parametrize(
    ("make", "options", "wanted"),
    [pytest.param(*case, id=name) for name, case in TARGETS.items()],
)
def test_target_that_exists(refusal, tmp_path, make, options, wanted):
    tiny.write_checkpoint(tmp_path / "source")
    make(tmp_path / "target")
    assert wanted in refusal(None, *options, target=tmp_path / "target")


@pytest.mark.parametrize(
    ("target", "wanted"),
    {
        "file/target": "is not a directory",
        "file/deep/er/target": "is not a directory",
        "link/target": "is not a directory",
        "link/deep/target": "is not a directory",
        "/proc/target": "cannot write /proc/target",
        "/proc/deep/target": "cannot write /proc/deep/target",
        "/dev/null/target": "/dev/null is not a directory",
        "n" * 256: "File name too long",
        "n" * 256 + "/target": "File name too long",
    }.items(),
)
def test_target_that_cannot_be_made(refusal, tmp_path, target, wanted):
    tiny.write_checkpoint(tmp_path / "source")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    assert wanted in refusal(target=tmp_path / target)


@pytest.mark.parametrize(
    "target", [known("pipeline.convert", "source"), known("pipeline.convert", "."), "link"]
)
def test_target_never_replaces_the_source(refusal, tmp_path, target):
    source = tiny.write_checkpoint(tmp_path / "models" / "source")
    (source.parent / "config.json").write_text("{}")  # makes it look like a model's directory
    (source.parent / "link").symlink_to("source")
    message = refusal(source, "--overwrite", target=source.parent / target)
    assert "is never overwritten" in message


@known("pipeline.convert")
def test_target_in_the_home_of_nobody(refusal, tmp_path):
    tiny.write_checkpoint(tmp_path / "source")
    assert "no such user's home" in refusal(target="~nosuchuser/x")


def test_target_may_lie_in_the_source(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "source")
    convert(source, source / "mlx_model")
    assert sorted(path.name for path in source.iterdir()) == [
        "config.json", "mlx_model", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_target_that_appears_meanwhile_is_kept(tmp_path, monkeypatch):
    from splitquant_mlx import pipeline

    source, target = tiny.write_checkpoint(tmp_path / "source"), tmp_path / "target"
    write_config = pipeline.write_config

    def write_config_and_target(*args):
        write_config(*args)
        model_at(target)

    monkeypatch.setattr(pipeline, "write_config", write_config_and_target)
    with pytest.raises(TargetError, match="exists already"):
        convert(source, target)
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


# --- the disk ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("overwrite", [False, True])
def test_write_that_fails(refusal, tmp_path, monkeypatch, number, overwrite):
    from splitquant_mlx.shards import ShardWriter

    add, count = ShardWriter.add, []

    def add_or_fail(self, name, array):
        add(self, name, array)
        count.append(name)
        if len(count) == 12:
            raise OSError(number, os.strerror(number))

    tiny.write_checkpoint(tmp_path / "source")
    model_at(tmp_path / "target")
    monkeypatch.setattr(ShardWriter, "add", add_or_fail)
    options = ["--overwrite"] if overwrite else []
    target = tmp_path / ("target" if overwrite else "other")
    message = refusal(None, *options, target=target, late=True)
    said = os.strerror(number) if number == errno.EIO else "disk full while writing"
    assert said in message and str(target) in message


def test_too_little_space_is_found_before_the_work(refusal, tmp_path, monkeypatch):
    from splitquant_mlx import save

    class Usage:
        free = 1000

    tiny.write_checkpoint(tmp_path / "source")
    monkeypatch.setattr(save.shutil, "disk_usage", lambda path: Usage)
    assert "is too full: the converted model needs" in refusal()


def test_parents_that_cannot_all_be_made_are_removed(refusal, tmp_path, monkeypatch):
    mkdir = Path.mkdir

    def mkdir_or_fail(self, *args, **kwargs):
        if self.name == "er":
            mkdir(self.parent)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        mkdir(self, *args, **kwargs)

    tiny.write_checkpoint(tmp_path / "source")
    monkeypatch.setattr(Path, "mkdir", mkdir_or_fail)
    assert "disk full" in refusal(target=tmp_path / "deep" / "er" / "target", late=True)


@pytest.mark.parametrize("step", ["first", "second"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, OSError])
def test_replacing_that_is_interrupted_leaves_the_old_model(tmp_path, monkeypatch, step, kind):
    source, target = tiny.write_checkpoint(tmp_path / "source"), tmp_path / "target"
    model_at(target)
    rename = Path.rename
    failing = ".partial-" if step == "second" else "target"

    def rename_or_fail(self, other):
        if self.parent == tmp_path and failing in self.name and "-old" not in self.name:
            raise kind("no")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", rename_or_fail)
    with pytest.raises(KeyboardInterrupt if kind is KeyboardInterrupt else TargetError):
        convert(source, target, overwrite=True)
    assert [path.name for path in target.iterdir()] == ["config.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


# --- code and tokenizers ----------------------------------------------------------------------


@pytest.mark.parametrize("key", ["model_file", "auto_map"])
def test_code_in_the_checkpoint_is_never_run(refusal, tmp_path, key):
    source = tiny.write_checkpoint(tmp_path / "source")
    marker = tmp_path / "marker"
    (source / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_config(**{key: "evil.py" if key == "model_file" else names})(source)
    if key == "model_file":
        assert "asks to run 'evil.py' from the checkpoint" in refusal()
    else:
        convert(source, tmp_path / "target")
        load(tmp_path / "target")
        assert not (tmp_path / "target" / "evil.py").exists()
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../../x", "os", "antigravity", "llama.foo", "x/../../evil"])
def test_model_type_imports_nothing_else(refusal, tmp_path, name):
    source = tiny.write_checkpoint(tmp_path / "source")
    edit_config(model_type=name)(source)
    before = {module for module in sys.modules if not module.startswith("mlx_lm")}
    assert "unknown architecture" in refusal()
    assert "antigravity" not in set(sys.modules) - before


def test_without_a_tokenizer_the_weights_are_converted(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "source", tokenizer=False)
    convert(source, tmp_path / "target")
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        load(tmp_path / "target")


def test_broken_tokenizer_is_copied_as_it_is(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "source")
    (source / "tokenizer.json").write_text("{")
    convert(source, tmp_path / "target")
    assert (tmp_path / "target" / "tokenizer.json").read_text() == "{"
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        load(tmp_path / "target")


@known("pipeline.convert: copies the tokenizer last")
def test_unreadable_tokenizer_is_found_before_the_work(refusal, tmp_path, monkeypatch):
    read_bytes = Path.read_bytes

    def read_or_fail(self):
        if self == tmp_path / "source" / "tokenizer.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read_bytes(self)

    tiny.write_checkpoint(tmp_path / "source")
    monkeypatch.setattr(Path, "read_bytes", read_or_fail)
    assert "tokenizer.json cannot be read: Input/output error" in refusal()


def test_config_that_says_it_is_not_quantized(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "source", quantization_config=None)
    convert(source, tmp_path / "target")
    assert load(tmp_path / "target")


def test_checkpoint_of_symlinks_is_converted_to_files(tmp_path):
    """The hub's cache is one of symlinks."""
    blobs = tiny.write_checkpoint(tmp_path / "blobs", shards=2)
    source = tmp_path / "source"
    source.mkdir()
    for number, file in enumerate(sorted(blobs.iterdir())):
        file.rename(blobs / str(number))
        (source / file.name).symlink_to(f"../blobs/{number}")
    (source / "broken.json").symlink_to("nowhere")
    convert(source, tmp_path / "target")
    assert not any(path.is_symlink() for path in (tmp_path / "target").iterdir())
    assert (tmp_path / "target" / "tokenizer.json").is_file()
    assert not (tmp_path / "target" / "broken.json").exists()


def test_names_cannot_drive_the_terminal(refusal, tmp_path):
    evil = "\x1b[2J\n\x07evil\u202e"
    source = tiny.write_checkpoint(tmp_path / f"so{evil}urce")
    assert "exists already" in refusal(source, target=source)
    assert "no such path" in refusal(tmp_path / evil)
    edit_config(model_type=evil)(source)
    assert "unknown architecture" in refusal(source)
    edit_config(model_type="llama")(source)
    tensor(evil, mx.zeros(3))(source)
    assert "have no place in this model" in refusal(source)
    assert "No such option" in refusal(source, f"--{evil}")


# --- signals ----------------------------------------------------------------------------------

SLOW = """
import sys, time
from splitquant_mlx.cli import run
from splitquant_mlx import pipeline
read = pipeline._Worker._read
def slow_read(self, name):
    w = read(self, name)
    if "layers.1" in name:
        print("ready", flush=True)
        time.sleep(30)
    return w
pipeline._Worker._read = slow_read
sys.exit(run(sys.argv[1:]))
"""

LIMITED = """
import resource, signal, sys
from splitquant_mlx.cli import run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
sys.exit(run(sys.argv[1:]))
"""


def start(script, tmp_path):
    command = ["convert", "--model", str(tmp_path / "source"), "--mlx-path"]
    return subprocess.Popen(
        [sys.executable, "-c", script, *command, str(tmp_path / "deep" / "target")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[1],
    )


@known("cli.run")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt_leaves_nothing(tmp_path, number):
    tiny.write_checkpoint(tmp_path / "source")
    before = tree(tmp_path)
    with start(SLOW, tmp_path) as process:
        assert process.stdout.readline() == "ready\n"
        assert tree(tmp_path) != before
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 2
    assert err == "splitquant-mlx: error: interrupted: nothing was left half-written\n"
    assert tree(tmp_path) == before


def test_file_size_limit(tmp_path):
    tiny.write_checkpoint(tmp_path / "source")
    before = tree(tmp_path)
    with start(LIMITED, tmp_path) as process:
        out, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert err.startswith("splitquant-mlx: error: cannot write ") and "File too large" in err
    assert err.count("\n") == 1 and out == ""
    assert tree(tmp_path) == before


@known("cli.run")
def test_debug_shows_where(tmp_path, capsys):
    assert run(["convert", "--model", str(tmp_path / "nosuch")], debug=True) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("splitquant-mlx: error: no such")


def test_every_refusal_is_a_splitquant_error(tmp_path):
    with pytest.raises(SplitQuantError, match="no such path"):
        convert(tmp_path / "nosuch", tmp_path / "target")
