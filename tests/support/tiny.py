"""Write tiny random checkpoints of many architectures, laid out and named as on the hub."""

import json
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx

VOCAB = 96
HIDDEN = 64
INNER = 128
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 16
LAYERS = 2
EXPERTS = 4

_BASE = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}
_MOE = {
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": INNER,
    "norm_topk_prob": True,
}
_OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None, "tie_word_embeddings": False},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": HEAD_DIM, "sliding_window": 32},
    "gemma3_text": {
        "query_pre_attn_scalar": HEAD_DIM,
        "sliding_window": 32,
        "sliding_window_pattern": 2,
    },
    "phi3": {"tie_word_embeddings": False},
    "mixtral": {
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
    "qwen3_moe": _MOE,
}
ARCHITECTURES = tuple(_OWN)
_NORMS = {
    "gemma2": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "gemma3_text": ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
}


def make_config(architecture: str = "llama", **changes: Any) -> dict[str, Any]:
    """Return config.json of a tiny model; a change to `...` (Ellipsis) removes the key."""
    config = {"model_type": architecture, **_BASE, **_OWN[architecture], **changes}
    return {key: value for key, value in config.items() if value is not ...}


def make_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the hub's names and shapes of every tensor of a model."""
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for i in range(LAYERS):
        for name, shape in _layer_shapes(config["model_type"]).items():
            shapes[f"model.layers.{i}.{name}"] = shape
    return shapes


def _layer_shapes(architecture: str) -> dict[str, tuple[int, ...]]:
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    norms = ("input_layernorm", "post_attention_layernorm", *_NORMS.get(architecture, ()))
    shapes: dict[str, tuple[int, ...]] = {f"{norm}.weight": (HIDDEN,) for norm in norms}
    shapes["self_attn.o_proj.weight"] = (HIDDEN, queries)
    if architecture == "phi3":
        shapes["self_attn.qkv_proj.weight"] = (queries + 2 * keys, HIDDEN)
        shapes["mlp.gate_up_proj.weight"] = (2 * INNER, HIDDEN)
        shapes["mlp.down_proj.weight"] = (HIDDEN, INNER)
        return shapes
    for name, rows in (("q", queries), ("k", keys), ("v", keys)):
        shapes[f"self_attn.{name}_proj.weight"] = (rows, HIDDEN)
        if architecture == "qwen2":
            shapes[f"self_attn.{name}_proj.bias"] = (rows,)
        if architecture in ("qwen3", "qwen3_moe", "gemma3_text") and name in "qk":
            shapes[f"self_attn.{name}_norm.weight"] = (HEAD_DIM,)
    wide, narrow = (INNER, HIDDEN), (HIDDEN, INNER)
    if architecture == "mixtral":
        shapes["block_sparse_moe.gate.weight"] = (EXPERTS, HIDDEN)
        for e in range(EXPERTS):
            for name, shape in (("w1", wide), ("w2", narrow), ("w3", wide)):
                shapes[f"block_sparse_moe.experts.{e}.{name}.weight"] = shape
        return shapes
    mlps = ["mlp."]
    if architecture == "qwen3_moe":
        shapes["mlp.gate.weight"] = (EXPERTS, HIDDEN)
        mlps = [f"mlp.experts.{e}." for e in range(EXPERTS)]
    for mlp in mlps:
        for name, shape in (("gate_proj", wide), ("up_proj", wide), ("down_proj", narrow)):
            shapes[f"{mlp}{name}.weight"] = shape
    return shapes


def make_tensors(
    config: dict[str, Any], dtype: mx.Dtype = mx.float32, seed: int = 0
) -> dict[str, mx.array]:
    """Return random tensors: norms near 1, everything else of a linear layer's usual size."""
    keys = mx.random.split(mx.random.key(seed), 1000)
    tensors = {}
    for key, (name, shape) in zip(keys, sorted(make_shapes(config).items()), strict=False):
        w = mx.random.normal(shape, key=key) * (0.02 if "norm" in name else HIDDEN**-0.5)
        tensors[name] = (w + (1 if "norm" in name else 0)).astype(dtype)
    mx.eval(tensors)
    return tensors


def write_checkpoint(
    directory: Path,
    architecture: str = "llama",
    *,
    dtype: mx.Dtype = mx.float32,
    shards: int = 1,
    index: bool | None = None,
    tokenizer: bool = True,
    replace: dict[str, mx.array | None] | None = None,
    **changes: Any,
) -> Path:
    """Write a checkpoint directory; returns it.

    Args:
        directory: to make.
        architecture: one of `ARCHITECTURES`.
        dtype: of all tensors.
        shards: number of safetensors files.
        index: whether to write model.safetensors.index.json; None is where there are many shards.
        tokenizer: whether to write a tokenizer.
        replace: tensors to put in, by name; None takes a tensor out.
        changes: to config.json; see `make_config`.
    """
    directory.mkdir(parents=True)
    config = make_config(architecture, **changes)
    (directory / "config.json").write_text(json.dumps(config))
    # the tensors are those of the architecture, whatever `changes` made of its config
    tied = changes.get("tie_word_embeddings", ...)
    honest = make_config(architecture, **({} if tied is ... else {"tie_word_embeddings": tied}))
    tensors = {**make_tensors(honest, dtype), **(replace or {})}
    write_weights(
        directory,
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        shards=shards,
        index=shards > 1 if index is None else index,
    )
    if tokenizer:
        write_tokenizer(directory)
    return directory


def write_weights(
    directory: Path, tensors: dict[str, mx.array], *, shards: int = 1, index: bool = False
) -> None:
    """Deal the tensors out over numbered safetensors files."""
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = (
            "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        )
        part = {name: tensors[name] for name in names[i::shards]}
        mx.save_safetensors(str(directory / file), part, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    if index:
        write_index(directory, weight_map)


def write_index(directory: Path, weight_map: Any) -> None:
    """Write model.safetensors.index.json."""
    text = json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(text)


def write_tokenizer(directory: Path, size: int = VOCAB) -> None:
    """Write a tokenizer of the words w2 to w95, or of another number of tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "</s>", *(f"w{n}" for n in range(2, size))]
    model = models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "eos_token": "</s>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def read_raw(file: Path) -> tuple[dict[str, Any], bytes]:
    """Return header and data of a safetensors file, unchecked."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_raw(file: Path, header: Any, data: bytes, length: int | None = None) -> None:
    """Write a safetensors file of whatever header (bytes as they are, else as JSON) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
