"""Model what a conversion costs: bytes exactly, seconds by a fit to measured conversions.

The bytes follow from the shapes and the plan. The seconds of a whole process are taken as

    startup + a * (bytes read + bytes written) + b * weights clustered
            + c * codes of split layers + d * codes of plain layers

with coefficients that are not negative, fitted to the medians of timed conversions by least squares
of the relative errors. They belong to the machine of the fit, its number of cores included.
"""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from splitquant_mlx.bench.random_checkpoint import Shape
from splitquant_mlx.conversion.plan import make_plan
from splitquant_mlx.models.architecture import build_model, parameters
from splitquant_mlx.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Work:
    """Count what one conversion handles.

    Attributes:
        weights: parameters of the model.
        bytes_in: of the tensors read.
        bytes_out: of the tensors written: codes, scales, biases and what is kept.
        clustered: weights that go through k-means.
        split_codes: codes of split layers, k for each weight.
        plain_codes: codes of layers that are quantized whole.
    """

    weights: int
    bytes_in: int
    bytes_out: int
    clustered: int
    split_codes: int
    plain_codes: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Hold the fitted coefficients, in seconds, each for one unit of `Work`."""

    startup_s: float
    s_per_byte: float
    s_per_clustered: float
    s_per_split_code: float
    s_per_plain_code: float

    def seconds(self, work: Work) -> float:
        """Return the modelled time of a conversion on the machine of the fit, s."""
        return float(_terms(work) @ np.array(list(asdict(self).values())))


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Describe another machine by what the cost is scaled with.

    Attributes:
        name: for the reader.
        cores: that convert weights.
        core_speed: of one core, over one core of the machine of the fit.
        memory_bytes_per_s: bandwidth.
        disc_bytes_per_s: sustained rate of reading and writing files.
    """

    name: str
    cores: int
    core_speed: float
    memory_bytes_per_s: float
    disc_bytes_per_s: float


M4_CLASS = Machine(
    name="M4-class, CPU",
    cores=4,
    core_speed=1.0,
    memory_bytes_per_s=120e9,
    disc_bytes_per_s=2e9,
)
ASSUMPTIONS = (
    "A prediction, not a measurement: no conversion was timed on this machine.",
    "Its cores, of which only the fast ones are counted, share the computing evenly, each at "
    "core_speed times the speed of a core of the machine of the fit; 1.0 is a guess.",
    "Computing takes no less than reading and writing every byte once at the memory's bandwidth.",
    "Files are read and written at disc_bytes_per_s, or as in the fit if that is slower.",
    "memory_bytes_per_s is the maker's figure for the plain M4; disc_bytes_per_s is a guess.",
)


def count_work(shape: Shape, recipe: Recipe, dtype: str = "bfloat16") -> Work:
    """Count the work of converting a model, from its shape alone, without any weight.

    Args:
        shape: of the model.
        recipe: the settings.
        dtype: of the checkpoint.

    Raises:
        RecipeError: when the recipe does not fit the shape.
    """
    config = shape.config(dtype)
    model = build_model(Path("."), config)
    plan = make_plan(recipe, model, config)
    read_bytes, kept_bytes = (getattr(mx, name).size for name in (dtype, recipe.dtype or dtype))
    arrays = parameters(model)
    weights = sum(array.size for array in arrays.values())
    total, clustered = 0, 0
    codes = {"split": 0, "quantize": 0}
    for name, array in arrays.items():
        layer = plan.layers.get(name.removesuffix(".weight"))
        if layer is None or not layer.bits:
            total += array.size * kept_bytes
            continue
        split = layer.action == "split"
        entries = array.size * (recipe.clusters if split else 1)
        if layer.mode == "affine":
            scale_bytes = 2 * (2 if split else kept_bytes)  # a scale and a bias
        else:
            scale_bytes = 1
        total += entries * layer.bits // 8 + entries // layer.group_size * scale_bytes
        codes[layer.action] += entries
        clustered += array.size if split else 0
    return Work(
        weights=weights,
        bytes_in=weights * read_bytes,
        bytes_out=total,
        clustered=clustered,
        split_codes=codes["split"],
        plain_codes=codes["quantize"],
    )


def fit_cost(works: Sequence[Work], seconds: Sequence[float]) -> Cost:
    """Fit the coefficients by non-negative least squares of the relative errors."""
    from sklearn.linear_model import LinearRegression

    rows = np.array([_terms(work) for work in works])
    scale = rows.max(axis=0)
    scale[scale == 0] = 1.0
    relative = rows / scale / np.array(seconds)[:, None]
    model = LinearRegression(positive=True, fit_intercept=False)
    model.fit(relative, np.ones(len(seconds)))
    return Cost(
        **dict(zip(Cost.__dataclass_fields__, map(float, model.coef_ / scale), strict=True))
    )


def predict(cost: Cost, work: Work, machine: Machine, fit_cores: int) -> float:
    """Scale the modelled time of a conversion to another machine, s; see `ASSUMPTIONS`.

    Args:
        cost: the fit.
        work: of the conversion.
        machine: to predict for.
        fit_cores: number of cores of the machine of the fit.
    """
    nbytes = work.bytes_in + work.bytes_out
    files = nbytes * max(cost.s_per_byte, 1 / machine.disc_bytes_per_s)
    computing = cost.seconds(work) - cost.startup_s - nbytes * cost.s_per_byte
    computing *= fit_cores / machine.cores / machine.core_speed
    return (
        cost.startup_s / machine.core_speed
        + files
        + max(computing, nbytes / machine.memory_bytes_per_s)
    )


def summarize_fit(
    cost: Cost, works: Sequence[Work], runs: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """Return coefficients, and measured and modelled seconds of every case, as JSON values."""
    cases = []
    for work, seconds in zip(works, runs, strict=True):
        median_s, modelled_s = statistics.median(seconds), cost.seconds(work)
        cases.append(
            {
                "work": asdict(work),
                "seconds": list(seconds),
                "median_s": median_s,
                "modelled_s": modelled_s,
                "relative_error": modelled_s / median_s - 1,
            }
        )
    return {
        "coefficients": asdict(cost),
        "cases": cases,
        "largest_relative_error": max(abs(case["relative_error"]) for case in cases),
    }


def _terms(work: Work) -> np.ndarray:
    return np.array(
        [
            1.0,
            work.bytes_in + work.bytes_out,
            work.clustered,
            work.split_codes,
            work.plain_codes,
        ]
    )
