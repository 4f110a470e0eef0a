"""Define the options that commands share, named as in mlx-lm."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from splitquant_mlx.cli.launched import launched_rank
from splitquant_mlx.errors import RecipeError, SourceError
from splitquant_mlx.runtime import blas
from splitquant_mlx.runtime.compatibility import check_versions

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
SystemPrompt = Annotated[str | None, typer.Option(help="System message for the chat template.")]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", "-m", help="Most tokens of an answer; -1 sets no limit.")
]
Temp = Annotated[float, typer.Option(help="Sampling temperature; 0 takes the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Sample from the likeliest tokens of this total.")]
MinP = Annotated[float, typer.Option(help="Drop tokens less likely than this times the likeliest.")]
TopK = Annotated[int, typer.Option(help="Sample from this many likeliest tokens; 0 from all.")]
MaxKvSize = Annotated[
    int | None, typer.Option(help="Tokens the KV cache holds; older ones are overwritten.")
]
KvBits = Annotated[int | None, typer.Option(help="Quantize the KV cache to this many bits.")]
KvGroupSize = Annotated[int, typer.Option(help="Group size of a quantized KV cache.")]
QuantizedKvStart = Annotated[
    int, typer.Option(help="Token from which on the KV cache is quantized.")
]


def start(device: str | None) -> None:
    """Make mlx ready: OpenBLAS on Linux, then the device. Call it before anything computes.

    Raises:
        RecipeError: when `device` is unknown or not on this machine.
        VersionError: when mlx, mlx-lm or transformers is too old.
    """
    check_versions()
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
    if found is False and mx.default_device() == mx.cpu and not launched_rank():
        print(f"note: {blas.ADVICE}", file=sys.stderr)


def check_model(model: str) -> None:
    """Refuse the default model where nothing was converted yet, rather than ask the hub for it."""
    if model == DEFAULT_MODEL and not Path(model).exists():
        raise SourceError(
            f"there is no {model} here: convert a model first with `splitquant-mlx convert "
            "--model ...`, or name one with --model"
        )
