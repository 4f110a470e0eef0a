"""Change a config.json one key at a time, and compare what we make of it with transformers.

To transformers a checkpoint whose config.json lacks a key, or says something else there, is
another model, or none. Ours has to be that model, too, or refused, or warned of:

    python tests/support/config_changes.py --kinds deleted changed --seed 3 [--only llama phi3]

Both forms of a config.json are changed, that of transformers 5 and that of 4. It needs torch:
`pip install -e ".[test,parity]"`.
"""

import argparse
import copy
import dataclasses
import gc
import json
import logging
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from architecture_variants import ALONE, VOCAB, Variant
from architectures import LIMIT, distance, explains, torch_logits, variants, write_reference

from splitquant_mlx.models.config import read_config
from splitquant_mlx.models.left_out import resolve_tied_head
from splitquant_mlx.models.shards import read_headers

Config = dict[str, Any]
Change = tuple[str, Config]
# what no model computes with
UNTOUCHED = {"model_type", "architectures", "transformers_version", "dtype", "torch_dtype"}
TOWERS = ("vision_config", "audio_config")
WORDS = ("gelu", "relu", "silu", "gelu_pytorch_tanh", "relu2", "softmax", "sigmoid", "greedy")
LOCAL = {"gemma3_text": "rope_local_base_freq", "gemma3n_text": "rope_local_base_freq"}


def old_form(config: Config) -> Config:
    """Return a config.json as transformers 4 wrote it."""
    old = {key: value for key, value in config.items() if key != "rope_parameters"}
    if "dtype" in old:
        old["torch_dtype"] = old.pop("dtype")
    if isinstance(old.get("text_config"), dict):
        old["text_config"] = old_form(old["text_config"])
    rope = config.get("rope_parameters") or {}
    if any(isinstance(table, dict) for table in rope.values()):
        if config.get("model_type") not in LOCAL:
            return {**old, "rope_parameters": rope}
        old[LOCAL[config["model_type"]]] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    old |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if rope.get("rope_type", "default") != "default":
        old["rope_scaling"] = {key: value for key, value in rope.items() if key not in old}
    return old


