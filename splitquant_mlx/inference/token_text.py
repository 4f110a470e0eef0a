"""Single tokens as bytes and text, as OpenAI's log-probabilities show them."""

import re
from collections.abc import Sequence
from typing import Any

from splitquant_mlx.inference.engine import Scored

Placed = tuple[Scored, int]  # with the index of its first character in the text


class Texts:
    """The bytes of each of a tokenizer's tokens.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
    """

    def __init__(self, tokenizer: Any) -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
        self._bytes = {c: b for b, c in bytes_to_unicode().items()} if byte_level else {}

    def bytes_of(self, token: int) -> bytes:
        """Return a token's bytes; none for an id without a token."""
        piece = self._tokenizer.convert_ids_to_tokens(token) or ""
        if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(byte[1])
        if token not in self._special and all(c in self._bytes for c in piece):
            return bytes(self._bytes[c] for c in piece)
        return piece.replace("▁", " ").encode()

    def text_of(self, token: int) -> str:
        """Return a token's text; bytes that are no text by themselves are spelled out."""
        data = self.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def place(self, tokens: Sequence[Scored], text: str) -> list[Placed]:
        """Return where each token of a text begins; special ones, put in, take no room."""
        data, placed = b"", []
        pieces = [b"" if s.token in self._special else self.bytes_of(s.token) for s in tokens]
        # a tokenizer may put a space before the text
        extra = len(b"".join(pieces).decode(errors="replace")) - len(text)
        for scored, piece in zip(tokens, pieces, strict=True):
            placed.append((scored, max(len(data.decode(errors="replace")) - extra, 0)))
            data += piece
        return placed

    def chat_logprobs(self, tokens: Sequence[Placed]) -> dict[str, Any]:
        """Return `logprobs` of a chat completion."""

        def entry(token: int, logprob: float | None) -> dict[str, Any]:
            data = list(self.bytes_of(token))
            return {"token": self.text_of(token), "logprob": logprob, "bytes": data}

        return {
            "content": [
                {**entry(s.token, s.logprob), "top_logprobs": [entry(*pair) for pair in s.top]}
                for s, _ in tokens
            ]
        }

    def completion_logprobs(self, tokens: Sequence[Placed]) -> dict[str, Any]:
        """Return `logprobs` of a completion; a token itself is always among its top ones."""
        tops = []
        for s, _ in tokens:
            top = {self.text_of(token): logprob for token, logprob in reversed(s.top)}
            tops.append(None if s.logprob is None else {**top, self.text_of(s.token): s.logprob})
        return {
            "tokens": [self.text_of(s.token) for s, _ in tokens],
            "token_logprobs": [s.logprob for s, _ in tokens],
            "top_logprobs": tops,
            "text_offset": [at for _, at in tokens],
        }
