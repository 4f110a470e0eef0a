"""lm-evaluation-harness: local-completions and local-chat-completions on a file of questions.

It prints the log-likelihoods of each question's choices, and what is said to each question.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import lm_eval.tasks
import yaml
from known import MODEL

QUESTIONS, TOKENIZER = os.environ["QUESTIONS"], os.environ["TOKENIZER"]
home = Path(tempfile.mkdtemp())
file = Path(lm_eval.tasks.__file__).parent / "arc" / "arc_easy.yaml"
choices = {k: v for k, v in yaml.safe_load(file.read_text()).items() if k not in ("tag", "task")}
choices |= {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": QUESTIONS}}}
del choices["dataset_name"], choices["training_split"], choices["validation_split"]
written = {
    **{key: choices[key] for key in ("dataset_path", "dataset_kwargs", "test_split")},
    "output_type": "generate_until",
    "doc_to_text": "Question: {{question}}",
    "doc_to_target": "{{choices.text[0]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 20, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}
for name, task in (("choices", choices), ("written", written)):
    (home / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **task}))


def responses(model, path, task, *more):
    """Run a task; return what the harness got for each document."""
    given = f"model={MODEL},base_url={os.environ['OPENAI_BASE_URL']}/{path},num_concurrent=4"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", model, "--tasks", task]
    command += ["--model_args", f"{given},tokenizer={TOKENIZER}", "--include_path", str(home)]
    command += ["--log_samples", "--output_path", str(home / task), *more]
    subprocess.run(command, check=True, stdout=sys.stderr)
    (found,) = (home / task).rglob("samples_*.jsonl")
    samples = sorted(map(json.loads, found.open()), key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


scored = responses("local-completions", "completions", "choices")
said = responses("local-chat-completions", "chat/completions", "written", "--apply_chat_template")
print(json.dumps({"choices": scored, "written": said}))
