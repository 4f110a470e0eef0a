"""Record of a conversion: the JSON beside the weights, splitquant.json."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.settings import NonNegativeInt, load_json, record

FILE_NAME = "splitquant.json"
# the code that a checkpoint carries for mlx-lm and mlx-vlm, see nn/model_file and nn/neighbour_file
MODEL_FILE = "splitquant_model.py"
# of layers with code of their own, and what the code needs to know of them beside the bits
OWN_MODES = {"lut": "outliers", "mixed": "group_size"}
# what is shown of a layer must not control the terminal
Name = Annotated[str, Field(pattern=r"^[\w.-]+$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]


@record
class LayerRecord:
    """Record of one layer that holds a weight matrix.

    Attributes:
        path: the module's path.
        kind: "linear", "lm_head", "embedding", "experts" or "other".
        action: "split", "quantize" or "keep".
        shape: of the original weight, (..., out, in).
        nbytes: stored size of the weight with its scales and biases, bytes.
        bits_per_weight: stored bits over ORIGINAL entries.
        bits: bits per code; None when kept.
        group_size: inputs that share a scale; None when kept.
        mode: mlx's quantization mode, "lut" or "mixed"; None when kept.
        clusters: parts the layer is split into; None unless split.
        outliers: entries of each row that are kept beside a codebook; None without.
        cut_points: where k-means split the entries, ascending; empty unless split, and of a
            stack of experts, each of which is split by itself.
        snr_db: 10 log10(sum w^2 / sum (w - w_hat)^2), dB, over evenly spaced rows of a large
            weight; None when kept or without error.
        note: why this layer differs from the recipe; empty if it does not.
        head: path of a head, tied to this embedding, that other programs look for: its scales and
            biases are stored under that name, too, see `head_file`; empty without.
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
        source: hub repo id or path, as given.
        revision: commit of the hub repo; None for a local source.
        recipe: the settings, as in a TOML recipe.
        versions: of Python and the packages that did it.
        device: mlx's device that did it.
        layers: one record for each layer with a weight matrix.
        linear_bits_per_weight: stored bits over original entries, converted linear layers; 0
            if none was converted.
        bits_per_weight: the same over every parameter of the model.
        source_bytes: size of the original's tensors.
        stored_bytes: size of the converted model's tensors.
        seconds: time of each stage, added up over threads, and wall time in "total", s; without
            the lost work of an interrupted conversion.
        refinement: mean KL divergence from the original on held-out calibration text "before" and
            "after" training scales and biases, nats per token; empty without it. The layers'
            snr_db is that before the training.
        source_card: licence, languages and the like from the source's README.
        warnings: what mlx-lm's model does otherwise than the original's, or leaves out.
        files: SHA-256 of every other file of the checkpoint, by name; `verify` reads it.
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
    """Read a manifest; None where the directory has none.

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
