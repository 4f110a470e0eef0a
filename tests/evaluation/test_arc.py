"""Answers agree with lm-evaluation-harness, question by question; letters are single tokens."""

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from local_harness import PlainLM, answers, arc_task, responses
from stories import held_out_questions

from splitquant_mlx import CheckpointError, RecipeError, load
from splitquant_mlx.data.questions import Question, load_questions
from splitquant_mlx.evaluation import arc, protocols
from splitquant_mlx.evaluation.arc import Exam, evaluate_arc
from splitquant_mlx.evaluation.protocols import draw_shots, encode_question

ASKED = ("protocol", "shots", "num_shots")
CHATML = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def ask(model, tokenizer, questions, *, task, **options):
    asked = {name: options.pop(name) for name in ASKED if name in options}
    exam = Exam(task=task, questions=questions, **asked)
    with TemporaryDirectory() as directory:
        options = {"journal": Path(directory) / "journal", "model_hash": "a", **options}
        return evaluate_arc(model, tokenizer, exam, **options)


@pytest.fixture(scope="module")
def easy(questions_file):
    return load_questions(questions_file)[:40]


@pytest.fixture(scope="module")
def shots(questions_file):
    """Return questions that are not in `easy`."""
    return load_questions(questions_file)[40:60]


@pytest.fixture(scope="module")
def small(stories):
    return load(stories)


def run_plainly(model, tokenizer, questions, shots, num_shots):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    return simple_evaluate(
        model=PlainLM(model, tokenizer, 512),
        tasks=[arc_task(questions, shots)],
        num_fewshot=num_shots,
        task_manager=TaskManager(include_defaults=False),
    )


@pytest.mark.parametrize(("num_shots", "count"), [(0, 40), (2, 12)])
def test_agrees_with_lm_evaluation_harness(num_shots, count, easy, shots, small, tmp_path):
    model, tokenizer = small
    theirs = run_plainly(model, tokenizer, easy[:count], shots, num_shots)
    ours = ask(
        model,
        tokenizer,
        easy[:count],
        task="arc_easy",
        shots=shots,
        num_shots=num_shots,
        journal=tmp_path / "journal",
        model_hash="none",
    )
    records = map(json.loads, (tmp_path / "journal").read_text().splitlines()[1:])
    result = {line["id"]: line["loglikelihoods"] for line in records}
    for question, expected in zip(easy[:count], responses(theirs), strict=True):
        assert result[question.id] == pytest.approx(expected, abs=1e-3)
    assert ours.correct == answers(theirs, "acc")
    assert ours.correct_norm == answers(theirs, "acc_norm")
    assert ours.correct != ours.correct_norm
    figures = theirs["results"]["arc_local"]
    assert ours.accuracy == pytest.approx(figures["acc,none"])
    assert ours.standard_error == pytest.approx(figures["acc_stderr,none"])
    assert ours.accuracy_norm == pytest.approx(figures["acc_norm,none"])
    assert ours.standard_error_norm == pytest.approx(figures["acc_norm_stderr,none"])
    assert ours.ids == tuple(question.id for question in easy[:count])


def test_agrees_on_questions_longer_than_the_model_reads(easy, small, tmp_path):
    file = tmp_path / "long.jsonl"
    file.write_text(held_out_questions(12, long=True))
    long = load_questions(file)
    short = easy[:2]
    pairs = encode_question(small[1], short[0], long[:3], protocol="loglikelihood", length=None)
    assert all(len(context) > 512 for context, _ in pairs)
    theirs = run_plainly(*small, short, long, 3)
    ours = ask(*small, short, task="arc_easy", shots=long, num_shots=3)
    assert ours.correct == answers(theirs, "acc")
    assert ours.correct_norm == answers(theirs, "acc_norm")


def make_question(name="q", choices=("one", "four"), answer=0, labels=None):
    labels = labels or tuple("ABCDE"[: len(choices)])
    text = f"What is {name}?"
    return Question(id=name, question=text, labels=labels, choices=choices, answer=answer)


class Words:
    """A tokenizer by words, without a chat template."""

    has_chat_template = False

    def encode(self, text, add_special_tokens=True, **_):
        return ["<s>"] * add_special_tokens + text.replace("\n", " \n ").split(" ")


class ChatWords(Words):
    has_chat_template = True
    options = None

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt, **options):
        assert not tokenize and add_generation_prompt
        self.options = options
        turns = [f"<{message['role']}> {message['content']} <end> " for message in messages]
        return "".join(turns) + "<assistant> "


