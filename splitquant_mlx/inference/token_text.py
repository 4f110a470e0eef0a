"""Bytes, text and offsets of single tokens, for OpenAI's `logprobs`."""

import re
from collections.abc import Sequence
from typing import Any

from splitquant_mlx.inference.engine import ScoredToken

OffsetToken = tuple[ScoredToken, int]  # and the index of its first character in the text


class TokenTexts:
    """Bytes and text of a tokenizer's tokens.

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
        """Return a token's bytes; empty for an unused id."""
        piece = self._tokenizer.convert_ids_to_tokens(token) or ""
        if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(byte[1])
        if token not in self._special and all(c in self._bytes for c in piece):
            return bytes(self._bytes[c] for c in piece)
        return piece.replace("▁", " ").encode()

    def text_of(self, token: int) -> str:
        """Return a token's text, or its bytes in hex for a partial character."""
        data = self.bytes_of(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def add_offsets(self, tokens: Sequence[ScoredToken], text: str) -> list[OffsetToken]:
        """Return tokens with their offsets in `text`; special tokens have no length."""
        data, offset_tokens = b"", []
        pieces = [b"" if s.token in self._special else self.bytes_of(s.token) for s in tokens]
        # a tokenizer may add a space before the text
        extra = len(b"".join(pieces).decode(errors="replace")) - len(text)
        for scored, piece in zip(tokens, pieces, strict=True):
            offset_tokens.append((scored, max(len(data.decode(errors="replace")) - extra, 0)))
            data += piece
        return offset_tokens

    def chat_logprobs(self, tokens: Sequence[OffsetToken]) -> dict[str, Any]:
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

    def completion_logprobs(self, tokens: Sequence[OffsetToken]) -> dict[str, Any]:
        """Return `logprobs` of a completion; top_logprobs always include the token itself."""
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
