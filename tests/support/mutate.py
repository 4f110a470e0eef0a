"""Mutate valid input: JSON by its structure, GGUF and safetensors by theirs, and any bytes blindly.

Everything is a pure function of the random number generator and the valid input.
"""

import copy
import json
import struct
from random import Random
from typing import Any

ESCAPE = "\x1b]0;owned\x07\x1b[31m\x9b2J"
TEMPLATES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ self.__init__.__globals__.__builtins__.open('/etc/passwd').read() }}",
    "{% include '/etc/passwd' %}",
    "{% for",
    "{{ raise_exception('" + ESCAPE + "') }}",
    "{{ messages[7].content }}",
    "{{ 1 / 0 }}",
    "{{ messages | tojson }}",
    "",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
)
NUMBERS = (
    0, -1, 1, 2, 3, 31, 32, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64,
    10**30, 10**400, -(2**63), 0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"), -float("inf"),
)  # fmt: skip
TEXTS = (
    "", "x", ESCAPE, "\ud800", "a\0b", "..", "../../x", "/etc/passwd", "evil.py", "[/red][link=x]",
    "\u202egnp", "A" * 100_000, "llama", "nan", "F32", "BF16", "U32", "float16",
    "model.safetensors", "../secret/model.safetensors", "pytorch_model.bin", "deepseek_v32",
    *TEMPLATES,
)  # fmt: skip
# What a checkpoint can say to have code run or other files read.
ENTRIES: tuple[tuple[str, Any], ...] = (
    ("model_file", "evil.py"),
    ("auto_map", {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"], "AutoConfig": "evil.C"}),
    ("auto_map", {"AutoTokenizer": "org/repo--evil.Tokenizer"}),
    ("tokenizer_class", "evil.Tokenizer"),
    ("tokenizer_file", "/etc/passwd"),
    ("vocab_file", "../secret/secret.json"),
    ("merges_file", "/etc/passwd"),
    ("chat_template_type", "../evil"),
    ("tool_parser_type", "evil"),
    ("name_or_path", "org/repo"),
    ("subfolder", ".."),
    ("quantization", {"group_size": 64, "bits": 4}),
    ("quantization_config", {"quant_method": "awq", "bits": 4, "group_size": 64}),
    ("num_hidden_layers", 10**9),
    ("num_experts", 10**9),
    ("rope_scaling", {"rope_type": "llama3", "factor": 0, "low_freq_factor": 1}),
    ("text_config", 1),
    ("rms_norm_eps", None),
    ("added_tokens_decoder", {"0": {"content": "<unk>", ESCAPE: True}}),
    ("pad_token", {"__type": "AddedToken", "content": ESCAPE, ESCAPE: True}),
    ("tokenizer_class", ESCAPE),
    ("architectures", [ESCAPE]),
    ("padding", {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_id": 0}),
    ("normalizer", {"type": "Replace", "pattern": {"Regex": "(a|aa)+$"}, "content": "a" * 999}),
    ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(?:x+x+)+y"}, "behavior": "Removed"}),
    ("splitquant", {"layers": {"model.norm": {}}}),
)


def hostile(rng: Random) -> Any:
    """Return a value that most fields do not expect."""
    kind = rng.randrange(6)
    if kind < 2:
        return rng.choice(NUMBERS)
    if kind < 4:
        return rng.choice(TEXTS)
    if kind == 4:
        return copy.deepcopy(
            rng.choice((None, True, False, [], {}, [[]], [None], {"a": {}}, {"": 1}))
        )
    many = [rng.choice((*NUMBERS, "x", ESCAPE, None))] * rng.choice((1, 2, 1000))
    return rng.choice((many, {"a": hostile(rng)}, nested(rng)))


def nested(rng: Random) -> Any:
    """Return lists or tables in one another, up to 400 deep."""
    value: Any = 1
    for _ in range(rng.choice((3, 17, 60, 400))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def place(rng: Random, value: Any) -> tuple[Any, Any]:
    """Return a container somewhere in `value`, which is one and is not empty, and a key of it."""
    while True:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        child = value[key]
        if not (isinstance(child, (dict, list)) and child) or rng.random() < 0.3:
            return value, key
        value = child


def mutate_value(rng: Random, value: Any) -> Any:
    """Return a copy of a JSON value with one to three of its parts changed."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not (isinstance(value, (dict, list)) and value) or rng.random() < 0.02:
            return hostile(rng)
        container, key = place(rng, value)
        other, other_key = place(rng, value)
        match rng.randrange(8):
            case 0 | 1 | 2:
                container[key] = hostile(rng)
            case 3:
                del container[key]
            case 4 if isinstance(container, dict):
                container[rng.choice(TEXTS)] = container.pop(key)
            case 5 if isinstance(value, dict):
                name, entry = rng.choice(ENTRIES)
                value[name] = copy.deepcopy(entry)
            case 6:
                container[key] = copy.deepcopy(other[other_key])
            case _:
                container[key] = nudged(rng, container[key])
    return value


def nudged(rng: Random, value: Any) -> Any:
    """Return a value of the same type that is a little off."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return rng.choice((value + 1, value - 1, -value, value * 2, value / 2, str(value)))
    if isinstance(value, str):
        return rng.choice((value[:-1], value + value, value + ESCAPE, value.upper(), value + "\0"))
    return [value, value] if isinstance(value, dict) else value * 2


def mutate_json(rng: Random, content: bytes) -> bytes:
    """Return a JSON text with its structure or its bytes changed."""
    if rng.random() < 0.2:
        return mutate_bytes(rng, content)
    text = json.dumps(mutate_value(rng, json.loads(content)))
    if rng.random() < 0.1 and text.startswith("{"):  # say a key twice
        key, value = rng.choice(list(json.loads(content).items()))
        extra = json.dumps({key: rng.choice((hostile(rng), value))})
        text = f"{extra[:-1]}, {text[1:]}" if rng.random() < 0.5 else f"{text[:-1]}, {extra[1:]}"
    return text.encode(rng.choice(("utf-8",) * 20 + ("utf-16", "utf-8-sig")), "surrogatepass")


def mutate_bytes(rng: Random, content: bytes, head: int = 1 << 30) -> bytes:
    """Flip, cut, double, insert or overwrite bytes, within the first `head` where that is given."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(min(len(data), head) or 1)
        match rng.randrange(8):
            case 0 if data:
                data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 2:
                size = rng.choice((2, 4, 8))
                data[at : at + size] = (rng.choice(NUMBERS[:18]) % 2 ** (8 * size)).to_bytes(
                    size, "little"
                )
            case 3 if rng.random() < 0.3:
                del data[at:]
            case 4:
                del data[at : at + rng.randrange(1, 40)]
            case 5:
                data[at:at] = data[at : at + rng.randrange(1, 40)]
            case 6 if rng.random() < 0.3:
                data += rng.randbytes(rng.choice((1, 7, 4096)))
            case _:
                data[at:at] = rng.choice(
                    (b"\0", b"\xff", b"{", b"[" * 5000, b'"', b"\x1b[0m", b"9")
                )
    return bytes(data)


def fill(rng: Random, names: list[str]) -> dict[str, Any]:
    """Return settings of these names that are mostly small numbers."""
    words = (0.5, True, "silu", "full_attention", [1, 1], {"type": "default"})
    usual = (*(1, 2, 4, 16, 64, 96) * 5, *words)
    return {n: hostile(rng) if rng.random() < 0.1 else rng.choice(usual) for n in names}


def mutate_safetensors(rng: Random, content: bytes) -> bytes:
    """Change header, length or data of a safetensors file."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    kind = rng.randrange(10)
    if kind == 0:
        return mutate_bytes(rng, content, 8 + length)
    if kind == 1:
        return mutate_bytes(rng, content)
    names = [name for name in header if name != "__metadata__"]
    if kind == 2:  # the same bytes as another shape, or two tensors on the same bytes
        entry, other = header[rng.choice(names)], header[rng.choice(names)]
        shape = entry["shape"]
        change: tuple[dict[str, Any], ...] = (
            {"shape": shape[::-1]},
            {"shape": [1, *shape]},
            {"shape": [0, 2**62]},
            {"shape": [2**32, 2**32]},
            {"shape": [*shape, 2**32 + 1], "data_offsets": [0, 0]},
            {"dtype": rng.choice(("F16", "I8", "I32", "F64", "U32", "BOOL", "BF16"))},
            {"data_offsets": other["data_offsets"]},
        )
        entry.update(rng.choice(change))
    elif kind == 3:  # values: not finite, huge, denormal
        at = rng.randrange(len(data) - 8) & -4
        word = rng.choice((float("nan"), float("inf"), 3e38, 1e-45, -0.0, 0.0))
        data = data[:at] + struct.pack("<f", word) + data[at + 4 :]
    elif kind == 4:  # a new name
        header[rng.choice(TEXTS)] = header.pop(rng.choice(names))
    else:
        header = mutate_value(rng, header)
    text = json.dumps(header).encode()
    size = len(text) + (rng.choice((0,) * 12 + (1, -1, 8, 2**62)))
    return struct.pack("<Q", size % 2**64) + text + data


def mutate_toml(rng: Random, values: dict[str, Any]) -> bytes:
    """Return settings as TOML, changed."""
    changed = mutate_value(rng, values)
    table = changed if isinstance(changed, dict) else {"bits": changed}
    lines = (
        f"{json.dumps(key)} = {json.dumps(value, ensure_ascii=rng.random() < 0.5)}"
        for key, value in table.items()
    )
    text = "\n".join(lines).encode("utf-8", "surrogatepass")
    return mutate_bytes(rng, text) if rng.random() < 0.3 else text