def read(pairs):
    """Return the words of the common context, and the continuations."""
    contexts = {" ".join(context) for context, _ in pairs}
    assert len(contexts) == 1
    return contexts.pop().replace(" \n ", "\n"), [" ".join(end) for _, end in pairs]


def test_the_prompt_of_loglikelihood():
    shot = make_question("s", ("red", "blue"), answer=1)
    pairs = encode_question(Words(), make_question(), [shot], protocol="loglikelihood", length=None)
    assert read(pairs) == (
        "<s> Question: What is s?\nAnswer: blue\n\nQuestion: What is q?\nAnswer:",
        ["one", "four"],
    )


def test_the_prompt_of_letters_without_a_chat_template():
    shot = make_question("s", ("red", "blue", "green"), answer=2)
    asked = make_question(labels=("1", "2"))
    pairs = encode_question(Words(), asked, [shot], protocol="letter", length=None)
    assert read(pairs) == (
        f"<s> {protocols.INSTRUCTION}\n\nQuestion: What is s?\nA. red\nB. blue\nC. green\n\n"
        f"The best answer is C.\n\n{protocols.INSTRUCTION}\n\nQuestion: What is q?\nA. one\n"
        "B. four\n\nThe best answer is",
        ["A", "B"],
    )


def test_the_prompt_of_letters_in_a_chat_template():
    tokenizer = ChatWords()
    shot = make_question("s", ("red", "blue"), answer=1)
    pairs = encode_question(tokenizer, make_question(), [shot], protocol="letter", length=None)
    assert read(pairs) == (
        f"<user> {protocols.INSTRUCTION}\n\nQuestion: What is s?\nA. red\nB. blue <end> "
        f"<assistant> The best answer is B. <end> <user> {protocols.INSTRUCTION}\n\n"
        "Question: What is q?\nA. one\nB. four <end> <assistant> The best answer is",
        ["A", "B"],
    )
    assert tokenizer.options["enable_thinking"] is False


def test_a_failing_template_is_named():
    class Broken(ChatWords):
        def apply_chat_template(self, *arguments, **options):
            raise ValueError("roles must\nalternate")

    with pytest.raises(CheckpointError, match="ValueError: roles must alternate"):
        encode_question(Broken(), make_question(), [], protocol="letter", length=None)


def test_letters_are_compared_by_probability(small, easy):
    import mlx.core as mx

    model, tokenizer = small
    ours = ask(model, tokenizer, easy[:6], task="arc_easy", protocol="letter")
    assert ours.accuracy_norm is ours.standard_error_norm is ours.correct_norm is None
    for question, correct in zip(easy, ours.correct, strict=False):
        pairs = encode_question(tokenizer, question, [], protocol="letter", length=512)
        assert len({tuple(end) for _, end in pairs}) == len(question.choices)
        values = []
        for context, end in pairs:
            logits = np.array(model(mx.array([[*context, *end]]))[0]).astype(np.float64)
            log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            values.append(sum(log_p[len(context) - 1 + i, token] for i, token in enumerate(end)))
        assert correct == (int(np.argmax(values)) == question.answer)


@given(st.integers(0, 5), st.integers(1, 8), st.integers(5, 12))
def test_examples_are_drawn_as_documented(num_shots, questions, pool):
    examples = [make_question(f"s{i}") for i in range(pool)]
    asked = [make_question(f"q{i}") for i in range(questions)]
    drawn = draw_shots(examples, num_shots, asked)
    assert [len(part) for part in drawn] == [num_shots] * questions
    assert all(len({shot.id for shot in part}) == num_shots for part in drawn)
    assert draw_shots(examples, num_shots, asked[:1]) == drawn[:1]


