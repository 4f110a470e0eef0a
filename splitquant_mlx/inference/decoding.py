"""Settings of how tokens are chosen and how the KV cache is kept, and a model's own wishes."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from splitquant_mlx.errors import RecipeError
from splitquant_mlx.settings import NonNegativeInt, settings

# A KV cache of limited size never drops the first tokens, on which models lean; as in mlx-lm.
KEPT_TOKENS = 4
KVBits = Literal[2, 3, 4, 5, 6, 8]
KVGroupSize = Literal[32, 64, 128]
Share = Annotated[float, Field(ge=0, le=1)]


@settings
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

    max_tokens: Annotated[int, Field(ge=-1)] = 256
    temp: Annotated[float, Field(ge=0)] = 0.0
    top_p: Share = 1.0
    min_p: Share = 0.0
    top_k: NonNegativeInt = 0
    max_kv_size: Annotated[int, Field(gt=KEPT_TOKENS)] | None = None
    kv_bits: KVBits | None = None
    kv_group_size: KVGroupSize = 64
    quantized_kv_start: NonNegativeInt = 5000

    def __post_init__(self) -> None:
        if self.max_tokens == 0:
            raise RecipeError("max_tokens: expected 1 or more, or -1, got 0")
        if self.kv_bits is not None and self.max_kv_size is not None:
            raise RecipeError("kv_bits: mlx-lm quantizes no KV cache that max_kv_size limits")

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
