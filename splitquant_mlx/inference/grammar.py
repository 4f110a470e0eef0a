"""Constrain answers to a JSON schema with llguidance."""

import json
from collections.abc import Callable
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from splitquant_mlx.inference.protocol import APIError

# small models can repeat optional white space endlessly
JSON_FORMAT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """Grammars over the tokens of one model.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
        vocab_size: number of logits.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size

    def from_schema(self, schema: dict[str, Any]) -> str:
        """Return the llguidance grammar of a JSON schema.

        Raises:
            APIError: (400) when the schema is unsupported, or llguidance is not installed.
        """
        try:
            from llguidance import LLMatcher
        except ImportError as exc:
            message = "JSON and forced tools need llguidance: pip install llguidance"
            raise APIError(400, message, param="response_format", code="not_installed") from exc
        text = json.dumps(schema, ensure_ascii=False)
        grammar = LLMatcher.grammar_from_json_schema(text, JSON_FORMAT)
        invalid, messages = LLMatcher.validate_grammar_with_warnings(grammar, self._vocabulary)
        problem = " ".join(messages[0].split()) if invalid else ""
        # llguidance silently skips characters that no token can produce
        if not invalid and (missing := self._missing_characters(text + '{}[]":, ')):
            problem = f"the vocabulary has no tokens for {missing}"
        if problem:
            message = f"unsupported JSON schema: {problem}"
            raise APIError(400, message, param="response_format")
        return grammar

    def processor(self, grammar: str) -> Callable[[mx.array, mx.array], mx.array]:
        """Return a logits processor that masks the tokens that the grammar forbids."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self._vocabulary, grammar)
        consumed: int | None = None  # number of tokens, including the prompt's

        def process(tokens: mx.array, logits: mx.array) -> mx.array:
            nonlocal consumed
            consumed = tokens.size if consumed is None else consumed  # first call: the prompt
            consumed += matcher.try_consume_tokens(tokens[consumed:].tolist())  # type: ignore
            if consumed < tokens.size:  # a token computed ahead, after the end
                return logits
            mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            allowed = np.unpackbits(mask, count=logits.shape[-1], bitorder="little")
            return mx.where(mx.array(allowed.astype(bool)), logits, -float("inf"))

        return process

    def _missing_characters(self, text: str) -> str:
        """Return the characters of a text that the vocabulary has no tokens for."""

        def has_tokens(character: str) -> bool:
            data = character.encode()
            return self._vocabulary.decode_bytes(self._vocabulary.tokenize_bytes(data)) == data

        return "".join(character for character in sorted(set(text)) if not has_tokens(character))

    @cached_property
    def _vocabulary(self) -> Any:
        from llguidance.hf import from_tokenizer

        ends, fast = sorted(self._tokenizer.eos_token_ids), self._tokenizer._tokenizer
        return from_tokenizer(fast, n_vocab=self._vocab_size, eos_token=ends)
