"""Convert fused or separate experts to the layout that mlx-lm's models read.

Newer programs store all experts of a layer as two arrays. gpt-oss: `gate_up_proj` (experts, hidden,
2 inner) with gate and up interleaved, `down_proj` (experts, inner, hidden), and their biases.
Others: (experts, 2 inner, hidden) with the gate first. mlx-lm does not read these for the
architectures below; for some it reads only the stacks of the original checkpoint, neither
transposed nor as separate experts.
"""

import re

import mlx.core as mx

STACK = ".experts.gate_up_proj"
# model_type -> mlx-lm's name of the module that contains the experts
BLOCKS = {
    "mixtral": "block_sparse_moe",
    "lfm2_moe": "feed_forward",
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "olmoe", "qwen3_vl_moe"), "mlp"),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "ernie4_5_moe"), "mlp"),
    **dict.fromkeys(("glm4_moe", "glm4_moe_lite"), "mlp"),
}
EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(\w+\.weight)")
# input projections of an expert, and the name of its output projection
INPUT, OUTPUT = re.compile(r"(\.experts\.\d+)\.(gate|up)_proj\.weight$"), r"\1.down_proj.weight"
# model types whose separate experts mlx-lm does not stack
STACKED = {"qwen3_5_moe"}


def separate_experts(tensors: dict[str, mx.array], model_type: str) -> dict[str, mx.array]:
    """Return the tensors with experts in mlx-lm's layout, lazily; see above."""
    if model_type == "longcat_flash":  # drop unused projections of its identity experts
        return {n: w for n, w in tensors.items() if INPUT.sub(OUTPUT, n) in tensors}
    if model_type in STACKED:
        return _stacked(tensors)
    if not any(name.endswith(STACK) for name in tensors):
        return tensors
    if model_type == "gpt_oss":
        return _gpt_oss(tensors)
    if model_type not in BLOCKS:
        return tensors
    result = dict(tensors)
    for name in [name for name in tensors if name.endswith(STACK)]:
        layer = name.removesuffix(STACK).rpartition(".")[0]
        stack = f"{layer}.{BLOCKS[model_type]}.switch_mlp"
        down = name.replace("gate_up_proj", "down_proj")
        if down in result and result[name].shape[1] != 2 * result[down].shape[2]:
            continue  # (experts, in, out), which mlx-lm reads
        gate, up = mx.split(result.pop(name), 2, axis=1)
        result |= {f"{stack}.gate_proj.weight": gate, f"{stack}.up_proj.weight": up}
        if down in result:
            result[f"{stack}.down_proj.weight"] = result.pop(down)
    return result


def _stacked(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    result, experts = {}, {}
    for name, w in tensors.items():
        if match := EXPERT.fullmatch(name):
            experts.setdefault((match[1], match[3]), {})[int(match[2])] = w
        else:
            result[name] = w
    for (block, leaf), weights in experts.items():
        result[f"{block}.switch_mlp.{leaf}"] = mx.stack([weights[n] for n in sorted(weights)])
    return result


def _gpt_oss(tensors: dict[str, mx.array]) -> dict[str, mx.array]:
    result = {}
    for name, w in tensors.items():
        stem, _, leaf = name.rpartition(".")
        if leaf == "gate_up_proj":
            result[f"{stem}.gate_proj.weight"] = w[..., ::2].swapaxes(-1, -2)
            result[f"{stem}.up_proj.weight"] = w[..., 1::2].swapaxes(-1, -2)
        elif leaf == "gate_up_proj_bias":
            result[f"{stem}.gate_proj.bias"] = w[..., ::2]
            result[f"{stem}.up_proj.bias"] = w[..., 1::2]
        elif leaf == "down_proj":
            result[f"{stem}.down_proj.weight"] = w.swapaxes(-1, -2)
        elif leaf == "down_proj_bias":
            result[f"{stem}.down_proj.bias"] = w
        else:
            result[name] = w
    return result
