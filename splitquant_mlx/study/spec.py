"""Hold the settings of a study: one model, converted in several ways, each measured alike.

A study is a TOML file with a `model`, a `[measure]` table, `[[variants]]` that are recipes with a
name, and a `[recipe]` table of settings that all of them share.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from splitquant_mlx.data.questions import ARC_TASKS
from splitquant_mlx.errors import RecipeError
from splitquant_mlx.recipe import Recipe, read_toml

ORIGINAL = "original"
PROTOCOLS = ("loglikelihood", "letter")


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Say what is measured of every variant.

    Attributes:
        arc: question sets, of "arc_challenge" and "arc_easy".
        protocols: ways to ask, of "loglikelihood" and "letter".
        num_shots: answered questions before each, for "loglikelihood".
        questions: how many of a set are asked; 0 is all.
        text_tokens: tokens for perplexity and KL divergence; 0 measures neither.
        context_length: tokens a window, for the two.
        prompt_tokens: of the timing; 0 times nothing.
        generation_tokens: of the timing.
        trials: counted rounds of the timing.
    """

    arc: tuple[str, ...] = ("arc_challenge",)
    protocols: tuple[str, ...] = PROTOCOLS
    num_shots: int = 0
    questions: int = 0
    text_tokens: int = 8192
    context_length: int = 512
    prompt_tokens: int = 512
    generation_tokens: int = 128
    trials: int = 3

    def __post_init__(self):
        for name, known in (("arc", ARC_TASKS), ("protocols", PROTOCOLS)):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)) or any(v not in known for v in values):
                raise RecipeError(f"{name}: wanted a list of {', '.join(known)}, got {values!r}")
            object.__setattr__(self, name, tuple(values))
        for field_ in dataclasses.fields(self):
            value = getattr(self, field_.name)
            least = 2 if field_.name == "context_length" else field_.name in ("trials",)
            if field_.type in (int, "int") and (type(value) is not int or value < least):
                raise RecipeError(
                    f"{field_.name}: wanted a whole number of {int(least)} or more, got {value!r}"
                )


@dataclass(frozen=True, kw_only=True)
class Study:
    """Hold one study.

    Attributes:
        name: of the file it came from, without its suffix.
        title: for the report.
        model: repo id, directory, .gguf file, or "demo" for the model of `splitquant-mlx demo`.
        revision: branch, tag or commit of a hub repo.
        variants: recipe by name, in the order of the report; "original" is always measured.
        measure: what is measured.
        notes: sentences for the report.
        paper: {"source", "claims": [{"what", "value", "unit"}]}, published figures to stand
            beside ours; empty if none.
    """

    name: str
    title: str
    model: str
    variants: dict[str, Recipe]
    measure: Measure = field(default_factory=Measure)
    revision: str | None = None
    notes: tuple[str, ...] = ()
    paper: dict[str, Any] = field(default_factory=dict)


def load_study(path: Path) -> Study:
    """Read a study. Raises RecipeError naming the file and the variant when it is wrong."""
    values = read_toml(path)
    try:
        return _study(path.stem, values)
    except RecipeError as exc:
        raise RecipeError(f"study {path}: {exc}") from exc


def slug(name: str) -> str:
    """Return a variant's name as a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "variant"


def _study(name: str, values: dict[str, Any]) -> Study:
    known = {field_.name for field_ in dataclasses.fields(Study)} - {"name"} | {"recipe"}
    if unknown := sorted(values.keys() - known):
        raise RecipeError(f"unknown key {unknown[0]!r}: known are {', '.join(sorted(known))}")
    for key, kind in (("title", str), ("model", str), ("measure", dict), ("recipe", dict),
                      ("paper", dict), ("variants", list), ("notes", list)):  # fmt: skip
        if not isinstance(values.setdefault(key, kind()), kind):
            raise RecipeError(f"{key}: wanted a {kind.__name__}, got {values[key]!r}")
    if not values["model"]:
        raise RecipeError("model is missing: wanted a repo id, a directory or a .gguf file")
    variants: dict[str, Recipe] = {}
    for own in values["variants"]:
        variant = own.get("name") if isinstance(own, dict) else None
        if not isinstance(variant, str) or not variant:
            raise RecipeError(f"every variant wants a name, got {own!r}")
        if slug(variant) in {ORIGINAL, *map(slug, variants)}:
            raise RecipeError(f"variant {variant!r}: the name is taken")
        settings = {**values["recipe"], **own}
        del settings["name"]
        if settings.get("method") == "auto":  # which chooses them; the other variants share them
            for key in ("bits", "group_size"):
                if key not in own:
                    settings.pop(key, None)
        try:
            variants[variant] = Recipe.from_dict(settings)
        except RecipeError as exc:
            raise RecipeError(f"variant {variant!r}: {exc}") from exc
    measure = [field_.name for field_ in dataclasses.fields(Measure)]
    if unknown := sorted(values["measure"].keys() - set(measure)):
        raise RecipeError(f"unknown key {unknown[0]!r} in measure: known are {', '.join(measure)}")
    return Study(
        name=name,
        title=values["title"] or name,
        model=values["model"],
        revision=values.get("revision"),
        variants=variants,
        measure=Measure(**values["measure"]),
        notes=tuple(values["notes"]),
        paper=values["paper"],
    )
