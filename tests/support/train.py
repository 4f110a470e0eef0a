"""Train the two tiny models of tests/trained: `python tests/support/train.py llama` (or mixture).

Both are trained from scratch on the text of `stories.py`, in float32 on the CPU, and stored in
float16 in the layout of the Hugging Face hub. Seed, text and order are fixed; the last digits
differ between machines, as those of their matrix products do. Seven minutes of CPU time each.

- llama: 0.26 M parameters, a tokenizer laid out as Llama 2's, no chat template. Its intermediate
  size, 172, is no multiple of any group size.
- mixture: Qwen3-MoE, 0.48 M parameters, 8 experts of which 2 are active per token, a byte-level
  tokenizer and a chat template, in which it was trained on questions and answers.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from splitquant_mlx.runtime import blas

blas.preload()

import mlx.core as mx  # noqa: E402  after OpenBLAS
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.models import llama, qwen3_moe  # noqa: E402
from stories import Writer  # noqa: E402
from tokenizers import (  # noqa: E402
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers.convert_slow_tokenizer import generate_merges  # noqa: E402

TRAINED = Path(__file__).resolve().parents[1] / "trained"
VOCAB = 512
LENGTH = 160
BATCH = 12
BALANCE = 0.01  # of the loss that spreads tokens evenly over experts (Switch Transformer, eq. 4)
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPE = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "torch_dtype": "float16",
}
LLAMA = {
    **SHAPE,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "intermediate_size": 172,
    "num_hidden_layers": 5,
    "mlp_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXTURE = {
    **SHAPE,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def sentencepiece_tokenizer(texts: list[str]) -> Tokenizer:
    """Train BPE with byte fallback on words that begin with ▁, laid out as Llama 2's."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "<s>", "</s>"]
    draft = Tokenizer(models.BPE(unk_token="<unk>"))
    draft.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(bytes_), special_tokens=special, show_progress=False
    )
    draft.train_from_iterator(texts, trainer)
    learned = json.loads(draft.to_str())["model"]
    merged = ["".join(merge) for merge in learned["merges"]]
    letters = sorted(set(learned["vocab"]) - set(special) - set(merged))
    pieces = [*special, *bytes_, *merged, *letters]  # letters last, as in SentencePiece's order
    vocab = {piece: number for number, piece in enumerate(pieces)}
    merges = generate_merges(vocab, {piece: -float(number) for piece, number in vocab.items()})
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    space, first = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse(), first])
    return tokenizer


def byte_level_tokenizer(texts: list[str]) -> Tokenizer:
    """Train BPE on bytes, laid out as Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def texts_for(name: str, count: int) -> list[str]:
    """Write the documents to train on: stories, and one in four of questions and answers."""
    writer, texts = Writer(seed=0), []
    for i in range(count):
        if i % 4:
            texts.append(writer.story())
        elif name == "llama":
            texts.append(writer.answered())
        else:
            asked = (writer.fact() for _ in range(writer.rng.randint(1, 3)))
            texts.append(
                "".join(
                    f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n{a}<|im_end|>\n"
                    for q, a in asked
                )
            )
    return texts


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Settings of one of the two models."""

    config: dict
    family: object
    tokenizer: object
    end: int
    special: dict


KINDS = {
    "llama": Kind(
        config=LLAMA,
        family=llama,
        tokenizer=sentencepiece_tokenizer,
        end=2,
        special={"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    ),
    "mixture": Kind(
        config=MIXTURE,
        family=qwen3_moe,
        tokenizer=byte_level_tokenizer,
        end=0,
        special={
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "chat_template": CHAT_TEMPLATE,
        },
    ),
}


class Recording(nn.Module):
    """A router that keeps its probabilities for the loss."""

    def __init__(self, gate: nn.Module, seen: list):
        super().__init__()
        self.gate, self._seen = gate, seen

    def __call__(self, x: mx.array) -> mx.array:
        scores = self.gate(x)
        self._seen.append(mx.softmax(scores, axis=-1).reshape(-1, scores.shape[-1]))
        return scores


def balance(probabilities: mx.array, top: int) -> mx.array:
    """Return experts x sum(share of tokens x mean probability): 1 for uniform routing."""
    experts = probabilities.shape[-1]
    least = mx.sort(probabilities, axis=-1)[:, -top, None]
    share = (probabilities >= least).mean(axis=0) / top
    return experts * (mx.stop_gradient(share) * probabilities.mean(axis=0)).sum()


def train(model: nn.Module, tokens: np.ndarray, *, steps: int, rate: float, top: int) -> None:
    """Train with AdamW and a cosine schedule on windows of the tokens, in a seeded order."""
    seen: list[mx.array] = []
    for layer in model.layers if top else ():
        layer.mlp.gate = Recording(layer.mlp.gate, seen)

    def loss(model, batch):
        seen.clear()
        logits = model(batch[:, :-1])
        value = nn.losses.cross_entropy(logits, batch[:, 1:], reduction="mean")
        extra = sum((balance(p, top) for p in seen), mx.array(0.0))
        return value + BALANCE * extra, value

    schedule = optim.join_schedules(
        [optim.linear_schedule(0, rate, 50), optim.cosine_decay(rate, steps - 50, rate / 20)], [50]
    )
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.95], weight_decay=0.1)
    step = nn.value_and_grad(model, loss)
    rng, rows = np.random.default_rng(0), []
    for number in range(steps):
        if not len(rows):
            start = rng.integers(LENGTH)
            count = (len(tokens) - start) // LENGTH - 1
            order = rng.permutation(count)[: count // BATCH * BATCH]
            rows = start + LENGTH * order.reshape(-1, BATCH)
        chosen, rows = rows[0], rows[1:]
        batch = mx.array(np.stack([tokens[at : at + LENGTH + 1] for at in chosen]))
        (_, value), gradients = step(model, batch)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        if number % 100 == 0 or number == steps - 1:
            print(f"step {number}: {value.item():.3f} nats/token", flush=True)
    for layer in model.layers if top else ():
        layer.mlp.gate = layer.mlp.gate.gate


def hub_weights(model: nn.Module) -> dict[str, mx.array]:
    """Return the weights in float16 by the names of the hub: every expert on its own."""
    weights = {}
    for name, w in tree_flatten(model.parameters()):
        w = w.astype(mx.float16)
        if "switch_mlp" in name:
            for e in range(w.shape[0]):
                weights[name.replace("switch_mlp", f"experts.{e}")] = w[e]
        else:
            weights[name] = w
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=KINDS)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--output", type=Path, default=TRAINED)
    options = parser.parse_args()
    kind, directory = KINDS[options.name], options.output / options.name
    mx.set_default_device(mx.Device(mx.cpu))
    mx.random.seed(0)
    texts = texts_for(options.name, 12_000)
    tokenizer = kind.tokenizer(texts[:4000])
    ids = [[*encoded.ids, kind.end] for encoded in tokenizer.encode_batch(texts)]
    tokens = np.concatenate(ids).astype(np.int32)
    print(f"{len(tokens):,} tokens, {sum(map(len, texts)) / len(tokens):.2f} characters per token")
    model = kind.family.Model(kind.family.ModelArgs.from_dict(kind.config))
    print(f"{sum(w.size for _, w in tree_flatten(model.parameters())):,} parameters")
    train(
        model,
        tokens,
        steps=options.steps,
        rate=options.rate,
        top=kind.config.get("num_experts_per_tok", 0),
    )
    directory.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(directory / "model.safetensors"), hub_weights(model), {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(kind.config, indent=2) + "\n")
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", **kind.special, "model_max_length": 512
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    main()
