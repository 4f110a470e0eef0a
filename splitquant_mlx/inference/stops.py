"""Split streamed text into content, reasoning and tool calls, up to a stop string.

Markers and stop strings are matched in the text, because they do not align with tokens. Text that
may be the start of one is held back until it is complete or ruled out.
"""

from collections.abc import Iterable, Mapping
from typing import Any

NORMAL, REASONING, TOOL = "normal", "reasoning", "tool"  # mlx-lm's names
Transitions = dict[str, str | None]  # marker to next state; None ends the text
Piece = tuple[str, str]  # state and text


def marker_transitions(tokenizer: Any, *, tools: bool) -> dict[str, Transitions]:
    """Return the markers of each state and the states that they lead to.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
        tools: whether the model may call tools; if not, a call is normal text.
    """
    states: dict[str, Transitions] = {NORMAL: {}, REASONING: {}, TOOL: {}}
    if tokenizer.has_thinking:
        states[NORMAL][tokenizer.think_start] = REASONING
        states[REASONING][tokenizer.think_end] = NORMAL
    # for formats with further markers; older versions of mlx-lm lack these attributes
    for marker in getattr(tokenizer, "structural_markers", ()):
        states[NORMAL][marker] = NORMAL
    for state, pairs in (getattr(tokenizer, "response_transitions", None) or {}).items():
        states.setdefault(state, {}).update((m, to) for m, to in pairs if tools or to != TOOL)
    if tools and tokenizer.has_tool_calling:
        if not any(TOOL in transitions.values() for transitions in states.values()):
            states[NORMAL][tokenizer.tool_call_start] = TOOL
        states[REASONING][tokenizer.tool_call_start] = TOOL
        if tokenizer.tool_call_end:
            states[TOOL][tokenizer.tool_call_end] = NORMAL
    return states


class StreamParser:
    """Parser that splits streamed text at markers and stop strings.

    Args:
        stops: strings that end the text, in the normal state.
        states: markers of each state; see `marker_transitions`.
        state: initial state.
    """

    def __init__(
        self, stops: Iterable[str], states: Mapping[str, Transitions], state: str = NORMAL
    ) -> None:
        self.stopped = False
        self.position = 0  # end of the text; once stopped, start of the stop string
        normal = {**states.get(NORMAL, {}), **dict.fromkeys(stops)}
        self._states = {TOOL: {}, **states, NORMAL: normal}
        self._state, self._buffer = state, ""
        self._after_marker = False  # skip white space

    def feed(self, text: str, *, last: bool = False) -> list[Piece]:
        """Add text and return the pieces that are decided; a tool call is one complete piece."""
        if self.stopped:
            return []
        pieces, end = [], len(self._buffer)
        self._buffer += text
        self.position += len(text)
        while end < len(self._buffer):
            if self._after_marker:
                self._buffer = self._buffer.lstrip()
                self._after_marker = not self._buffer
                continue
            end += 1
            transitions = self._states[self._state]
            matches = [marker for marker in transitions if self._buffer.endswith(marker, 0, end)]
            if not matches:
                continue
            marker = max(matches, key=len)
            pieces.append((self._state, self._buffer[: end - len(marker)]))
            if (state := transitions[marker]) is None:
                self.stopped = True
                self.position -= len(self._buffer) - end + len(marker)
                self._buffer = ""
                break
            self._buffer, self._state, self._after_marker, end = self._buffer[end:], state, True, 0
        decided = len(self._buffer)
        if not last and self._state == TOOL:
            decided = 0
        elif not last:
            decided -= _partial_marker(self._buffer, self._states[self._state])
        pieces.append((self._state, self._buffer[:decided]))
        self._buffer = self._buffer[decided:]
        # other states are the headers between messages
        return [(s, text) for s, text in pieces if text and s in (NORMAL, REASONING, TOOL)]


def _partial_marker(text: str, markers: Iterable[str]) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of a marker."""
    longest = max(map(len, markers), default=1) - 1
    sizes = range(min(longest, len(text)), 0, -1)
    return next((n for n in sizes if any(m.startswith(text[-n:]) for m in markers)), 0)
