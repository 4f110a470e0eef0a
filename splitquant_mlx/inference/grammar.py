"""Keep answers to a JSON schema: llguidance says which tokens may come next."""

import json
import threading
from collections.abc import Callable
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
        self._lock, self._words = threading.Lock(), None

    def of_schema(self, schema: dict[str, Any]) -> str:
        """Return the grammar of a JSON schema. Raises Refusal (400): it is none, or no extra."""
        try:
            from llguidance import LLMatcher
        except ImportError as exc:
            message = "JSON and forced tools need llguidance: pip install 'splitquant-mlx[json]'"
            raise Refusal(400, message, param="response_format", code="not_installed") from exc
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), FORM)
        wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar, self._vocabulary())
        if wrong:
            message = f"the JSON schema cannot be followed: {' '.join(messages[0].split())}"
            raise Refusal(400, message, param="response_format")
        if missing := "".join(c for c in _asked_for(schema) if not self._can_write(c)):
            message = f"the JSON schema cannot be followed: the vocabulary cannot write {missing}"
            raise Refusal(400, message, param="response_format")
        return grammar

    def processor(self, grammar: str) -> Callable[[mx.array, mx.array], mx.array]:
        """Return a logits processor that leaves only tokens that the grammar allows."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self._vocabulary(), grammar)
        start, followed = -1, 0

        def process(tokens: mx.array, logits: mx.array) -> mx.array:
            nonlocal start, followed
            start = tokens.size if start < 0 else start  # the first call sees the prompt alone
            new = np.array(tokens)[start + followed :].tolist()
            followed += matcher.try_consume_tokens(new)
            if followed < tokens.size - start:  # computed ahead, after the end
                return logits
            bits = np.unpackbits(
                np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little"
            )
            allowed = np.zeros(logits.shape[-1], bool)
            allowed[: bits.size] = bits[: allowed.size]
            return mx.where(mx.array(allowed), logits, -float("inf"))

        return process

    def _can_write(self, character: str) -> bool:
        words = self._vocabulary()
        return words.decode_bytes(words.tokenize_bytes(character.encode())) == character.encode()

    def _vocabulary(self) -> Any:
        with self._lock:
            if self._words is None:
                from llguidance.hf import from_tokenizer

                ends = sorted(self._tokenizer.eos_token_ids)
                fast = self._tokenizer._tokenizer
                self._words = from_tokenizer(fast, n_vocab=self._vocab_size, eos_token=ends)
            return self._words


def _asked_for(schema: Any) -> list[str]:
    """Return the characters of JSON's structure and of the names and values that a schema fixes.

    llguidance leaves out those that no token has, and goes on as if they were written.
    """
    found, rest = set('{}[]":, '), [schema]
    while rest:
        node = rest.pop()
        if isinstance(node, dict):
            names = node.get("properties")
            fixed = [
                *(names if isinstance(names, dict) else ()),
                node.get("enum"),
                node.get("const"),
            ]
            found.update(json.dumps(fixed, ensure_ascii=False))
            rest.extend(node.values())
        elif isinstance(node, list):
            rest.extend(node)
    return sorted(found)