def leaves(config: Config, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every entry of a table and of those inside."""
    for key, value in config.items():
        if key in TOWERS or (key in UNTOUCHED and key != "model_type"):
            continue
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, key))
        if key != "model_type" or path:
            yield (*path, key)


def at(config: Config, path: tuple[str, ...]) -> tuple[Config, str]:
    """Return the table that the last key of a path is in, and this key."""
    for key in path[:-1]:
        config = config[key]
    return config, path[-1]


def deleted(config: Config) -> Iterator[Change]:
    """Yield the tables with one entry less."""
    for path in leaves(config):
        changed = copy.deepcopy(config)
        table, key = at(changed, path)
        del table[key]
        yield f"without {'.'.join(path)}", changed


def changed(config: Config, values: Any) -> Iterator[Change]:
    """Yield the tables with one entry of another value, of those that `values` gives for it."""
    for path in leaves(config):
        table, key = at(config, path)
        for value in values(table[key]):
            other = copy.deepcopy(config)
            at(other, path)[0][key] = value
            yield f"{'.'.join(path)} {value!r:.60}", other


def others(value: Any) -> list[Any]:
    """Return other values of the same type."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, max(1, value // 2), 0]
    if isinstance(value, float):
        return [value * 1.5 + 0.01, 0.0, -1.0]
    if isinstance(value, str):
        return [word for word in WORDS if word != value] + ["nonsense"]
    if isinstance(value, list):
        return [value[::-1], value[:-1]] if value else []
    return [True, 0.5, 3] if value is None else []


def wrong_types(value: Any) -> list[Any]:
    """Return values of another type."""
    if isinstance(value, bool):
        return [int(value), None, "true"]
    if isinstance(value, int):
        return [float(value), str(value), None, -value - 1, 1 << 40]
    if isinstance(value, float):
        return [str(value), None, int(value) + 1, 1e30, float("nan")]
    if isinstance(value, str):
        return [None, 1, [value]]
    return [None, "none", {}] if isinstance(value, (list, dict)) else []


def unknown(config: Config) -> Iterator[Change]:
    """Yield the tables with a key that mlx-lm's class reads and they lack."""
    from splitquant_mlx.models.architecture import find_classes
    from splitquant_mlx.models.config_forms import settings_fields

    model_class, _ = find_classes(Path(), config)
    inner = config.get("text_config", config)
    for name, field in settings_fields(sys.modules[model_class.__module__]).items():
        if name in inner or name in config or name in UNTOUCHED or name == "text_config":
            continue
        has_default = field.default is not dataclasses.MISSING
        for value in others(field.default) if has_default else []:
            added = copy.deepcopy(config)
            added.get("text_config", added)[name] = value
            yield f"with {name} {value!r:.60}", added


def contradicted(config: Config) -> Iterator[Change]:
    """Yield the tables with a second word on what they say already."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    inner = config.get("text_config", config)
    scaled = {"type": "linear", "rope_type": "linear", "factor": 2.0}
    second: list[tuple[str, Any]] = [
        *(("rope_theta", base) for base in (123.0, 0, -5.0, "10000")),
        *(("rope_scaling", table) for table in (scaled, {**scaled, "factor": -1.0}, {}, [])),
        *(("rope_scaling", {"type": kind, "factor": 2.0}) for kind in ("ntk", "spiral", 7)),
        *(("rope_parameters", table) for table in (scaled, {"rope_theta": 99.0}, {})),
        *(("partial_rotary_factor", part) for part in (0.5, 2.0, -1.0)),
        *((key, 123.0) for key in ("rope_local_base_freq", "rotary_emb_base", "rotary_pct")),
        *((key, 2) for key in ("sliding_window_pattern", "rotary_dim", "max_window_layers")),
        ("use_sliding_window", True),
    ]
    names = CONFIG_MAPPING[inner["model_type"]].attribute_map
    second += [(a, v) for a, name in names.items() for v in others(inner.get(name))]
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    second += [(name, 3) for name in experts if any(other in inner for other in experts)]
    for key, value in second:
        if inner.get(key) != value:
            added = copy.deepcopy(config)
            added.get("text_config", added)[key] = value
            yield f"beside it {key} {value!r:.60}", added
    if inner is config:
        nested = {key: value for key, value in config.items() if isinstance(value, float)}
        yield "with a text_config", {**config, "text_config": {k: v * 2 for k, v in nested.items()}}
        return
    for key, held in inner.items():
        for value in others(held) if key not in UNTOUCHED and key not in config else ():
            yield f"outside {key} {value!r:.60}", {**config, key: value}


KINDS = {
    "unknown": unknown,
    "contradicted": contradicted,
    "deleted": deleted,
    "changed": lambda config: changed(config, others),
    "types": lambda config: changed(config, wrong_types),
}


class Model:
    """A tiny checkpoint whose config.json is changed, and transformers' logits of it."""

    def __init__(self, directory: Path, variant: Variant, seed: int):
        self.directory, self.length = directory, variant.tokens
        self.tokens = np.random.default_rng(seed).integers(3, VOCAB, (1, variant.tokens))
        self.wanted = torch_logits(write_reference(directory, variant, seed), self.tokens)
        self.config = json.loads((directory / "config.json").read_text())
        self.headers = read_headers(directory)
        self.read, self.arguments = self.reading(), None
        with suppress(Exception):  # of an architecture that is refused
            self.arguments = self.our_arguments()
        self.strange: set[str] = set()
        self.strange = self.reference()[1]

    def write(self, config: Config) -> None:
        """Write config.json."""
        (self.directory / "config.json").write_text(json.dumps(config))

    def reading(self) -> Config:
        """Return what transformers reads in config.json."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.directory).to_dict()

    def our_arguments(self) -> Any:
        """Return what a model of mlx-lm is made with."""
        from splitquant_mlx.models.architecture import find_classes
        from splitquant_mlx.models.config_forms import normalize

        config = resolve_tied_head(read_config(self.directory), self.headers)
        both = normalize(self.directory, config)
        folded = {key: value for key, value in both.items() if "multiplier" in key or "base" in key}
        return find_classes(self.directory, both)[1].from_dict(both), folded

    def reference(self) -> tuple[np.ndarray, set[str]]:
        """Return transformers' logits, and the tensors that are missing or not used."""
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

        config = AutoConfig.from_pretrained(self.directory)
        sees = config.get_text_config(decoder=True) is not config
        Auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        model, info = Auto.from_pretrained(
            self.directory,
            config=config,
            dtype="float32",
            attn_implementation="eager",
            output_loading_info=True,
        )
        keys = {*info["missing_keys"], *info["unexpected_keys"]}
        return torch_logits(model.eval(), self.tokens), keys - self.strange

    def judge(self, config: Config) -> tuple[str, str]:
        """Return a verdict on a config.json, and why; "QUIET" and "CRASH" are none to have."""
        from splitquant_mlx.errors import SplitQuantError

        self.write(config)
        with suppress(Exception):  # which is met again, and judged
            if self.reading() == self.read and self.our_arguments() == self.arguments:
                return "same", "read alike"
        try:
            ours, notes = our_logits(self.directory, self.tokens)
        except SplitQuantError as exc:
            return "refused", str(exc).split(str(self.directory))[-1][:200]
        except Exception as exc:
            return "CRASH", f"{type(exc).__name__}: {exc}"[:200]
        try:
            same = self.reading() == self.read
            wanted, keys = (self.wanted, set()) if same else self.reference()
        except Exception as exc:
            return "warned" if notes else "alone", f"{type(exc).__name__}: {exc}"[:200]
        if keys:
            return "tensors", f"{sorted(keys)[:3]}"
        if not (np.isfinite(wanted).all() and np.isfinite(ours).all()):
            return "not finite", ""
        result = {"difference": distance(ours, wanted), "tokens": self.length}
        if result["difference"] <= LIMIT:
            return "same", ""
        explained = any(explains(note, result) for note in notes)
        return "warned" if explained else "QUIET", f"{result['difference']:.1e} {notes}"


def our_logits(directory: Path, tokens: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the logits of our model, and what is said of it."""
    import mlx.core as mx

    from splitquant_mlx.models.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(directory)
    model = checkpoint.model.eval()
    model.load_weights(list(checkpoint.weights.items()))
    return np.array(model(mx.array(tokens))[0].astype(mx.float32)), checkpoint.warnings


def judge_all(
    variant: Variant, kinds: list[str], seed: int, share: float = 1.0
) -> Iterator[tuple[str, str, str]]:
    """Yield change, verdict and why for a share of the changes of one variant, in both forms."""
    directory, chosen = Path(tempfile.mkdtemp(prefix="changes-")), random.Random(seed)
    try:
        model = Model(directory, variant, seed)
        judged: set[str] = set()  # what is alike in both forms, once
        for form, config in {"5": model.config, "4": old_form(model.config)}.items():
            verdict, why = model.judge(config)
            yield f"form {form}", verdict, why
            if verdict == "refused":
                break
            for name, other in (change for kind in kinds for change in KINDS[kind](config)):
                if name not in judged and chosen.random() < share:
                    yield f"form {form}, {name}", *model.judge(other)
                judged.add(name)
    finally:
        shutil.rmtree(directory)
        gc.collect()


def judge_architectures(
    kinds: list[str], seed: int, share: float = 1.0, only: list[str] | None = None
) -> Iterator[tuple[str, str, str, str]]:
    """Yield architecture, change, verdict and why for a share of the changes of each."""
    import transformers

    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    for variant in variants():
        kind = variant.architecture
        if variant.name == "plain" and kind not in ALONE and kind in (only or [kind]):
            for judged in judge_all(variant, kinds, seed, share):
                yield kind, *judged


def main() -> None:
    """Judge the changes and print what is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=["deleted"])
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--all", action="store_true", help="print every verdict")
    options = parser.parse_args()
    total: dict[str, Counter[str]] = {}
    for kind, name, verdict, why in judge_architectures(
        options.kinds, options.seed, options.share, options.only
    ):
        total.setdefault(kind, Counter())[verdict] += 1
        if options.all or verdict in ("QUIET", "CRASH", "alone"):
            print(f"{kind}: {verdict}: {name}: {why}", flush=True)
    for kind, found in total.items():
        print(kind, dict(found))
    whole = sum(total.values(), Counter())
    print(dict(whole))
    sys.exit(1 if whole["QUIET"] or whole["CRASH"] else 0)


if __name__ == "__main__":
    main()
