"""Compare mlx-lm's models with transformers', for every architecture that both have.

For each variant a tiny random checkpoint is written by transformers' `save_pretrained`; the
logits of transformers' model on torch are compared with those of our `load_model`, and with an
8-bit conversion as we load it and as stock mlx-lm does:

    python tests/support/architectures.py --seed 3 --json out.json [--only llama phi3]

`just architectures` writes the table that `splitquant-mlx doctor --architectures` prints, and
docs/architectures.md; with --only, the other rows stay as they are recorded. It needs torch:
`pip install -e ".[test,parity]"`.
"""

import argparse
import copy
import dataclasses
import gc
import json
import logging
import re
import shutil
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from architecture_page import write_page
from architecture_settings import SETTINGS
from architecture_variants import (
    ALONE,
    BASE,
    LEFT_OUT,
    OVERRIDES,
    SMALL,
    TEXTS,
    TOWER,
    VARIANTS,
    VOCAB,
    WRAPPER,
    Variant,
)

USED = ("mlx", "mlx-lm", "transformers")
LIMIT = 1e-4
LARGEST = float(np.finfo(np.float32).max)
MAX_PARAMETERS = 4_000_000
# what is new in a converted checkpoint, or written in another way
NOT_COMPARED = {
    "quantization",
    "quantization_config",
    "_name_or_path",
    "transformers_version",
    "sliding_window_pattern",
    "n_inner",
    "position_embedding_type",
}


def variants() -> list[Variant]:
    """Return all that is compared."""
    names = [name for name in architectures() if name not in LEFT_OUT]
    found = [Variant(architecture=name) for name in names]
    return found + [Variant(**more) for more in (*VARIANTS, *SETTINGS)]


def architectures() -> list[str]:
    """Return the model types that mlx-lm and transformers both have."""
    import mlx_lm.models
    from mlx_lm.utils import MODEL_REMAPPING
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    files = (file.stem for file in Path(mlx_lm.models.__path__[0]).glob("*.py"))
    return sorted({*files, *MODEL_REMAPPING} & set(CONFIG_MAPPING.keys()))


def settings_of(variant: Variant) -> dict[str, Any]:
    """Return what the configuration class is made with.

    Of a model that sees or hears, `variant.settings` are those of the language model inside.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    default = CONFIG_MAPPING[variant.architecture]().to_dict()
    text = default.get("text_config")
    if text is None:
        return _text_settings(variant, default)
    kind = variant.settings.get("model_type", TEXTS.get(variant.architecture, text["model_type"]))
    inner = dataclasses.replace(variant, architecture=kind)
    if kind != text["model_type"]:
        text = CONFIG_MAPPING[kind]().to_dict()
    towers = {
        part: {"model_type": table["model_type"], **_known(TOWER, table)}
        for part, table in default.items()
        if isinstance(table, dict) and part in ("vision_config", "audio_config")
    }
    settings = {**_known(SMALL, default), **_known(WRAPPER, default), **towers}
    settings |= copy.deepcopy(OVERRIDES.get(variant.architecture, {}))
    return {**settings, "text_config": {"model_type": kind, **_text_settings(inner, text)}}


def _text_settings(variant: Variant, default: dict[str, Any]) -> dict[str, Any]:
    settings = _known(SMALL, default)
    rope = default.get("rope_parameters")
    if rope and all(isinstance(value, dict) for value in rope.values()):
        bases = {kind: BASE * (n + 1) for n, kind in enumerate(rope)}
        rope = {kind: {**table, "rope_theta": bases[kind]} for kind, table in rope.items()}
        settings["rope_parameters"] = rope
    elif rope:
        kept = {k: rope[k] for k in ("partial_rotary_factor",) if k in rope}
        kept |= {"mrope_section": [2, 3, 3]} if "mrope_section" in rope else {}
        settings["rope_parameters"] = {**kept, "rope_type": "default", "rope_theta": BASE}
    if "qk_rope_head_dim" in settings:
        settings.pop("head_dim", None)
    settings |= copy.deepcopy(OVERRIDES.get(variant.architecture, {}))
    for key, value in copy.deepcopy(variant.settings).items():
        if key == "rope_parameters" and rope:
            value = {**settings["rope_parameters"], **value}
        settings[key] = value
    return settings


def _known(values: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key in default}


def write_reference(directory: Path, variant: Variant, seed: int) -> Any:
    """Write a random checkpoint with save_pretrained and return transformers' model of it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(seed)
    config = CONFIG_MAPPING[variant.architecture](**settings_of(variant))
    if variant.architecture in ALONE:
        config = config.get_text_config(decoder=True)
    sees = config.get_text_config(decoder=True) is not config
    Auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    config._attn_implementation = "eager"
    with torch.device("meta"):
        size = sum(p.numel() for p in Auto.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size} parameters, expected at most {MAX_PARAMETERS}")
    model = Auto.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim == 1 or name.endswith(("A_log", "dt_bias", ".D")):
                parameter += 0.1 * noise
            else:
                parameter.copy_(noise * (0.5 if "embed" in name else parameter.shape[-1] ** -0.5))
        model.tie_weights()
    model.save_pretrained(directory)
    if variant.architecture in ALONE:
        wrap(directory, variant.architecture)
    return model


