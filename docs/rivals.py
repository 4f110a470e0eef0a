"""Quantize a model by mlx-lm's own programs, for the rows of recipes/rivals.toml.

    python docs/rivals.py MODEL TEXT RECORD [NAME ...]

writes rivals/NAME under the working directory for every rival, or for those named, and RECORD, a
JSON file: the command, the tokens of calibration, the time and, of one that failed, its last line.
Calibration is on the second half of TEXT; the divergence is measured on its beginning. mlx-lm's
programs fetch their text; here they find this one in their cache. They keep scales in the dtype of
the weights, so the results are cast to float16 as all others are.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from mlx_lm.utils import load_tokenizer

SEQUENCE = 512
# On Linux with a fast matrix product, without which a day does not suffice.
RUN = (
    sys.executable,
    "-c",
    "import splitquant_mlx.runtime.blas as b; b.preload(); import mlx_lm.cli as c; c.main()",
)
CAST = ("convert", "--dtype", "float16")
RIVALS = {  # sequences of calibration, program
    "convert-mixed_3_4": (0, (*CAST, "-q", "--quant-predicate", "mixed_3_4")),
    "convert-mixed_4_6": (0, (*CAST, "-q", "--quant-predicate", "mixed_4_6")),
    "gptq": (64, ("gptq", "--num-samples", "64")),
    # 5.5 bits/weight with float32 scales are 5.0, its default, with float16 scales
    "dynamic_quant": (16, ("dynamic_quant", "--target-bpw", "5.5")),
    "awq": (4, ("awq", "--num-samples", "4")),
}


def write_text(model: str, text: str, sequences: int, home: Path) -> int:
    """Write `sequences` of `text` where the programs look in `home`; return the tokens."""
    tokenizer = load_tokenizer(Path(model))
    size = sequences * SEQUENCE * (len(text) // len(tokenizer.encode(text)))  # in characters
    while len(tokenizer.encode(text[:size])) < sequences * SEQUENCE:
        size += SEQUENCE
    cache = home / ".cache" / "mlx-lm" / "calibration_v5.txt"
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(text[:size], encoding="utf-8")
    return len(tokenizer.encode(text[:size])) // SEQUENCE * SEQUENCE


def make(name: str, model: str, text: str) -> dict:
    """Run one program and return its record; its checkpoint is in rivals/`name`."""
    sequences, program = RIVALS[name]
    home, raw = Path("rivals") / f"{name}.home", f"rivals/{name}.raw"
    tokens = write_text(model, text, sequences, home)
    record = {"command": f"mlx_lm.{' '.join(program)}", "tokens": tokens}
    environment = {**os.environ, "HOME": str(home.absolute()), "HF_HUB_OFFLINE": "1"}
    command = [*RUN, *program, "--model", model, "--mlx-path", raw]
    started = time.perf_counter()
    with (home / "log").open("w", encoding="utf-8") as log:
        status = subprocess.run(command, env=environment, stdout=log, stderr=log).returncode
    record["seconds"] = time.perf_counter() - started
    if status:
        lines = (home / "log").read_text(encoding="utf-8").splitlines()
        return record | {"status": status, "failed": lines[-1] if lines else ""}
    subprocess.run(
        [*RUN, *CAST, "--model", raw, "--mlx-path", f"rivals/{name}"], env=environment, check=True
    )
    return record


def main() -> None:
    """Make the rivals that are named, or all."""
    model, file, record, *names = sys.argv[1:]
    text, target = Path(file).read_text(encoding="utf-8"), Path(record)
    records = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    for name in names or RIVALS:
        records[name] = make(name, model, text[len(text) // 2 :])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
