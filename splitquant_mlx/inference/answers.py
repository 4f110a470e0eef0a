"""One answer under way: tokens in, what the model says, thinks and calls out."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, NamedTuple

from splitquant_mlx.inference.engine import Engine, Job, Plan, Scored
from splitquant_mlx.inference.stops import NORMAL, TOOL, Piece, Reader
from splitquant_mlx.inference.token_text import Placed, Texts

BEGIN, END = "begin", "end"  # kinds of parts, besides NORMAL, REASONING and TOOL
KEEPALIVE_S = 5.0


class Part(NamedTuple):
    """What an answer says next; one without text shows now and then that it is under way.

    Args:
        kind: BEGIN, NORMAL, REASONING, TOOL or END.
        text: of the prompt for BEGIN, if it is to be repeated.
        tokens: computed since the part before.
        calls: for TOOL, as OpenAI's API gives them.
        finish: for END, why it ends there.
    """

    kind: str
    text: str = ""
    tokens: tuple[Placed, ...] = ()
    calls: tuple[dict[str, Any], ...] = ()
    finish: str | None = None


class Answer:
    """An answer to compute and read.

    Args:
        plan: to compute.
        reader: of the text.
        detokenizer: mlx-lm's, to which the token before the answer was given.
        texts: of tokens.
        parse: returns the calls that a text makes, or fails.
        parallel: whether to go on after the first call.
        echo: text to repeat first.
    """

    def __init__(
        self,
        plan: Plan,
        reader: Reader,
        detokenizer: Any,
        texts: Texts,
        *,
        parse: Callable[[str], Any] = json.loads,
        parallel: bool = True,
        echo: str = "",
    ) -> None:
        self.plan, self.job, self.completion_tokens = plan, Job(plan), 0
        self._reader, self._detokenizer, self._texts = reader, detokenizer, texts
        self._parse, self._parallel, self._echo = parse, parallel, echo
        self._length = reader.position = len(echo)
        self._waiting: list[Placed] = []  # tokens that no part has told of yet
        self._calls = 0
        self._events: asyncio.Queue[Any] = asyncio.Queue()

    def start(self, engine: Engine) -> "Answer":
        """Have the answer computed."""
        loop = asyncio.get_running_loop()

        def emit(event: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody is there to hear
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        self.job.emit = emit
        engine.submit(self.job)
        return self

    async def parts(self) -> AsyncIterator[Part]:
        """Yield what comes, to the end. Raises what ends the answer early."""
        scored = await self._event() if self.plan.score_prompt else []
        yield Part(BEGIN, self._echo, tuple(self._texts.place(scored, self._echo)))
        finish = None
        while finish is None:
            try:
                pieces, finish = self._read(await asyncio.wait_for(self._event(), KEEPALIVE_S))
            except asyncio.TimeoutError:
                pieces = [(NORMAL, "")]
            for piece in pieces:
                yield self._part(*piece)
            if self._calls and not self._parallel:
                finish = "stop"
        self.job.cancelled = True
        finish = "tool_calls" if self._calls and finish == "stop" else finish
        yield Part(END, tokens=self._told(), finish=finish)

    async def _event(self) -> Any:
        event = await self._events.get()
        if isinstance(event, Exception):
            raise event
        return event

    def _read(self, scored: Scored) -> tuple[list[Piece], str | None]:
        """Return what a token adds to the text, and whether the answer ends with it."""
        token, _, _, finish = scored
        if token is None:
            return [], finish
        self.completion_tokens += 1
        if finish != "stop":  # the token of the end has no text
            self._waiting.append((scored, self._length))
            self._detokenizer.add_token(token)
        if finish:
            self._detokenizer.finalize()
        text = self._detokenizer.last_segment
        self._length += len(text)
        pieces = self._reader.feed(text, last=finish is not None)
        if not self._reader.stopped:
            return pieces, finish
        self._waiting = [t for t in self._waiting if t[1] < self._reader.position]
        return pieces, "stop"

    def _part(self, kind: str, text: str) -> Part:
        if kind != TOOL:
            return Part(kind, text, self._told())
        try:
            found = self._parse(text)
            found = found if isinstance(found, list) else [found]
            calls = tuple(map(self._call, found if self._parallel else found[:1]))
        except Exception:  # parsers raise what they like; the text was cut off, mostly
            return Part(NORMAL, text, self._told())
        return Part(kind, tokens=self._told(), calls=calls)

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        name, given = str(call["name"]), call.get("arguments") or {}
        given = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        function = {"name": name, "arguments": given}
        self._calls += 1
        index, name = self._calls - 1, new_id("call_")
        return {"index": index, "id": name, "type": "function", "function": function}

    def _told(self) -> tuple[Placed, ...]:
        told, self._waiting = tuple(self._waiting), []
        return told


def new_id(prefix: str) -> str:
    """Return a new id."""
    return prefix + uuid.uuid4().hex[:24]
