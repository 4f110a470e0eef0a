r"""Write the tables of the README and of the pages here from JSON that the program wrote.

    splitquant-mlx bench make-checkpoint llama-3.2-1b llama-3.2-1b
    splitquant-mlx bench convert --model llama-3.2-1b --json docs/bench.json
    python benchmarks/kmeans_speed.py docs/kmeans.json
    python benchmarks/memory_by_depth.py docs/memory.json
    splitquant-mlx convert --model <cache>/demo/SmolLM2-135M-Instruct.Q4_1.gguf --mlx-path split
    splitquant-mlx convert --model <cache>/demo/SmolLM2-135M-Instruct.Q4_1.gguf --mlx-path rtn \
        --method rtn --embeddings keep
    splitquant-mlx bench --model split --against rtn -p 32 -g 8 -n 3 --device cpu \
        --json docs/speed.json
    splitquant-mlx run recipes/smollm2.toml --output-dir docs/results/smollm2
    splitquant-mlx run recipes/tiny.toml --model <directory> --output-dir docs/results/<its name>
    python tests/support/offgrid.py <cache>/demo/SmolLM2-135M-Instruct.Q4_1.gguf \
        smollm2-135m-offgrid
    splitquant-mlx run recipes/sizes.toml --model smollm2-135m-offgrid \
        --output-dir docs/results/sizes
    splitquant-mlx run recipes/neighbours.toml --model <directory> --data text=<stories> \
        --output-dir docs/results/neighbours-<its name>
    splitquant-mlx run recipes/whole-files.toml --model smollm2-135m-offgrid \
        --data text=<text> --output-dir docs/results/whole-smollm2
    splitquant-mlx run recipes/whole-files.toml --model qwen2.5-coder-0.5b-offgrid \
        --data text=<text> --output-dir docs/results/whole-qwen2.5-coder-0.5b
    splitquant-mlx run <rtn 4-bit, auto 4.5, and the same with 64 texts, of whole-files.toml> \
        --model qwen2.5-coder-1.5b-offgrid \
        --data text=<text> --output-dir docs/results/whole-qwen2.5-coder-1.5b
    python docs/rivals.py smollm2-135m-offgrid <text> docs/results/rivals/smollm2.json
    python docs/hqq_rival.py smollm2-135m-offgrid docs/results/rivals/smollm2.json
    splitquant-mlx run recipes/rivals.toml --model smollm2-135m-offgrid --data text=<text> \
        --output-dir docs/results/rivals-smollm2
    splitquant-mlx run recipes/arc.toml --model smollm2-135m-offgrid \
        --data arc_challenge=<test> --data arc_easy=<validation> \
        --output-dir docs/results/arc-smollm2
    python docs/chat_text.py <wheel of chatterbot-corpus 1.3.3> <chat>
    splitquant-mlx run recipes/other-texts.toml --model <directory> --data text=<chat> \
        --output-dir docs/results/text-chat-<its name>
    splitquant-mlx run recipes/other-texts.toml --model <directory> --data text=<argparse.py> \
        --output-dir docs/results/text-code-<its name>
    splitquant-mlx run recipes/paper.toml --model <directory> --measure text \
        --data text=<text> --output-dir docs/results/paper-<its name>
    python docs/figures.py

With --check nothing is written; the exit code says whether all are up to date.
"""

import json
import math
import re
import sys
from itertools import product
from pathlib import Path

import numpy as np

from splitquant_mlx.evaluation.paired import compare
from splitquant_mlx.report import load_report, markdown
from splitquant_mlx.study.results import load_results

DOCS = Path(__file__).resolve().parent
INTRODUCTION = """\
<!-- written by docs/figures.py from docs/results -->

What `splitquant-mlx run` measured; the environment stands in every file of `docs/results`. Times
are of one machine that had other work to do at the time: do not rely on them.

"""
MARKS = r"(<!-- {}: [^\n]*-->\n).*?(<!-- end -->)"


def bench_table(bench: dict) -> str:
    """Return the conversion times as a Markdown table of ratios."""
    lines = ["| | time | peak memory, GB |", "|---|---|---|"]
    for name, program in bench["programs"].items():
        lines.append(f"| {name} | {program['ratio']:.2f} x | {program['peak_bytes'] / 1e9:.2f} |")
    return "\n".join(lines) + "\n"


