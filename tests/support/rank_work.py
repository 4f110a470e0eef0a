"""Do, as one rank of a group, what test_distributed.py looks at; prints JSON.

Arguments: a directory of models, and the paths of a text and of questions.
"""

import inspect
import json
import sys
from pathlib import Path

from splitquant_mlx.runtime import blas

blas.preload()

import mlx.core as mx  # noqa: E402  after OpenBLAS

mx.set_default_device(mx.Device(mx.cpu))

from mlx_lm.generate import generation_stream, stream_generate  # noqa: E402  after the device
from mlx_lm.utils import sharded_load  # noqa: E402

from splitquant_mlx.errors import RecipeError, SplitQuantError  # noqa: E402
from splitquant_mlx.evaluation.task import Task, evaluate  # noqa: E402
from splitquant_mlx.inference.decoding import Decoding  # noqa: E402
from splitquant_mlx.models.loader import load, load_model  # noqa: E402
from splitquant_mlx.runtime import ranks as distributed  # noqa: E402

PROMPT = [3, 5, 8, 13, 21, 34, 55, 89]


def logits(path, group):
    """Return the logits after PROMPT of a model that the ranks divide."""
    model = load_model(path, group=group, pipeline="pipeline" in path.name)
    return model(mx.array([PROMPT]))[0, -1].tolist()


def stock(path, group):
    """Return the same logits from mlx-lm on its own, which runs the checkpoint's own code."""
    options = inspect.signature(sharded_load).parameters.keys() & {"trust_remote_code"}
    model, _ = sharded_load(str(path), tensor_group=group, **dict.fromkeys(options, True))
    return model(mx.array([PROMPT]))[0, -1].tolist()


def sampled(path, group):
    """Return tokens sampled by ranks whose random numbers differ."""
    model, tokenizer = load(path, group=group)
    mx.random.seed(group.rank() if group else 0)
    options = Decoding(temp=1.0, max_tokens=12).options(group)
    tokens = [found.token for found in stream_generate(model, tokenizer, PROMPT, **options)]
    distributed.drain(group, generation_stream)
    return tokens


def evaluations(model, reference, text, questions, group):
    """Return the values of evaluations by all ranks."""
    data = {"context_length": 32, "data": text, "limit": 7}
    tasks = {
        "perplexity": (Task(name="perplexity", stride=20, **data), None),
        "kl": (Task(name="kl", **data), reference),
        "arc": (Task(name="arc_easy", data=questions), reference),
        "letter": (Task(name="arc_easy", data=questions, protocol="letter"), None),
    }
    found = {}
    for name, (task, other) in tasks.items():
        result = evaluate(str(model), task, reference=other and str(other), group=group)
        found[name] = result["values"]
    return found


def failures(group):
    """Return what each rank hears when one, or each, of them fails."""
    heard = []
    for failing in ((1,), (0, 1)):
        try:
            with distributed.fail_together(group):
                if group.rank() in failing:
                    raise RecipeError(f"{group.rank()} does not want to")
                distributed.gather(group, "before the failing rank is done")
        except SplitQuantError as exc:
            heard.append([type(exc).__name__, str(exc)])
    try:
        distributed.check_alike(group, "recipe", group.rank())
    except SplitQuantError as exc:
        heard.append([type(exc).__name__, str(exc)])
    return heard


def work(home, text, questions, group):
    """Return all of it; a group of None does it alone."""
    models = home / "models"
    return {
        "logits": {path.name: logits(path, group) for path in sorted(models.iterdir())},
        "stock": stock(models / "llama", group) if group else [],
        "sampled": sampled(models / "llama", group),
        "failures": failures(group) if group else [],
        "evaluations": evaluations(home / "split", home / "original", text, questions, group),
        "dealt": distributed.unshard(group, distributed.shard(group, list("abcde"))),
    }


if __name__ == "__main__":
    joined = distributed.join()
    print(json.dumps(work(*map(Path, sys.argv[1:]), joined)))
