"""Feed mutated input to every parser: `python tests/fuzz.py --inputs 10000 --seed 0`.

Whatever the input, the package must refuse it with a SplitQuantError or do its work. Anything else
is a defect: another exception, a crash or a hang, memory out of proportion, a file opened outside
the model's directory, code run or a connection opened, a control character sent to the terminal.
Input n of a seed is always the same: `--only n` repeats it here, where a debugger can see it.
"""

import argparse
import dataclasses
import importlib
import io
import json
import multiprocessing
import os
import pkgutil
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import gguf_bytes
import mutate
import tiny
from children import CONTROL, LIMIT_S, Defect, Result, campaign

from splitquant_mlx import Recipe, SplitQuantError
from splitquant_mlx.errors import SplitQuantWarning
from splitquant_mlx.formats import gguf_tokenizer
from splitquant_mlx.runtime import blas

MAX_MESSAGE = 2000
SECRET = "the-secret-outside"
RECIPE = {"method": "rtn", "bits": 4, "group_size": 32, "include": ["*.mlp.*"], "exclude": ["a[b"]}
# parser -> base, file
PARSERS = {
    "safetensors": ("plain", "model-00001-of-00002.safetensors"),
    "index": ("plain", "model.safetensors.index.json"),
    "config": ("plain", "config.json"),
    "tokenizer_config": ("plain", "tokenizer_config.json"),
    "tokenizer": ("plain", "tokenizer.json"),
    "generation_config": ("plain", "generation_config.json"),
    "layout": ("plain", ""),
    "gguf": ("", "model.gguf"),
    "recipe": ("plain", "../recipe.toml"),
    "manifest": ("split", "splitquant.json"),
    "split config": ("split", "config.json"),
    "split weights": ("split", "model.safetensors"),
    "rtn config": ("rtn", "config.json"),
}


