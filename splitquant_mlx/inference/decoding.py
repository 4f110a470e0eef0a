"""Settings of sampling and of the KV cache, and the sampling that a model recommends."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from splitquant_mlx.errors import RecipeError
from splitquant_mlx.settings import NonNegativeInt, settings

KEEP_TOKENS = 4  # first tokens (attention sinks) that a rotating KV cache keeps, as in mlx-lm
KVBits = Literal[2, 3, 4, 5, 6, 8]
KVGroupSize = Literal[32, 64, 128]
Probability = Annotated[float, Field(ge=0, le=1)]


@settings
class Decoding:
    """Settings of sampling and of the KV cache; names and meanings are mlx-lm's.

    Attributes:
        max_tokens: maximum number of tokens to generate; -1 for no limit.
        temp: sampling temperature; 0 for greedy decoding.
        top_p: sample from the most likely tokens with this total probability.
        min_p: drop tokens less likely than this times the most likely.
        top_k: sample from this many most likely tokens; 0 for all.
        max_kv_size: maximum size of the KV cache, tokens; older tokens are overwritten.
        kv_bits: quantize the KV cache to this many bits.
        kv_group_size: group size of the quantized KV cache; by default 64.
        quantized_kv_start: position at which to start quantizing the KV cache; by default 5000.

    Raises:
        RecipeError: when a setting is out of range or conflicts with another.
    """

    max_tokens: Annotated[int, Field(ge=-1)] = 256
    temp: Annotated[float, Field(ge=0)] = 0.0
    top_p: Probability = 1.0
    min_p: Probability = 0.0
    top_k: NonNegativeInt = 0
    max_kv_size: Annotated[int, Field(gt=KEEP_TOKENS)] | None = None
    kv_bits: KVBits | None = None
    kv_group_size: KVGroupSize = 64
    quantized_kv_start: NonNegativeInt = 5000

    def __post_init__(self) -> None:
        if self.max_tokens == 0:
            raise RecipeError("expected 1 or more, or -1, got 0", field="max_tokens")
        if self.kv_bits is not None and self.max_kv_size is not None:
            raise RecipeError(
                "mlx-lm cannot quantize a KV cache limited by max_kv_size", field="kv_bits"
            )

    def options(self, group: Any = None) -> dict[str, Any]:
        """Return the keyword arguments for mlx-lm's `generate`, except `prompt_cache`.

        In a group of ranks, all use the token that rank 0 samples.
        """
        from mlx_lm.sample_utils import make_sampler

        from splitquant_mlx.runtime.ranks import follow_rank_0

        sampler = make_sampler(self.temp, top_p=self.top_p, min_p=self.min_p, top_k=self.top_k)
        return {
            "max_tokens": self.max_tokens,
            "sampler": follow_rank_0(group, sampler),
            "kv_bits": self.kv_bits,
            "kv_group_size": self.kv_group_size,
            "quantized_kv_start": self.quantized_kv_start,
        }

    def empty_cache(self, model: Any) -> list[Any]:
        """Return an empty KV cache for `model`."""
        from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

        cache = make_prompt_cache(model, self.max_kv_size)
        if (size := self.max_kv_size) is None:
            return cache
        # models with a make_cache method, such as Llama, ignore the limit
        return [RotatingKVCache(size, keep=KEEP_TOKENS) if type(c) is KVCache else c for c in cache]


@contextmanager
def readable_errors() -> Iterator[None]:
    """Convert mlx-lm's errors about settings that the model does not support to RecipeError."""
    try:
        yield
    except (ValueError, NotImplementedError) as exc:
        import mlx.core as mx

        # an error inside mlx-lm's compiled sampling leaves an unusable random state
        mx.random.seed(time.time_ns())
        raise RecipeError(f"mlx-lm cannot run this model with these settings: {exc}") from exc


def recommended_sampling(directory: Path) -> dict[str, Any]:
    """Return the sampling settings in a model's generation_config.json, by `Decoding`'s names.

    Empty without a valid file; temp 0 if do_sample is false.
    """
    try:
        config = json.loads((directory / "generation_config.json").read_text(encoding="utf-8"))
        if config.get("do_sample") is False:
            return {"temp": 0.0}
        names = {"temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
        values = {name: config.get(key) for name, key in names.items()}
        sampling = {name: value for name, value in values.items() if type(value) in (int, float)}
        Decoding(**sampling)
    except (OSError, ValueError, AttributeError, RecursionError, RecipeError):
        return {}
    return sampling
