"""The shapes of OpenAI's answers: completions and chat completions, in chunks or whole."""

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from splitquant_mlx.inference.answers import BEGIN, END, Answer, Part, new_id
from splitquant_mlx.inference.protocol import ChatRequest, CompletionRequest
from splitquant_mlx.inference.service import Service
from splitquant_mlx.inference.stops import REASONING, TOOL

Chunk = dict[str, Any]


class Completions:
    """/v1/completions, and what other paths share with it.

    Args:
        service: plans the answers.
    """

    kind: type[Any] = CompletionRequest
    object, chunk_object, prefix = "text_completion", "text_completion", "cmpl-"
    named_events = False

    def __init__(self, service: Service) -> None:
        self.service = service

    def answers(self, request: Any) -> list[Answer]:
        """Return the answers to compute. Raises Refusal."""
        return self.service.completions(request)

    def choice(self, request: Any, part: Part) -> Chunk:
        """Return what a part of an answer adds to its choice: lists, strings, what comes once."""
        wanted = request.logprobs is not None and part.tokens
        logprobs = self.service.texts.completion_logprobs(part.tokens) if wanted else None
        return {"text": part.text, "logprobs": logprobs, "finish_reason": part.finish}

    async def chunks(self, request: Any, answers: Sequence[Answer]) -> AsyncIterator[Chunk]:
        """Yield what a stream consists of."""
        head = self.envelope(self.chunk_object)
        for index, answer in enumerate(answers):
            async for part in answer.parts():
                yield {**head, "choices": [{"index": index, **self.choice(request, part)}]}
        if request.stream_options.get("include_usage") or not request.stream:
            yield {**head, "choices": [], "usage": usage_of(answers)}

    def collect(self, chunks: Sequence[Chunk]) -> Chunk:
        """Return the chunks of a stream in one."""
        choices: dict[int, Chunk] = {}
        for chunk in chunks:
            for choice in chunk["choices"]:
                _merge(choices.setdefault(choice["index"], {}), choice)
        return {**chunks[-1], "object": self.object, "choices": list(choices.values())}

    def envelope(self, kind: str) -> Chunk:
        """Return what all chunks of an answer share."""
        created, model = int(time.time()), self.service.names[0]
        return {"id": new_id(self.prefix), "object": kind, "created": created, "model": model}


class Chat(Completions):
    """/v1/chat/completions."""

    kind = ChatRequest
    object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def answers(self, request: ChatRequest) -> list[Answer]:
        """Return the one answer to compute."""
        return [self.service.chat(request)]

    def choice(self, request: ChatRequest, part: Part) -> Chunk:
        """Return what a part of an answer adds to its message."""
        delta: Chunk = {"content": part.text}
        if part.kind == BEGIN:
            delta = {"role": "assistant", "content": ""}
        elif part.kind == REASONING:
            delta = {"reasoning": part.text, "reasoning_content": part.text}
        elif part.kind == TOOL:
            delta = {"tool_calls": list(part.calls)}
        elif part.kind == END:
            delta = {}
        wanted = request.logprobs and part.tokens
        logprobs = self.service.texts.chat_logprobs(part.tokens) if wanted else None
        return {"delta": delta, "logprobs": logprobs, "finish_reason": part.finish}

    def collect(self, chunks: Sequence[Chunk]) -> Chunk:
        """Return the chunks of a stream in one."""
        answer = super().collect(chunks)
        choice = answer["choices"][0]
        choice["message"] = message = choice.pop("delta")
        if "tool_calls" in message:
            message["content"] = message["content"] or None
            message["tool_calls"] = [
                {k: v for k, v in call.items() if k != "index"} for call in message["tool_calls"]
            ]
        return answer


def _merge(whole: Chunk, part: Chunk) -> None:
    """Add a part of a choice to what there is of it."""
    for name, value in part.items():
        before = whole.get(name)
        if isinstance(value, dict) and before:
            _merge(before, value)
        elif isinstance(value, str | list) and before:
            whole[name] += value
        elif value is not None or name not in whole:
            whole[name] = value


def usage_of(answers: Sequence[Answer]) -> Chunk:
    """Return the token counts of answers together."""
    prompt = sum(len(answer.plan.prompt) for answer in answers)
    said = sum(answer.completion_tokens for answer in answers)
    cached = {"cached_tokens": sum(answer.job.cached for answer in answers)}
    counts = {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}
    return {**counts, "prompt_tokens_details": cached}
