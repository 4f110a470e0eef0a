"""Run lm-evaluation-harness as one rank of a group; prints JSON. Arguments: model, questions."""

import json
import sys
from pathlib import Path

from splitquant_mlx.runtime import blas

blas.preload()

import mlx.core as mx  # noqa: E402  after OpenBLAS

mx.set_default_device(mx.Device(mx.cpu))

from lm_eval.api.instance import Instance  # noqa: E402
from local_harness import arc_task, responses  # noqa: E402

from splitquant_mlx import load  # noqa: E402
from splitquant_mlx.data.questions import load_questions  # noqa: E402
from splitquant_mlx.evaluation.harness import SplitQuantLM, run_task  # noqa: E402
from splitquant_mlx.runtime import ranks as distributed  # noqa: E402


def work(model, questions, group):
    """Return log-likelihoods and texts; a group of None finds them alone."""
    small = load(model)
    task = arc_task(load_questions(questions)[:12])
    found = run_task(*small, task, group=group)
    prompts = [(word, {"until": ["."], "max_gen_toks": 8}) for word in ("Once", "One", "The")]
    requests = [
        Instance(request_type="generate_until", doc={}, arguments=arguments, idx=i)
        for i, arguments in enumerate(prompts)
    ]
    texts = SplitQuantLM(*small, group=group).generate_until(requests)
    return {"responses": responses(found), "results": found["results"], "texts": texts}


if __name__ == "__main__":
    joined = distributed.join()
    print(json.dumps(work(*map(Path, sys.argv[1:]), joined)))
