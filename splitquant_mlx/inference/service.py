"""From a checked request to the answers to compute: prompts to tokens, settings for the rest."""

import json
from inspect import signature
from typing import Any

from mlx_lm.sample_utils import make_logits_processors

from splitquant_mlx.errors import one_line
from splitquant_mlx.inference.answers import Answer
from splitquant_mlx.inference.engine import Engine, Plan
from splitquant_mlx.inference.protocol import (
    ChatRequest,
    CompletionRequest,
    Refusal,
    Request,
    refuse,
)
from splitquant_mlx.inference.stops import NORMAL, REASONING, TOOL, Reader, marks_of
from splitquant_mlx.inference.token_text import Texts

SAMPLING = {"temp", "top_p", "top_k", "min_p"}
PENALTIES = set(signature(make_logits_processors).parameters)
RESERVED = {"tokenize", "add_generation_prompt", "tools", "return_dict", "chat_template"}


class Service:
    """Plans the answers of one model.

    Args:
        engine: computes them.
        names: of the model, first the one that clients are told.
        context: most tokens of a prompt and its answer together.
    """

    def __init__(self, engine: Engine, names: list[str], context: int) -> None:
        self.engine, self.names, self.context = engine, names, context
        self.settings, self.tokenizer = engine.settings, engine.tokenizer
        self.texts = Texts(self.tokenizer)

    def check_model(self, name: str | None) -> None:
        """Raise Refusal (404) for another model than the one served."""
        if name is None or name.rstrip("/").removeprefix("./") in self.names:
            return
        message = (
            f"the model {name!r:.80} is not served here: ask for {self.names[0]!r}, or name it so "
            "with --served-model-name where the server is started"
        )
        raise Refusal(404, message, param="model", code="model_not_found")

    def chat(self, request: ChatRequest) -> Answer:
        """Return the answer to compute for a chat completion. Raises Refusal."""
        tokenizer, schema, grammar = self.tokenizer, request.schema(), None
        forced = bool(request.forced_tools())
        tools = [tool.model_dump(exclude_none=True) for tool in request.tools]
        tools = [] if request.tool_choice == "none" else tools
        if tools and not forced and not tokenizer.has_tool_calling:
            message = "tools: this model's chat template has none: leave them out, or require one"
            raise Refusal(400, message, param="tools")
        if schema is not None:
            if self.engine.draft_model is not None:
                raise Refusal(400, "JSON and forced tools: not with a draft model")
            grammar = self.engine.grammars.of_schema(schema)
        text = self._render(request, tools, thinking=grammar is None)
        prompt = self._encode(text, special=not tokenizer.has_chat_template)
        top = request.top_logprobs if request.logprobs else None
        plan = self._plan(request, prompt, top=top, grammar=grammar)
        if grammar is not None:
            marks, state = {}, TOOL if forced else NORMAL
        else:
            marks = marks_of(tokenizer, tools=bool(tools))
            state = getattr(tokenizer, "response_initial_state", None) or NORMAL
            begin, end = tokenizer.think_start, tokenizer.think_end
            if begin and text.rfind(begin) > text.rfind(end):
                state = REASONING

        def parse(said: str) -> Any:
            return json.loads(said) if forced else tokenizer.tool_parser(said, tools)

        return Answer(
            plan,
            Reader(request.stop, marks, state),
            tokenizer.detokenizer,
            self.texts,
            parse=parse,
            parallel=request.parallel_tool_calls,
        )

    def completions(self, request: CompletionRequest) -> list[Answer]:
        """Return the answers to compute, one per prompt. Raises Refusal."""
        answers, vocab_size = [], self.engine.vocab_size
        for given in request.prompt:
            prompt = self._encode(given) if isinstance(given, str) else given
            if any(not 0 <= token < vocab_size for token in prompt):
                refuse("prompt", f"expected token ids below {vocab_size}", prompt)
            score = request.echo and request.logprobs is not None
            plan = self._plan(request, prompt, top=request.logprobs, score_prompt=score)
            echo = self.tokenizer.decode(prompt, skip_special_tokens=True) if request.echo else ""
            detokenizer = self.tokenizer.detokenizer
            for token in self._encode("a", special=False)[-1:]:  # or the first space would be lost
                detokenizer.add_token(token)
                detokenizer.last_segment  # noqa: B018  reading takes it away
            reader = Reader(request.stop, {})
            answers.append(Answer(plan, reader, detokenizer, self.texts, echo=echo))
        return answers

    def _plan(self, request: Request, prompt: list[int], **rest: Any) -> Plan:
        settings, count, vocab_size = self.settings, len(prompt), self.engine.vocab_size
        newer = getattr(request, "max_completion_tokens", None)
        most = request.max_tokens if newer is None else newer
        if most == 0 and not getattr(request, "echo", False):
            refuse("max_tokens", "expected 1 or more without echo", 0)
        limit = min(settings.max_prompt_tokens or self.context, self.context - (most != 0))
        if not 0 < count <= limit:
            message = f"the prompt has {count} tokens, expected 1 to {limit}"
            raise Refusal(400, message, code="context_length_exceeded" if count else None)
        if any(int(token) >= vocab_size for token in request.logit_bias):
            refuse("logit_bias", f"expected token ids below {vocab_size}", request.logit_bias)
        left = min(settings.max_tokens_limit, self.context - count)
        most = settings.max_tokens if most is None else most
        sampling = {name: getattr(settings, name) for name in SAMPLING}
        sampling |= request.model_dump(include=SAMPLING, exclude_none=True)
        sampling["top_k"] = sampling["top_k"] if 0 < sampling["top_k"] < vocab_size else 0
        return Plan(
            prompt=prompt,
            max_tokens=left if most in (None, -1) else min(most, left),
            sampling=sampling,
            penalties=request.model_dump(include=PENALTIES),
            seed=request.seed,
            **rest,
        )

    def _render(self, request: ChatRequest, tools: list[dict[str, Any]], thinking: bool) -> str:
        """Return the prompt that a conversation makes."""
        messages = request.conversation()
        if not self.tokenizer.has_chat_template:
            return "\n".join(message["content"] for message in messages)
        variables = {**self.settings.template_variables(), **request.chat_template_kwargs}
        if wrong := RESERVED & set(variables):
            expected = "expected variables of the chat template"
            refuse("chat_template_kwargs", expected, sorted(wrong))
        if request.reasoning_effort is not None:
            variables["reasoning_effort"] = request.reasoning_effort
        if not thinking:
            variables["enable_thinking"] = False
        if tools:
            variables["tools"] = tools
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **variables
            )
        except Exception as exc:  # a template raises what it likes
            message = f"the chat template refuses these messages: {one_line(exc)}"
            raise Refusal(400, message, param="messages") from exc

    def _encode(self, text: str, *, special: bool = True) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=special))