def wrap(directory: Path, architecture: str) -> None:
    """Make the checkpoint of a language model one of the model that it is part of."""
    from safetensors.numpy import load_file, save_file

    file, config = directory / "model.safetensors", directory / "config.json"
    old, new = ALONE[architecture]
    tensors = load_file(file)
    save_file({new + name.removeprefix(old): w for name, w in tensors.items()}, file)
    text = json.loads(config.read_text())
    tie = {"tie_word_embeddings": text.get("tie_word_embeddings", True)}
    config.write_text(json.dumps({"model_type": architecture, "text_config": text, **tie}))


def compare(variant: Variant, seed: int, directory: Path) -> dict[str, Any]:
    """Return the figures of one variant; relative differences are of the largest logit."""
    import tiny

    from splitquant_mlx import Recipe, convert
    from splitquant_mlx.errors import SplitQuantError

    result: dict[str, Any] = {"architecture": variant.architecture, "variant": variant.name}
    result["tokens"] = variant.tokens
    tokens = np.random.default_rng(seed).integers(3, VOCAB, (1, variant.tokens))
    wanted = torch_logits(write_reference(directory / "source", variant, seed), tokens)
    tiny.write_tokenizer(directory / "source")
    try:
        result["difference"] = rounded(distance(our_logits(directory / "source", tokens), wanted))
        recipe = Recipe(method="rtn", bits=8, group_size=32)
        manifest = convert(directory / "source", directory / "out", recipe=recipe)
    except SplitQuantError as exc:
        reason = str(exc).split("/source", 1)[-1].lstrip(": ")
        return {**result, "refused": textwrap.shorten(reason, 200, placeholder=" ...")}
    ours = our_logits(directory / "out", tokens)
    result["stock"] = rounded(distance(stock_logits(directory / "out", tokens), ours))
    result["correlation"] = rounded(float(np.corrcoef(ours.ravel(), wanted.ravel())[0, 1]), 4)
    result["warnings"] = [text for text in manifest.warnings if not text.startswith("mlx-vlm")]
    result["config"] = differing_keys(directory / "source", directory / "out")
    return result


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Return transformers' logits (tokens, vocabulary)."""
    import torch

    inner = getattr(model, "language_model", None)  # Llama 4's own forward fails without images
    model = inner if hasattr(inner, "lm_head") else model
    with torch.no_grad():
        return model(torch.from_numpy(tokens), use_cache=False).logits[0].float().numpy()


def our_logits(directory: Path, tokens: np.ndarray) -> np.ndarray:
    """Return the logits of the model that our `load_model` loads."""
    import mlx.core as mx

    from splitquant_mlx.models.loader import load_model

    return np.array(load_model(directory)(mx.array(tokens))[0].astype(mx.float32))


