"""Define the options that commands share, named as in mlx-lm."""

import os
import sys
from typing import Annotated

import typer

from splitquant_mlx import blas
from splitquant_mlx.errors import RecipeError

DEFAULT_MODEL = "mlx_model"

Model = Annotated[
    str, typer.Option(help="Directory, .gguf file or Hugging Face repo id of the model.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hugging Face repo.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code the checkpoint brings along.")
]
Device = Annotated[
    str | None, typer.Option(help="cpu or gpu; the GPU where there is one if not given.")
]
Seed = Annotated[int, typer.Option(help="Seed of the random number generator.")]


def start(device: str | None) -> None:
    """Make mlx ready: OpenBLAS on Linux, then the device. Call it before anything computes.

    Raises:
        RecipeError: when `device` is unknown or not on this machine.
    """
    # transformers looks for deep-learning frameworks it will not need, and says what it misses
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    found = blas.preload()
    import mlx.core as mx

    if device not in (None, "cpu", "gpu"):
        raise RecipeError(f"--device: wanted cpu or gpu, got {device!r}")
    if device == "gpu" and not mx.is_available(mx.gpu):
        raise RecipeError("--device gpu: mlx finds no GPU on this machine: use --device cpu")
    if device is not None:
        mx.set_default_device(mx.Device(getattr(mx, device)))
    if found is False and mx.default_device() == mx.cpu:
        print(f"note: {blas.ADVICE}", file=sys.stderr)
