"""Record of a conversion: splitquant.json in the checkpoint directory."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.settings import NonNegativeInt, load_json, record

FILE_NAME = "splitquant.json"
# model code of a checkpoint for mlx-lm and mlx-vlm, see nn/split_model_file and nn/lut_model_file
MODEL_FILE = "splitquant_model.py"
# modes that need the model file: mode -> the setting it needs in addition to bits
OWN_MODES = {"lut": "outliers", "mixed": "group_size"}
# action -> text
ACTIONS = {"split": "split", "quantize": "quantized", "keep": "not quantized"}
# names are printed, so they must not contain control characters
Name = Annotated[str, Field(pattern=r"^[\w.-]+$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]


@record
class LayerRecord:
    """Record of one layer with a weight matrix.

    Attributes:
        path: the module's path.
        kind: "linear", "lm_head", "embedding", "experts" or "other".
        action: "split", "quantize" or "keep".
        shape: shape of the original weight, (..., out, in).
        nbytes: stored size of the weight with its scales and biases, bytes.
        bits_per_weight: stored bits per entry of the original weight.
        bits: bits per code; None unless quantized.
        group_size: inputs that share a scale; None unless quantized.
        mode: mlx's quantization mode, "lut" or "mixed"; None unless quantized.
        clusters: parts the layer is split into; None unless split.
        outliers: unquantized entries per row of a codebook layer; None otherwise.
        cut_points: cluster boundaries of k-means, ascending; empty unless split, and for a stack
            of experts, each of which has its own.
        snr_db: 10 log10(sum w^2 / sum (w - w_hat)^2), dB, over evenly spaced rows of a large
            weight; None unless quantized, and when the error is 0.
        note: why this layer differs from the recipe; empty if it does not.
        head: path of an output head tied to this embedding, under which its scales and biases are
            stored a second time, see `head_file`; empty if not.
    """

    path: Name
    kind: Name
    action: Name
    shape: tuple[NonNegativeInt, ...]
    nbytes: NonNegativeInt
    bits_per_weight: Finite
    bits: NonNegativeInt | None = None
    group_size: NonNegativeInt | None = None
    mode: Name | None = None
    clusters: NonNegativeInt | None = None
    outliers: NonNegativeInt | None = None
    cut_points: tuple[Finite, ...] = ()
    snr_db: Finite | None = None
    note: str = ""
    head: Annotated[str, Field(pattern=r"^[\w.-]*$")] = ""

    @property
    def needs_code(self) -> bool:
        """Return whether stock mlx-lm needs the checkpoint's model file to run the layer."""
        return self.action == "split" or self.mode in OWN_MODES


@record
class Manifest:
    """Record of one conversion.

    Attributes:
        source: hub repo id or path, as passed by the user.
        revision: commit of the hub repo; None for a local source.
        recipe: the settings, as in a TOML recipe.
        versions: versions of Python and packages.
        device: "cpu" or "gpu", of the conversion.
        layers: one record per layer with a weight matrix.
        linear_bits_per_weight: stored bits per original entry of the converted linear layers; 0
            if none was converted.
        bits_per_weight: the same over all parameters of the model.
        source_bytes: size of the original's tensors.
        stored_bytes: size of the converted model's tensors.
        seconds: time per stage, summed over threads, and wall time in "total", s; excludes the
            repeated work of an interrupted conversion.
        refinement: mean KL divergence from the original on held-out calibration text "before" and
            "after" training scales and biases, nats per token; empty without training. The
            layers' snr_db is from before.
        source_card: licence, languages and other metadata of the source's README.
        warnings: differences between mlx-lm's model and the original, one sentence each.
        files: SHA-256 of every other file of the checkpoint, by name, for `verify`.
    """

    source: str
    revision: str | None
    recipe: dict[str, Any]
    versions: dict[str, str]
    device: str
    layers: tuple[LayerRecord, ...]
    linear_bits_per_weight: Finite
    bits_per_weight: Finite
    source_bytes: NonNegativeInt
    stored_bytes: NonNegativeInt
    seconds: dict[str, Finite] = Field(default_factory=dict)
    refinement: dict[str, Finite] = Field(default_factory=dict)
    source_card: dict[str, Any] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    files: dict[str, str] = Field(default_factory=dict)

    def save(self, directory: Path) -> None:
        """Write the manifest into `directory`."""
        text = json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False)
        (directory / FILE_NAME).write_text(text + "\n", encoding="utf-8")


def load_manifest(directory: str | Path) -> Manifest | None:
    """Read a manifest; None if the directory has none.

    Raises:
        CheckpointError: when it cannot be read.
    """
    file = Path(directory) / FILE_NAME
    if not file.exists():
        return None
    try:
        return load_json(Manifest, file.read_bytes())
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"{file} is not a splitquant-mlx manifest: {exc}") from exc


def count_actions(layers: Iterable[Any]) -> str:
    """Return how many layers, of a manifest or a plan, are split, quantized and not quantized."""
    counts = Counter(layer.action for layer in layers)
    return ", ".join(f"{counts[key]} {text}" for key, text in ACTIONS.items() if counts[key])
