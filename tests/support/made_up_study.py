"""Write a study's results as a run would: a dozen variants with made-up, plausible figures."""

import random
import re

from splitquant_mlx.study.results import Claim, Paper, Result, StudyRecord, save, save_study

QUESTIONS = 1200
# name, method, bits, granularity, clusters, linear bits/weight, KL, share of right answers
VARIANTS = (
    ("original", "none", None, None, None, 16.0, None, 0.61),
    ("rtn-3-g64", "rtn", 3, "group", None, 3.5, 1.744, 0.38),
    ("imatrix-3-g64", "imatrix", 3, "group", None, 3.51, 0.558, 0.44),
    ("gptq-3-g64", "gptq", 3, "group", None, 3.52, 0.414, 0.47),
    ("rtn-4-tensor", "rtn", 4, "tensor", None, 4.0, 11.2, 0.26),
    ("rtn-4-g64", "rtn", 4, "group", None, 4.5, 0.398, 0.51),
    ("imatrix-4-g64", "imatrix", 4, "group", None, 4.5, 0.129, 0.56),
    ("gptq-4-g64", "gptq", 4, "group", None, 4.5, 0.0991, 0.58),
    ("imatrix-4-g32", "imatrix", 4, "group", None, 5.0, 0.083, 0.58),
    ("rtn-5-g64", "rtn", 5, "group", None, 5.5, 0.113, 0.57),
    ("gptq-5-g64", "gptq", 5, "group", None, 5.5, 0.0251, 0.60),
    ("rtn-6-g64", "rtn", 6, "group", None, 6.5, 0.0263, 0.60),
    ("rtn-8-g64", "rtn", 8, "group", None, 8.5, 0.0012, 0.61),
    ("splitquant-4-tensor", "splitquant", 4, "tensor", 3, 12.0, 0.87, 0.46),
    ("splitquant-4-g64", "splitquant", 4, "group", 3, 13.5, 0.0473, 0.60),
)
PAPER = Paper(
    source="arXiv:2503.07657",
    claims=(
        Claim(what="INT4 with the split above plain INT4, ARC", value=11.76, unit="points"),
        Claim(what="split and INT4 on an Apple M4 CPU", value=126, unit="s"),
    ),
)
MACHINE = {"chip": "made-up", "cores": 2, "system": "Linux x86_64", "memory_bytes": 25 * 10**9}
VERSIONS = {"python": "3.11.7", "splitquant-mlx": "0.1.0", "mlx": "0.32.4"}


def result(variant, part, values, **changes):
    known = {
        "study": "made-up",
        "variant": variant,
        "part": part,
        "settings": {"part_of": part},
        "values": values,
        "seconds": 12.5,
        "created": "2025-06-01T12:00:00+00:00",
        "machine": MACHINE,
        "versions": VERSIONS,
    }
    return Result(**{**known, **changes})


def study(**changes):
    known = {
        "title": "A made-up study",
        "model": "SmolLM2-135M-Instruct",
        "reference_variant": "original",
        "notes": ("All figures are made up.",),
        "paper": PAPER,
        "order": tuple(variant[0] for variant in VARIANTS),
    }
    return StudyRecord(**{**known, **changes})


def answers(share, seed, *, norm=True):
    rng = random.Random(seed)
    values = {"questions": QUESTIONS, "num_shots": 0}
    for ending, right in (("", share), ("_norm", share - 0.02)) if norm else (("", share),):
        # one threshold per question for all variants, so that their answers go together
        thresholds = random.Random(ending)
        correct = [int(thresholds.random() + rng.gauss(0, 0.05) < right) for _ in range(QUESTIONS)]
        accuracy = sum(correct) / QUESTIONS
        values[f"correct{ending}"] = correct
        values[f"accuracy{ending}"] = accuracy
        values[f"standard_error{ending}"] = (accuracy * (1 - accuracy) / (QUESTIONS - 1)) ** 0.5
    return values


def results():
    """Return the results of every part of every variant."""
    found = []
    for seed, (name, method, bits, granularity, clusters, bpw, kl, share) in enumerate(VARIANTS):
        whole = 0.8 * bpw + 0.2 * 16
        work = {"read": 0.4, "cluster": 6.1, "quantize": 3.2, "write": 0.9}
        if method in ("imatrix", "gptq"):
            work["calibrate"] = 21.7 + 9 * (method == "gptq")
        if clusters is None:
            work.pop("cluster")
        convert = {
            "method": method,
            "linear_bits_per_weight": bpw,
            "bits_per_weight": whole,
            "stored_bytes": round(134_515_008 * whole / 8),
            "source_bytes": 269_030_016,
            "seconds": {} if kl is None else {**work, "total": sum(work.values()) * 0.6},
            "peak_bytes": None if kl is None else 700_000_000 + 10**7 * seed,
            "bits": bits,
            "granularity": granularity,
            "clusters": clusters,
        }
        speed = 40 / (bpw / 4) ** 0.7
        parts = {
            "convert": convert,
            "arc_challenge.loglikelihood": answers(share, seed),
            "arc_challenge.letter": answers(share + 0.05, seed + 100, norm=False),
            "perplexity": {
                "perplexity": 59.4 * 2.718 ** (0.7 * (kl or 0)),
                "standard_error": 0.84,
                "tokens": 2048,
                "context_length": 1024,
                "stride": 512,
            },
            "speed": {
                "prefill_tokens_per_s": 30 * speed,
                "decode_tokens_per_s": speed,
                "decode_tokens_per_s_min": speed * 0.95,
                "decode_tokens_per_s_max": speed * 1.04,
                "load_s": 0.31,
                "first_token_s": 0.052,
                "peak_bytes": convert["stored_bytes"] + 50_000_000,
            },
        }
        if kl is not None:
            parts["kl"] = {
                "positions": 2047,
                "kl_mean": kl,
                "kl_median": kl / 2,
                "kl_p99": kl * 9,
                "kl_low": kl * 0.9,
                "kl_high": kl * 1.1,
                "top1_agreement": 0.97 - 0.09 * min(kl, 4) ** 0.5,
            }
        if name == "splitquant-4-g64":
            counts = [round(2000 * 2.718 ** (-((i - 40) ** 2) / 120)) for i in range(80)]
            parts["weights"] = {
                "layer": "model.layers.0.mlp.up_proj",
                "edges": [(i - 40) / 200 for i in range(81)],
                "counts": counts,
                "cut_points": [-0.041, 0.0423],
            }
        found += [result(name, part, values) for part, values in parts.items()]
    return found


def write_study(directory, *, without=(), **changes):
    """Write the whole study, less the parts in `without`, and return its directory."""
    for made in results():
        if made.part not in without:
            save(made, directory)
    save_study(study(**changes), directory)
    return directory


def tables(text: str) -> dict:
    """Parse Markdown's tables into {title: {variant: {heading: cell}}}."""
    found = {}
    for section in text.split("\n## ")[1:]:
        lines = [line for line in section.splitlines() if line.startswith("|")]
        cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
        plain = [[re.sub(r"\\(.)", r"\1", cell) for cell in row] for row in cells]
        if plain:
            title = section.splitlines()[0]
            found[title] = {r[0]: dict(zip(plain[0], r, strict=True)) for r in plain[2:]}
    return found
