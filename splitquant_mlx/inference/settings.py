"""Settings of the HTTP server: one field for each option of `serve`."""

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
    """Settings of the HTTP server; each field has the help text of its option.

    Raises:
        RecipeError: when a setting is out of range.
    """

    host: Annotated[str, "Address to listen on."] = "127.0.0.1"
    port: Annotated[int, "Port to listen on; 0 for any free port.", Field(ge=0, le=65535)] = 8080
    api_key: Annotated[str | None, "Key that clients must send; visible in process lists."] = None
    allowed_origins: Annotated[Names, "Origin whose web pages are allowed; * for all.", LIST] = ()
    served_model_name: Annotated[Names, "Additional name of the model for clients.", LIST] = ()
    max_request_bytes: Annotated[int, "Maximum size of a request's body.", ABOVE_0] = 4 * 2**20
    max_prompt_tokens: Annotated[
        int | None, "Maximum prompt length; by default the context length.", ABOVE_0
    ] = None
    max_tokens_limit: Annotated[int, "Upper limit of max_tokens in requests.", ABOVE_0] = 8192
    max_concurrent: Annotated[int, "Maximum concurrent requests; others get 429.", ABOVE_0] = 16
    request_timeout: Annotated[float, "Seconds to send a request or read an answer.", ABOVE_0] = (
        30.0
    )
    max_tokens: Annotated[int | None, "Default maximum tokens per answer.", ABOVE_0] = None
    temp: Annotated[float, "Default temperature.", Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, "Default top_p.", UP_TO_1] = 1.0
    top_k: Annotated[int, "Default top_k; 0 for all tokens.", Field(ge=0)] = 0
    min_p: Annotated[float, "Default min_p.", UP_TO_1] = 0.0
    adapter_path: Annotated[str | None, "Directory of a LoRA adapter."] = None
    draft_model: Annotated[str | None, "Small model for speculative decoding; no batching."] = None
    num_draft_tokens: Annotated[int, "Tokens that the draft model proposes.", ABOVE_0] = 3
    chat_template: Annotated[str | None, "Chat template to use instead of the model's."] = None
    chat_template_args: Annotated[str, "Variables of the chat template, a JSON object."] = "{}"
    decode_concurrency: Annotated[int, "Maximum answers per batch.", ABOVE_0] = 32
    prompt_concurrency: Annotated[int, "Maximum prompts per batch.", ABOVE_0] = 8
    prefill_step_size: Annotated[int, "Prompt tokens per prefill step.", ABOVE_0] = 2048
    prompt_cache_size: Annotated[int, "Maximum KV caches in the prompt cache.", ABOVE_0] = 10
    prompt_cache_bytes: Annotated[int | None, "Maximum bytes of the prompt cache.", ABOVE_0] = None
    kv_bits: Annotated[KVBits | None, "Quantize the KV cache to this many bits; no batching."] = (
        None
    )
    kv_group_size: Annotated[KVGroupSize, "Group size of the quantized KV cache."] = 64
    quantized_kv_start: Annotated[int, "Position at which to start quantizing the KV cache."] = 5000
    pipeline: Annotated[bool, "Split the model by layers instead of within each layer."] = False
    log_level: Annotated[Level, "DEBUG, INFO (each request), WARNING, ERROR or CRITICAL."] = "INFO"

    def __post_init__(self) -> None:
        key = self.api_key
        if key is not None and not (key.isprintable() and key == key.strip() != ""):
            raise RecipeError(
                "expected printable characters without surrounding spaces", field="api_key"
            )
        self.template_variables()

    def template_variables(self) -> dict[str, Any]:
        """Return the variables in `chat_template_args`."""
        return json_object("chat_template_args", self.chat_template_args)


def json_object(name: str, text: str) -> dict[str, Any]:
    """Parse the setting `name` as a JSON object. Raises RecipeError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise RecipeError(f"expected JSON, got {text!r:.80}: {exc}", field=name) from exc
    if not isinstance(value, dict):
        raise RecipeError(f"expected a JSON object such as {{}}, got {text:.80}", field=name)
    return value
