"""Settings of the HTTP server: one field per option of `serve`."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from splitquant_mlx.errors import RecipeError
from splitquant_mlx.inference.decoding import KVBits, KVGroupSize
from splitquant_mlx.settings import settings

ABOVE_0, UP_TO_1, LIST = Field(gt=0), Field(ge=0, le=1), Field(strict=False)
Level = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
Names = tuple[str, ...]


@settings
class ServeSettings:
    """Settings of the HTTP server; the text at each field is the help of its option.

    Raises:
        RecipeError: a setting is out of range.
    """

    host: Annotated[str, "Address to listen on."] = "127.0.0.1"
    port: Annotated[int, "Port to listen on; 0 takes any free one.", Field(ge=0, le=65535)] = 8080
    api_key: Annotated[str | None, "Key that clients must send; process lists show it."] = None
    allowed_origins: Annotated[Names, "Origin whose pages may use it; * for all.", LIST] = ()
    served_model_name: Annotated[Names, "Name of the model for clients, too.", LIST] = ()
    max_request_bytes: Annotated[int, "Largest body of a request.", ABOVE_0] = 4 * 2**20
    max_prompt_tokens: Annotated[int | None, "Longest prompt, if not the context.", ABOVE_0] = None
    max_tokens_limit: Annotated[int, "Longest answer, whatever a request asks for.", ABOVE_0] = 8192
    max_concurrent: Annotated[int, "Requests answered at a time; one more gets 429.", ABOVE_0] = 16
    request_timeout: Annotated[float, "Seconds to send a request or read an answer.", ABOVE_0] = (
        30.0
    )
    max_tokens: Annotated[int | None, "Longest answer, unless a request says.", ABOVE_0] = None
    temp: Annotated[float, "Temperature, unless a request says.", Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, "top_p, unless a request says.", UP_TO_1] = 1.0
    top_k: Annotated[int, "top_k, unless a request says; 0 for all.", Field(ge=0)] = 0
    min_p: Annotated[float, "min_p, unless a request says.", UP_TO_1] = 0.0
    adapter_path: Annotated[str | None, "Directory of a LoRA adapter."] = None
    draft_model: Annotated[str | None, "Small model for speculative decoding; no batches."] = None
    num_draft_tokens: Annotated[int, "Tokens that the draft model proposes.", ABOVE_0] = 3
    chat_template: Annotated[str | None, "Chat template instead of the model's."] = None
    chat_template_args: Annotated[str, "Variables of the chat template, a JSON object."] = "{}"
    decode_concurrency: Annotated[int, "Answers computed in one batch.", ABOVE_0] = 32
    prompt_concurrency: Annotated[int, "Prompts computed in one batch.", ABOVE_0] = 8
    prefill_step_size: Annotated[int, "Tokens of a prompt computed at a time.", ABOVE_0] = 2048
    prompt_cache_size: Annotated[int, "KV caches of earlier prompts that are kept.", ABOVE_0] = 10
    prompt_cache_bytes: Annotated[int | None, "Most bytes of the KV caches kept.", ABOVE_0] = None
    kv_bits: Annotated[KVBits | None, "Bits of a quantized KV cache; no batches."] = None
    kv_group_size: Annotated[KVGroupSize, "Group size of a quantized KV cache."] = 64
    quantized_kv_start: Annotated[int, "Token where the KV cache begins to be quantized."] = 5000
    pipeline: Annotated[bool, "Divide the layers among the ranks, not each layer."] = False
    log_level: Annotated[Level, "DEBUG, INFO (each request), WARNING, ERROR or CRITICAL."] = "INFO"

    def __post_init__(self) -> None:
        key = self.api_key
        if key is not None and not (key.isprintable() and key == key.strip() != ""):
            raise ValueError("api_key: expected printable characters without spaces around them")
        self.template_variables()

    def template_variables(self) -> dict[str, Any]:
        """Return the variables that `chat_template_args` gives to the chat template."""
        return json_object("chat_template_args", self.chat_template_args)


def json_object(name: str, text: str) -> dict[str, Any]:
    """Return the JSON object that a setting is. Raises RecipeError, with its name, for another."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise RecipeError(f"{name}: {text!r:.80} is not JSON: {exc}") from exc
    if not isinstance(value, dict):
        raise RecipeError(f"{name}: expected a JSON object such as {{}}, got {text:.80}")
    return value
