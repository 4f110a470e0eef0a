"""Render a tokenizer's chat template."""

from collections.abc import Mapping, Sequence
from typing import Any

from splitquant_mlx.errors import CheckpointError, one_line


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    *,
    continues: bool = False,
) -> str:
    """Return the prompt for the assistant's next message.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper, with a chat template.
        messages: `role` and `content` of each.
        variables: further variables for the template.
        continues: whether the model continues the last message.

    Raises:
        CheckpointError: when the template fails.
    """
    try:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            continue_final_message=continues,
            add_generation_prompt=not continues,
            **variables,
        )
    except Exception as exc:  # a template can raise anything
        raise CheckpointError(
            f"the chat template fails on these messages: {type(exc).__name__}: {one_line(exc)}"
        ) from exc
