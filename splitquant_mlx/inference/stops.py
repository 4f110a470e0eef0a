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
    # of formats that mark more than thoughts and calls; older versions of mlx-lm know none
    for mark in getattr(tokenizer, "structural_markers", ()):
        marks[NORMAL][mark] = NORMAL
    for state, found in (getattr(tokenizer, "response_transitions", None) or {}).items():
        marks.setdefault(state, {}).update((m, to) for m, to in found if tools or to != TOOL)
    if tools and tokenizer.has_tool_calling:
        if not any(TOOL in found.values() for found in marks.values()):
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
        self.position = 0  # of the text's end; once stopped, of the stop string
        self._marks = {TOOL: {}, **marks, NORMAL: {**marks.get(NORMAL, {}), **dict.fromkeys(stops)}}
        self._state, self._held = state, ""
        self._fresh = False  # right after a marker, white space is skipped

    def feed(self, text: str, *, last: bool = False) -> list[Piece]:
        """Return what can be said of the text now; a call comes as one piece, once it is whole."""
        if self.stopped:
            return []
        pieces, end = [], len(self._held)
        self._held += text
        self.position += len(text)
        while end < len(self._held):
            if self._fresh:
                self._held = self._held.lstrip()
                self._fresh = not self._held
                continue
            end += 1
            marks = self._marks[self._state]
            found = [mark for mark in marks if self._held.endswith(mark, 0, end)]
            if not found:
                continue
            mark = max(found, key=len)
            pieces.append((self._state, self._held[: end - len(mark)]))
            if (state := marks[mark]) is None:
                self.stopped = True
                self.position -= len(self._held) - end + len(mark)
                self._held = ""
                break
            self._held, self._state, self._fresh, end = self._held[end:], state, True, 0
        said = len(self._held)
        if not last:
            said -= said if self._state == TOOL else _begun(self._held, self._marks[self._state])
        pieces.append((self._state, self._held[:said]))
        self._held = self._held[said:]
        told = (NORMAL, REASONING, TOOL)  # what else there is, is between messages
        return [(state, text) for state, text in pieces if text and state in told]


def _begun(text: str, marks: Marks) -> int:
    """Return the length of the longest end of the text that a mark begins with."""
    longest = max(map(len, marks), default=1) - 1
    sizes = range(min(longest, len(text)), 0, -1)
    return next((n for n in sizes if any(m.startswith(text[-n:]) for m in marks)), 0)
