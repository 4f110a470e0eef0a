"""An unusable checkpoint is refused by its headers, before any work."""

import os

import mlx.core as mx
import tiny
from damage import (
    NORM,
    UP,
    both,
    edit_config,
    edit_entry,
    edit_header,
    index,
    refile,
    remove,
    replace,
    table,
    tensor,
    write,
)

PATHS = {
    "absent": (lambda path: None, "no such path"),
    "empty directory": (lambda path: path.mkdir(), "is not a model directory"),
    "file": (lambda path: path.write_text("x"), "is a file: pass the model's directory"),
    "broken symlink": (lambda path: path.symlink_to("nowhere"), "no such path"),
    "fifo": (os.mkfifo, "is a file"),
}


@table(PATHS)
def test_a_path_that_is_not_a_model(refusal, tmp_path, edit, wanted):
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
    "list": (write("config.json", "[]"), "expected a table with a model_type"),
    "no model_type": (edit_config(model_type=...), "expected a table with a model_type"),
    "model_type a number": (edit_config(model_type=1), "expected a table with a model_type"),
    **{
        f"model_type {name!r}": (edit_config(model_type=name), "unknown architecture")
        for name in ("", "nosuch", "../x", "os", "llama.foo", "base", "cache", ".", "/tmp/evil")
    },
    "architectures of lists": (edit_config(architectures=[["x"]]), "architectures"),
    "a list of types": (edit_config(torch_dtype=["float16"]), "torch_dtype: expected a name"),
    "architectures a number": (edit_config(architectures=3), "architectures"),
    "no hidden_size": (edit_config(hidden_size=...), "'hidden_size'"),
    "hidden_size a string": (
        edit_config(hidden_size="64"),
        "hidden_size: expected an integer, 0 or more, got '64'",
    ),
    "hidden_size negative": (
        edit_config(hidden_size=-64),
        "hidden_size: expected an integer, 0 or more, got -64",
    ),
    "hidden_size true": (edit_config(hidden_size=True), "0 or more, got True"),
    "hidden_size a fraction": (
        edit_config(hidden_size=64.5),
        "hidden_size: expected an integer, 0 or more, got 64.5",
    ),
    "intermediate_size 0": (edit_config(intermediate_size=0), "intermediate_size 0"),
    "no heads": (edit_config(num_attention_heads=0), "num_attention_heads 0"),
    "negative heads": (
        edit_config(num_attention_heads=-4, num_key_value_heads=-2, head_dim=-16),
        "-4",
    ),
    "rms_norm_eps a string": (
        edit_config(rms_norm_eps="1e-5"),
        "rms_norm_eps: expected a number, got '1e-5'",
    ),
    "rope_theta a string": (edit_config(rope_theta="x"), "rope_theta: expected a number, got 'x'"),
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
    "-1 layers": (edit_config(num_hidden_layers=-1), "expected an integer, 0 or more, got -1"),
    "too many layers": (edit_config(num_hidden_layers=3), "missing tensors: model.layers.2."),
    "too few layers": (
        edit_config(num_hidden_layers=1),
        "extra tensors: model.layers.1.",
    ),
    "vocab_size 10**15": (edit_config(vocab_size=10**15), "vocab_size 1000000000000000"),
    "vocab_size 2**31 - 1": (edit_config(vocab_size=2**31 - 1), "'model.embed_tokens.weight'"),
    "rope_scaling of a wrong type": (edit_config(rope_scaling=[1]), "config.json does not"),
    "quantized by mlx": (
        edit_config(quantization={"bits": 4}),
        "quantized with mlx, but no tensor is",
    ),
    "quantized by gptq": (
        edit_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantized with gptq, but no tensor is",
    ),
    "quantized inside": (
        edit_config(text_config={"quantization_config": {"quant_method": "fp8"}}),
        "quantized with fp8, but no tensor is",
    ),
    "quantized by us": (edit_config(splitquant={"layers": {}}), "is quantized already"),
}

