"""Compare mlx-lm's models with transformers', for every architecture that both have.

For each variant a tiny random checkpoint is written by transformers' `save_pretrained`; the
logits of transformers' model on torch are compared with those of our `load_model`, and with an
8-bit conversion as we load it and as stock mlx-lm does:

    python tests/support/architectures.py --seed 3 --json out.json [--only llama phi3]

The table in docs/architectures.md comes from it; see `splitquant-mlx doctor --architectures`.
"""

import argparse
import copy
import dataclasses
import gc
import json
import logging
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from architecture_variants import BASE, LEFT_OUT, OVERRIDES, SMALL, VARIANTS, VOCAB, Variant

USED = ("mlx", "mlx-lm", "transformers")
LIMIT = 1e-4
MAX_PARAMETERS = 4_000_000


def variants() -> list[Variant]:
    """Return all that is compared."""
    names = [name for name in architectures() if name not in LEFT_OUT]
    found = [Variant(architecture=name) for name in names]
    return found + [Variant(**more) for more in VARIANTS]


def architectures() -> list[str]:
    """Return the model types that mlx-lm and transformers both have."""
    import mlx_lm.models
    from mlx_lm.utils import MODEL_REMAPPING
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    files = (file.stem for file in Path(mlx_lm.models.__path__[0]).glob("*.py"))
    return sorted({*files, *MODEL_REMAPPING} & set(CONFIG_MAPPING.keys()))


def settings_of(variant: Variant) -> dict[str, Any]:
    """Return what the configuration class is made with."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    cls = CONFIG_MAPPING[variant.architecture]
    default = cls().to_dict()
    settings = {key: value for key, value in SMALL.items() if key in default}
    rope = default.get("rope_parameters")
    if rope and all(isinstance(value, dict) for value in rope.values()):
        bases = {kind: BASE * (n + 1) for n, kind in enumerate(rope)}
        rope = {kind: {**table, "rope_theta": bases[kind]} for kind, table in rope.items()}
        settings["rope_parameters"] = rope
    elif rope:
        kept = {k: rope[k] for k in ("partial_rotary_factor",) if k in rope}
        settings["rope_parameters"] = {**kept, "rope_type": "default", "rope_theta": BASE}
    settings |= copy.deepcopy(OVERRIDES.get(variant.architecture, {}))
    if "qk_rope_head_dim" in settings:
        settings.pop("head_dim", None)
    for key, value in copy.deepcopy(variant.settings).items():
        if key == "rope_parameters" and rope:
            value = {**settings["rope_parameters"], **value}
        settings[key] = value
    return settings


def write_reference(directory: Path, variant: Variant, seed: int) -> Any:
    """Write a random checkpoint with save_pretrained and return transformers' model of it."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(seed)
    config = CONFIG_MAPPING[variant.architecture](**settings_of(variant))
    config._attn_implementation = "eager"
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size} parameters, expected at most {MAX_PARAMETERS}")
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim == 1 or name.endswith(("A_log", "dt_bias", ".D")):
                parameter += 0.1 * noise
            else:
                parameter.copy_(noise * (0.5 if "embed" in name else parameter.shape[-1] ** -0.5))
        model.tie_weights()
    model.save_pretrained(directory)
    return model


def compare(variant: Variant, seed: int, directory: Path) -> dict[str, Any]:
    """Return the figures of one variant; relative differences are of the largest logit."""
    import tiny

    from splitquant_mlx import Recipe, convert
    from splitquant_mlx.errors import SplitQuantError

    result: dict[str, Any] = {"architecture": variant.architecture, "variant": variant.name}
    tokens = np.random.default_rng(seed).integers(3, VOCAB, (1, variant.tokens))
    wanted = torch_logits(write_reference(directory / "source", variant, seed), tokens)
    tiny.write_tokenizer(directory / "source")
    try:
        result["difference"] = rounded(distance(our_logits(directory / "source", tokens), wanted))
        recipe = Recipe(method="rtn", bits=8, group_size=32)
        manifest = convert(directory / "source", directory / "out", recipe=recipe)
    except SplitQuantError as exc:
        return {**result, "refused": str(exc).split("/source", 1)[-1].lstrip(": ")[:200]}
    ours = our_logits(directory / "out", tokens)
    result["stock"] = rounded(distance(stock_logits(directory / "out", tokens), ours))
    result["correlation"] = rounded(float(np.corrcoef(ours.ravel(), wanted.ravel())[0, 1]), 4)
    result["warnings"] = list(getattr(manifest, "warnings", ()))
    result["config"] = differing_keys(directory / "source", directory / "out")
    return result


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Return transformers' logits (tokens, vocabulary)."""
    import torch

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
    verdict = "warned" if warned else "same" if right else "WRONG"
    return Comparison(**named, **figures, verdict=verdict, remark="; ".join(warned))


def differing_keys(source: Path, converted: Path) -> list[str]:
    """Return the settings that transformers reads differently from two directories."""
    from transformers import AutoConfig

    new = (
        "quantization",
        "quantization_config",
        "_name_or_path",
        "transformers_version",
        "sliding_window_pattern",
        "n_inner",
    )
    one, two = (AutoConfig.from_pretrained(path).to_dict() for path in (source, converted))
    for table in (one, two):
        ropes = table.get("rope_parameters") or {}
        for rope in (ropes, *ropes.values()):
            if isinstance(rope, dict):
                rope.pop("type", None)
                rope.setdefault("partial_rotary_factor", 1.0)
    return sorted(key for key in one if key not in new and two.get(key) != one[key])


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


def main() -> None:
    """Compare and write the figures."""
    from splitquant_mlx.inspection.architectures import write_page

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path, help="write the table as Markdown, too")
    parser.add_argument("--only", nargs="*")
    options = parser.parse_args()
    found = compare_all(options.seed, options.only)
    if options.json:
        text = json.dumps(dataclasses.asdict(found), indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    if options.page:
        write_page(found, options.page)
    wrong = [result for result in found.results if result.verdict == "WRONG"]
    sys.exit(f"{len(wrong)} of {len(found.results)} are wrong" if wrong else 0)


if __name__ == "__main__":
    main()