def kmeans_table(kmeans: dict) -> str:
    """Return the times of both ways to cluster as a Markdown table."""
    lines = ["| matrix | exact, ns per weight | scikit-learn's KMeans |", "|---|---|---|"]
    for run in kmeans["runs"]:
        shape = " x ".join(map(str, run["shape"]))
        lines.append(
            f"| {run['dtype']}, {shape} | {run['exact_ns_per_weight']:.1f} | {run['ratio']:.0f} x |"
        )
    return "\n".join(lines) + "\n"


def memory_table(memory: dict) -> str:
    """Return the peak memory by depth as a Markdown table."""
    lines = ["| layers | checkpoint, MB | peak memory, MB |", "|---|---|---|"]
    for run in memory["runs"]:
        cells = run["source_bytes"] / 1e6, run["peak_bytes"] / 1e6
        lines.append(f"| {run['layers']} | {cells[0]:.0f} | {cells[1]:.0f} |")
    return "\n".join(lines) + "\n"


def speed_table(speed: dict) -> str:
    """Return the times of one model over another's as a Markdown table."""
    found = speed["ratios"][0]
    lines = [
        f"| {found['model']} over {found['against']} | median | least | most |",
        "|---|---|---|---|",
    ]
    names = {
        "prefill_time": "time to read a prompt",
        "decode_time": "time per token",
        "load_s": "time to load",
        "first_token_s": "time from start to first token",
        "peak_bytes": "peak memory",
    }
    for key, name in names.items():
        cells = " | ".join(f"{found[key][of]:.2f} x" for of in ("median", "min", "max"))
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines) + "\n"


def model_of(study: Path) -> str:
    """Return the name of the model of a published study."""
    return json.loads((study / "study.json").read_text(encoding="utf-8"))["model"]


def values_of(study: Path) -> dict[str, dict]:
    """Return the values of a published study, by variant; those of ARC are in `arc_table`."""
    found: dict[str, dict] = {}
    for result in load_results(study):
        row = found.setdefault(result.variant, {"variant": result.variant})
        row.update(result.values)
    return found


