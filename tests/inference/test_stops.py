"""Text is split at stop strings and markers, independent of the pieces it arrives in."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitquant_mlx.inference.stops import NORMAL, REASONING, TOOL, StreamParser, marker_transitions

MARKS = {
    NORMAL: {"<think>": REASONING, "<call>": TOOL},
    REASONING: {"</think>": NORMAL, "<call>": TOOL},
    TOOL: {"</call>": NORMAL},
}


def read(pieces, stops=(), marks=None, state=NORMAL):
    """Return the pieces, joined within a state, and the parser."""
    parser, result = StreamParser(stops, marks or {}, state), []
    for i, piece in enumerate(pieces):
        for kind, text in parser.feed(piece, last=i == len(pieces) - 1):
            if result and result[-1][0] == kind != TOOL:
                result[-1] = kind, result[-1][1] + text
            else:
                result.append((kind, text))
    return result, parser


def first_stop(text, stops):
    """Return the text before the first complete stop string."""
    for end in range(len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))]
    return text


@given(
    st.lists(st.text("ab", max_size=3), min_size=1), st.lists(st.text("ab", min_size=1), max_size=3)
)
def test_a_text_ends_at_its_first_stop_string(pieces, stops):
    text = "".join(pieces)
    result, parser = read(pieces, stops)
    expected = first_stop(text, stops)
    assert "".join(part for _, part in result) == expected
    assert parser.stopped == any(stop in text for stop in stops)
    assert parser.position == len(expected)


def test_only_a_possible_stop_string_is_held_back():
    parser = StreamParser(["gamma delta"], {})
    assert [parser.feed(piece) for piece in ("alpha ga", "mma", " del", "ay")] == [
        [(NORMAL, "alpha ")],
        [],
        [],
        [(NORMAL, "gamma delay")],
    ]


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_reasoning_and_calls_are_separated(size):
    text = "<think>\nwell, x\n</think>\n\nYes. <call>{1}</call><call>{2}</call> Done"
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    expected = [(REASONING, "well, x\n"), (NORMAL, "Yes. "), (TOOL, "{1}"), (TOOL, "{2}")]
    done = [(NORMAL, "Done")]
    assert read(pieces, (), MARKS)[0] == expected + done
    # stop strings do not apply to reasoning, nor to the white space after it
    assert read(pieces, ["\n\n", "x", "Done"], MARKS)[0] == expected
    assert read([text[8:]], (), MARKS, REASONING)[0] == expected + done


def test_a_truncated_call_is_returned_at_the_end():
    assert read(["<call>{", '"a'], (), MARKS)[0] == [(TOOL, '{"a')]


@pytest.mark.parametrize("tools", [True, False])
def test_a_format_of_several_messages(tools):
    """As mlx_lm.chat_templates.muse_spark describes one."""
    header = [("to=self|", REASONING), ("to=user|", NORMAL), ("<calls>", TOOL)]
    ends = {REASONING: [("<eom>", "header")], NORMAL: [("<eom>", "header")]}
    tokenizer = SimpleNamespace(
        has_thinking=False,
        structural_markers=("<start>",),
        response_transitions={"header": header, **ends},
        has_tool_calling=True,
        tool_call_start="<calls>",
        tool_call_end="</calls>",
    )
    text = "to=self|hm<eom>from=me to=user|<start>Yes.<eom><calls>{}</calls>"
    expected, _ = read(list(text), (), marker_transitions(tokenizer, tools=tools), "header")
    call = [(TOOL, "{}")] if tools else []
    assert expected == [(REASONING, "hm"), (NORMAL, "Yes."), *call]
