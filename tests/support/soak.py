"""Convert, load, chat and evaluate in one process, over and over: `python tests/soak.py`.

Whoever serves, studies or scripts keeps a process for days: memory and open files must stay where
they are once everything has been used. What is measured, after a warm-up of a tenth of the time,
is resident memory, its slope, mlx's own memory, open files and threads; the figures are JSON.
"""

import argparse
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from splitquant_mlx.runtime import blas

blas.preload()

import mlx.core as mx  # noqa: E402  after OpenBLAS
import tiny  # noqa: E402  imports mlx

from splitquant_mlx import Recipe, convert  # noqa: E402
from splitquant_mlx.data.questions import Question  # noqa: E402
from splitquant_mlx.evaluation.arc import Exam, evaluate_arc  # noqa: E402
from splitquant_mlx.evaluation.divergence import measure_divergence  # noqa: E402
from splitquant_mlx.evaluation.perplexity import measure_perplexity  # noqa: E402
from splitquant_mlx.evaluation.reference import open_reference  # noqa: E402
from splitquant_mlx.inference.chat import Conversation, Decoder  # noqa: E402
from splitquant_mlx.inference.decoding import Decoding  # noqa: E402
from splitquant_mlx.models.lazy import LazyModel  # noqa: E402
from splitquant_mlx.models.loader import load  # noqa: E402
from splitquant_mlx.runtime.environment import describe_machine, versions  # noqa: E402

ARCHITECTURES = ("llama", "qwen3", "gemma2")
RECIPES = (Recipe(), Recipe(method="rtn"), Recipe(bits=3, clusters=2, granularity="channel"))
ROUND = len(ARCHITECTURES) * len(RECIPES)
WARM_UP, WARM_UP_ROUNDS, LEAST_ROUNDS = 0.1, 2, 5
TEMPLATE = "{% for m in messages %}w2 {{ m.content }} {% endfor %}w3"
QUESTIONS = [
    Question(
        id=str(n),
        question=f"w{n} w{n + 1}",
        labels=("A", "B", "C"),
        choices=("w4 w5", "w6", f"w{n + 2}"),
        answer=n % 3,
    )
    for n in range(2, 6)
]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Hold what the process has after a loop; `seconds` since the start."""

    seconds: float
    resident_bytes: int
    mlx_bytes: int
    open_files: int
    threads: int


def take_sample(began: float) -> Sample:
    """Look at this process."""
    return Sample(
        seconds=time.monotonic() - began,
        resident_bytes=resident_bytes(),
        mlx_bytes=mx.get_active_memory(),
        open_files=len(os.listdir("/dev/fd")),
        threads=number_of_threads(),
    )


def resident_bytes() -> int:
    """Return the memory of this process that is in RAM."""
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    asked = ["ps", "-o", "rss=", "-p", str(os.getpid())]
    return 1024 * int(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)


def number_of_threads() -> int:
    """Return how many threads there are: on Linux all of them, elsewhere Python's own."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else threading.active_count()


def one_loop(source: Path, recipe: Recipe, room: Path) -> None:
    """Do with a checkpoint what users do."""
    convert(source, room / "model", recipe=recipe, overwrite=True)
    model, tokenizer = load(room / "model", tokenizer_config={"chat_template": TEMPLATE})
    decoder = Decoder(model, tokenizer, Decoding(max_tokens=16, temp=0.7))
    conversation = Conversation(tokenizer, decoder)
    for message in ("w5 w6 w7", "w8", "w9 w10"):
        for _ in conversation.answer(message):
            pass
    opened, original = LazyModel(room / "model"), LazyModel(source)
    tokens = np.arange(256, dtype=np.int32) * 7 % tiny.VOCAB
    measure_perplexity(opened.model, tokens, context_length=64)
    exam = Exam(task="soak", questions=QUESTIONS)
    journal = room / "journal"
    evaluate_arc(opened.model, opened.tokenizer, exam, journal=journal, model_hash=opened.hash)
    journal.unlink()
    reference = open_reference(
        tokens.reshape(4, 64),
        model_hash=original.hash,
        load=original.load,
        directory=room / "reference",
    )
    measure_divergence(opened.model, reference)


def samples(minutes: float, room: Path) -> Iterator[Sample]:
    """Yield a sample after every loop."""
    sources = [tiny.write_checkpoint(room / name, name) for name in ARCHITECTURES]
    began = time.monotonic()
    for number, (source, recipe) in enumerate(itertools.cycle(itertools.product(sources, RECIPES))):
        if number >= ROUND * LEAST_ROUNDS and time.monotonic() - began > 60 * minutes:
            return
        one_loop(source, recipe, room)
        gc.collect()  # what waits for the collector is no leak
        yield take_sample(began)


def summary(found: Sequence[Sample]) -> dict[str, Any]:
    """Return the figures of what comes after the warm-up."""
    early = sum(sample.seconds < WARM_UP * found[-1].seconds for sample in found)
    warm = max(early, WARM_UP_ROUNDS * ROUND)
    kept = found[warm:]
    tenth = len(kept) // 10 or 1
    figures: dict[str, Any] = {
        "loops": len(found),
        "warm_up_loops": warm,
        "seconds": found[-1].seconds,
    }
    for name in ("resident_bytes", "mlx_bytes"):
        values = [getattr(sample, name) for sample in kept]
        figures[name] = {
            "after_warm_up": int(np.median(values[:tenth])),
            "end": int(np.median(values[-tenth:])),
            "slope_a_loop": float(np.polyfit(range(len(values)), values, 1)[0]),
        }
    for name in ("open_files", "threads"):
        values = [getattr(sample, name) for sample in kept]
        figures[name] = {"after_warm_up": values[0], "most": max(values), "end": values[-1]}
    return figures


def main() -> int:
    """Run, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--json", type=Path, help="write figures and all samples here")
    options = parser.parse_args()
    mx.set_default_device(mx.Device(mx.cpu))
    with tempfile.TemporaryDirectory(prefix="soak-") as room:
        found = list(samples(options.minutes, Path(room)))
    figures = {**summary(found), "machine": describe_machine(), "versions": versions()}
    print(json.dumps(figures, indent=2))
    if options.json:
        figures["samples"] = [asdict(sample) for sample in found]
        options.json.write_text(json.dumps(figures) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
