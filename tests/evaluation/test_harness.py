"""lm-evaluation-harness gets the same results from this package as from an unbatched model."""

import builtins
import importlib
import sys

import pytest
from lm_eval.api.instance import Instance
from local_harness import PlainLM, answers, arc_task, responses

from splitquant_mlx import RecipeError, load
from splitquant_mlx.data.questions import load_questions
from splitquant_mlx.evaluation.harness import SplitQuantLM, run_task
from splitquant_mlx.progress import Silent


@pytest.fixture(scope="module")
def small(stories):
    return load(stories)


@pytest.fixture(scope="module")
def questions(questions_file):
    loaded = load_questions(questions_file)
    return sorted(loaded, key=lambda q: len(q.question) + sum(map(len, q.choices)))[:25]


def requests(kind, *arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=arguments_, idx=i)
        for i, arguments_ in enumerate(arguments)
    ]


@pytest.mark.parametrize(("num_shots", "count"), [(0, 20), (1, 8)])
def test_a_task_gives_the_same_answers(num_shots, count, small, questions):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    task = arc_task(questions[:20], questions[20:])
    theirs = simple_evaluate(
        model=PlainLM(*small, max_length=512),
        tasks=[task],
        num_fewshot=num_shots,
        limit=count,
        task_manager=TaskManager(include_defaults=False),
    )
    ours = run_task(*small, task=task, num_shots=num_shots, limit=count)
    for result, expected in zip(responses(ours), responses(theirs), strict=True):
        assert result == pytest.approx(expected, abs=1e-3)
    for metric in ("acc", "acc_norm"):
        assert answers(ours, metric) == answers(theirs, metric)
        assert len(answers(ours, metric)) == count
    figures = ours["results"]["arc_local"]
    assert {name for name in figures if "," in name} == {
        f"{metric}{part},none" for metric in ("acc", "acc_norm") for part in ("", "_stderr")
    }


def test_log_likelihoods_of_any_pair(small):
    plain, ours = PlainLM(*small, max_length=512), SplitQuantLM(*small)
    pairs = requests(
        "loglikelihood",
        ("Once upon a time", ", there was"),
        ("", "Once upon a time"),
        ("Once upon a ", "time"),
        ("Once upon a time", " a big red zebra"),
        ("and then " * 300, "they went home"),
    )
    result = ours.loglikelihood(pairs, disable_tqdm=True)
    expected = plain.loglikelihood(pairs, disable_tqdm=True)
    assert [value for value, _ in result] == pytest.approx(
        [value for value, _ in expected], abs=1e-3
    )
    assert [greedy for _, greedy in result] == [greedy for _, greedy in expected]
    assert {greedy for _, greedy in result} == {True, False}


def test_rolling_windows_score_every_token_once(small, story_text):
    text = story_text[:600]
    plain, ours = PlainLM(*small, max_length=512), SplitQuantLM(*small)
    texts = requests("loglikelihood_rolling", (text,), (text[:50],))
    expected = plain.loglikelihood_rolling(texts)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(expected, abs=1e-3)
    tokens = ours.tok_encode(text)
    ours.max_length = 32
    (result,) = ours.loglikelihood_rolling(texts[:1])
    assert len(tokens) > 3 * 32
    # windows of 32: the later ones start with one token of context
    total = 0.0
    for start in range(0, len(tokens), 32):
        end = min(start + 32, len(tokens))
        before = tokens[max(end - 33, 0) : start] if start else [plain.prefix_token_id]
        scored = [(("", ""), before, tokens[start:end])]
        total += plain._loglikelihood_tokens(scored)[0][0]
    assert result == pytest.approx(total, abs=1e-3)


def test_generation_stops_at_stop_strings_and_lengths(small):
    from mlx_lm import generate

    ours, prompt = SplitQuantLM(*small), "Once upon a time"
    whole = generate(*small, prompt=prompt, max_tokens=60)
    (result,) = ours.generate_until(requests("generate_until", (prompt, {"max_gen_toks": 60})))
    assert result == whole.split("</s>")[0] and len(result) > 60
    generation_requests = requests(
        "generate_until",
        (prompt, {"max_gen_toks": 60, "until": ["."]}),
        (prompt, {"max_gen_toks": 5, "until": "no such text"}),
        (prompt, {"max_gen_toks": 60, "until": [whole[20:30], "."]}),
        ("and then " * 400 + prompt, {"max_gen_toks": 8, "until": []}),
    )
    first, second, third, long = ours.generate_until(generation_requests)
    assert first == whole.split(".")[0]
    assert 0 < len(second) < 60 and whole.startswith(second)
    assert third == whole.split(".")[0].split(whole[20:30])[0]
    assert long


def test_a_task_that_generates_more_than_the_model_reads(small):
    generation_requests = requests("generate_until", ("Once", {"max_gen_toks": 512}))
    with pytest.raises(RecipeError, match=r"max_gen_toks: expected less than .* got 512"):
        SplitQuantLM(*small).generate_until(generation_requests)


def test_the_opening_token_comes_once(small):
    ours = SplitQuantLM(*small)
    opening = small[1].decode([ours.prefix_token_id])
    assert ours.tok_encode(opening + "Once") == ours.tok_encode("Once")
    assert ours.tok_encode("Once")[0] == ours.prefix_token_id
    assert ours.tok_encode("Once", add_special_tokens=False) == ours.tok_encode("Once")[1:]


def test_progress_adds_up(small, recorder):
    ours = SplitQuantLM(*small, progress=recorder)
    ours.loglikelihood(requests("loglikelihood", ("Once", " upon"), ("a", "b")), disable_tqdm=True)
    ours.generate_until(requests("generate_until", ("Once", {"max_gen_toks": 2})))
    assert sum(recorder.reported) == 0 and len(recorder.reported) == 5


def test_a_task_without_its_data_is_refused(small, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    task = {"task": "x", "dataset_path": "json", "dataset_kwargs": {"data_files": "/none.json"}}
    with pytest.raises(RecipeError) as caught:
        run_task(*small, task=task)
    message = str(caught.value)
    assert "lm-evaluation-harness cannot run the task" in message and "\n" not in message


def test_a_task_that_does_not_exist(small, monkeypatch):
    from lm_eval.tasks import TaskManager

    # reading the harness's 14,000 tasks takes a minute
    original = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager, "__init__", lambda self, **_: original(self, include_defaults=False)
    )
    labels = []

    class Recorder(Silent):
        def task(self, label, total=None):
            labels.append(label)
            return super().task(label, total)

    with pytest.raises(RecipeError, match="has no task 'arc_hard': see `lm-eval ls tasks`"):
        run_task(*small, task="arc_hard", progress=Recorder())
    assert labels == ["Reading lm-eval's tasks"]


def test_without_lm_evaluation_harness(monkeypatch):
    original = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("lm_eval"):
            raise ModuleNotFoundError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "splitquant_mlx.evaluation.harness")
    with pytest.raises(RecipeError, match="not installed: pip install lm-eval"):
        importlib.import_module("splitquant_mlx.evaluation.harness")
