"""Options that several commands share, named as in mlx-lm."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from splitquant_mlx.cli import console
from splitquant_mlx.cli.launched import launched_rank
from splitquant_mlx.cli.settings import settings_options
from splitquant_mlx.errors import RecipeError, SourceError
from splitquant_mlx.inference.decoding import Decoding
from splitquant_mlx.runtime import blas
from splitquant_mlx.runtime.compatibility import check_versions

DEFAULT_MODEL = "mlx_model"
LAYERS, PUBLISHING = "Which layers", "Publishing"
SAMPLING, CACHE, LOADING = "Sampling", "KV cache", "Loading"

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="Directory, .gguf file or Hugging Face repo id; without one, the newest converted "
        "model here.",
    ),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", metavar="MODEL", help="The same, as an option.")
]
Original = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Repo id, directory or .gguf file to convert."),
]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of a Hugging Face repo.", rich_help_panel=LOADING),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python code of the checkpoint.",
        rich_help_panel=LOADING,
    ),
]
Device = Annotated[
    Literal["cpu", "gpu"] | None,
    typer.Option(
        metavar="cpu|gpu",
        help="Device to compute on; default: the GPU if available.",
        rich_help_panel=LOADING,
    ),
]
JsonFile = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE",
        callback=console.check_json,
        help="Write the result as JSON; - prints only JSON to standard output.",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        help="Seed of the random number generator; default: a new one.",
        rich_help_panel=SAMPLING,
    ),
]
SystemPrompt = Annotated[str | None, typer.Option(help="System message for the chat template.")]


@dataclass(frozen=True, kw_only=True)
class Model:
    """Options of the model of a command."""

    model: ModelArgument = None
    model_option: ModelOption = None
    revision: Revision = None
    device: Device = None

    def choose(self) -> str:
        """Return the model's name; see `choose_model`."""
        return choose_model(self.model, self.model_option)


@dataclass(frozen=True, kw_only=True)
class TrustedModel(Model):
    """Options of a model that may run its own code."""

    trust_remote_code: TrustRemoteCode = False


decoding_options = settings_options(
    Decoding,
    "decoding",
    flags={"max_tokens": ("--max-tokens", "-m")},
    panel=CACHE,
    panels={"max_tokens": None, **dict.fromkeys(("temp", "top_p", "min_p", "top_k"), SAMPLING)},
)


def start(device: str | None) -> None:
    """Set up mlx: OpenBLAS on Linux, then the device. Call it before the first computation.

    Raises:
        RecipeError: when `device` is not available.
        VersionError: when mlx, mlx-lm or transformers is too old.
    """
    check_versions()
    # transformers warns about missing deep-learning frameworks that are not needed here
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # else five lines per request when offline
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    has_openblas = blas.preload()
    import mlx.core as mx

    if device == "gpu" and not mx.is_available(mx.gpu):
        raise RecipeError("--device gpu: mlx finds no GPU on this machine: use --device cpu")
    if device is not None:
        mx.set_default_device(mx.Device(getattr(mx, device)))
    if has_openblas is False and mx.default_device() == mx.cpu and not launched_rank():
        console.note(f"note: {blas.ADVICE}")


def named_model(argument: str | None, option: str | None) -> str | None:
    """Return the model given as an argument or as an option.

    Raises:
        RecipeError: when both are given and differ.
        SourceError: when the name looks like a misspelled directory.
    """
    from splitquant_mlx.models.library import closest

    if argument is not None and option is not None and argument != option:
        raise RecipeError(f"expected one model, got {argument!r} and --model {option!r}")
    name = option if argument is None else argument
    if name and not _exists(name) and (near := closest(name, Path.cwd())):
        raise SourceError(f"there is no {name} here: did you mean {near}?")
    return name


def named_original(argument: str | None, option: str | None) -> str:
    """Return the model to convert. Raises RecipeError when none is given; see `named_model`."""
    if (name := named_model(argument, option)) is None:
        raise RecipeError("expected a model to convert: a directory, a .gguf file or a repo id")
    return name


def _exists(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # `resolve` raises an error for it
        return True


def choose_model(argument: str | None, option: str | None = None) -> str:
    """Return the model given to a command, else the newest converted model here.

    Raises:
        RecipeError: when argument and option differ.
        SourceError: when none is given and there is none here, or the name is misspelled.
    """
    from splitquant_mlx.models.library import converted_in

    name = named_model(argument, option) or os.environ.get("SPLITQUANT_MODEL")
    if name is not None:
        return name
    if converted := converted_in(Path.cwd()):
        name = converted[0].path.name
        if not launched_rank():
            console.note(f"Using {name}, the newest converted model here.")
        return name
    if Path(DEFAULT_MODEL, "config.json").exists():
        return DEFAULT_MODEL
    raise SourceError(
        "there is no converted model here: convert one first with `splitquant-mlx convert "
        "MODEL`, or give one"
    )
