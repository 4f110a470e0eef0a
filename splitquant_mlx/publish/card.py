"""Write the model card of a converted checkpoint: what it is, what it costs, how it is run.

What stands in a manifest or a result may be a stranger's: it goes into the table at the top as YAML
strings, and into the text as code spans.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import resources
from pathlib import Path

from splitquant_mlx._version import __version__
from splitquant_mlx.errors import TargetError
from splitquant_mlx.formats.manifest import MODEL_FILE, Manifest
from splitquant_mlx.formats.model_card import check_source_card
from splitquant_mlx.publish.figures import figures_table
from splitquant_mlx.publish.files import CARD, Converted
from splitquant_mlx.publish.markdown import code, table
from splitquant_mlx.publish.measurements import Measurement
from splitquant_mlx.recipe import SELF
from splitquant_mlx.report.numbers import decimals, megabytes

REPO = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})(?:/|$)", re.ASCII)
MARK = re.compile(r"<!-- splitquant-mlx wrote this card: ([0-9a-f]{64}) -->\n\Z")
PAPER = "[SplitQuantV2](https://arxiv.org/abs/2503.07657)"
MOST_NOTES = 8


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
        repo: where it is to be published, USER/NAME.
        measurements: what was measured of it.
        base_model: repo id of the original, for one that was converted from a local copy.
    """
    base, revision = (base_model, None) if base_model else find_base(converted.manifest)
    sections = (
        f"# {repo.rpartition('/')[2]}",
        _origin(converted, base, revision),
        _sizes(converted),
        "## Measured\n\n" + _measured(measurements),
        "## Run it\n\n" + (_run_split if converted.is_split else _run_plain)(converted, repo),
        "## Licence\n\n" + _licence(converted),
        "## How it was made\n\n" + _recipe(converted),
    )
    text = f"---\n{_metadata(converted, base)}\n---\n\n" + "\n\n".join(sections) + "\n\n"
    return f"{text}<!-- splitquant-mlx wrote this card: {_hash(text)} -->\n"


def is_own(text: str) -> bool:
    """Tell whether `make_card` wrote this text and nobody changed it since."""
    mark = MARK.search(text)
    return mark is not None and mark[1] == _hash(text[: mark.start()])


def find_base(manifest: Manifest) -> tuple[str | None, str | None]:
    """Return repo id and commit of the original, where it came from the hub or from its cache."""
    if manifest.revision is not None and REPO.fullmatch(manifest.source):
        return manifest.source, manifest.revision
    if found := SNAPSHOT.search(manifest.source):
        return f"{found[1]}/{found[2]}", found[3]
    return None, None


def write_card(text: str, directory: Path) -> None:
    """Write README.md, all of it or nothing. Raises TargetError when it cannot be written."""
    file = directory / CARD
    partial = directory / f".{CARD}.partial-{os.getpid()}"
    try:
        try:
            with partial.open("w", encoding="utf-8", newline="\n") as opened:
                opened.write(text)
                opened.flush()
                os.fsync(opened.fileno())
            partial.replace(file)
        finally:
            with suppress(FileNotFoundError):
                partial.unlink()
    except OSError as exc:
        raise TargetError(f"cannot write {file}: {exc.strerror or exc}") from exc


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _metadata(converted: Converted, base: str | None) -> str:
    from huggingface_hub import ModelCardData

    found = check_source_card(converted.manifest.source_card)
    parent, tags = found.pop("base_model", None), found.pop("tags", [])
    relation = {"base_model_relation": "quantized"} if base else {}
    own = ["mlx", "splitquant-mlx", converted.recipe.method]
    data = {
        "pipeline_tag": "text-generation",
        **found,
        # the parent that a local copy names is no more than an ancestor
        "base_model": base or parent,
        **relation,
        "library_name": "mlx",
        "tags": [*(tags if isinstance(tags, list) else [tags]), *own],
    }
    return ModelCardData(**data).to_yaml()


def _origin(converted: Converted, base: str | None, revision: str | None) -> str:
    manifest, recipe = converted.manifest, converted.recipe
    if base and REPO.fullmatch(base):
        origin = f"[{base}](https://huggingface.co/{base})"
        origin += f" at revision {code(revision)}" if revision else ""
    else:
        origin = f"{code(Path(manifest.source).name)} (a local copy)"
    methods = {
        "splitquant": f"every linear layer is split by k-means into {recipe.clusters} layers that "
        f"sum to it, whose narrower ranges quantize better ({PAPER})",
        "rtn": "weights are rounded to the nearest code, as `mlx_lm.convert -q` does",
        "imatrix": "scales and biases are fitted to the mean squared input of every channel",
        "gptq": "roundings of a layer make up for each other (GPTQ and coordinate descent)",
        "auto": "bits and group size are chosen for every layer from its predicted divergence, and "
        "roundings of a layer make up for each other (GPTQ and coordinate descent)",
    }
    how = methods.get(recipe.method, f"method {code(recipe.method)}")
    calibration = recipe.calibration
    if calibration is None:
        data = "without calibration data"
    elif calibration.text == SELF:
        data = "calibrated on text that the original wrote itself"
    else:
        data = "calibrated on a text"
    text = f"{origin} quantized by splitquant-mlx, {data}: {how}."
    if converted.is_split:
        text += (
            f" It stores {recipe.clusters} codes for every weight: where splitquant-mlx measured "
            "both, plain quantization with more bits was closer to the original at equal bytes."
        )
    return text


