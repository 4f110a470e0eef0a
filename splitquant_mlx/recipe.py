"""Settings of a conversion, and their TOML form."""

import dataclasses
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field
from typing_extensions import TypedDict

from splitquant_mlx.errors import RecipeError
from splitquant_mlx.settings import (
    STRICT,
    NonNegativeInt,
    PositiveInt,
    Strings,
    from_mapping,
    nested,
    settings,
)
from splitquant_mlx.sizes import parse_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

Method = Literal[
    "splitquant", "rtn", "imatrix", "gptq", "auto", "lut", "salience", "omniquant", "efficientqat"
]
Bits = Literal[2, 3, 4, 5, 6, 8]
GroupSize = Literal[16, 32, 64, 128]
Mode = Literal["affine", "mxfp4", "nvfp4", "mxfp8"]
DType = Literal["float16", "bfloat16", "float32"]


def _require_size(text: str) -> str:
    parse_bytes(text)
    return text


def _require_share(text: str) -> str:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)%", text)
    if found is None or float(found[1]) > 10:
        raise ValueError(f"expected a share from 0% to 10%, such as 0.5%, got {text!r:.80}")
    return text


Size = Annotated[str, AfterValidator(_require_size)]
Share = Annotated[str, AfterValidator(_require_share)]

METHODS: tuple[str, ...] = get_args(Method)
LEARNED = ("omniquant", "efficientqat")  # trained block by block
# methods with layers of this package, and the bits that they support
OWN_LAYERS = {"lut": (2, 3, 4), "salience": (2, 3, 4, 5)}
CALIBRATED = ("imatrix", "gptq", "auto", *OWN_LAYERS, *LEARNED)
TARGETS = ("target_bpw", "max_kl", "target_size", "fits")  # of auto, mutually exclusive
FIXED_BITS = ("imatrix", "gptq", *OWN_LAYERS, *LEARNED)  # calibrated, with one number of bits
SWEEPS = {"gptq": 1, "auto": 1, "lut": 3, "salience": 1, "omniquant": 10, "efficientqat": 10}
FEWEST_TEXTS, MOST_TEXTS, INPUTS_PER_TEXT = 128, 256, 16  # of calibration, by default
SELF = "self"  # calibration on text sampled from the model
BITS: tuple[int, ...] = get_args(Bits)
GROUP_SIZES = (32, 64, 128)  # of mode affine
DTYPES: tuple[str, ...] = get_args(DType)
# mode -> (group_size, bits): defaults of affine, fixed values of the others
MODES = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}


