"""Read a model's text as it comes: what it says, thinks and calls, up to a stop string.

Markers and stop strings are looked for in the text, since tokenizers cut them as they like. Text
that may be the beginning of one is held back until more of it decides.
"""

from collections.abc import Iterable, Mapping
from typing import Any

NORMAL, REASONING, TOOL = "normal", "reasoning", "tool"  # as mlx-lm names them
Marks = dict[str, str | None]  # marker to the state after it; None ends the text
Piece = tuple[str, str]  # state and text


def marks_of(tokenizer: Any, *, tools: bool) -> dict[str, Marks]:
    """Return the markers of each state, as mlx-lm's TokenizerWrapper knows them.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
        tools: whether the model may call tools; if not, a call is text like any other.
    """
    marks: dict[str, Marks] = {NORMAL: {}, REASONING: {}, TOOL: {}}
    if tokenizer.has_thinking:
        marks[NORMAL][tokenizer.think_start] = REASONING
        marks[REASONING][tokenizer.think_end] = NORMAL
    if tools and tokenizer.has_tool_calling:
        marks[NORMAL][tokenizer.tool_call_start] = TOOL
        marks[REASONING][tokenizer.tool_call_start] = TOOL
        if tokenizer.tool_call_end:
            marks[TOOL][tokenizer.tool_call_end] = NORMAL
    return marks


class Reader:
    """Cut a text that comes in pieces at markers and stop strings.

    Args:
        stops: strings that end the text, where it is neither thought nor a call.
        marks: markers of each state.
        state: of the first character.
    """

    def __init__(
        self, stops: Iterable[str], marks: Mapping[str, Marks], state: str = NORMAL
    ) -> None:
        self.stopped = False
        self.position = 0  # of the first character not read yet; once stopped, of the stop string
        self._marks = {**marks, NORMAL: {**marks.get(NORMAL, {}), **dict.fromkeys(stops)}}
        self._state = state
        self._held = self._call = ""
        self._fresh = False  # right after a marker, white space is skipped

    def feed(self, text: str, *, last: bool = False) -> list[Piece]:
        """Return what can be said of the text now; a call comes as one piece, once it is whole."""
        self._held += text
        pieces: list[Piece] = []
        while not self.stopped:
            if self._fresh:
                self._take(len(self._held) - len(self._held.lstrip()))
                self._fresh = not self._held
            marks = self._marks[self._state]
            found = [(at + len(m), at, m) for m in marks if (at := self._held.find(m)) >= 0]
            if not found:
                keep = 0 if last else _begun(self._held, marks)
                pieces += self._say(len(self._held) - keep)
                break
            _, at, mark = min(found)  # the first that is complete, however the text is cut
            pieces += self._say(at)
            if (state := marks[mark]) is None:
                self.stopped = True
            else:
                pieces += self._end_call()
                self._take(len(mark))
                self._state, self._fresh = state, True
        return pieces + (self._end_call() if last else [])

    def _take(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        self.position += count
        return text

    def _say(self, count: int) -> list[Piece]:
        text = self._take(count)
        if self._state == TOOL:
            self._call += text
            return []
        return [(self._state, text)] if text else []

    def _end_call(self) -> list[Piece]:
        call, self._call = self._call, ""
        return [(TOOL, call)] if call.strip() else []


def _begun(text: str, marks: Marks) -> int:
    """Return the length of the longest end of the text that a mark begins with."""
    longest = max(map(len, marks), default=1) - 1
    sizes = range(min(longest, len(text)), 0, -1)
    return next((n for n in sizes if any(m.startswith(text[-n:]) for m in marks)), 0)
