"""Settings of how tokens are chosen and how the KV cache is kept, and a model's own wishes."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitquant_mlx.errors import RecipeError

# A KV cache of limited size never drops the first tokens, on which models lean; as in mlx-lm.
KEPT_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Settings of sampling and of the KV cache; names and meanings are mlx-lm's.

    Attributes:
        max_tokens: longest answer, in tokens; -1 sets no limit.
        temp: sampling temperature; 0 takes the likeliest token.
        top_p: sample from the likeliest tokens of this total.
        min_p: drop tokens less likely than this times the likeliest.
        top_k: sample from this many likeliest tokens; 0 from all.
        max_kv_size: tokens the KV cache holds; older ones are overwritten.
        kv_bits: quantize the KV cache to this many bits.
        kv_group_size: group size of a quantized KV cache; by default 64.
        quantized_kv_start: token from which on the KV cache is quantized; by default 5000.

    Raises:
        RecipeError: when a setting is out of range or does not fit the others.
    """

    max_tokens: int = 256
    temp: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    max_kv_size: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000

    def __post_init__(self) -> None:
        """Refuse what mlx-lm would ignore, or stumble over in the middle of an answer."""
        kv_size = self.max_kv_size
        for name, right, expected in (
            ("max_tokens", self.max_tokens > 0 or self.max_tokens == -1, "1 or more, or -1"),
            ("temp", self.temp >= 0, "0 or more"),
            ("top_p", 0 <= self.top_p <= 1, "0 to 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("max_kv_size", kv_size is None or kv_size > KEPT_TOKENS, "5 or more"),
            ("kv_bits", self.kv_bits in (None, 2, 3, 4, 5, 6, 8), "2, 3, 4, 5, 6 or 8"),
            ("kv_group_size", self.kv_group_size in (32, 64, 128), "32, 64 or 128"),
            ("quantized_kv_start", self.quantized_kv_start >= 0, "0 or more"),
        ):
            if not right:
                option = "--" + name.replace("_", "-")
                raise RecipeError(f"{option}: expected {expected}, got {getattr(self, name)}")
        if self.kv_bits is not None and kv_size is not None:
            raise RecipeError(
                "--kv-bits and --max-kv-size: mlx-lm cannot quantize a limited KV cache: give one"
            )

    def options(self, group: Any = None) -> dict[str, Any]:
        """Return the keyword arguments for mlx-lm's `generate`, all but `prompt_cache`.

        With a group of ranks, all take the token that rank 0 samples.
        """
        from mlx_lm.sample_utils import make_sampler

        from splitquant_mlx.runtime.ranks import led

        sampler = make_sampler(self.temp, top_p=self.top_p, min_p=self.min_p, top_k=self.top_k)
        return {
            "max_tokens": self.max_tokens,
            "sampler": led(group, sampler),
            "kv_bits": self.kv_bits,
            "kv_group_size": self.kv_group_size,
            "quantized_kv_start": self.quantized_kv_start,
        }

    def empty_cache(self, model: Any) -> list[Any]:
        """Return a new KV cache for `model`."""
        from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

        cache = make_prompt_cache(model, self.max_kv_size)
        if (size := self.max_kv_size) is None:
            return cache
        # Models that make their cache themselves, Llama for one, know nothing of the limit.
        return [RotatingKVCache(size, keep=KEPT_TOKENS) if type(c) is KVCache else c for c in cache]


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn mlx-lm's errors on settings that do not suit the model into RecipeError."""
    try:
        yield
    except (ValueError, NotImplementedError) as exc:
        import mlx.core as mx

        # one that comes out of mlx-lm's compiled sampling leaves a random state that is of no use
        mx.random.seed(time.time_ns())
        raise RecipeError(f"mlx-lm cannot run this model with these settings: {exc}") from exc


def recommended_sampling(directory: Path) -> dict[str, Any]:
    """Return what a model's generation_config.json recommends, by `Decoding`'s names.

    Empty where there is no such file, or where it says nothing of sampling; temp 0 where it says
    not to sample.
    """
    try:
        found = json.loads((directory / "generation_config.json").read_text(encoding="utf-8"))
        if found.get("do_sample") is False:
            return {"temp": 0.0}
        names = {"temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
        given = {name: found.get(key) for name, key in names.items()}
        chosen = {name: value for name, value in given.items() if type(value) in (int, float)}
        Decoding(**chosen)
    except (OSError, ValueError, AttributeError, RecursionError, RecipeError):
        return {}
    return chosen
