"""A Llama model in numpy and float64, written from the architecture alone: no mlx anywhere."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


class NumpyLlama:
    """Read a checkpoint, quantized (affine) or not, and compute its log-probabilities."""

    def __init__(self, directory: Path):
        self.config = json.loads((directory / "config.json").read_text())
        tensors: dict[str, np.ndarray] = {}
        for file in directory.glob("*.safetensors"):
            tensors |= load_file(file)
        split = self.config.get("splitquant", {}).get("layers", {})
        quantization = self.config.get("quantization") or {}
        self.weights = {}
        for name, tensor in tensors.items():
            layer = name.rpartition(".")[0]
            if name.endswith((".scales", ".biases")):
                continue
            if f"{layer}.scales" in tensors and name.endswith(".weight"):
                settings = split.get(layer) or quantization.get(layer) or quantization
                scales, biases = tensors[f"{layer}.scales"], tensors[f"{layer}.biases"]
                tensor = dequantize(tensor, scales, biases, settings["bits"])
                tensor = tensor.reshape(len(tensor), settings.get("clusters", 1), -1).sum(axis=1)
            self.weights[name] = tensor.astype(np.float64)

    def __call__(self, tokens) -> np.ndarray:
        """Return ln p of every next token, (len(tokens), vocabulary)."""
        embedding = self.weights["model.embed_tokens.weight"]
        x = embedding[np.asarray(tokens)]
        for i in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            x = x + self.attention(self.norm(x, f"{layer}.input_layernorm"), f"{layer}.self_attn")
            x = x + self.mlp(self.norm(x, f"{layer}.post_attention_layernorm"), f"{layer}.mlp")
        head = embedding if self.config["tie_word_embeddings"] else self.weights["lm_head.weight"]
        logits = self.norm(x, "model.norm") @ head.T
        logits -= logits.max(axis=-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))

    def norm(self, x, name):
        mean_square = (x * x).mean(axis=-1, keepdims=True)
        return (
            x / np.sqrt(mean_square + self.config["rms_norm_eps"]) * self.weights[name + ".weight"]
        )

    def linear(self, x, name):
        return x @ self.weights[name + ".weight"].T

    def attention(self, x, name):
        queries, keys = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        length = len(x)
        q, k, v = (
            self.linear(x, f"{name}.{p}_proj").reshape(length, heads, -1).swapaxes(0, 1)
            for p, heads in (("q", queries), ("k", keys), ("v", keys))
        )
        q, k = self.rotate(q), self.rotate(k)
        k, v = (np.repeat(a, queries // keys, axis=0) for a in (k, v))
        scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
        scores += np.triu(np.full((length, length), -np.inf), 1)
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        y = (p / p.sum(axis=-1, keepdims=True)) @ v
        return self.linear(y.swapaxes(0, 1).reshape(length, -1), f"{name}.o_proj")

    def rotate(self, x):
        """Turn the pair (x_i, x_{i + d/2}) at position t by the angle t * theta^(-2i/d)."""
        half = x.shape[-1] // 2
        frequencies = self.config["rope_theta"] ** (-np.arange(half) / half)
        angles = np.outer(np.arange(x.shape[1]), frequencies)
        first, second, cos, sin = x[..., :half], x[..., half:], np.cos(angles), np.sin(angles)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def mlp(self, x, name):
        gate = self.linear(x, f"{name}.gate_proj")
        silu = gate / (1 + np.exp(-gate))
        return self.linear(silu * self.linear(x, f"{name}.up_proj"), f"{name}.down_proj")


def dequantize(words, scales, biases, bits):
    """Unpack a little-endian stream of codes; return scale * code + bias, float64."""
    stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    digits = stream.reshape(len(words), -1, bits).astype(np.float64)
    codes = (digits * 2.0 ** np.arange(bits)).sum(axis=-1)
    grouped = codes.reshape(*scales.shape, -1)
    scales, biases = scales.astype(np.float64), biases.astype(np.float64)
    return (grouped * scales[..., None] + biases[..., None]).reshape(len(words), -1)


def window_nlls(model, tokens, context_length, stride):
    """Return -ln p of every scored token, one window at a time, token by token."""
    nlls, seen = [], 0
    for start in range(0, len(tokens), stride):
        end = min(start + context_length, len(tokens))
        log_p = model(tokens[start:end])
        for position in range(max(seen, start + 1), end):
            nlls.append(-log_p[position - start - 1, tokens[position]])
        seen = end
        if end == len(tokens):
            break
    return np.array(nlls)
