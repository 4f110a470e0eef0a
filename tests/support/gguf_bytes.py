"""Write a tiny llama model as GGUF, byte by byte, whole or damaged where it hurts."""

import struct
from random import Random
from typing import Any

import mutate
import numpy as np
import tiny

U32, F32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9
FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", U32: "<I", 5: "<i", F32: "<f", BOOL: "<?", 10: "<Q"}
STEMS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
}
WORDS = ["<unk>", "</s>", *(chr(97 + n % 26) * (1 + n // 26) for n in range(94))]
METADATA: dict[str, tuple[int, Any]] = {
    "general.architecture": (STRING, "llama"),
    "llama.block_count": (U32, tiny.LAYERS),
    "llama.context_length": (U32, 256),
    "llama.embedding_length": (U32, tiny.HIDDEN),
    "llama.feed_forward_length": (U32, tiny.INNER),
    "llama.attention.head_count": (U32, tiny.HEADS),
    "llama.attention.head_count_kv": (U32, tiny.KV_HEADS),
    "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
    "tokenizer.ggml.model": (STRING, "llama"),
    "tokenizer.ggml.tokens": (ARRAY, (STRING, WORDS)),
    "tokenizer.ggml.scores": (ARRAY, (F32, [float(-n) for n in range(96)])),
    "tokenizer.ggml.token_type": (ARRAY, (U32, [2, 3, *[1] * 94])),
    "tokenizer.ggml.eos_token_id": (U32, 1),
    "tokenizer.ggml.unknown_token_id": (U32, 0),
    "tokenizer.ggml.add_space_prefix": (BOOL, True),
    "tokenizer.chat_template": (STRING, "{{ messages[0].content }}"),
}


def string(value: str) -> bytes:
    """Return a GGUF string."""
    raw = value.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def value_bytes(kind: int, value: Any) -> bytes:
    """Return a metadata value without its type."""
    if kind == STRING:
        return string(value)
    if kind == ARRAY:
        inner, items = value
        head = struct.pack("<IQ", inner, len(items))
        return head + b"".join(value_bytes(inner, item) for item in items)
    return struct.pack(FORMATS[kind], value)


def tensors() -> dict[str, tuple[tuple[int, ...], bytes]]:
    """Return shape and float32 bytes of every tensor of the tiny llama, by GGUF name."""
    found = {}
    for name, array in tiny.make_tensors(tiny.make_config()).items():
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            layer, _, rest = stem.removeprefix("model.layers.").partition(".")
            name = f"blk.{layer}.{STEMS[rest]}.weight"
        else:
            name = f"{STEMS[stem]}.weight"
        found[name] = tuple(array.shape), np.array(array).tobytes()
    return found


def write(rng: Random | None = None) -> bytes:
    """Return the file; with a generator, with one or two of its fields changed."""
    entries = [[key, kind, value_bytes(kind, value)] for key, (kind, value) in METADATA.items()]
    infos, data = [], b""
    for name, (shape, content) in tensors().items():
        infos.append([name, list(shape[::-1]), 0, len(data)])
        data += content + bytes(-len(content) % 32)
    counts = [len(infos), len(entries)]
    version = 3
    for _ in range(rng.choice((1, 1, 2)) if rng else 0):
        assert rng is not None
        number = rng.choice([n for n in mutate.NUMBERS if isinstance(n, int)]) % 2**64
        entry, info = rng.choice(entries), rng.choice(infos)
        match rng.randrange(12):
            case 0:
                entry[1:] = STRING, string(rng.choice(mutate.TEXTS))
            case 1 | 2:
                kind = rng.choice((0, 1, 2, U32, 5, F32, BOOL, 10, 13, 77))
                entry[1:] = (
                    kind,
                    rng.choice((number % 2**32, rng.randrange(200))).to_bytes(8, "little"),
                )
                entry[2] = entry[2][: struct.calcsize(FORMATS.get(kind, "<I"))]
            case 3:
                inner = rng.choice((U32, F32, STRING, ARRAY, 13))
                payload = rng.randbytes(rng.choice((0, 8, 400))) + bytes(64)
                count = rng.choice((0, 1, 96, number))
                entry[1:] = ARRAY, struct.pack("<IQ", inner, count) + payload
            case 4:
                entries.remove(entry)
                counts[1] -= 1
            case 5:
                entries.append([rng.choice((entry[0], *mutate.TEXTS)), *rng.choice(entries)[1:]])
                counts[1] += 1
            case 6:
                info[1] = rng.choice(([number], [number, number], info[1][::-1], [0], [], [1] * 5))
            case 7:
                info[2] = rng.choice((1, 2, 8, 12, 30, 2**32 - 1))
            case 8:
                info[3] = rng.choice((number, info[3] + 32, 1, rng.choice(infos)[3]))
            case 9:
                info[0] = rng.choice((*mutate.TEXTS, rng.choice(infos)[0]))
            case 10:
                counts[rng.randrange(2)] = number
            case _:
                version = number % 2**32
    head = b"GGUF" + struct.pack("<IQQ", version, *counts)
    head += b"".join(string(k) + struct.pack("<I", kind) + raw for k, kind, raw in entries)
    for name, dims, kind, offset in infos:
        head += string(name) + struct.pack("<I", len(dims))
        head += b"".join(struct.pack("<Q", n) for n in dims) + struct.pack(
            "<IQ", kind, offset % 2**64
        )
    return head + bytes(-len(head) % 32) + data
