"""Wrap text between words while it is streamed to a terminal."""

from rich.cells import cell_len


class Wrapper:
    """A word wrapper for text that arrives in pieces.

    A word is printed at once; if it reaches the edge, it is erased and moved to the next line.

    Args:
        columns: width of the terminal.
        column: column of the cursor.
    """

    def __init__(self, columns: int, column: int = 0) -> None:
        self._edge = columns - 1  # in the last column, terminals delay the line break
        self._column = column
        self._word = ""

    def __call__(self, text: str) -> str:
        """Return what to print for the next piece of the text."""
        return "".join(map(self._next, text.replace("\t", "    ")))

    def _next(self, char: str) -> str:
        width = cell_len(char)
        word, word_width = self._word, cell_len(self._word)
        self._word = "" if char.isspace() or width > 1 else word + char
        if char == "\n" or (char == " " and self._column >= self._edge):
            self._column = 0
            return "\n"
        self._column += width
        if self._column <= self._edge:
            return char
        if not 0 < word_width < self._column - width or not self._word:
            self._column = width
            return f"\n{char}"
        self._column = word_width + width
        return f"\x1b[{word_width}D\x1b[K\n{word}{char}"