class LayerSettings(TypedDict, total=False):
    """Settings of a single layer; they override the recipe's."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    bits: Bits
    group_size: Literal[32, 64, 128]


@settings
class Calibration:
    """Settings of the calibration text.

    Attributes:
        text: "self" (text that the model itself samples) or a file: .jsonl, .parquet, plain text.
        num_samples: number of texts; by default 8 tokens for each input of the widest layer, in 128
            to 256 texts. Refine takes eight times as many, at most 1,024.
        sequence_length: tokens of each text.
        seed: seed of the sampled text.
    """

    text: Annotated[str, Field(min_length=1)] = SELF
    num_samples: PositiveInt | None = None
    sequence_length: Annotated[int, Field(ge=2, lt=2**63)] = 128
    seed: NonNegativeInt = 0

    def texts_for(self, widest_input: int | None = None) -> int:
        """Return the number of texts for a model; the most there can be if its width is unknown.

        gptq's divergence on WikiText-2 with 128 texts of 128 tokens instead of 256: SmolLM2-135M
        (1,536 inputs, two seeds) 2 % more, Qwen2.5-Coder-0.5B (4,864 inputs, one seed) 7 % more.
        """
        if self.num_samples is not None:
            return self.num_samples
        if widest_input is None:
            return MOST_TEXTS
        return min(max(FEWEST_TEXTS, widest_input // INPUTS_PER_TEXT), MOST_TEXTS)


@settings
class Recipe:
    """Settings of a conversion.

    Attributes:
        method: "splitquant" (k-means split, then affine quantization of every part), "rtn"
            (round to nearest, what `mlx_lm.convert -q` does), "imatrix" (rtn with scales fitted
            under the importance of the inputs), "gptq" (also compensates each column's rounding
            error in the columns not yet quantized), "auto" (gptq with bits and group size chosen
            for each layer), "lut" (a codebook for each row of a linear layer; 2 to 4 bits),
            "salience" (gptq with a bit more for the salient inputs of a layer, and one less for as
            many; 2 to 5 bits), "omniquant" (clipping learned block by block) or "efficientqat" (the
            weights, too).
        bits: bits per code; by default 4 (mxfp8: 8). Not for auto.
        group_size: inputs that share scales and biases; by default 64 (mxfp4, mxfp8: 32, nvfp4:
            16). Not for auto.
        granularity: one scale per "group", per "channel" (output row) or per "tensor" (part).
        mode: quantization mode of mlx; all but "affine" are for rtn at group granularity.
        clusters: parts a layer is split into, 2 to 8; 3 in the paper.
        kmeans: "exact" (global optimum) or "sklearn" (the published approach, for comparison).
        dtype: type of the tensors that stay unquantized; by default the checkpoint's own.
        embeddings: "keep" or "quantize"; by default "keep" for splitquant, as in the paper, and
            "quantize" for the others, as in mlx_lm.convert.
        lm_head: "keep", "quantize" or "split"; the default is that of embeddings.
        include: glob patterns; where given, only layers that match one of them are converted.
        exclude: glob patterns of layers to keep unquantized.
        embedding_bits: bits of quantized embeddings and lm_head; by default 6 for the
            calibrated methods but auto, as in mlx_lm.gptq, and `bits` for the others.
        layers: settings of single layers, by path: {"bits": ..., "group_size": ...}.
        calibration: text that all but rtn are calibrated on; with splitquant, the scales of the
            parts are then fitted as by imatrix, which the paper does not do.
        sweeps: rounds of coordinate descent of gptq, auto and salience, of codes and codebooks of
            lut, where 0 is SqueezeLLM; by default 1, for lut 3. Passes over the text of omniquant
            and efficientqat; by default 10.
        outliers: for lut, the share of each row that is kept in 16 bits, such as "0.5%".
        codebook: for lut, "kmeans" or "powers" (of two, times a scale for each row).
        target_bpw: for auto, bits/weight of the quantized layers, embeddings and lm_head among
            them; by default 4.5.
        max_kl: for auto, predicted KL divergence, nats per token, to stay below, instead of a
            target_bpw.
        target_size: for auto, size of all .safetensors files to stay below, such as 4.2GB or 4GiB,
            instead of a target_bpw.
        fits: for auto, memory of the machine to run on, such as 16GB, instead of a target_bpw: the
            model is to fit in beside a context of 8,192 tokens and the system.
        refine: train scales and biases, codes fixed, to predict what the original predicts. Not
            for splitquant, lut and salience.
    """

    method: Method = "splitquant"
    bits: Bits | None = None
    group_size: GroupSize | None = None
    granularity: Literal["group", "channel", "tensor"] = "group"
    mode: Mode = "affine"
    clusters: Annotated[int, Field(ge=2, le=8)] = 3
    kmeans: Literal["exact", "sklearn"] = "exact"
    dtype: DType | None = None
    embeddings: Literal["keep", "quantize"] | None = None
    lm_head: Literal["keep", "quantize", "split"] | None = None
    include: Strings = ()
    exclude: Strings = ()
    embedding_bits: Bits | None = None
    layers: Mapping[str, LayerSettings] = Field(default_factory=dict)
    calibration: Annotated[Calibration | None, nested(Calibration)] = None
    sweeps: NonNegativeInt | None = None
    outliers: Share | None = None
    codebook: Literal["kmeans", "powers"] | None = None
    target_bpw: Annotated[float, Field(gt=3, lt=16)] | None = None
    max_kl: Annotated[float, Field(gt=0)] | None = None
    target_size: Size | None = None
    fits: Size | None = None
    refine: bool | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "refine", self.refine or None)
        self._refuse_unused()
        self._check_mode()
        unsplit = "keep" if self.method == "splitquant" else "quantize"
        self._fill(embeddings=unsplit, lm_head=unsplit)
        embedding_bits = 6 if self.method in FIXED_BITS else None
        kept = self.embeddings == self.lm_head == "keep"
        if kept and self.embedding_bits not in (None, embedding_bits):
            raise RecipeError(
                "embeddings and lm_head are kept unquantized: set one of them to 'quantize', or "
                "leave embedding_bits out",
                field="embedding_bits",
            )
        if self.runs_the_model:
            self._fill(calibration=Calibration(), embedding_bits=embedding_bits)
        if self.method in SWEEPS:
            self._fill(sweeps=SWEEPS[self.method])
        if self.method == "auto" and not self._targets:
            self._fill(target_bpw=4.5)
        if self.method == "lut":
            self._fill(codebook="kmeans")
        if self.method in OWN_LAYERS:
            self._require("bits", OWN_LAYERS[self.method], f"with method {self.method!r}")

    @property
    def _targets(self) -> list[str]:
        return [name for name in TARGETS if getattr(self, name) is not None]

    @property
    def outlier_share(self) -> float:
        """Return the share of each row that lut stores in 16 bits."""
        return float((self.outliers or "0%")[:-1]) / 100

    @property
    def texts(self) -> Calibration:
        """Return the settings of the calibration text, or their defaults."""
        return self.calibration or Calibration()

    @property
    def runs_the_model(self) -> bool:
        """Return whether the conversion runs the original model, to calibrate or to refine."""
        return self.method in CALIBRATED or bool(self.refine)

    def _refuse_unused(self) -> None:
        """Reject settings that the method would ignore; a default value counts as unset."""
        auto, split = self.method == "auto", self.method == "splitquant"
        lut = self.method == "lut"
        if auto:  # older recipes of auto contain these defaults
            for name, default in (("bits", 4), ("group_size", 64)):
                if getattr(self, name) == default:
                    object.__setattr__(self, name, None)
        if auto and (self.bits or self.group_size):
            name = "bits" if self.bits else "group_size"
            raise RecipeError("method 'auto' chooses it for each layer: use target_bpw", field=name)
        allowed = {
            "clusters": split or self.clusters == 3,
            "kmeans": split or self.kmeans == "exact",
            "lm_head": split or self.lm_head != "split",
            "refine": self.method not in ("splitquant", *OWN_LAYERS),
            "calibration": self.runs_the_model or split,
            "sweeps": self.method in SWEEPS,
            **dict.fromkeys(TARGETS, auto),
            "outliers": lut,
            "codebook": lut,
        }
        for name, is_allowed in allowed.items():
            value = getattr(self, name)
            if value is not None and not is_allowed:
                raise RecipeError(f"not for method {self.method!r}: leave it out", field=name)
        if len(named := self._targets) > 1:
            raise RecipeError(f"expected one target, got {named[0]} as well", field=named[1])

    def _check_mode(self) -> None:
        group_size, bits = MODES[self.mode]
        if self.method != "auto":
            self._fill(bits=bits, group_size=group_size)
        if self.mode == "affine":
            self._require("group_size", (None, *GROUP_SIZES), "with mode 'affine'")
        else:
            what = f"with mode {self.mode!r}"
            self._require("method", ("rtn",), what)
            self._require("granularity", ("group",), what)
            self._require("bits", (bits,), what)
            self._require("group_size", (group_size,), what)
            self._require("layers", ({},), what)
            self._require("embedding_bits", (None,), what)
        if self.runs_the_model or self.calibration is not None:
            what = "with refine" if self.method == "rtn" else f"with calibrated {self.method!r}"
            self._require("mode", ("affine",), what)
            self._require("granularity", ("group",), what)

    def _require(self, name: str, allowed: tuple[Any, ...], what: str) -> None:
        value = getattr(self, name)
        if value not in allowed:
            choices = ", ".join(repr(choice) for choice in allowed if choice not in (None, {}))
            reason = f"expected {choices or 'none'} {what}, got {value!r:.80}"
            raise RecipeError(reason, field=name)

    def _fill(self, **defaults: Any) -> None:
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def for_model(self, widest_input: int) -> "Recipe":
        """Return the recipe with the number of calibration texts for a model."""
        if self.calibration is None:
            return self
        number = self.calibration.texts_for(widest_input)
        texts = dataclasses.replace(self.calibration, num_samples=number)
        return dataclasses.replace(self, calibration=texts)

    def without_target(self) -> "Recipe":
        """Return the gptq recipe underlying an "auto" recipe."""
        return dataclasses.replace(self, method="gptq", **dict.fromkeys(TARGETS))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON or TOML values, without unset ones."""
        values = _without_none(dataclasses.asdict(self))
        return {name: value for name, value in values.items() if value not in ([], {})}

    def to_toml(self) -> str:
        """Return the settings as TOML text that `load_recipe` reads back."""
        values = self.to_dict()
        layers = values.pop("layers", {})
        tables = {"": values}
        if calibration := values.pop("calibration", None):
            tables["[calibration]\n"] = calibration
        tables |= {f"[layers.{_toml(path)}]\n": values for path, values in layers.items()}
        return "\n".join(
            head + "".join(f"{key} = {_toml(value)}\n" for key, value in table.items())
            for head, table in tables.items()
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """Build a recipe from plain values. Raises RecipeError for unknown keys and bad values."""
        return from_mapping(cls, values)


def _without_none(value: Any) -> Any:
    """Return a setting as a JSON value, without entries that are None."""
    if isinstance(value, dict):
        return {name: _without_none(entry) for name, entry in value.items() if entry is not None}
    return list(value) if isinstance(value, tuple) else value


def load_recipe(path: str | Path) -> Recipe:
    """Read a TOML recipe. Raises RecipeError naming the file when it is missing or wrong."""
    values = read_toml(Path(path))
    if "variants" in values:
        raise RecipeError(f"{path} is a study, not a recipe: splitquant-mlx run {path}")
    try:
        return Recipe.from_dict(values)
    except RecipeError as exc:
        raise RecipeError(f"recipe {path}: {exc}") from exc


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises RecipeError naming it when it is missing or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise RecipeError(f"cannot read {path}: {exc.strerror or exc}") from exc
    except (ValueError, RecursionError) as exc:  # not TOML or UTF-8, nested too deeply
        raise RecipeError(f"{path} is not valid TOML: {exc}") from exc


def _toml(value: Any) -> str:
    """Return a string, number, boolean or list of strings as TOML, which is JSON except for DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
