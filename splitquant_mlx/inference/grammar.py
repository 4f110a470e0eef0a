"""Keep answers to a JSON schema: llguidance says which tokens may come next."""

import json
from collections.abc import Callable
from functools import cached_property
from typing import Any

import mlx.core as mx
import numpy as np

from splitquant_mlx.inference.protocol import Refusal

# small models repeat white space without end where they may
FORM: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """Grammars over the tokens of one model.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
        vocab_size: number of logits.
    """

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size

    def of_schema(self, schema: dict[str, Any]) -> str:
        """Return the grammar of a JSON schema. Raises Refusal (400): it is none, or no extra."""
        try:
            from llguidance import LLMatcher
        except ImportError as exc:
            message = "JSON and forced tools need llguidance: pip install 'splitquant-mlx[json]'"
            raise Refusal(400, message, param="response_format", code="not_installed") from exc
        text = json.dumps(schema, ensure_ascii=False)
        grammar = LLMatcher.grammar_from_json_schema(text, FORM)
        wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar, self._vocabulary)
        why = " ".join(messages[0].split()) if wrong else ""
        # llguidance leaves out what no token can write, and goes on as if it were written
        if not wrong and (missing := self._unwritable(text + '{}[]":, ')):
            why = f"the vocabulary cannot write {missing}"
        if why:
            message = f"the JSON schema cannot be followed: {why}"
            raise Refusal(400, message, param="response_format")
        return grammar

    def processor(self, grammar: str) -> Callable[[mx.array, mx.array], mx.array]:
        """Return a logits processor that leaves only tokens that the grammar allows."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self._vocabulary, grammar)
        followed: int | None = None  # tokens, those of the prompt among them

        def process(tokens: mx.array, logits: mx.array) -> mx.array:
            nonlocal followed
            followed = tokens.size if followed is None else followed  # first the prompt alone
            followed += matcher.try_consume_tokens(tokens[followed:].tolist())  # type: ignore
            if followed < tokens.size:  # computed ahead, after the end
                return logits
            mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            allowed = np.unpackbits(mask, count=logits.shape[-1], bitorder="little")
            return mx.where(mx.array(allowed.astype(bool)), logits, -float("inf"))

        return process

    def _unwritable(self, text: str) -> str:
        """Return the characters of a text that the vocabulary has no tokens for."""

        def written(character: str) -> bool:
            data = character.encode()
            return self._vocabulary.decode_bytes(self._vocabulary.tokenize_bytes(data)) == data

        return "".join(character for character in sorted(set(text)) if not written(character))

    @cached_property
    def _vocabulary(self) -> Any:
        from llguidance.hf import from_tokenizer

        ends, fast = sorted(self._tokenizer.eos_token_ids), self._tokenizer._tokenizer
        return from_tokenizer(fast, n_vocab=self._vocab_size, eos_token=ends)
