"""Name the experts of fused stacks as mlx-lm's models want them.

Newer programs store all experts of a layer as two arrays. gpt-oss: `gate_up_proj` (experts, hidden,
2 inner) with gate and up in turn, `down_proj` (experts, inner, hidden), and their biases. Others:
(experts, 2 inner, hidden) with the gate first. mlx-lm reads neither for the architectures here; of
some it reads the stacks as first published alone, neither turned nor expert by expert.
"""

import re

import mlx.core as mx

STACK = ".experts.gate_up_proj"
# where mlx-lm has the experts of a block: model_type -> name of the block
BLOCKS = {
    "mixtral": "block_sparse_moe",
    "lfm2_moe": "feed_forward",
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "olmoe", "qwen3_vl_moe"), "mlp"),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "ernie4_5_moe"), "mlp"),
    **dict.fromkeys(("glm4_moe", "glm4_moe_lite"), "mlp"),
}
EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(\w+\.weight)")
# what an expert reads its input by, and what it is nothing without
INPUT, OUTPUT = re.compile(r"(\.experts\.\d+)\.(gate|up)_proj\.weight$"), r"\1.down_proj.weight"
# of these mlx-lm stacks no experts by itself
STACKED = {"qwen3_5_moe"}


def separate_experts(tensors: dict[str, mx.array], model_type: str) -> dict[str, mx.array]:
    """Return the tensors, fused stacks of experts (see above) as three, lazily."""
    if model_type == "longcat_flash":  # of experts that pass their input on, never used
        return {n: w for n, w in tensors.items() if INPUT.sub(OUTPUT, n) in tensors}
    if model_type in STACKED:
        return _stacked(tensors)
    if not any(name.endswith(STACK) for name in tensors):
        return tensors
    if model_type == "gpt_oss":
        return _gpt_oss(tensors)
    if model_type not in BLOCKS:
        return tensors
    found = dict(tensors)
    for name in [name for name in tensors if name.endswith(STACK)]:
        layer = name.removesuffix(STACK).rpartition(".")[0]
        stack = f"{layer}.{BLOCKS[model_type]}.switch_mlp"
        down = name.replace("gate_up_proj", "down_proj")
        if down in found and found[name].shape[1] != 2 * found[down].shape[2]:
            continue  # inputs first, which mlx-lm reads by itself
        gate, up = mx.split(found.pop(name), 2, axis=1)
        found |= {f"{stack}.gate_proj.weight": gate, f"{stack}.up_proj.weight": up}
        if down in found:
            found[f"{stack}.down_proj.weight"] = found.pop(down)
    return found


def _stacked(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    found, experts = {}, {}
    for name, w in tensors.items():
        if match := EXPERT.fullmatch(name):
            experts.setdefault((match[1], match[3]), {})[int(match[2])] = w
        else:
            found[name] = w
    for (block, leaf), held in experts.items():
        found[f"{block}.switch_mlp.{leaf}"] = mx.stack([held[n] for n in sorted(held)])
    return found


def _gpt_oss(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    found = {}
    for name, w in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if leaf == "gate_up_proj":
            found[f"{stem}.gate_proj.weight"] = w[..., ::2].swapaxes(-1, -2)
            found[f"{stem}.up_proj.weight"] = w[..., 1::2].swapaxes(-1, -2)
        elif leaf == "gate_up_proj_bias":
            found[f"{stem}.gate_proj.bias"] = w[..., ::2]
            found[f"{stem}.up_proj.bias"] = w[..., 1::2]
        elif leaf == "down_proj":
            found[f"{stem}.down_proj.weight"] = w.swapaxes(-1, -2)
        elif leaf == "down_proj_bias":
            found[f"{stem}.down_proj.bias"] = w
        else:
            found[name] = w
    return found
