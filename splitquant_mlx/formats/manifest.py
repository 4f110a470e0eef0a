"""Record what a conversion did: the JSON that stands beside the weights as splitquant.json."""

import dataclasses
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

from splitquant_mlx.errors import CheckpointError, one_line

FILE_NAME = "splitquant.json"
# the code that a split checkpoint carries for mlx-lm, see nn/model_file
MODEL_FILE = "splitquant_model.py"
# what comes of building a record from values of the wrong form
MALFORMED = (ValueError, TypeError, KeyError, AttributeError)
# what is shown of a layer must not drive the terminal
SHOWN = re.compile(r"[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """Record one layer that holds a weight matrix.

    Attributes:
        path: the module's path.
        kind: "linear", "lm_head", "embedding", "experts" or "other".
        action: "split", "quantize" or "keep".
        shape: of the original weight, (..., out, in).
        nbytes: stored size of the weight with its scales and biases, bytes.
        bits_per_weight: stored bits over ORIGINAL entries.
        bits: bits of a code; None when kept.
        group_size: inputs that share a scale; None when kept.
        mode: mlx's quantization mode; None when kept.
        clusters: parts the layer is split into; None unless split.
        cut_points: where k-means split the entries, ascending; empty unless split.
        snr_db: 10 log10(sum w^2 / sum (w - w_hat)^2), dB, over evenly spaced rows of a large
            weight; None when kept or without error.
        note: why this layer differs from the recipe; empty if it does not.
    """

    path: str
    kind: str
    action: str
    shape: tuple[int, ...]
    nbytes: int
    bits_per_weight: float
    bits: int | None = None
    group_size: int | None = None
    mode: str | None = None
    clusters: int | None = None
    cut_points: tuple[float, ...] = ()
    snr_db: float | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Record one conversion.

    Attributes:
        source: hub repo id or path, as given.
        revision: commit of the hub repo; None for a local source.
        recipe: the settings, as in a TOML recipe.
        versions: of Python and the packages that did it.
        device: mlx's device that did it.
        layers: one record for each layer with a weight matrix.
        linear_bits_per_weight: stored bits over original entries, converted linear layers; 0
            where none was converted.
        bits_per_weight: the same over every parameter of the model.
        source_bytes: size of the original's tensors.
        stored_bytes: size of the converted model's tensors.
        seconds: of each stage, added up over threads, and wall time in "total", s; of a conversion
            that was interrupted, without the work that was lost.
        refinement: mean KL divergence from the original on held-out calibration text "before" and
            "after" scales and biases were trained, nats a token; empty where they were not. The
            layers' snr_db is that before it.
        source_card: licence, languages and the like from the source's README.
        files: SHA-256 of every other file of the checkpoint by its name; `verify` wants it.
    """

    source: str
    revision: str | None
    recipe: dict[str, Any]
    versions: dict[str, str]
    device: str
    layers: tuple[LayerRecord, ...]
    linear_bits_per_weight: float
    bits_per_weight: float
    source_bytes: int
    stored_bytes: int
    seconds: dict[str, float] = field(default_factory=dict)
    refinement: dict[str, float] = field(default_factory=dict)
    source_card: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    def save(self, directory: Path) -> None:
        """Write the manifest into `directory`."""
        text = json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False)
        (directory / FILE_NAME).write_text(text + "\n", encoding="utf-8")


def load_manifest(directory: Path) -> Manifest | None:
    """Read a manifest; None where the directory has none.

    Raises:
        CheckpointError: when it cannot be read.
    """
    file = directory / FILE_NAME
    if not file.exists():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        values["layers"] = parse_layers(values["layers"])
        manifest = Manifest(**values)
        check_types(manifest)
    except (OSError, RecursionError, *MALFORMED) as exc:
        reason = f"{one_line(exc):.200}"
        raise CheckpointError(f"{file} is not a splitquant-mlx manifest: {reason}") from exc
    return manifest


def parse_layers(values: list[dict[str, Any]]) -> tuple[LayerRecord, ...]:
    """Build records from what JSON gave. Raises one of MALFORMED."""
    layers = []
    for layer in values:
        tuples = {name: tuple(layer[name]) for name in ("shape", "cut_points")}
        layers.append(LayerRecord(**{**layer, **tuples}))
        check_types(layers[-1])
    return tuple(layers)


def check_types(record: Any) -> None:
    """Raise ValueError when a field of a dataclass is not of the type it is declared with."""
    for field_ in dataclasses.fields(record):
        value = getattr(record, field_.name)
        if not _fits(value, field_.type):
            raise ValueError(f"{field_.name} is {value!r:.80}")
    if isinstance(record, LayerRecord):
        for value in (record.path, record.kind, record.action, record.mode or "affine"):
            if not SHOWN.fullmatch(value):
                raise ValueError(f"a layer has the name, kind, action or mode {value!r:.80}")


def _fits(value: Any, kind: Any) -> bool:
    inner = get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(item, inner[0]) for item in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(_fits(item, inner[1]) for item in value.values())
    if inner:  # a choice of types
        return any(_fits(value, choice) for choice in inner)
    if kind is float:
        return type(value) in (int, float) and abs(value) < 2**63 and math.isfinite(value)
    if kind is int:
        return type(value) is int and 0 <= value < 2**63
    return kind is Any or isinstance(value, kind)