HEADERS = {
    "no bytes": (write("model.safetensors", b""), "not a safetensors file (0 bytes)"),
    "5 bytes": (write("model.safetensors", b"12345"), "not a safetensors file (5 bytes)"),
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
        "truncated or corrupt: expected",
    ),
    "last byte gone": (
        lambda d: os.truncate(
            d / "model.safetensors", (d / "model.safetensors").stat().st_size - 1
        ),
        "truncated or corrupt: expected",
    ),
    "a byte too much": (
        lambda d: os.truncate(
            d / "model.safetensors", (d / "model.safetensors").stat().st_size + 1
        ),
        "truncated or corrupt: expected",
    ),
    "not JSON": (edit_header(lambda header: b"{not json}"), "corrupt safetensors header"),
    "not UTF-8": (edit_header(lambda header: b'{"\xff": 1}'), "corrupt safetensors header"),
    "deep JSON": (edit_header(lambda header: b"[" * 200_000), "corrupt safetensors header"),
    "list": (edit_header(lambda header: b"[]"), "corrupt safetensors header (not an object)"),
    "nothing": (edit_header(lambda header: b"{}"), "expected 0 bytes of data"),
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
    "offsets overlapping": (edit_entry(data_offsets=[0, 32768]), "expected to start at byte"),
    "offsets beyond the file": (
        edit_entry(data_offsets=[10**12, 10**12 + 32768]),
        "to start at byte",
    ),
    "dtype unknown": (edit_entry(dtype="F31"), "unknown dtype F31"),
    "dtype null": (edit_entry(dtype=None), UP),
    "dtype a list": (edit_entry(dtype=["F32"]), UP),
    "dtype F8": (
        edit_header(lambda h: h[UP].update(dtype="F8_E4M3", shape=[128, 256])),
        "expected dtype F16, BF16, F32, F64, got F8_E4M3",
    ),
    "dtype F8_E8M0": (edit_entry(dtype="F8_E8M0", shape=[128, 256]), "dtype F8_E8M0"),
    "dtype F64 of another shape": (edit_entry(dtype="F64", shape=[64, 64]), "got [64, 64]"),
    "dtype I32": (edit_entry(dtype="I32"), "expected dtype F16, BF16, F32, F64, got int32"),
    "dtype I32 of a norm": (
        edit_header(lambda header: header[NORM].update(dtype="I32")),
        "expected dtype F16, BF16, F32, F64, got int32",
    ),
    "dtype U8": (edit_entry(dtype="U8", shape=[128, 256]), UP),
}


TENSORS = {
    "wider": (tensor(UP, mx.zeros((128, 96))), "by config.json, got [128, 96]"),
    "transposed": (
        tensor(UP, mx.zeros((64, 128))),
        "expected shape [128, 64], by config.json, got [64, 128]",
    ),
    "flat": (tensor(UP, mx.zeros((128 * 64,))), "by config.json, got [8192]"),
    "of no dimension": (
        tensor(NORM, mx.array(1.0)),
        f"{NORM!r}: expected shape [64], by config.json, got []",
    ),
    "missing": (tensor(UP, None), f"missing tensors: {UP}"),
    "extra": (tensor("extra.weight", mx.zeros((2, 2))), "extra tensors: extra.w"),
    "extra of the format": (
        tensor("model.layers.0.mlp.up_proj.scales", mx.zeros(2)),
        "extra tensors",
    ),
    "extra bias": (tensor("model.layers.0.mlp.up_proj.bias", mx.ones(128)), "extra tensors"),
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
    "map a list": (index([1]), "is not a valid index"),
    "map of lists": (index({UP: []}), "[] is not a .safetensors file"),
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
    "map names a NUL": (index({UP: "a\0.safetensors"}), "is not a .safetensors file"),
    "map and shards lack a tensor": (
        both(tensor(UP, None), index(dict.fromkeys((UP, NORM), "model.safetensors"))),
        f"missing tensors: {UP}",
    ),
    "map and shards have one too many": (
        both(
            tensor("extra", mx.zeros(3)),
            index(dict.fromkeys((UP, NORM, "extra"), "model.safetensors")),
        ),
        "extra tensors: extra",
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
def test_an_unusable_checkpoint(refusal, tmp_path, edit, wanted):
    source = tiny.write_checkpoint(tmp_path / "source", tokenizer=False)
    edit(source)
    assert wanted in refusal()