def _sizes(converted: Converted) -> str:
    manifest, recipe = converted.manifest, converted.recipe
    done = Counter(layer.action for layer in manifest.layers)
    words = {"split": "split", "quantize": "quantized", "keep": "kept"}
    chosen = "of each layer its own"
    bits, size = (chosen,) * 2 if recipe.method == "auto" else (recipe.bits, recipe.group_size)
    rows = [
        ("method", code(recipe.method)),
        ("bits of a code, mode", f"{bits}, {code(recipe.mode)}"),
        ("one scale for each", f"{recipe.granularity} (group size {size})"),
        ("layers", ", ".join(f"{done[key]} {word}" for key, word in words.items() if done[key])),
        ("bits/weight, converted linear layers", decimals(manifest.linear_bits_per_weight, 2)),
        ("bits/weight, whole model", decimals(manifest.bits_per_weight, 2)),
        (
            "size, MB",
            f"{megabytes(manifest.stored_bytes)} (original {megabytes(manifest.source_bytes)})",
        ),
    ]
    reasons = Counter((words[x.action], x.note) for x in manifest.layers if x.note)
    notes = [
        f"- {count} layers {word}: {code(note)}"
        for (word, note), count in reasons.most_common(MOST_NOTES)
    ]
    explained = "Bits/weight is stored bits over the number of weights of the original."
    return "\n\n".join([table(("", ""), rows), explained, *(["\n".join(notes)] if notes else [])])


def _measured(measurements: Sequence[Measurement]) -> str:
    if not measurements:
        return "Nothing yet."
    return figures_table(measurements) + "\n\n± is one standard error."


def _run_plain(converted: Converted, repo: str) -> str:
    return f"""Everything that reads MLX models runs it: mlx-lm, LM Studio, splitquant-mlx.

```bash
pip install mlx-lm
mlx_lm.generate --model {repo} --prompt "Why is the sky blue?"
mlx_lm.chat --model {repo}
mlx_lm.server --model {repo}
```"""


def _run_split(converted: Converted, repo: str) -> str:
    file = converted.path / MODEL_FILE
    shipped = resources.files("splitquant_mlx.nn").joinpath("model_file.py").read_bytes()
    same = f" It is the file that splitquant-mlx {__version__} installs."
    return f"""With splitquant-mlx, which runs no code from this repo:

```bash
splitquant-mlx chat --model {repo}
splitquant-mlx generate --model {repo} --prompt "Why is the sky blue?"
splitquant-mlx serve --model {repo}
```

With stock mlx-lm:

```bash
pip install mlx-lm
mlx_lm.generate --model {repo} --trust-remote-code --prompt "Why is the sky blue?"
```

`--trust-remote-code` runs [`{MODEL_FILE}`]({MODEL_FILE}) from this repo, with all your rights, on
your machine: read it before you do.{same if file.read_bytes() == shipped else ""}"""


def _licence(converted: Converted) -> str:
    card = check_source_card(converted.manifest.source_card)
    stated = card.get("license_name") or card.get("license")
    names = ", ".join(code(name) for name in converted.licences)
    if not stated and not names:
        return "The original came without a statement of its licence: ask its authors."
    listed = stated if isinstance(stated, list) else [stated] if stated else []
    text = f"That of the original{': ' if listed else ''}{', '.join(map(code, listed))}."
    return f"{text} See {names}." if names else text


def _recipe(converted: Converted) -> str:
    manifest, recipe = converted.manifest, converted.recipe
    if recipe.calibration is not None:
        # where the text lies on this machine is nobody's business
        own = replace(recipe.calibration, text=Path(recipe.calibration.text).name)
        recipe = replace(recipe, calibration=own)
    toml = "".join(c if c.isprintable() or c == "\n" else " " for c in recipe.to_toml())
    versions = ", ".join(code(f"{name} {v}") for name, v in list(manifest.versions.items())[:12])
    return f"""`splitquant-mlx convert --recipe recipe.toml` with this recipe.toml, on
{code(manifest.device)}, with {versions}. Every layer's record is in `splitquant.json`.

```toml
{toml.strip()}
```"""
