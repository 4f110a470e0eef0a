"""Compare plain, calibrated and split quantization of a small chat model.

All three quantize only the linear layers. The KL divergence from the original is measured on a
short text.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from splitquant_mlx.conversion.pipeline import convert
from splitquant_mlx.evaluation.divergence import Divergence, divergence, log_probabilities
from splitquant_mlx.models.directory import as_directory
from splitquant_mlx.models.lazy import LazyModel
from splitquant_mlx.models.shards import read_headers
from splitquant_mlx.models.source import Source
from splitquant_mlx.progress import SILENT, Progress
from splitquant_mlx.recipe import Calibration, Recipe
from splitquant_mlx.runtime.environment import made_with

QUESTION = "Why is the sky blue?"
MAX_TOKENS = 32
_LINEAR_ONLY = {"bits": 4, "embeddings": "keep", "lm_head": "keep"}
# fewer calibration texts than by default: it takes seconds and is nearly as accurate
RECIPES = {
    "rtn 4-bit": Recipe(method="rtn", **_LINEAR_ONLY),
    "gptq 4-bit": Recipe(method="gptq", **_LINEAR_ONLY, calibration=Calibration(num_samples=16)),
    "split 4-bit": Recipe(method="splitquant", bits=4),
}
RECOMMENDED = "gptq 4-bit"
TEXT = """\
The harbour town wakes before the sun does. By four in the morning the first boats have \
already left the quay, their lamps swinging over black water, and the bakers two streets \
uphill have pulled the second batch of rolls from the oven. An hour later the fish market \
opens. It is loud, wet and quick: a crate of mackerel changes hands in less time than it \
takes to describe it, and prices are shouted in a shorthand that only the buyers \
understand. By eight it is over, the floor is hosed down, and the gulls argue about \
whatever is left.

Engineers came here in the last century to build the long breakwater. They had learned, \
from two failures, that a wall which stands straight against the sea is a wall that falls. \
The third design was a slope of loose stone. Each wave that runs up the slope loses its \
strength in the gaps between the blocks, and what comes back is too weak to carry anything \
away. The method is slow and needs far more rock, but it has held for ninety years. When \
asked why they had not thought of it sooner, the chief engineer answered that the numbers \
had been right from the beginning; it was the assumptions that had to be replaced.

There is a lesson in this for anyone who measures things. A single figure, such as the \
height of the largest wave, tells you little about what will happen on an ordinary day. \
You need to know how often waves of every size arrive, how they are grouped, and how much \
of their energy is spent before they reach the wall. Most of the water does no harm at \
all. A few rare waves do most of the damage, and a structure that spreads its effort \
evenly over all of them is strong in the wrong places. The same is true of rounding \
numbers, insuring houses and planning hospitals.
"""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Result of the demo for one model.

    Attributes:
        method: "original" or the name of a recipe.
        bits_per_weight: bits/weight of the linear layers.
        nbytes: stored bytes of all weights.
        divergence: divergence from the original; None for the original.
        answer: answer to the question.
        path: directory of the converted model; None for the original.
        seconds: time of the conversion, s; None for the original.
    """

    method: str
    bits_per_weight: float
    nbytes: int
    divergence: Divergence | None
    answer: str
    path: Path | None = None
    seconds: float | None = None


def run_demo(source: Source, directory: Path, progress: Progress = SILENT) -> list[Result]:
    """Convert `source` with every recipe of the demo and compare the results.

    Args:
        source: small chat model.
        directory: directory for the converted models, which replace those of an earlier demo.
        progress: progress reporter.

    Raises:
        SplitQuantError: see `convert` and `load`.
    """
    with as_directory(source, progress) as original:
        model = LazyModel(original)
        with progress.task("Running the original"):
            tokens = model.tokenizer.encode(TEXT)
            reference = log_probabilities(model.model, tokens)
            results = [_original_result(original, _answer(model))]
        for number, (method, recipe) in enumerate(RECIPES.items(), 1):
            progress.note(f"{number} of {len(RECIPES)}, converting: {method}")
            path = directory / method.replace(" ", "-")
            # keep the name of the source, not that of the directory a GGUF file was unpacked to
            unpacked = Source(name=source.name, path=original, revision=source.revision)
            manifest = convert(unpacked, path, recipe=recipe, overwrite=True, progress=progress)
            with progress.task(f"Running the {method} model"):
                converted = LazyModel(path)
                comparison = divergence([reference], [log_probabilities(converted.model, tokens)])
                results.append(
                    Result(
                        method=method,
                        bits_per_weight=manifest.linear_bits_per_weight,
                        nbytes=manifest.stored_bytes,
                        divergence=comparison,
                        answer=_answer(converted),
                        path=path,
                        seconds=manifest.seconds["total"],
                    )
                )
    return results


def _original_result(directory: Path, answer: str) -> Result:
    headers = read_headers(directory).values()
    nbytes = sum(header.nbytes for header in headers)
    entries = sum(math.prod(header.shape) for header in headers)
    return Result(
        method="original",
        bits_per_weight=8 * nbytes / entries,
        nbytes=nbytes,
        divergence=None,
        answer=answer,
    )


def _answer(model: LazyModel) -> str:
    """Return the model's greedy answer to the question."""
    from mlx_lm import stream_generate

    messages = [{"role": "user", "content": QUESTION}]
    prompt = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    text = ""
    for response in stream_generate(model.model, model.tokenizer, prompt, max_tokens=MAX_TOKENS):
        text += response.text
        if response.finish_reason == "length":
            text += " ..."
    return text.strip()


def save_results(results: list[Result], model: str, directory: Path) -> dict[str, Any]:
    """Write the results and their environment to demo.json; return the values written."""
    values = {
        "model": model,
        "question": QUESTION,
        "results": [
            {**dataclasses.asdict(result), "path": result.path and result.path.name}
            for result in results
        ],
        **made_with(),
        "device": mx.default_device().type.name,
    }
    text = json.dumps(values, indent=2) + "\n"
    (directory / "demo.json").write_text(text, encoding="utf-8")
    return values
