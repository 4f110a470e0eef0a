"""Restore parameters that llama.cpp's converters split, fuse or transform.

Each is computed from GGUF tensors of the same layer and the content of config.json.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import mlx.core as mx


class Joined(NamedTuple):
    """A parameter computed from others: their names after "blk.N.", and `join(config, *arrays)`."""

    sources: tuple[str, ...]
    join: Callable[..., mx.array]


Config = Mapping[str, Any]


def _kv_b(config: Config, k: mx.array, v: mx.array) -> mx.array:
    """Join k (heads, rank, nope) and v (heads, value, rank) to (heads (nope + value), rank)."""
    return mx.concatenate([k.swapaxes(1, 2), v], axis=1).reshape(-1, v.shape[-1])


def _split_kv_b(config: Config, kv_b: mx.array) -> tuple[mx.array, mx.array]:
    """Split (heads (nope + value), rank) as `_kv_b` joins it."""
    heads = kv_b.reshape(config["num_attention_heads"], -1, kv_b.shape[-1])
    k, v = mx.split(heads, [config["qk_nope_head_dim"]], axis=1)
    return k.swapaxes(1, 2), v


def _a_log(config: Config, a: mx.array) -> mx.array:
    return mx.log(-a).flatten()


def _qkvz(config: Config, qkv: mx.array, z: mx.array) -> mx.array:
    """Interleave by key head: its query, key, values and gates are consecutive rows."""
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    parts = [*mx.split(qkv, [keys, 2 * keys]), z]
    by_head = [w.reshape(config["linear_num_key_heads"], -1, w.shape[-1]) for w in parts]
    return mx.concatenate(by_head, axis=1).reshape(-1, z.shape[-1])


def _group_values(config: Config, w: mx.array, axis: int = 0) -> mx.array:
    """Reorder value heads from (value, key head) to (key head, value) order along `axis`."""
    keys = config["linear_num_key_heads"]
    values = config["linear_num_value_heads"] // keys
    heads = mx.unflatten(w, axis, (values, keys, -1))
    return mx.flatten(heads.swapaxes(axis, axis + 1), axis, axis + 2)


def _group_qkv_values(config: Config, w: mx.array) -> mx.array:
    """Reorder the value heads in rows of queries, keys and values."""
    keys = 2 * config["linear_num_key_heads"] * config["linear_key_head_dim"]
    return mx.concatenate([w[:keys], _group_values(config, w[keys:])])


def _qkv_part(number: int) -> Callable[..., mx.array]:
    return lambda config, qkv: mx.split(qkv, 3)[number]


# DeepSeek 2 and 3: a file may have either form of the key and value projections
LATENT = {
    "self_attn.kv_b_proj.weight": Joined(("attn_k_b.weight", "attn_v_b.weight"), _kv_b),
    "self_attn.embed_q.weight": Joined(("attn_kv_b.weight",), lambda c, w: _split_kv_b(c, w)[0]),
    "self_attn.unembed_out.weight": Joined(
        ("attn_kv_b.weight",), lambda c, w: _split_kv_b(c, w)[1]
    ),
}
FUSED_QKV = {
    f"self_attn.{name}_proj.{leaf}": Joined((f"attn_qkv.{leaf}",), _qkv_part(number))
    for number, name in enumerate("qkv")
    for leaf in ("weight", "bias")
}
DELTA_NET = {
    "linear_attn.A_log": Joined(("ssm_a",), _a_log),
    "linear_attn.in_proj_qkvz.weight": Joined(("attn_qkv.weight", "attn_gate.weight"), _qkvz),
}
GROUPED_DELTA_NET = {
    "linear_attn.A_log": Joined(("ssm_a",), lambda c, a: _group_values(c, _a_log(c, a))),
    "linear_attn.dt_bias": Joined(("ssm_dt.bias",), _group_values),
    "linear_attn.in_proj_a.weight": Joined(("ssm_alpha.weight",), _group_values),
    "linear_attn.in_proj_b.weight": Joined(("ssm_beta.weight",), _group_values),
    "linear_attn.in_proj_z.weight": Joined(("attn_gate.weight",), _group_values),
    "linear_attn.in_proj_qkv.weight": Joined(("attn_qkv.weight",), _group_qkv_values),
    "linear_attn.conv1d.weight": Joined(("ssm_conv1d.weight",), _group_qkv_values),
    "linear_attn.out_proj.weight": Joined(("ssm_out.weight",), lambda c, w: _group_values(c, w, 1)),
}
MAMBA = {
    "mamba.A_log": Joined(("ssm_a",), _a_log),
    "mamba.D": Joined(("ssm_d",), lambda config, d: d.flatten()),
    "mamba.norm.weight": Joined(("ssm_norm.weight",), lambda config, w: w.flatten()),
    "shared_mlp.input_linear.weight": Joined(
        ("ffn_gate_shexp.weight", "ffn_up_shexp.weight"),
        lambda config, gate, up: mx.concatenate([gate, up]),
    ),
}
