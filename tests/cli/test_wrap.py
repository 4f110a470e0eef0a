"""Word wrapping at the edge of a terminal."""

import pyte
import pytest

from splitquant_mlx.cli.wrap import Wrapper

TEXT = "The quick brown fox jumps over the lazy dog.\n\nA line, and averylongwordthatfitsnowhere x"


def shown(pieces, columns=20, column=0):
    """Return the lines that a terminal shows."""
    screen = pyte.Screen(columns, 30)
    stream = pyte.Stream(screen)
    stream.feed("m> "[:column])
    wrap = Wrapper(columns, column)
    for piece in pieces:
        stream.feed(wrap(piece).replace("\n", "\r\n"))
    return "\n".join(line.rstrip() for line in screen.display).rstrip().split("\n")


@pytest.mark.parametrize("pieces", [TEXT, [TEXT], TEXT.split(" o")], ids=["chars", "whole", "few"])
def test_words_that_fit_on_a_line_are_not_broken(pieces):
    if pieces == TEXT.split(" o"):
        pieces = [pieces[0], *(f" o{piece}" for piece in pieces[1:])]
    assert shown(pieces) == [
        "The quick brown fox",
        "jumps over the lazy",
        "dog.",
        "",
        "A line, and",
        "averylongwordthatfi",
        "tsnowhere x",
    ]


def test_the_first_line_begins_after_the_label():
    assert shown(["hello there, my friend"], columns=16, column=3) == [
        "m> hello there,",
        "my friend",
    ]


def test_lines_break_between_wide_characters():
    assert shown(["ab " + "漢" * 10], columns=12) == ["ab 漢漢漢漢", "漢漢漢漢漢", "漢"]
