"""Run lm-evaluation-harness's own ARC tasks on local questions, with as plain a model as can be."""

from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import numpy as np
from lm_eval.api.model import TemplateLM


def arc_task(questions, shots=()):
    """Return the installed arc_easy task with `questions` as its data; `shots` are its train."""
    import lm_eval.tasks
    import yaml
    from datasets import Dataset, DatasetDict

    file = Path(lm_eval.tasks.__file__).parent / "arc" / "arc_easy.yaml"
    config = yaml.safe_load(file.read_text())
    rows = {
        "train": shots or questions[:1],
        "validation": questions[:1],
        "test": questions,
    }
    data = DatasetDict(
        {split: Dataset.from_list([as_row(q) for q in part]) for split, part in rows.items()}
    )
    for key in ("dataset_path", "dataset_name", "tag"):
        config.pop(key)
    return {**config, "task": "arc_local", "custom_dataset": lambda **_: data}


def as_row(question):
    """Return a question in the data set's own layout."""
    row = asdict(question)
    return {
        "id": row["id"],
        "question": row["question"],
        "choices": {"text": list(row["choices"]), "label": list(row["labels"])},
        "answerKey": row["labels"][row["answer"]],
    }


def answers(results, metric):
    """Return the 0 or 1 of every question, in their order."""
    samples = sorted(results["samples"]["arc_local"], key=lambda sample: sample["doc_id"])
    return tuple(int(sample[metric]) for sample in samples)


def responses(results):
    """Return the log-likelihoods of every question's options, nats, in the questions' order."""
    samples = sorted(results["samples"]["arc_local"], key=lambda sample: sample["doc_id"])
    return [[value for value, _ in sample["filtered_resps"]] for sample in samples]


class PlainLM(TemplateLM):
    """Score one sequence at a time, as models/huggingface.py does with its defaults."""

    def __init__(self, model, tokenizer, max_length):
        super().__init__()
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length

    @property
    def eot_token_id(self):
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self):
        return self.tokenizer.bos_token_id

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    def _loglikelihood_tokens(self, requests, **kwargs):
        found = []
        for _, context, continuation in requests:
            inputs = (context + continuation)[-(self.max_length + 1) :][:-1]
            logits = np.array(self.model(mx.array([inputs]))[0]).astype(np.float64)
            logits = logits[-len(continuation) :]
            log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            greedy = bool((logits.argmax(axis=-1) == continuation).all())
            found.append((log_p[range(len(continuation)), continuation].sum().item(), greedy))
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        return [
            sum(
                self._loglikelihood_tokens([(None, [self.prefix_token_id], tokens)])[0][0]
                for tokens in [self.tok_encode(request.args[0])]
            )
            for request in requests
        ]

    def generate_until(self, requests, disable_tqdm=False):
        raise NotImplementedError