def sizes_table(study: Path) -> str:
    """Return what each method keeps, by size; the closest of each size is in bold.

    Sizes are in bits/weight of the linear layers. Divergences are also given as a ratio to that of
    rtn at the same size, where there is one.
    """
    sizes: dict[float, list[tuple[float, str]]] = {}
    found = values_of(study)
    for variant, row in found.items():
        if "kl_mean" in row:
            bits = round(row["linear_bits_per_weight"], 1)
            sizes.setdefault(bits, []).append((row["kl_mean"], variant))
    lines = [
        "| bits/weight | method | KL, nats | to rtn | top-1 agreement | perplexity |",
        "|---|---|---|---|---|---|",
    ]
    for bits, rows in sorted(sizes.items()):
        plain = [kl for kl, variant in rows if variant.startswith("rtn")]
        for kl, variant in sorted(rows, reverse=True):
            cells = (
                f"{bits:.1f}",
                f"**{variant}**" if kl == min(rows)[0] and len(rows) > 1 else variant,
                f"{kl:.3f}",
                f"{kl / plain[0]:.2f}" if plain else "",
                f"{found[variant]['top1_agreement']:.0%}",
                f"{found[variant]['perplexity']:.1f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def whole_files() -> dict[str, list[dict]]:
    """Return what was measured of whole files, by model: a row for each variant, by size."""
    models: dict[str, dict[str, dict]] = {}
    for study in sorted(DOCS.glob("results/whole-*")) + sorted(DOCS.glob("results/rivals-*")):
        models.setdefault(model_of(study), {}).update(values_of(study))
    found = {}
    for model, rows in models.items():
        measured = [row for row in rows.values() if "kl_mean" in row]
        plain = {
            row["weight_file_bytes"]: math.log(row["kl_mean"])
            for row in measured
            if row["variant"].startswith("rtn")
        }
        sizes = sorted(plain)
        for row in measured:
            size = row["weight_file_bytes"]
            if sizes[0] * 0.99 <= size <= sizes[-1] * 1.01:
                there = math.exp(np.interp(size, sizes, [plain[other] for other in sizes]))
                row["to_rtn"] = row["kl_mean"] / there
        found[model] = sorted(measured, key=lambda row: row["weight_file_bytes"])
    return found


def without_ablations(rows: list[dict]) -> list[dict]:
    """Leave out `auto` with fewer texts, unless it is the only one at its size."""
    variants = {row["variant"] for row in rows}
    return [
        row
        for row in rows
        if not (row["variant"].endswith("texts") and row["variant"].partition(",")[0] in variants)
    ]


def whole_files_table() -> str:
    """Return a table for each model of what whole files keep, by size on disc."""
    lines = []
    for model, rows in whole_files().items():
        lines += [
            f"### {model}",
            "",
            "| MB | method | KL, nats | 95 % interval | to rtn | 99th | top-1 | perplexity |",
            "|---:|---|---:|---:|---:|---:|---:|---:|",
        ]
        for row in rows:
            cells = (
                f"{row['weight_file_bytes'] / 1e6:.3g}",
                row["variant"],
                f"{row['kl_mean']:.4f}",
                f"{row['kl_low']:.4f} to {row['kl_high']:.4f}",
                f"{row['to_rtn']:.2f}" if "to_rtn" in row else "",
                f"{row['kl_p99']:.2f}",
                f"{row['top1_agreement']:.0%}",
                f"{row['perplexity']:.1f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def real_models_table() -> str:
    """Return what whole files of the real models keep at the size of rtn 4-bit, closest last."""
    lines = [
        "| model | method | MB | KL, nats | to rtn | top-1 | perplexity |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for model, rows in whole_files().items():
        size = next(row["weight_file_bytes"] for row in rows if row["variant"] == "rtn 4-bit")
        near = [
            row
            for row in without_ablations(rows)
            if abs(row["weight_file_bytes"] / size - 1) < 0.11
        ]
        for row in sorted(near, key=lambda row: -row["kl_mean"]) if size > 1e7 else ():
            cells = (
                model.removesuffix("-offgrid"),
                f"**{row['variant']}**" if row["variant"].startswith("auto") else row["variant"],
                f"{row['weight_file_bytes'] / 1e6:.0f}",
                f"{row['kl_mean']:.3f}",
                f"{row['to_rtn']:.2f}",
                f"{row['top1_agreement']:.0%}",
                f"{row['perplexity']:.1f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def targets_table() -> str:
    """Return what `auto` was to reach at equal bytes, and what it reached."""
    lines = ["| model | target | measured | |", "|---|---|---:|---|"]

    def add(model: str, target: str, measured: str, met: bool) -> None:
        lines.append(f"| {model} | {target} | {measured} | {'met' if met else '**missed**'} |")

    for model, rows in whole_files().items():
        for row in without_ablations(rows):
            if row["variant"].startswith("auto 4.5"):
                smollm2, refined = model.startswith("smollm2"), row["variant"].endswith("refined")
                most = ((0.45, 0.40), (0.24, 0.22))[smollm2][refined]
                target = f"{row['variant']} at most {most} of rtn's KL"
                add(model, target, f"{row['to_rtn']:.2f}", row["to_rtn"] <= most)
            if "forecast_kl" in row:
                forecast, measured = row["forecast_kl"], row["kl_mean"]
                off = measured / forecast - 1
                target = f"{row['variant']}: forecast of {forecast:.4f} nats within 15 %"
                add(model, target, f"{measured:.4f} ({off:+.0%})", abs(off) <= 0.15)
    return "\n".join(lines) + "\n"


def other_texts_table() -> str:
    """Return what whole files of 4.5 bits/weight keep on chat text and code."""
    lines = [
        "| model | text | method | KL, nats | 95 % interval | to rtn | 99th | top-1 |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for study in sorted(DOCS.glob("results/text-*")):
        found = values_of(study)
        for variant, row in found.items():
            if "kl_mean" in row:
                cells = (
                    model_of(study).removesuffix("-offgrid"),
                    study.name.split("-")[1],
                    variant,
                    f"{row['kl_mean']:.4f}",
                    f"{row['kl_low']:.4f} to {row['kl_high']:.4f}",
                    f"{row['kl_mean'] / found['rtn 4-bit']['kl_mean']:.2f}",
                    f"{row['kl_p99']:.2f}",
                    f"{row['top1_agreement']:.0%}",
                )
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def arc_table() -> str:
    """Return the accuracies of whole files on ARC, with the paired difference to the original."""
    names = {"arc_challenge": "ARC-Challenge", "arc_easy": "ARC-Easy"}
    lines = [
        "| model | variant | MB | questions | correct, % | to the original, points | p |",
        "|---|---|---:|---|---:|---:|---:|",
    ]
    for study in sorted(DOCS.glob("results/arc-*")):
        found: dict[str, dict] = {}
        for result in load_results(study):
            found.setdefault(result.variant, {})[result.part] = result.values
        by_size = sorted(found.items(), key=lambda row: row[1]["convert"]["weight_file_bytes"])
        for (task, name), (variant, parts) in product(names.items(), by_size):
            score, original = (of[f"{task}.loglikelihood"] for of in (parts, found["original"]))
            paired = compare(score["correct"], original["correct"])
            changed = (paired.only_first + paired.only_second) / paired.questions
            error = math.sqrt((changed - paired.difference**2) / paired.questions)
            cells = (
                model_of(study).removesuffix("-offgrid"),
                variant,
                f"{parts['convert']['weight_file_bytes'] / 1e6:.3g}",
                f"{name}, {score['questions']:,}",
                f"{score['accuracy']:.1%} ± {score['standard_error']:.1%}".replace("%", ""),
                ""
                if parts is found["original"]
                else f"{100 * paired.difference:+.1f} ± {100 * error:.1f}",
                "" if parts is found["original"] else f"{paired.p_value:.2g}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def paper_table() -> str:
    """Return what the split changes in the paper's experiment, at each width and granularity."""
    lines = [
        "| model | codes | scales per | plain: KL, nats | perplexity | split: KL, nats "
        "| perplexity | split / plain: KL | bytes |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for study in sorted(DOCS.glob("results/paper-*")):
        found = values_of(study)
        for bits, scale in product((8, 4, 2), ("group", "channel", "tensor")):
            plain, split = (found[f"{how} INT{bits} {scale}"] for how in ("plain", "split"))
            cells = (
                model_of(study).removesuffix("-offgrid"),
                f"INT{bits}",
                scale,
                *(f"{row[key]:.3g}" for row in (plain, split) for key in ("kl_mean", "perplexity")),
                f"{split['kl_mean'] / plain['kl_mean']:.2g}",
                f"{split['weight_file_bytes'] / plain['weight_file_bytes']:.2f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def results() -> str:
    """Return the reports of all published studies, one after the other, as Markdown."""
    studies = sorted(file.parent for file in DOCS.glob("results/*/study.json"))
    return INTRODUCTION + "\n".join(markdown(load_report(study)) for study in studies)


def main() -> None:
    """Bring the README and the pages up to date, or check that they are."""
    writers = {
        "bench": bench_table,
        "kmeans": kmeans_table,
        "memory": memory_table,
        "speed": speed_table,
    }
    tables = {
        name: write(json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8")))
        for name, write in writers.items()
    }
    tables["whole-files"] = whole_files_table()
    tables["targets"] = targets_table()
    tables["real-models"] = real_models_table()
    tables["other-texts"] = other_texts_table()
    tables["arc"] = arc_table()
    tables["paper"] = paper_table()
    tables["sizes"] = sizes_table(DOCS / "results" / "sizes")
    tables["wider"] = sizes_table(DOCS / "results" / "neighbours-babyllama-tok105")
    tables["narrower"] = sizes_table(DOCS / "results" / "neighbours-stories260K")
    tables["owned"] = sizes_table(DOCS / "results" / "neighbours-trained-llama")
    pages = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]
    files = {page: page.read_text(encoding="utf-8") for page in pages}
    for page, name in product(pages, tables):
        marks = re.compile(MARKS.format(name), re.DOTALL)
        files[page] = marks.sub(
            lambda found, name=name: found[1] + tables[name] + found[2], files[page]
        )
    files[DOCS / "results.md"] = results()
    for file, content in files.items():
        if "--check" not in sys.argv:
            file.write_text(content, encoding="utf-8")
        elif file.read_text(encoding="utf-8") != content:
            sys.exit(f"{file.name}: run python docs/figures.py")


if __name__ == "__main__":
    main()
