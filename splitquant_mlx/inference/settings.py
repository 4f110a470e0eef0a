"""Settings of the HTTP server: one field per option of `serve`."""

import json
from dataclasses import dataclass
from typing import Annotated, Any

from splitquant_mlx.errors import RecipeError

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
ONE_OF = {"kv_bits": (None, 2, 3, 4, 5, 6, 8), "kv_group_size": (32, 64, 128), "log_level": LEVELS}
UP_TO = {"port": 65535, "temp": 2, "top_p": 1, "min_p": 1, "top_k": 2**31}
Names = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Settings of the HTTP server; the text at each field is the help of its option.

    Raises:
        RecipeError: a setting is out of range.
    """

    host: Annotated[str, "Address to listen on."] = "127.0.0.1"
    port: Annotated[int, "Port to listen on; 0 takes any free one."] = 8080
    api_key: Annotated[str | None, "Key that clients must send; process lists show it."] = None
    allowed_origins: Annotated[Names, "Origin whose web pages may use the server; * for all."] = ()
    served_model_name: Annotated[Names, "Name of the model for clients, besides its own."] = ()
    max_request_bytes: Annotated[int, "Largest body of a request."] = 4 * 2**20
    max_prompt_tokens: Annotated[int | None, "Longest prompt; else the model's context."] = None
    max_tokens_limit: Annotated[int, "Longest answer, whatever a request asks for."] = 8192
    max_concurrent: Annotated[int, "Requests answered at a time; one more gets status 429."] = 16
    request_timeout: Annotated[float, "Seconds for a request to arrive and be read."] = 30.0
    max_tokens: Annotated[int | None, "Longest answer, where a request does not say."] = None
    temp: Annotated[float, "Sampling temperature, where a request does not say."] = 0.0
    top_p: Annotated[float, "top_p, where a request does not say."] = 1.0
    top_k: Annotated[int, "top_k, where a request does not say; 0 samples from all tokens."] = 0
    min_p: Annotated[float, "min_p, where a request does not say."] = 0.0
    adapter_path: Annotated[str | None, "Directory of a LoRA adapter."] = None
    draft_model: Annotated[str | None, "Small model for speculative decoding; no batches."] = None
    num_draft_tokens: Annotated[int, "Tokens that the draft model proposes at a time."] = 3
    chat_template: Annotated[str | None, "Chat template instead of the model's."] = None
    chat_template_args: Annotated[str, "Variables of the chat template, a JSON object."] = "{}"
    decode_concurrency: Annotated[int, "Answers computed in one batch."] = 32
    prompt_concurrency: Annotated[int, "Prompts computed in one batch."] = 8
    prefill_step_size: Annotated[int, "Tokens of a prompt computed at a time."] = 2048
    prompt_cache_size: Annotated[int, "KV caches of earlier prompts that are kept."] = 10
    prompt_cache_bytes: Annotated[int | None, "Most bytes of the KV caches kept."] = None
    kv_bits: Annotated[int | None, "Bits of a quantized KV cache; no batches."] = None
    kv_group_size: Annotated[int, "Group size of a quantized KV cache."] = 64
    quantized_kv_start: Annotated[int, "Token from which on the KV cache is quantized."] = 5000
    pipeline: Annotated[bool, "Divide the layers among the ranks, not each layer."] = False
    log_level: Annotated[str, f"{', '.join(LEVELS)}; INFO logs each request."] = "INFO"

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            right, expected = True, ""
            if name in ONE_OF:
                right, expected = value in ONE_OF[name], f"one of {ONE_OF[name]}"
            elif name in UP_TO:
                right, expected = 0 <= value <= UP_TO[name], f"0 to {UP_TO[name]}"
            elif isinstance(value, int | float) and name != "quantized_kv_start":
                right, expected = value is False or 0 < value < float("inf"), "a number above 0"
            elif name == "api_key" and isinstance(value, str):
                right = value.isprintable() and value == value.strip() != ""
                expected, value = "printable characters without spaces around them", "others"
            if not right:
                raise RecipeError(f"--{name.replace('_', '-')}: expected {expected}, got {value}")
        self.template_variables()

    def template_variables(self) -> dict[str, Any]:
        """Return the variables that `chat_template_args` gives to the chat template."""
        try:
            return dict(**json.loads(self.chat_template_args))
        except (ValueError, TypeError) as exc:
            raise RecipeError(f"--chat-template-args: expected a JSON object: {exc}") from exc
