"""Write a model that says what it is told: its next token depends on the last one alone."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

END = "<|im_end|>"
SPECIAL = (END, "<tool_call>", "</tool_call>", "<think>", "</think>")
# the prompt ends with the text of the last message
LAST = "{% for m in messages %}{{ m.content }}{% endfor %}"
TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}{# <tool_call> tool_call.name #}" + LAST


def write_scripted(directory, scripts: dict[str, list[bytes | str]], template: str = LAST) -> Path:
    """Write a llama that answers a prompt ending with the character X with scripts[X].

    A script is a list of tokens: bytes, or the name of a special token. None may occur twice.
    """
    table = bytes_to_unicode()
    vocab = {char: i for i, char in enumerate(table[byte] for byte in range(256))}

    def name(piece):
        return piece if isinstance(piece, str) else "".join(table[byte] for byte in piece)

    for piece in (piece for script in scripts.values() for piece in script if piece not in SPECIAL):
        vocab.setdefault(name(piece), len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    used = [s for s in SPECIAL if s == END or any(s in script for script in scripts.values())]
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in used])
    ids = tokenizer.get_vocab()
    size = -(-len(ids) // 32) * 32
    head = mx.zeros((size, size))
    for trigger, script in scripts.items():
        last = ids[name(trigger.encode())]
        for piece in (name(piece) for piece in [*script, END]):
            head[ids[piece], last] = 4.0
            last = ids[piece]
    _write(Path(directory), head, tokenizer, template, ids[END])
    return Path(directory)


def _write(directory: Path, head: mx.array, tokenizer, template: str, end: int) -> None:
    size = head.shape[0]
    layer = {f"self_attn.{n}_proj": (size, size) for n in "qkvo"}
    layer |= {f"mlp.{n}_proj": (32, size) for n in ("gate", "up")} | {"mlp.down_proj": (size, 32)}
    weights = {f"model.layers.0.{n}.weight": mx.zeros(shape) for n, shape in layer.items()}
    for norm in ("layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"):
        weights[f"model.{norm}.weight"] = mx.ones((size,))
    weights |= {"model.embed_tokens.weight": mx.eye(size), "lm_head.weight": head}
    config = {
        "model_type": "llama",
        "hidden_size": size,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": size // 32,
        "vocab_size": size,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "eos_token_id": end,
    }
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    mx.save_safetensors(str(directory / "model.safetensors"), weights, {"format": "pt"})
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    settings["chat_template"] = template
    for file, content in (("config.json", config), ("tokenizer_config.json", settings)):
        (directory / file).write_text(json.dumps(content))