def make_bases(root: Path) -> None:
    """Write the valid models that are mutated, and a secret beside them."""
    from splitquant_mlx import convert

    plain = tiny.write_checkpoint(root / "plain", shards=2)
    pieces = {key: value for key, (_, value) in gguf_bytes.METADATA.items()}
    for key in ("tokens", "scores", "token_type"):
        pieces[f"tokenizer.ggml.{key}"] = pieces[f"tokenizer.ggml.{key}"][1]
    gguf_tokenizer.build_tokenizer(pieces).save(str(plain / "tokenizer.json"))
    tokenizer = json.loads((plain / "tokenizer_config.json").read_text())
    tokenizer["chat_template"] = "{% for m in messages %}w2 {{ m.content }} {% endfor %}"
    (plain / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (plain / "generation_config.json").write_text('{"eos_token_id": [1], "temperature": 0.5}')
    (plain / "evil.py").write_text("raise SystemExit('code of the checkpoint ran')")
    (plain / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    for name, method in {"split": "splitquant", "rtn": "rtn"}.items():
        convert(plain, root / name, recipe=Recipe(method=method))
        shutil.copy(plain / "evil.py", root / name)
    for name in ("secret", "linked"):
        (root / name).mkdir()
        (root / name / "secret.json").write_text(json.dumps({"model_type": SECRET}))
        shutil.copy(plain / "model-00001-of-00002.safetensors", root / name / "model.safetensors")


def parser_of(number: int) -> str:
    """Return which parser an input is for."""
    return list(PARSERS)[number % len(PARSERS)]


def attempt(bases: Path, seed: int, room: Path, number: int) -> str:
    """Mutate one input in the empty directory `room` and use it; returns the outcome.

    Raises:
        Exception: whatever the package should not have done.
    """
    rng, parser = Random(f"{seed}:{number}"), parser_of(number)
    base, name = PARSERS[parser]
    model = room / (name if parser == "gguf" else "model")
    if base:
        model.mkdir()
        (room / "secret").mkdir()
        for directory in (model, room / "secret"):
            for file in (bases / (base if directory == model else "secret")).iterdir():
                os.link(file, directory / file.name)
    if parser == "layout":
        rearrange(rng, model, bases / "linked")
    else:
        target = model / name if base else model
        target.unlink(missing_ok=True)  # or the link's other end would be written
        target.write_bytes(mutated(rng, parser, bases / base / name))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SplitQuantWarning)  # a note to the user
            outcome = use(rng, parser, base, model, room)
    except SplitQuantError as exc:
        if not str(exc) or "\n" in str(exc):
            raise Defect(f"not one line: {exc!r:.200}") from exc
        outcome = "refused"
    written = room / "out"
    if written.is_dir() and any(SECRET.encode() in f.read_bytes() for f in written.iterdir()):
        raise Defect("a file from outside the model was copied")
    return outcome


def mutated(rng: Random, parser: str, file: Path) -> bytes:
    """Return the content of `file`, mutated as its format suggests."""
    if parser == "gguf":
        if rng.random() < 0.6:
            return gguf_bytes.write(rng)
        return mutate.mutate_bytes(rng, gguf_bytes.write(), rng.choice((400, 4000, 1 << 30)))
    if parser == "recipe":
        return mutate.mutate_toml(rng, RECIPE)
    if file.suffix == ".safetensors":
        return mutate.mutate_safetensors(rng, file.read_bytes())
    content = file.read_bytes()
    if parser == "config" and rng.random() < 0.3:
        content = json.dumps({**json.loads(content), **other_architecture(rng)}).encode()
        if rng.random() < 0.5:
            return content
    return mutate.mutate_json(rng, content)


def other_architecture(rng: Random) -> dict[str, Any]:
    """Return settings of any architecture that mlx-lm has."""
    from mlx_lm import models

    names = sorted(module.name for module in pkgutil.iter_modules(models.__path__))
    name = rng.choice(names)
    try:
        arguments = getattr(importlib.import_module(f"mlx_lm.models.{name}"), "ModelArgs", None)
    except SystemExit:  # an optional package is missing
        arguments = None
    fields = dataclasses.fields(arguments) if dataclasses.is_dataclass(arguments) else ()
    return {**mutate.fill(rng, [field.name for field in fields]), "model_type": name}


def rearrange(rng: Random, model: Path, linked: Path) -> None:
    """Put links, directories and pipes where files should be."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        names = ["x.json", "LICENSE", "model-2.safetensors", "tokenizer.model"]
        names += sorted(p.name for p in model.iterdir() if p.suffix not in (".py", ".bin"))
        place = model / rng.choice(names)
        place.unlink(missing_ok=True) if not place.is_dir() else None
        if os.path.lexists(place):
            continue
        match rng.randrange(6):
            case 0:
                os.mkfifo(place)
            case 1:
                place.mkdir()
            case 2:
                place.write_bytes(rng.randbytes(rng.choice((0, 9, 999))))
            case _:
                inside = model / rng.choice(names)
                links = (linked / "secret.json", linked, inside, place.name, "/dev/zero", "nowhere")
                place.symlink_to(rng.choice(links))


def use(rng: Random, parser: str, base: str, model: Path, room: Path) -> str:
    """Do one of the things a user does with a model; return the outcome."""
    from splitquant_mlx import convert, load, load_recipe
    from splitquant_mlx.inference.chat import encode
    from splitquant_mlx.inspection.layers import layer_histogram
    from splitquant_mlx.inspection.overview import describe

    recipe = load_recipe(model / "../recipe.toml") if parser == "recipe" else Recipe()
    actions = [
        *["load"] * 3,
        "generate",
        "inspect",
        "cli inspect",
        "layer",
        *["convert"] * 5,
        "cli",
    ]
    if base in ("split", "rtn"):
        actions = ["load", "load", "generate", "inspect", "cli inspect", "layer"]
    match rng.choice(actions):
        case "convert":
            convert(model, room / "out", recipe=recipe)
            try:
                load(room / "out")
            except SplitQuantError:
                return "converted, load refuses"
            return "converted and loads"
        case "cli":
            given = ["--recipe", str(model / "../recipe.toml")] if parser == "recipe" else []
            return command("convert", "--mlx-path", str(room / "out"), *given, model=model)
        case "cli inspect":
            return command("inspect", model=model)
        case "generate":
            return command("generate", "--prompt", "w3", "--max-tokens", "2", model=model)
        case "load":
            tokenizer = load(model)[1]
            encode(tokenizer, [{"role": "user", "content": "w3 w4"}])
            return "loads"
        case _ if not model.is_dir():
            return command("inspect", model=model)
        case "inspect":
            describe(model)
        case _:
            layer_histogram(model, "model.layers.0.mlp.up_proj")
    return "inspected"


def command(name: str, *options: str, model: Path) -> str:
    """Run a command line; its exit code and its output must be those of a clean end."""
    from splitquant_mlx.cli import run

    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run([name, "--model", str(model), *options])
    text = out.getvalue() + err.getvalue()
    if found := CONTROL.search(text):
        raise Defect(f"{name} prints {found[0]!r} in {text:.300}")
    if code not in (0, 2) or "error: unexpected " in err.getvalue() or "Traceback" in text:
        raise Defect(f"{name} exits with {code}: {err.getvalue():.300}")
    if len(err.getvalue()) > MAX_MESSAGE:
        raise Defect(f"{name} complains with {len(err.getvalue())} characters")
    return "refused" if code == 2 else f"{name} runs"


def warm_up(bases: Path) -> None:
    """Import and start what the first input should not pay for."""
    from splitquant_mlx.cli import run

    blas.preload()
    os.environ["COLUMNS"] = "200"
    for base in ("plain", "split", "rtn"):
        run(["generate", "--model", str(bases / base), "--prompt", "w3", "--max-tokens", "2"])
        run(["inspect", str(bases / base)])


def table(results: list[Result]) -> str:
    """Return the number of every outcome of every parser."""
    counts = Counter((parser_of(r.number), r.outcome) for r in results)
    outcomes = sorted({outcome for _, outcome in counts})
    lines = [["", *outcomes]]
    lines += [[p, *(str(counts[p, o] or "") for o in outcomes)] for p in PARSERS]
    lines.append(["total", *(str(sum(counts[p, o] for p in PARSERS)) for o in outcomes)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = [zip(line, widths, strict=True) for line in lines]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in row) for row in rows)


def main() -> int:
    """Run a campaign; print the outcomes, and every defect once."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds an input may take")
    parser.add_argument("--parser", choices=list(PARSERS), help="mutate only this one's input")
    parser.add_argument("--only", type=int, help="repeat this input in the same process")
    options = parser.parse_args()
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        bases, room = Path(scratch) / "bases", Path(scratch) / "room"
        bases.mkdir(), room.mkdir()
        if options.only is not None:
            make_bases(bases)
            print(attempt(bases, options.seed, room, options.only))
            return 0
        maker = multiprocessing.get_context("fork").Process(target=make_bases, args=(bases,))
        maker.start(), maker.join()
        began = time.monotonic()
        results = campaign(
            partial(attempt, bases, options.seed),
            [n for n in range(options.inputs) if options.parser in (None, parser_of(n))],
            warm_up=partial(warm_up, bases),
            readable=(str(bases), str(Path(blas.__file__).parent)),
            limit_s=options.limit,
        )
    print(table(results))
    print(f"{len(results)} inputs, {time.monotonic() - began:.0f} s")
    defects: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda r: r.number):
        if result.defect:
            key = f"{parser_of(result.number)}: {result.defect.partition(': ')[0]}"
            defects.setdefault(key, []).append(result)
    for key, found in sorted(defects.items()):
        numbers = ", ".join(str(r.number) for r in found[:6])
        print(f"{len(found)} x {key} (inputs {numbers}) {found[0].defect.partition(': ')[2]!r}")
    return 1 if defects else 0


if __name__ == "__main__":
    sys.exit(main())
