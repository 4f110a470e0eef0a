"""Restore the original names of tensors that transformers saves under different names."""

import re
from collections.abc import Mapping

import mlx.core as mx

# model_type -> patterns of transformers' names, and mlx-lm's names
RENAMED = {
    "mixtral": ((r"^(model\.layers\.\d+)\.mlp\.gate\.", r"\1.block_sparse_moe.gate."),),
    "nanochat": (
        (r"^model\.embed_tokens\.", "transformer.wte."),
        (r"^model\.layers\.(\d+)\.self_attn\.([qkv])_proj\.", r"transformer.h.\1.attn.c_\2."),
        (r"^model\.layers\.(\d+)\.self_attn\.o_proj\.", r"transformer.h.\1.attn.c_proj."),
        (r"^model\.layers\.(\d+)\.mlp\.fc1\.", r"transformer.h.\1.mlp.c_fc."),
        (r"^model\.layers\.(\d+)\.mlp\.fc2\.", r"transformer.h.\1.mlp.c_proj."),
    ),
    "olmo_hybrid": (
        (r"^(model\.layers\.\d+)\.attention_layer_norm\.", r"\1.input_layernorm."),
        (r"^(model\.layers\.\d+)\.feedforward_layer_norm\.", r"\1.post_attention_layernorm."),
    ),
}


def rename(tensors: Mapping[str, mx.array], model_type: str) -> dict[str, mx.array]:
    """Return the tensors of a checkpoint under the names that mlx-lm reads."""

    def renamed(name: str) -> str:
        for pattern, new in RENAMED.get(model_type, ()):
            name = re.sub(pattern, new, name)
        return name

    return {renamed(name): tensor for name, tensor in tensors.items()}
