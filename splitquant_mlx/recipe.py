"""Hold the settings of one conversion, and read and write them as TOML."""

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from splitquant_mlx.errors import RecipeError, TargetError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

METHODS = ("splitquant", "rtn", "imatrix", "gptq", "auto")
CALIBRATED = ("imatrix", "gptq", "auto")
SELF = "self"  # calibration on text that the model writes
GRANULARITIES = ("group", "channel", "tensor")
BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
KMEANS = ("exact", "sklearn")
DTYPES = ("float16", "bfloat16", "float32")
EMBEDDINGS = ("keep", "quantize")
LM_HEAD = ("keep", "quantize", "split")
# mode -> (group_size, bits): the pairs mlx's kernels know; affine takes any of the above
MODES = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}
Built = TypeVar("Built")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Say on what text the inputs of a model's layers are measured.

    Attributes:
        text: "self" (what the model itself writes) or a file: .jsonl, .parquet, plain text.
        num_samples: texts.
        sequence_length: tokens of each.
        seed: of what the model writes.
    """

    text: str = SELF
    num_samples: int = 256
    sequence_length: int = 128
    seed: int = 0

    def __post_init__(self):
        if type(self.text) is not str or not self.text:
            raise RecipeError(f"calibration: wanted 'self' or a text file, got {self.text!r}")
        for name, least in (("num_samples", 1), ("sequence_length", 2), ("seed", 0)):
            _require_whole(name, getattr(self, name), least)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Say how to quantize a model.

    Attributes:
        method: "splitquant" (k-means split, then affine quantization of every part), "rtn"
            (round to nearest, what `mlx_lm.convert -q` does), "imatrix" (rtn with scales fitted
            under the importance of the inputs), "gptq" (codes that make up for each other's errors
            as well) or "auto" (gptq with bits and group size chosen for each layer).
        bits: bits of a code; None takes the mode's own (4, mxfp8: 8). Not for auto.
        group_size: inputs that share scales and biases; None takes the mode's own (affine: 64).
            Not for auto.
        granularity: one scale a "group", a "channel" (output row) or a "tensor" (part).
        mode: mlx's quantization mode; all but "affine" are for rtn at group granularity.
        clusters: parts a layer is split into, 2 to 8 (the paper's k, 3).
        kmeans: "exact" (global optimum) or "sklearn" (the published approach, for comparison).
        dtype: type of the tensors that stay unquantized; None takes the checkpoint's own.
        embeddings: "keep" or "quantize"; None is "keep" for splitquant, as in the paper, and
            else "quantize", as in mlx_lm.convert.
        lm_head: "keep", "quantize" or "split"; None as for embeddings.
        include: glob patterns over layer paths, such as "*.mlp.*"; when given, only layers that
            match one are converted, embeddings and heads among them.
        exclude: glob patterns of layers to keep as they are.
        embedding_bits: bits of embeddings and lm_head where they are quantized; None is 6 for
            imatrix and gptq, as in mlx_lm.gptq, and else `bits`.
        layers: settings of single layers, by path: {"bits": ..., "group_size": ...}.
        calibration: what imatrix, gptq and auto are calibrated on; with splitquant, that the
            scales of its parts are to be fitted as imatrix's are, which the paper does not do.
        sweeps: rounds of coordinate descent of gptq and auto; None is 3.
        target_bpw: bits/weight of what auto quantizes, embeddings and lm_head among it.
        max_kl: or the KL divergence, nats a token, that auto is to stay below.
        refine: train scales and biases, codes fixed, to predict what the original does, on four
            times as many texts; see `refine`. Not for splitquant.
    """

    method: str = "splitquant"
    bits: int | None = None
    group_size: int | None = None
    granularity: str = "group"
    mode: str = "affine"
    clusters: int = 3
    kmeans: str = "exact"
    dtype: str | None = None
    embeddings: str | None = None
    lm_head: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    embedding_bits: int | None = None
    layers: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    calibration: Calibration | None = None
    sweeps: int | None = None
    target_bpw: float | None = None
    max_kl: float | None = None
    refine: bool | None = None

    def __post_init__(self):
        _require_choice("method", self.method, METHODS)
        _require_choice("mode", self.mode, tuple(MODES))
        mode_group_size, mode_bits = MODES[self.mode]
        self._fill(bits=mode_bits, group_size=mode_group_size)
        if self.mode == "affine":
            _require_choice("bits", self.bits, BITS)
            _require_choice("group_size", self.group_size, GROUP_SIZES)
        elif self.method != "rtn":
            raise RecipeError(f"mode {self.mode!r} is for method 'rtn', got {self.method!r}")
        elif (self.group_size, self.bits) != (mode_group_size, mode_bits):
            raise RecipeError(
                f"mode {self.mode!r} has group_size {mode_group_size} and bits {mode_bits}, "
                f"got group_size {self.group_size} and bits {self.bits}: leave both out"
            )
        _require_choice("granularity", self.granularity, GRANULARITIES)
        if self.mode != "affine" and self.granularity != "group":
            raise RecipeError(f"mode {self.mode!r} has granularity 'group' only")
        if type(self.clusters) is not int or not 2 <= self.clusters <= 8:
            raise RecipeError(f"clusters: wanted a whole number from 2 to 8, got {self.clusters!r}")
        _require_choice("kmeans", self.kmeans, KMEANS)
        _require_choice("dtype", self.dtype, (None, *DTYPES))
        unsplit = "keep" if self.method == "splitquant" else "quantize"
        self._fill(embeddings=unsplit, lm_head=unsplit)
        _require_choice("embeddings", self.embeddings, EMBEDDINGS)
        _require_choice("lm_head", self.lm_head, LM_HEAD)
        if self.method != "splitquant" and self.lm_head == "split":
            raise RecipeError(
                f"lm_head 'split' is for method 'splitquant', got method {self.method!r}"
            )
        for name in ("include", "exclude"):
            patterns = getattr(self, name)
            is_list = isinstance(patterns, (list, tuple))
            if not is_list or not all(isinstance(pattern, str) for pattern in patterns):
                raise RecipeError(f"{name}: wanted a list of glob patterns, got {patterns!r}")
            object.__setattr__(self, name, tuple(patterns))
        self._refuse_unused()
        self._check_layers()
        self._check_calibration()

    def _refuse_unused(self) -> None:
        """Refuse what the method would ignore; what has its default value was not asked for."""
        for name, default in (("clusters", 3), ("kmeans", "exact")):
            value = getattr(self, name)
            if self.method != "splitquant" and value != default:
                raise RecipeError(f"{name} is for method 'splitquant', got method {self.method!r}")
        for name, default in (("bits", 4), ("group_size", 64)):
            if self.method == "auto" and (value := getattr(self, name)) is not None:
                if value != default:  # which recipes of auto used to have
                    raise RecipeError(f"{name} is not for method 'auto': use target_bpw")
                object.__setattr__(self, name, None)
        if self.embedding_bits is not None and (self.embeddings, self.lm_head) == ("keep",) * 2:
            raise RecipeError(
                "embedding_bits: embeddings and lm_head are kept unquantized: set one of them to "
                "'quantize', or leave embedding_bits out"
            )

    def _check_layers(self) -> None:
        if self.embedding_bits is not None:
            _require_choice("embedding_bits", self.embedding_bits, BITS)
        if not isinstance(self.layers, Mapping):
            raise RecipeError(f"layers: wanted a table of layer paths, got {self.layers!r}")
        if (self.layers or self.embedding_bits) and self.mode != "affine":
            raise RecipeError(f"layers and embedding_bits are for mode 'affine', got {self.mode!r}")
        choices = {"bits": BITS, "group_size": GROUP_SIZES}
        for path, settings in self.layers.items():
            if not isinstance(settings, Mapping) or not settings.keys() <= choices.keys():
                raise RecipeError(f"layers.{path}: wanted bits and group_size, got {settings!r}")
            for name, value in settings.items():
                _require_choice(f"layers.{path}.{name}", value, choices[name])

    def _check_calibration(self) -> None:
        _require_choice("refine", self.refine, (None, True, False))
        object.__setattr__(self, "refine", self.refine or None)
        calibrated = self.method in CALIBRATED or bool(self.refine)
        allowed = {
            "refine": self.method != "splitquant",
            "calibration": calibrated or self.method == "splitquant",
            "sweeps": self.method in ("gptq", "auto"),
            "target_bpw": self.method == "auto",
            "max_kl": self.method == "auto",
        }
        for name, may_be in allowed.items():
            if getattr(self, name) is not None and not may_be:
                raise RecipeError(f"{name} is not for method {self.method!r}")
        if not calibrated and self.calibration is None:
            return
        if self.mode != "affine" or self.granularity != "group":
            subject = "refine" if self.method == "rtn" else f"method {self.method!r}"
            raise RecipeError(f"{subject} has mode 'affine', granularity 'group' only")
        self._fill(calibration=Calibration())
        if isinstance(self.calibration, Mapping):
            object.__setattr__(self, "calibration", _build(Calibration, self.calibration))
        if not isinstance(self.calibration, Calibration):
            raise RecipeError(f"calibration: wanted a table, got {self.calibration!r}")
        if allowed["sweeps"]:
            self._fill(sweeps=3)
            _require_whole("sweeps", self.sweeps, 0)
        if self.method == "auto":
            self._check_target()
        elif self.method in CALIBRATED:
            self._fill(embedding_bits=6)

    def _check_target(self) -> None:
        if self.max_kl is None:
            self._fill(target_bpw=4.5)
        for name, least, most in (("target_bpw", 3.0, 16.0), ("max_kl", 0.0, math.inf)):
            value = getattr(self, name)
            if value is None:
                continue
            if type(value) not in (int, float) or not least < value < most:
                raise RecipeError(f"{name}: wanted a number over {least:g}, got {value!r}")
            object.__setattr__(self, name, float(value))
        if self.target_bpw is not None and self.max_kl is not None:
            raise RecipeError("target_bpw and max_kl: give one of the two")

    def _fill(self, **defaults: Any) -> None:
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON or TOML values; unset ones are left out."""
        values = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }
        return {name: value for name, value in values.items() if value not in (None, [], {})}

    def to_toml(self) -> str:
        """Return the settings as TOML text that `load_recipe` reads back."""
        values = self.to_dict()
        layers = values.pop("layers", {})
        tables = {"": values}
        if calibration := values.pop("calibration", None):
            tables["[calibration]\n"] = calibration
        tables |= {f"[layers.{_toml(path)}]\n": own for path, own in layers.items()}
        return "\n".join(
            head + "".join(f"{key} = {_toml(value)}\n" for key, value in table.items())
            for head, table in tables.items()
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """Build a recipe from plain values. Raises RecipeError for unknown keys and bad values."""
        return _build(cls, values)


def _build(kind: type[Built], values: Mapping[str, Any]) -> Built:
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            name = kind.__name__.lower()
            raise RecipeError(f"unknown {name} key {key!r}: known are {', '.join(known)}")
    return kind(**values)


def load_recipe(path: Path) -> Recipe:
    """Read a TOML recipe. Raises RecipeError naming the file when it is missing or wrong."""
    values = read_toml(path)
    if "variants" in values:
        raise RecipeError(f"{path} is a study, not a recipe: splitquant-mlx run {path}")
    try:
        return Recipe.from_dict(values)
    except RecipeError as exc:
        raise RecipeError(f"recipe {path}: {exc}") from exc


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe that `load_recipe` reads. Raises TargetError when that fails."""
    try:
        path.write_text(recipe.to_toml(), encoding="utf-8")
    except OSError as exc:
        raise TargetError(f"cannot write {path}: {exc.strerror or exc}") from exc


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises RecipeError naming it when it is missing or not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise RecipeError(f"recipe {path}: {exc.strerror or exc}") from exc
    except (ValueError, RecursionError) as exc:  # TOML, UTF-8, too long a number, too deep
        raise RecipeError(f"recipe {path} is not valid TOML: {exc}") from exc


def _require_whole(name: str, value: object, least: int) -> None:
    if type(value) is not int or value < least:
        raise RecipeError(f"{name}: wanted a whole number of {least} or more, got {value!r}")


def _toml(value: Any) -> str:
    """Write a string, whole number or list of strings: JSON's are TOML's too, but for DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _require_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if not any(
        value is choice or (value == choice and type(value) is type(choice)) for choice in choices
    ):
        wanted = ", ".join(str(choice) for choice in choices if choice is not None)
        raise RecipeError(f"{name}: wanted one of {wanted}, got {value!r}")
