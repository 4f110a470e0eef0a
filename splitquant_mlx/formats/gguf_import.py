"""Turn a llama-architecture GGUF file into a Hugging Face directory that mlx-lm loads.

llama.cpp renames the tensors and reorders the rows of the query and key projections: it rotates
neighbouring pairs of channels where Hugging Face rotates channel i of a head with channel
i + head_dim / 2. Names, shapes and settings are all checked before the first byte is written.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.formats.gguf import Gguf, open_gguf, read_tensor
from splitquant_mlx.formats.gguf_tokenizer import ELSEWHERE, write_tokenizer
from splitquant_mlx.formats.model_card import write_source_card
from splitquant_mlx.formats.shard_writer import ShardWriter
from splitquant_mlx.progress import Progress, Silent

ROPE_FACTORS = "rope_freqs.weight"
MAX_SETTING = 1 << 40
# The values of all published Llama 3.1, 3.2 and 3.3; GGUF keeps only the factors they lead to.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# GGUF name: Hugging Face name, sizes (out, in); the weights of norms are vectors.
MODEL = {
    "token_embd": ("model.embed_tokens", ("vocab", "hidden")),
    "output_norm": ("model.norm", ("hidden",)),
    "output": ("lm_head", ("vocab", "hidden")),
}
LAYER = {
    "attn_norm": ("input_layernorm", ("hidden",)),
    "attn_q": ("self_attn.q_proj", ("queries", "hidden")),
    "attn_k": ("self_attn.k_proj", ("keys", "hidden")),
    "attn_v": ("self_attn.v_proj", ("keys", "hidden")),
    "attn_output": ("self_attn.o_proj", ("hidden", "queries")),
    "ffn_norm": ("post_attention_layernorm", ("hidden",)),
    "ffn_gate": ("mlp.gate_proj", ("inner", "hidden")),
    "ffn_up": ("mlp.up_proj", ("inner", "hidden")),
    "ffn_down": ("mlp.down_proj", ("hidden", "inner")),
}
# what the README of a hub repo calls it: GGUF name
CARD = {
    "license": "license",
    "license_name": "license.name",
    "license_link": "license.link",
    "language": "languages",
    "tags": "tags",
}


class _Target(NamedTuple):
    """Say what a tensor becomes; `heads` is 0 unless llama.cpp reordered the rows head by head."""

    name: str
    shape: tuple[int, ...]
    heads: int


def import_gguf(path: Path, directory: Path, progress: Progress | None = None) -> None:
    """Write config.json, the tokenizer and safetensors shards for the model in `path`.

    Files of only F32 tensors are stored as float32, of only F32 and BF16 as bfloat16, all others
    as float16. The caller owns `directory`, which exists, and clears it after a failure.

    Raises:
        SourceError: the file cannot be opened.
        CheckpointError: the file is corrupt or incomplete, or holds what is not supported here.
    """
    gguf = open_gguf(path)
    try:
        dtype = _dtype(gguf)
        config = _config(gguf, dtype)
        targets = _targets(config)
        _check_tensors(gguf, targets)
        write_tokenizer(gguf.metadata, directory)
        _write_tensors(gguf, targets, dtype, directory, progress or Silent())
    except CheckpointError as exc:
        raise CheckpointError(f"{path}: {exc}") from exc
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    card = {key: gguf.metadata.get(f"general.{name}") for key, name in CARD.items()}
    write_source_card(card, directory)


def _dtype(gguf: Gguf) -> mx.Dtype:
    types = {info.type for info in gguf.tensors.values()}
    if types == {"F32"}:
        return mx.float32
    return mx.bfloat16 if types <= {"F32", "BF16"} else mx.float16


def _config(gguf: Gguf, dtype: mx.Dtype) -> dict[str, Any]:
    """Return the config.json of the model that the metadata describes."""
    metadata = gguf.metadata
    if (architecture := metadata.get("general.architecture")) != "llama":
        raise CheckpointError(f"architecture is {architecture!r:.80}, wanted 'llama'; {ELSEWHERE}")
    tokens = metadata.get("tokenizer.ggml.tokens")
    layers = _setting(metadata, "block_count", int)
    if layers > len(gguf.tensors) or not isinstance(tokens, list):
        got = f"{layers} layers in {len(gguf.tensors)} tensors, tokens {tokens!r:.80}"
        raise CheckpointError(f"the file has {got}, wanted all tensors and a tokenizer")
    hidden = _setting(metadata, "embedding_length", int)
    heads = _setting(metadata, "attention.head_count", int)
    kv_heads = _setting(metadata, "attention.head_count_kv", int, heads)
    head_dim = _setting(metadata, "attention.key_length", int, hidden // heads)
    rotated = _setting(metadata, "rope.dimension_count", int, head_dim)
    value_dim = _setting(metadata, "attention.value_length", int, head_dim)
    if not head_dim == rotated == value_dim or head_dim % 2 or heads % kv_heads:
        raise CheckpointError(
            f"llama.attention has {heads} heads of {head_dim} channels, {rotated} of them rotated, "
            f"and {kv_heads} value heads of {value_dim}, wanted equal even sizes; {ELSEWHERE}"
        )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tokens),
        "hidden_size": hidden,
        "intermediate_size": _setting(metadata, "feed_forward_length", int),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": _setting(metadata, "context_length", int),
        "rms_norm_eps": _setting(metadata, "attention.layer_norm_rms_epsilon", float),
        "rope_theta": _setting(metadata, "rope.freq_base", float, 10000.0),
        "hidden_act": "silu",
        "attention_bias": any(".attn_" in name and ".bias" in name for name in gguf.tensors),
        "mlp_bias": any(".ffn_" in name and ".bias" in name for name in gguf.tensors),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        **{key: metadata.get(f"tokenizer.ggml.{key}") for key in ("bos_token_id", "eos_token_id")},
        "torch_dtype": str(dtype).removeprefix("mlx.core."),
    }
    scaling = _rope_scaling(gguf, head_dim, config["rope_theta"])
    return {**config, "rope_scaling": scaling} if scaling else config


def _setting(metadata: dict[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """Return a positive number; a float32 as its shortest decimal: 1e-05, not 9.99999974e-06."""
    value = metadata.get(f"llama.{key}", default)
    if type(value) not in (int, kind) or not 0 < value < MAX_SETTING:
        wanted = f"a positive {kind.__name__} below {MAX_SETTING}"
        raise CheckpointError(f"llama.{key} is {value!r:.80}, wanted {wanted}; {ELSEWHERE}")
    return value if kind is int else float(str(np.float32(value)))


def _rope_scaling(gguf: Gguf, head_dim: int, theta: float) -> dict[str, Any] | None:
    """Return the rope_scaling of config.json, or None for plain rotary embeddings."""
    metadata = gguf.metadata
    has_factors = ROPE_FACTORS in gguf.tensors
    legacy = metadata.get("llama.rope.scale_linear")
    kind = metadata.get("llama.rope.scaling.type", "linear" if legacy else "none")
    if kind == "none":
        return _llama3_scaling(gguf, head_dim, theta) if has_factors else None
    if kind == "linear" and not has_factors:
        return {
            "rope_type": kind,
            "factor": _setting(metadata, "rope.scaling.factor", float, legacy),
        }
    raise CheckpointError(f"llama.rope.scaling.type is {kind!r:.80}, not supported; {ELSEWHERE}")


def _llama3_scaling(gguf: Gguf, head_dim: int, theta: float) -> dict[str, Any] | None:
    """Return the Llama 3 scaling that slows the head_dim / 2 frequencies as the file's factors do.

    Wavelengths over context/low are slowed by `factor`, those under context/high not at all, and
    in between 1/slow-down is linear in 1/wavelength (transformers, _compute_llama3_parameters).
    """
    factors = read_tensor(gguf, ROPE_FACTORS)
    factor = float(factors.max())
    low, high = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]
    wavelengths = 2 * math.pi * theta ** (np.arange(len(factors)) / len(factors))
    turns = LLAMA3_ROPE["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    with np.errstate(all="ignore"):
        wanted = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != (head_dim // 2,) or not np.allclose(factors, wanted, rtol=1e-4):
        got = f"{factors.shape} up to {factor}, wanted {(head_dim // 2,)} of Llama 3.1 to 3.3"
        raise CheckpointError(f"tensor {ROPE_FACTORS!r} holds factors {got}; {ELSEWHERE}")
    return {"factor": factor, **LLAMA3_ROPE} if factor != 1 else None


def _targets(config: dict[str, Any]) -> dict[str, _Target]:
    """Return what each tensor the file must have becomes, by its GGUF name."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    sizes = {
        "vocab": config["vocab_size"],
        "hidden": config["hidden_size"],
        "inner": config["intermediate_size"],
        "queries": heads["attn_q"] * config["head_dim"],
        "keys": heads["attn_k"] * config["head_dim"],
    }
    targets = {}

    def add(old: str, new: str, stem: str, names: tuple[str, ...], bias: bool) -> None:
        shape = tuple(sizes[name] for name in names)
        targets[f"{old}.weight"] = _Target(f"{new}.weight", shape, heads.get(stem, 0))
        if bias and len(shape) == 2:
            targets[f"{old}.bias"] = _Target(f"{new}.bias", shape[:1], heads.get(stem, 0))

    for stem, (new, names) in MODEL.items():
        if stem != "output" or not config["tie_word_embeddings"]:
            add(stem, new, stem, names, bias=False)
    for layer in range(config["num_hidden_layers"]):
        for stem, (new, names) in LAYER.items():
            bias = config["attention_bias" if stem.startswith("attn") else "mlp_bias"]
            add(f"blk.{layer}.{stem}", f"model.layers.{layer}.{new}", stem, names, bias)
    return targets