def stock_logits(directory: Path, tokens: np.ndarray) -> np.ndarray:
    """Return the logits of the model that mlx-lm loads by itself."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    return np.array(load_model(directory)[0](mx.array(tokens))[0].astype(mx.float32))


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the largest difference, relative to the largest logit."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def rounded(value: float, digits: int = 2) -> float:
    """Round to significant digits."""
    return float(f"{value:.{digits}g}")


def comparison(result: dict[str, Any]) -> Any:
    """Return a row of the table; a verdict "WRONG" is none that it may have."""
    from splitquant_mlx.inspection.architectures import Comparison

    named = {key: result[key] for key in ("architecture", "variant")}
    if "refused" in result:
        return Comparison(**named, verdict="refused", remark=result["refused"])
    if "error" in result or result["config"] or result["stock"] > LIMIT:
        remark = result.get("error") or f"stock {result['stock']}, other {result['config']}"
        return Comparison(**named, verdict="WRONG", remark=remark)
    figures = {key: result[key] for key in ("difference", "correlation")}
    warned, right = result["warnings"], result["difference"] <= LIMIT
    explained = right or any(explains(warning, result) for warning in warned)
    verdict = "WRONG" if not explained else "warned" if warned else "same"
    return Comparison(**named, **figures, verdict=verdict, remark="; ".join(warned))


def explains(warning: str, result: dict[str, Any]) -> bool:
    """Tell whether a warning is of the difference that was measured, on a text of this length."""
    if length := re.search(r"texts longer than (\d+) tokens", warning):
        return result["tokens"] > int(length[1])
    if length := re.search(r"the short ones up to (\d+) tokens", warning):
        return result["tokens"] <= int(length[1])
    slight = "differs slightly" in warning and result["difference"] <= 100 * LIMIT
    return slight or "rounds the range of YaRN" in warning


def differing_keys(source: Path, converted: Path) -> list[str]:
    """Return the settings that transformers reads differently from two directories."""
    from transformers import AutoConfig

    one, two = (AutoConfig.from_pretrained(path).to_dict() for path in (source, converted))
    tied = {"tie_word_embeddings"} if one.get("text_config") else set()  # the wrapper's own decides
    return sorted(_differing(one, two, NOT_COMPARED | tied))


def _differing(one: dict[str, Any], two: dict[str, Any], skipped: set[str]) -> Iterator[str]:
    for key, value in one.items():
        other = two.get(key, 1.0 if key == "partial_rotary_factor" else None)
        if isinstance(value, dict) and isinstance(other, dict):
            yield from (f"{key}.{inner}" for inner in _differing(value, other, skipped))
        elif _finite(value) != _finite(other) and key not in skipped:
            yield key


def _finite(value: Any) -> Any:
    """Return a setting with the largest float32 for infinity, as a conversion writes it."""
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return min(value, LARGEST) if isinstance(value, float) else value


def compare_all(seed: int, only: list[str] | None = None) -> Any:
    """Compare all variants, or those of some architectures, in this process."""
    import transformers

    from splitquant_mlx.inspection.architectures import Comparisons
    from splitquant_mlx.runtime.environment import versions

    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    results = []
    for variant in variants():
        if only and variant.architecture not in only:
            continue
        directory = Path(tempfile.mkdtemp(prefix="architecture-"))
        try:
            results.append(compare(variant, seed, directory))
        except Exception as exc:
            results.append(
                {"architecture": variant.architecture, "variant": variant.name}
                | {"error": f"{type(exc).__name__}: {exc}"[:300]}
            )
        finally:
            shutil.rmtree(directory)
            gc.collect()
        print(json.dumps(results[-1])[:400], flush=True)
    used = {name: number for name, number in versions().items() if name in USED}
    return Comparisons(versions=used, results=tuple(map(comparison, results)))


def with_other_rows(found: Any) -> Any:
    """Return the comparison with the recorded rows of what was not compared anew."""
    from splitquant_mlx.inspection.architectures import recorded

    if found.versions != recorded().versions:
        raise SystemExit("other versions than the recorded ones: compare all")
    rows = {(row.architecture, row.variant): row for row in (*recorded().results, *found.results)}
    order = [(variant.architecture, variant.name) for variant in variants()]
    return dataclasses.replace(found, results=tuple(rows[key] for key in order if key in rows))


def main() -> None:
    """Compare and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path, help="write the table as Markdown, too")
    parser.add_argument("--only", nargs="*")
    options = parser.parse_args()
    found = compare_all(options.seed, options.only)
    if options.only and options.json and options.json.exists():
        found = with_other_rows(found)
    if options.json:
        text = json.dumps(dataclasses.asdict(found), indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    if options.page:
        write_page(found, options.page)
    wrong = [result for result in found.results if result.verdict == "WRONG"]
    sys.exit(f"{len(wrong)} of {len(found.results)} are wrong" if wrong else 0)


if __name__ == "__main__":
    main()