def test_an_interrupted_evaluation_resumes(small, easy, tmp_path, monkeypatch):
    settings = {"task": "arc_easy", "journal": tmp_path / "new" / "journal", "model_hash": "a"}
    questions, scored = [q for q in easy if len(q.choices) == 4][:12], []
    whole = ask(*small, questions, task="arc_easy")

    class Interrupt:
        """Raise KeyboardInterrupt after five questions."""

        def task(self, label, total=None):
            return nullcontext(self.advance if label.startswith("Answering") else lambda _: None)

        def advance(self, amount, note=""):
            scored.append(amount)
            if sum(scored) >= 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(*small, questions, **settings, progress=Interrupt())
    with settings["journal"].open("ab") as torn:
        torn.write(b'{"id": "torn", "loglikel')
    asked, original = [], arc.score

    def counted(model, pairs, **options):
        asked.append(len(pairs))
        return original(model, pairs, **options)

    monkeypatch.setattr(arc, "score", counted)
    assert ask(*small, questions, **settings) == whole
    assert asked == [4 * (12 - int(sum(scored)))]
    assert ask(*small, questions, **settings) == whole
    assert asked[1:] == [0]
    # another model or another prompt does not resume
    ask(*small, questions, **{**settings, "model_hash": "b"})
    ask(*small, [replace(questions[0], question="Why?")], **{**settings, "model_hash": "b"})
    assert all(asked[2:]) and len(asked) == 4


def test_one_question_has_no_standard_error(small, easy):
    result = ask(*small, easy[:1], task="arc_easy")
    assert result.accuracy in (0.0, 1.0) and math.isnan(result.standard_error)


def test_progress_adds_up(small, easy, recorder):
    ask(*small, easy[:5], task="arc_easy", progress=recorder)
    assert sum(recorder.reported) == 0 and recorder.reported.count(-5) == 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"protocol": "guess"}, "protocol: expected loglikelihood or letter, got 'guess'"),
        ({"num_shots": -1}, "num_shots: expected 0 to 25, got -1"),
        ({"num_shots": 26}, "num_shots: expected 0 to 25, got 26"),
        ({"num_shots": 3, "shots": [make_question("s")]}, "expected at least 3 examples"),
        ({"num_shots": 1, "shots": [make_question("q")]}, "'q' is also a few-shot example"),
        ({"questions": []}, "questions: expected one or more"),
        ({"questions": [make_question(), make_question()]}, "each with a unique id"),
        ({"questions": [make_question(choices=("x" * 600, "y"))]}, "at most 512 tokens (the model"),
    ],
)
def test_refusals(options, expected, small):
    settings = {"questions": [make_question()], "task": "arc_easy", **options}
    with pytest.raises(RecipeError) as caught:
        ask(*small, **settings)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


KNOWN = """
What do bees make?|honey|iron|paper|glass
What do cows give us to drink?|milk|petrol|ink|lava
What is the capital of France?|Paris|Madrid|Oslo|Cairo
What is water made of when it freezes?|ice|sand|smoke|wood
Which animal says meow?|a cat|a horse|a fish|a spider
What do plants need from the sun?|light|salt|noise|metal
How many legs does a dog have?|four|nine|seven|eleven
What falls from clouds?|rain|stones|bread|coins
What do we use to write on paper?|a pen|a spoon|a shoe|a pillow
Which organ pumps blood through the body?|the heart|the hair|the nose|the knee
What is the color of the sky on a clear day?|blue|brown|purple|gray
Which planet do humans live on?|Earth|Jupiter|Saturn|Neptune
What do birds use to fly?|wings|teeth|horns|gills
What is the opposite of hot?|cold|tall|loud|wet
What do fish live in?|water|fire|trees|books
What do people read in a library?|books|clouds|engines|shoes
Which season is the coldest?|winter|summer|July|noon
What do you call frozen rain?|snow|steam|mud|oil
What does a clock show?|the time|the price|the weight|the taste
Where do people go to see a doctor?|a hospital|a cinema|a bakery|a farm
"""


@pytest.mark.slow
def test_a_real_model_knows_something(smollm2):
    from splitquant_mlx.models.dense import for_scoring

    model, tokenizer = load(smollm2)
    questions = []
    for number, line in enumerate(KNOWN.strip().splitlines()):
        text, *choices = line.split("|")
        answer = number % 4  # the correct option is not always the first
        choices.insert(answer, choices.pop(0))
        questions.append(
            Question(
                id=str(number),
                question=text,
                choices=tuple(choices),
                labels=tuple("ABCD"),
                answer=answer,
            )
        )
    model = for_scoring(model)
    result = ask(model, tokenizer, questions, task="arc_easy")
    assert result.accuracy > 0.25 + 4 * result.standard_error
    letters = ask(model, tokenizer, questions[:16], task="arc_easy", protocol="letter")
    assert letters.questions == 16 and 0 <= letters.accuracy <= 1
    pairs = encode_question(tokenizer, questions[0], [], protocol="letter", length=None)
    assert [tokenizer.decode(end) for _, end in pairs] == [" A", " B", " C", " D"]
    assert all(len(end) == 1 for _, end in pairs)