def _check_tensors(gguf: Gguf, targets: dict[str, _Target]) -> None:
    missing = sorted(targets.keys() - gguf.tensors.keys())
    extra = sorted(gguf.tensors.keys() - targets.keys() - {ROPE_FACTORS})
    if missing or extra:
        raise CheckpointError(
            f"tensors missing from a llama model: {missing!r:.200}, unknown: {extra!r:.200}; "
            "the file is incomplete or of another architecture"
        )
    for name, target in targets.items():
        shape = gguf.tensors[name].shape
        if shape != target.shape:
            wanted = f"the metadata wants {target.shape}; the file is corrupt"
            raise CheckpointError(f"tensor {name!r} has shape {shape}, {wanted}")


def _write_tensors(
    gguf: Gguf, targets: dict[str, _Target], dtype: mx.Dtype, directory: Path, progress: Progress
) -> None:
    writer = ShardWriter(directory, [target.name for target in targets.values()])
    total = sum(gguf.tensors[name].nbytes for name in targets)
    stored_as = np.float16 if dtype == mx.float16 else np.float32
    try:
        with progress.task("Unpacking", total) as advance:
            for name, target in targets.items():
                values = read_tensor(gguf, name, stored_as)
                if target.heads:
                    values = _half_split(values, target.heads)
                writer.add(target.name, _cast(name, values, dtype))
                advance(gguf.tensors[name].nbytes)
    finally:
        # Also after a failure: it ends the open shard's file.
        writer.close()


def _half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of each head from interleaved (0, d/2, 1, ...) to half-split (0, 1, ...)."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _cast(name: str, values: np.ndarray, dtype: mx.Dtype) -> mx.array:
    if not np.isfinite(values).all():
        raise CheckpointError(f"tensor {name!r} has values not finite as {dtype}; {ELSEWHERE}")
    return mx.array(values, dtype)
