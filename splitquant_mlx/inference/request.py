"""Check requests of OpenAI's API: bytes in, a body that mlx_lm.server can work with out.

mlx_lm.server computes with what it is given, in the one thread that serves everybody: a top_k
beyond the vocabulary, or a stop word that is a number, ends it. It also fetches pictures, drafts
and adapters from wherever a request says. So what gets through here has the right types, is within
bounds, and asks for the served model and for text.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from splitquant_mlx.errors import RecipeError
from splitquant_mlx.inference.fields import CHAT, COMMON, TEXT, Refusal, integer, refuse, show

ALIAS = "default_model"  # mlx_lm.server's word for the model it was started with


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Bound what one client can ask for, and all of them together.

    Args:
        max_request_bytes: of a request's body.
        max_tokens_limit: most tokens of an answer that a request may ask for.
        max_prompt_tokens: of a prompt after the chat template.
        max_concurrent: requests being answered at a time.
        request_timeout_s: within which a request must have arrived, and a piece of the answer left.

    Raises:
        RecipeError: a limit is not positive.
    """

    max_request_bytes: int = 2**20
    max_tokens_limit: int = 8192
    max_prompt_tokens: int = 32768
    max_concurrent: int = 16
    request_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < float("inf"):
                flag = name.removesuffix("_s").replace("_", "-")
                raise RecipeError(f"--{flag}: wanted a number above 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class Served:
    """Say what is on offer.

    Args:
        name: of the model, as /v1/models lists it.
        vocab_size: number of logits.
        limits: for every request.
        defaults: of fields, where a request does not say.
        template_parameters: what chat_template_kwargs must not set.
    """

    name: str
    vocab_size: int
    limits: Limits
    defaults: Mapping[str, Any]
    template_parameters: Collection[str] = ()


def check_request(raw: bytes, *, chat: bool, served: Served) -> dict[str, Any]:
    """Return the body of a completion request, ready for mlx_lm.server.

    Args:
        raw: the body as it arrived.
        chat: whether it must have messages, rather than a prompt.
        served: the model and the limits.

    Raises:
        Refusal: 400, or 404 for another model.
    """
    # OpenAI's null means: not given.
    given = {name: value for name, value in _parse(raw).items() if value is not None}
    body = {**served.defaults, **given}
    _check_model(body, served.name)
    body["model"] = served.name
    for name, check in (COMMON | (CHAT if chat else TEXT)).items():
        if name in body:
            body[name] = check(name, body[name])
    _check_tokens(body, served)
    _check_vocabulary(body, served.vocab_size)
    for name in body.get("chat_template_kwargs", {}):
        if name in served.template_parameters:
            refuse(name, "a variable of the chat template", name, "chat_template_kwargs")
    if (wanted := "messages" if chat else "prompt") not in body:
        raise Refusal(400, f"{wanted}: missing", param=wanted, code="missing_required_parameter")
    return body


def _parse(raw: bytes) -> dict[str, Any]:
    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a number of JSON")

    try:
        body = json.loads(raw.decode(), parse_constant=no_constant)
        # JSON can spell half a character, which no tokenizer takes.
        json.dumps(body, ensure_ascii=False).encode()
    except RecursionError as exc:
        raise Refusal(400, "the request is nested too deeply") from exc
    except ValueError as exc:  # of JSON, of UTF-8, or an integer of thousands of digits
        raise Refusal(400, f"the request is not JSON in UTF-8: {exc}") from exc
    if not isinstance(body, dict):
        raise Refusal(400, f"the request must be a JSON object, got {show(body)}")
    return body


def _check_model(body: dict[str, Any], name: str) -> None:
    model = body.get("model", name)
    if not isinstance(model, str):
        refuse("model", "a string", model)
    if model not in (name, ALIAS):
        raise Refusal(
            404, f"only {name!r} is served, not {model!r}", param="model", code="model_not_found"
        )
    if body.pop("draft_model", ALIAS) != ALIAS or "adapters" in body:
        raise Refusal(400, "draft models and adapters are chosen when the server starts")


def _check_tokens(body: dict[str, Any], served: Served) -> None:
    limit = served.limits.max_tokens_limit
    for name in ("max_tokens", "max_completion_tokens"):
        if name in body:
            body[name] = integer(1, limit)(name, body[name])


def _check_vocabulary(body: dict[str, Any], vocab_size: int) -> None:
    if body.get("top_k", 0) >= vocab_size:
        body["top_k"] = 0
    for token in body.get("logit_bias", {}):
        if not 0 <= int(token) < vocab_size:
            refuse("logit_bias", f"token ids below {vocab_size}", token)
