"""Say where another program does not run a converted model as mlx-lm does.

mlx-vlm's Gemma 3 has a head of its own. It takes the embedding's weight for it, whether the head is
tied or not, and of a quantized embedding the codes without their scales, which fit nothing.
"""

from collections.abc import Sequence
from typing import Any

from splitquant_mlx.formats.manifest import LayerRecord

HEAD_FROM_EMBEDDING = ("gemma3", "gemma3_text")  # in mlx-vlm 0.7


def neighbour_notes(config: dict[str, Any], layers: Sequence[LayerRecord]) -> list[str]:
    """Return a sentence for each program that does not run a conversion of these layers."""
    if config["model_type"] not in HEAD_FROM_EMBEDDING:
        return []
    name = f"mlx-vlm's {config['model_type']}"
    if any(layer.kind == "lm_head" for layer in layers):
        return [f"{name} takes the embedding for the head, whatever is stored: use mlx-lm"]
    if any(layer.kind == "embedding" and layer.action == "quantize" for layer in layers):
        return [
            f"{name} does not load a quantized embedding without a head: where it is to run "
            "there, too, keep the embedding with --exclude '*embed_tokens'"
        ]
    return []
