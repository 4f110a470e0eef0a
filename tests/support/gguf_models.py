"""Write tiny models as GGUF files, a Llama's weights changed as llama.cpp's converter does."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add one metadata entry of the type that Python's value has."""
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    kinds |= {str: writer.add_string, list: writer.add_array}  # type: ignore[dict-item]
    if value is not None:
        kinds[type(value)](key, value)


def words(count: int) -> dict[str, Any]:
    """Return a sentencepiece vocabulary: specials, bytes, and pieces of one letter or more."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [chr(0x3400 + n) for n in range(count - len(tokens))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens[:count],
        "tokenizer.ggml.scores": [-float(n) for n in range(count)],
        "tokenizer.ggml.token_type": ([2, 3, 3] + [6] * 256 + [1] * count)[:count],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder q and k rows as llama.cpp's convert_hf_to_gguf.py does (`permute`)."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def half_split(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo `interleave`."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata that all architectures have, without the architecture's name."""
    return {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config.get("rms_norm_eps", 1e-5),
        "rope.freq_base": config.get("rope_theta", 10000.0),
    }


def tensors(weights: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the weights of a Llama (names of the hub) as llama.cpp's converter writes them."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    found = {}
    for name, value in weights.items():
        projection = name.split(".")[-2]
        if projection in heads:
            value = interleave(value, heads[projection])
        old = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert old is not None, name
        found[old] = value
    return found


def write(path: Path, architecture: str, metadata: dict[str, Any], stored: dict[str, Any]) -> None:
    """Write a file; `stored` holds arrays, or pairs of quantized bytes and their type."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        add_value(writer, key, value)
    for name, value in stored.items():
        if isinstance(value, tuple):
            writer.add_tensor(name, value[0], raw_dtype=value[1])
        else:
            writer.add_tensor(name, np.ascontiguousarray(value, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
