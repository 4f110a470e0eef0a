"""Compare three ways to make a small real chat model smaller: plain, calibrated, split.

Only the linear layers are quantized, in all of them, so that the comparison is of the methods
alone. The distance from the original is measured on a short text of our own.
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
_KEPT = {"bits": 4, "embeddings": "keep", "lm_head": "keep"}
# gptq is calibrated on fewer texts than by default: it takes seconds, and is nearly as close
RECIPES = {
    "rtn 4-bit": Recipe(method="rtn", **_KEPT),
    "gptq 4-bit": Recipe(method="gptq", **_KEPT, calibration=Calibration(num_samples=16)),
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
    """Result of the demo for one form of the model.

    Attributes:
        method: "original", or the name of a recipe.
        bits_per_weight: of the linear layers.
        nbytes: of the whole model's weights as stored.
        divergence: from the original; None for the original itself.
        answer: to the question.
        path: where the converted model is; None for the original.
        seconds: the conversion took, s; None for the original.
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
        source: a small chat model.
        directory: where to put the converted models, replacing those of an earlier demo.
        progress: progress reporter.

    Raises:
        SplitQuantError: see `convert` and `load`.
    """
    with as_directory(source, progress) as original:
        model = LazyModel(original)
        with progress.task("Asking the original"):
            tokens = model.tokenizer.encode(TEXT)
            reference = log_probabilities(model.model, tokens)
            results = [_original_result(original, _ask(model))]
        for number, (method, recipe) in enumerate(RECIPES.items(), 1):
            progress.note(f"{number} of {len(RECIPES)}, converting: {method}")
            path = directory / method.replace(" ", "-")
            # named by its source, not by the directory a GGUF file was unpacked to
            unpacked = Source(name=source.name, path=original, revision=source.revision)
            manifest = convert(unpacked, path, recipe=recipe, overwrite=True, progress=progress)
            with progress.task(f"Asking the {method} model"):
                converted = LazyModel(path)
                distance = divergence([reference], [log_probabilities(converted.model, tokens)])
                results.append(
                    Result(
                        method=method,
                        bits_per_weight=manifest.linear_bits_per_weight,
                        nbytes=manifest.stored_bytes,
                        divergence=distance,
                        answer=_ask(converted),
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


def _ask(opened: LazyModel) -> str:
    """Return the model's greedy answer to the question."""
    from mlx_lm import stream_generate

    messages = [{"role": "user", "content": QUESTION}]
    prompt = opened.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    text = ""
    for response in stream_generate(opened.model, opened.tokenizer, prompt, max_tokens=MAX_TOKENS):
        text += response.text
        if response.finish_reason == "length":
            text += " ..."
    return text.strip()


def save_results(results: list[Result], model: str, directory: Path) -> dict[str, Any]:
    """Write the results and their environment to demo.json; returns what was written."""
    values = {
        "model": model,
        "question": QUESTION,
        "results": [
            {**dataclasses.asdict(result), "path": result.path and result.path.name}
            for result in results
        ],
        **made_with(),
        "device": str(mx.default_device()),
    }
    text = json.dumps(values, indent=2) + "\n"
    (directory / "demo.json").write_text(text, encoding="utf-8")
    return values
