"""Schema of a study's results: one pydantic class for the values of each part."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from splitquant_mlx.settings import NonNegativeInt, load_json, record

NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}  # strings in JSON


def _number(value: Any) -> Any:
    return NOT_FINITE.get(value, value) if isinstance(value, str) else value


def _line(value: str) -> str:
    if not value.isprintable() or not value.strip():
        raise ValueError(f"expected one printable line, got {value!r:.80}")
    return value


Number = Annotated[float, Field(allow_inf_nan=True), BeforeValidator(_number)]
Line = Annotated[str, AfterValidator(_line)]
Answers = tuple[Literal[0, 1], ...]


@record
class Conversion:
    """Size of a model, and cost of its conversion if the study converted it.

    Attributes:
        method: method of the recipe; "original" or "foreign" for other models.
        bits_per_weight: stored bits divided by the original's parameter count, whole model.
        linear_bits_per_weight: the same for the linear layers.
        stored_bytes: size of the tensors.
        weight_file_bytes: size on disk of the model directory's weight files.
        source_bytes: size of the original's tensors.
        seconds: time of each stage, summed over threads, and wall time in "total", s.
        peak_bytes: peak memory of the conversion.
        bits, granularity, clusters: settings of the recipe.
        num_samples: number of calibration texts; absent without calibration.
        model_hash: content hash of the converted model.
        forecast_kl: mean KL divergence forecast for an "auto" recipe, nats per token.
    """

    method: Line
    bits_per_weight: float
    stored_bytes: NonNegativeInt
    linear_bits_per_weight: float | None = None
    weight_file_bytes: NonNegativeInt | None = None
    source_bytes: NonNegativeInt | None = None
    seconds: dict[Line, float] = Field(default_factory=dict)
    peak_bytes: NonNegativeInt | None = None
    bits: NonNegativeInt | None = None
    granularity: Line | None = None
    clusters: NonNegativeInt | None = None
    num_samples: NonNegativeInt | None = None
    model_hash: Line | None = None
    forecast_kl: Number | None = None


@record
class ArcScore:
    """Answers to multiple-choice questions; see `evaluation.arc.ArcResult`."""

    questions: NonNegativeInt
    num_shots: NonNegativeInt
    accuracy: float
    correct: Answers
    standard_error: Number | None = None
    accuracy_norm: float | None = None
    standard_error_norm: Number | None = None
    correct_norm: Answers | None = None

    def __post_init__(self) -> None:
        for answers in (self.correct, self.correct_norm):
            if answers is not None and len(answers) != self.questions:
                raise ValueError(f"expected {self.questions} answers, got {len(answers)}")


@record
class PerplexityScore:
    """Perplexity of a text; see `evaluation.perplexity.Perplexity`."""

    perplexity: Number
    standard_error: Number | None = None
    mean_nll: Number | None = None
    tokens: NonNegativeInt | None = None
    context_length: NonNegativeInt | None = None
    stride: NonNegativeInt | None = None


@record
class DivergenceScore:
    """KL divergence from the original; see `evaluation.divergence.Divergence`."""

    kl_mean: Number
    kl_low: Number | None = None
    kl_high: Number | None = None
    kl_median: Number | None = None
    kl_p99: Number | None = None
    standard_error: Number | None = None
    top1_agreement: float | None = None
    positions: NonNegativeInt | None = None

    def __post_init__(self) -> None:
        if self.kl_low is not None and self.kl_high is not None:
            mean, low, high = self.kl_mean, self.kl_low, self.kl_high
            if low > mean or mean > high:
                raise ValueError(
                    f"expected kl_mean from kl_low {low} to kl_high {high}, got {mean}"
                )


@record
class Speed:
    """Speed of a model: median of the trials; `_min` and `_max` are their range."""

    decode_tokens_per_s: float
    decode_tokens_per_s_min: float | None = None
    decode_tokens_per_s_max: float | None = None
    prefill_tokens_per_s: float | None = None
    load_s: float | None = None
    first_token_s: float | None = None
    peak_bytes: NonNegativeInt | None = None


@record
class Weights:
    """Histogram of one layer's weights, and the cut points of its k-means clusters."""

    layer: Line
    edges: tuple[float, ...]
    counts: tuple[float, ...]
    cut_points: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.edges) != len(self.counts) + 1:
            raise ValueError(
                f"expected {len(self.counts) + 1} edges, one more than counts, "
                f"got {len(self.edges)}"
            )


PARTS: dict[str, type] = {
    "convert": Conversion,
    "arc_challenge.loglikelihood": ArcScore,
    "arc_challenge.letter": ArcScore,
    "arc_easy.loglikelihood": ArcScore,
    "arc_easy.letter": ArcScore,
    "perplexity": PerplexityScore,
    "kl": DivergenceScore,
    "speed": Speed,
    "weights": Weights,
}


def check_values(part: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Validate the values of a part; return them as JSON values, without absent fields.

    Raises:
        ValueError: with a one-line message, when the part is unknown or a value is invalid.
    """
    if part not in PARTS:
        raise ValueError(f"part: expected one of {', '.join(PARTS)}, got {part!r:.80}")
    try:
        checked = load_json(PARTS[part], values)
    except ValueError as exc:
        raise ValueError(f"values.{exc}") from None
    fields = ((name, getattr(checked, name)) for name in values)
    return {name: list(v) if isinstance(v, tuple) else v for name, v in fields}
