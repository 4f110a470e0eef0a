"""The size of the caches of a context, from the shapes of a lazy call."""

import pytest
import tiny

from splitquant_mlx.models.architecture import build_model
from splitquant_mlx.models.footprint import context_bytes, context_length

KEYS_AND_VALUES = 2 * 2 * tiny.KV_HEADS * tiny.HEAD_DIM  # bytes per layer and token
GPT2 = {
    **{"model_type": "gpt2", "n_ctx": 64, "n_positions": 64, "n_embd": 32, "n_head": 4},
    **{"n_layer": 1, "layer_norm_epsilon": 1e-5, "vocab_size": 128, "num_key_value_heads": 4},
}
LATENT = {
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "q_lora_rank": 48,
    "moe_intermediate_size": 32,
    "rope_scaling": None,
}


@pytest.mark.parametrize(
    ("config", "bytes_for_100"),
    [
        (tiny.make_config("llama"), 100 * tiny.LAYERS * KEYS_AND_VALUES),
        # one of the layers has a window of 32 tokens
        (tiny.make_config("gemma3_text"), (100 + 32) * KEYS_AND_VALUES),
        # the latent vector and the rotated part of the keys
        (tiny.make_config("llama") | LATENT | {"model_type": "deepseek_v3"}, 100 * 2 * 2 * 40),
    ],
    ids=["all tokens", "a window", "latent attention"],
)
def test_bytes_of_a_context(tmp_path, config, bytes_for_100):
    assert context_bytes(build_model(tmp_path, config), 100) == bytes_for_100


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        (tiny.make_config("llama"), 256),
        (GPT2, 64),
    ],
    ids=["llama", "gpt2"],
)
def test_context_length_by_the_names_of_each_architecture(tmp_path, config, tokens):
    assert context_length(build_model(tmp_path, config)) == tokens
