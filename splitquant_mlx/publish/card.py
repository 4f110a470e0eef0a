"""The model card of a converted checkpoint, from the template card.md.j2.

Manifest and results are untrusted: their text is quoted as YAML strings in the metadata and as code
spans in the body.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from splitquant_mlx._version import __version__
from splitquant_mlx.conversion.save import model_code
from splitquant_mlx.formats.manifest import ACTIONS, MODEL_FILE, Manifest, count_actions
from splitquant_mlx.formats.model_card import check_source_card
from splitquant_mlx.publish.figures import code, eval_results, figures_table, table
from splitquant_mlx.publish.files import Converted
from splitquant_mlx.publish.measurements import Measurement
from splitquant_mlx.recipe import SELF, Recipe
from splitquant_mlx.report.numbers import decimals, megabytes

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

REPO = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})(?:/|$)", re.ASCII)
SIGNATURE = re.compile(r"<!-- splitquant-mlx wrote this card: ([0-9a-f]{64}) -->\n\Z")
PAPER = "[SplitQuantV2](https://arxiv.org/abs/2503.07657)"
MAX_NOTES = 8


def make_card(
    converted: Converted,
    repo: str,
    measurements: Sequence[Measurement],
    *,
    base_model: str | None = None,
) -> str:
    """Return the text of README.md.

    Args:
        converted: the checkpoint.
        repo: repo to publish it in, USER/NAME.
        measurements: measurements of the checkpoint.
        base_model: repo id of the original, if that was a local copy.
    """
    from huggingface_hub import ModelCard

    base, revision = (base_model, None) if base_model else find_base(converted.manifest)
    manifest, recipe = converted.manifest, converted.recipe
    name = repo.rpartition("/")[2]
    template = resources.files("splitquant_mlx.publish").joinpath("card.md.j2")
    card = ModelCard.from_template(
        _metadata(converted, base, name, measurements),
        template_str=template.read_text(encoding="utf-8"),
        name=name,
        repo=repo,
        origin=_origin(manifest, base, revision),
        calibration=_calibration(recipe),
        how=METHODS[recipe.method],
        recipe=recipe,
        split=any(layer.action == "split" for layer in manifest.layers),
        needs_code=converted.needs_code,
        sizes=_sizes(converted),
        notes=_notes(converted),
        figures=figures_table(measurements) if measurements else "",
        model_file=MODEL_FILE,
        is_shipped_file=converted.needs_code
        and (converted.path / MODEL_FILE).read_bytes() == model_code(manifest.layers),
        version=__version__,
        licence=_licence(converted),
        device=code(manifest.device),
        versions=", ".join(code(f"{k} {v}") for k, v in list(manifest.versions.items())[:12]),
        toml=_toml(recipe),
    )
    text = card.content.rstrip() + "\n\n"
    return f"{text}<!-- splitquant-mlx wrote this card: {_hash(text)} -->\n"


def is_own(text: str) -> bool:
    """Return whether `make_card` wrote this text and it is unchanged."""
    match = SIGNATURE.search(text)
    return match is not None and match[1] == _hash(text[: match.start()])


def find_base(manifest: Manifest) -> tuple[str | None, str | None]:
    """Return repo id and commit of an original from the hub or its cache; else (None, None)."""
    if manifest.revision is not None and REPO.fullmatch(manifest.source):
        return manifest.source, manifest.revision
    if match := SNAPSHOT.search(manifest.source):
        return f"{match[1]}/{match[2]}", match[3]
    return None, None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _metadata(
    converted: Converted, base: str | None, name: str, measurements: Sequence[Measurement]
) -> "ModelCardData":
    from huggingface_hub import ModelCardData

    inherited = check_source_card(converted.manifest.source_card)
    parent, tags = inherited.pop("base_model", None), inherited.pop("tags", [])
    tags = [*(tags if isinstance(tags, list) else [tags]), "mlx", "splitquant-mlx"]
    results = eval_results(measurements)
    return ModelCardData(
        **{
            "pipeline_tag": "text-generation",
            **inherited,
            # of a local copy only the parent is known, so no relation is stated
            "base_model": base or parent,
            **({"base_model_relation": "quantized"} if base else {}),
            **({"model_name": name, "eval_results": results} if results else {}),
            "library_name": "mlx",
            "tags": list(dict.fromkeys([*tags, converted.recipe.method])),
        }
    )


METHODS = {
    "splitquant": "every linear layer is split by k-means into layers that sum to it, whose "
    f"narrower ranges quantize better ({PAPER})",
    "rtn": "weights are rounded to the nearest code, as `mlx_lm.convert -q` does",
    "imatrix": "scales and biases minimize the error weighted by the mean squared input per "
    "channel",
    "gptq": "each column's rounding error is compensated in later columns (GPTQ and coordinate "
    "descent)",
    "lut": "every row of a linear layer has its own codebook, by exact k-means and codes that "
    "compensate each other's errors (SqueezeLLM, GANQ)",
    "salience": "the most salient inputs of every linear layer have one bit more, and equally many "
    "others one bit less (SliM-LLM), rounded by GPTQ and coordinate descent",
    "omniquant": "clipping strengths are learned block by block (OmniQuant)",
    "efficientqat": "weights, scales and biases are learned block by block (EfficientQAT)",
    "auto": "bits and group size are chosen for every layer from its predicted divergence, and "
    "each column's rounding error is compensated in later columns (GPTQ and coordinate descent)",
}


def _origin(manifest: Manifest, base: str | None, revision: str | None) -> str:
    if not base or not REPO.fullmatch(base):
        return f"{code(Path(manifest.source).name)} (a local copy)"
    at = f" at revision {code(revision)}" if revision else ""
    return f"[{base}](https://huggingface.co/{base}){at}"


def _calibration(recipe: Recipe) -> str:
    if recipe.calibration is None:
        return "without calibration data"
    sampled = recipe.calibration.text == SELF
    return f"calibrated on {'text sampled from the original model' if sampled else 'a text file'}"


def _sizes(converted: Converted) -> str:
    manifest, recipe = converted.manifest, converted.recipe
    is_auto = recipe.method == "auto"
    bits, size = ("per layer",) * 2 if is_auto else (recipe.bits, recipe.group_size)
    rows = [
        ("method", code(recipe.method)),
        ("bits per code, mode", f"{bits}, {code(recipe.mode)}"),
        ("one codebook per", f"row (outliers: {recipe.outliers or 'none'})")
        if recipe.method == "lut"
        else ("one scale per", f"{recipe.granularity} (group size {size})"),
        ("layers", count_actions(manifest.layers)),
        ("bits/weight, converted linear layers", decimals(manifest.linear_bits_per_weight, 2)),
        ("bits/weight, whole model", decimals(manifest.bits_per_weight, 2)),
        (
            "size, MB",
            f"{megabytes(manifest.stored_bytes)} (original {megabytes(manifest.source_bytes)})",
        ),
    ]
    return table(("", ""), rows)


def _notes(converted: Converted) -> str:
    """Return the reasons why layers differ from the recipe, as a Markdown list."""
    layers = converted.manifest.layers
    reasons = Counter((ACTIONS.get(x.action, "changed"), x.note) for x in layers if x.note)
    return "\n".join(
        f"- {count} layers {word}: {code(note)}"
        for (word, note), count in reasons.most_common(MAX_NOTES)
    )


def _licence(converted: Converted) -> str:
    card = check_source_card(converted.manifest.source_card)
    stated = card.get("license_name") or card.get("license")
    names = ", ".join(code(name) for name in converted.licences)
    if not stated and not names:
        return "The original states no licence: ask its authors."
    listed = stated if isinstance(stated, list) else [stated] if stated else []
    text = f"Same as the original{': ' if listed else ''}{', '.join(map(code, listed))}."
    return f"{text} See {names}." if names else text


def _toml(recipe: Recipe) -> str:
    if recipe.calibration is not None:
        # omit the directory, which is private
        named = replace(recipe.calibration, text=Path(recipe.calibration.text).name)
        recipe = replace(recipe, calibration=named)
    return "".join(c if c.isprintable() or c == "\n" else " " for c in recipe.to_toml()).strip()
