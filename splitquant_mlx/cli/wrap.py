"""Break a text between words while it is printed."""

from rich.cells import cell_len


class Wrapper:
    """Turn pieces of a text into what a terminal shows without a word broken at its edge.

    A word is shown as it comes; where it reaches the edge, it is wiped and begins the next line.

    Args:
        columns: of the terminal.
        column: where the cursor is.
    """

    def __init__(self, columns: int, column: int = 0) -> None:
        self._edge = columns - 1  # at the last column a terminal's cursor waits to be moved on
        self._column = column
        self._word = ""

    def __call__(self, text: str) -> str:
        """Return what to print for the next piece of the text."""
        return "".join(map(self._next, text.replace("\t", "    ")))

    def _next(self, char: str) -> str:
        width = cell_len(char)
        begun, before = self._word, cell_len(self._word)
        self._word = "" if char.isspace() or width > 1 else begun + char
        if char == "\n" or (char == " " and self._column >= self._edge):
            self._column = 0
            return "\n"
        self._column += width
        if self._column <= self._edge:
            return char
        if not 0 < before < self._column - width or not self._word:
            self._column = width
            return f"\n{char}"
        self._column = before + width
        return f"\x1b[{before}D\x1b[K\n{begun}{char}"
