"""Questions are loaded unchanged, or rejected with file and line."""

import csv
import io
import json

import pyarrow as pa
import pytest
from fake_hub import Failure, FakeHub
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from splitquant_mlx import RecipeError, SourceError
from splitquant_mlx.data.questions import Question, fetch_questions, load_questions

ROW = {
    "id": "Mercury_1",
    "question": "Which “gas” do plants take in?\nChoose.",
    "choices": {"text": ["oxygen, pure", 'the "carbon" one', "argon"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
QUESTION = Question(
    id="Mercury_1",
    question=ROW["question"],
    labels=("A", "B", "C"),
    choices=("oxygen, pure", 'the "carbon" one', "argon"),
    answer=1,
)
NUMBERED = {
    **ROW,
    "id": "2",
    "choices": {"text": ["a", "b", "a", "c", "d"], "label": list("12345")},
    "answerKey": "5",
}


def as_jsonl(*rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_parquet(*rows) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(list(rows)), buffer)
    return buffer.getvalue()


def as_csv(*rows, columns=("id", "question", "choices", "answerKey", "note")) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        writer.writerow({**row, "choices": json.dumps(row["choices"])})
    return text.getvalue().encode()


def as_ai2_jsonl(*rows) -> bytes:
    """Write questions in the layout of the .jsonl files of AI2's archive."""
    return as_jsonl(
        *(
            {
                "id": row["id"],
                "question": {
                    "stem": row["question"],
                    "choices": [
                        {"text": text, "label": label}
                        for text, label in zip(*row["choices"].values(), strict=True)
                    ],
                },
                "answerKey": row["answerKey"],
            }
            for row in rows
        )
    )


def as_ai2_csv(*rows) -> bytes:
    """Write questions in the layout of the .csv files of AI2's archive."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["questionID", "originalQuestionID", "AnswerKey", "question", "subject"])
    for row in rows:
        options = zip(*row["choices"].values(), strict=True)
        listed = " ".join(f"({label}) {option}" for option, label in options)
        writer.writerow([row["id"], "1", row["answerKey"], f"{row['question']} {listed}", ""])
    return text.getvalue().encode()


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", as_jsonl),
        ("a.PARQUET", as_parquet),
        ("a.csv", as_csv),
        ("a.jsonl", as_ai2_jsonl),
        ("a.csv", as_ai2_csv),
    ],
)
def test_every_layout_reads_the_same(tmp_path, name, write):
    (tmp_path / name).write_bytes(write(ROW, NUMBERED))
    first, second = load_questions(tmp_path / name)
    assert first == QUESTION
    assert second.labels == tuple("12345") and second.answer == 4


def test_a_letter_in_brackets_before_the_options_belongs_to_the_question(tmp_path):
    row = {**ROW, "question": "Is vitamin (A) found in (B) or (1)?"}
    (tmp_path / "a.csv").write_bytes(as_ai2_csv(row))
    (result,) = load_questions(tmp_path / "a.csv")
    assert result.question == row["question"] and result.choices == QUESTION.choices


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.csv", b"questionID,AnswerKey,question\n1,A,What?\n", "line 2: expected options such"),
        ("a.csv", b"questionID,AnswerKey,question\n1,C,Q (A) a (B) b\n", "one of A, B, got 'C'"),
        ("a.jsonl", b'{"id": "1", "question": {"stem": "Q"}, "answerKey": "A"}', "a list"),
    ],
)
def test_incomplete_ai2_questions_are_rejected(tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=problem):
        load_questions(tmp_path / name)


@given(
    st.integers(2, 26),
    st.data(),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(str.strip),
)
def test_any_question_round_trips(tmp_path_factory, count, draw, text):
    labels = [chr(ord("A") + i) for i in range(count)]
    row = {
        "id": text,
        "question": text,
        "choices": {"text": [text] * count, "label": labels},
        "answerKey": draw.draw(st.sampled_from(labels)),
    }
    directory = tmp_path_factory.mktemp("any")
    for name, write in (("a.jsonl", as_jsonl), ("a.parquet", as_parquet), ("a.csv", as_csv)):
        (directory / name).write_bytes(write(row))
        (result,) = load_questions(directory / name)
        assert (result.id, result.question, result.choices) == (text, text, (text,) * count)
        assert result.labels[result.answer] == row["answerKey"]


def test_reads_a_file_laid_out_as_arc(questions_file):
    questions = load_questions(questions_file)
    assert len(questions) == 120
    assert {len(question.choices) for question in questions} == {3, 4, 5}
    assert {question.labels[0] for question in questions} == {"A", "1"}


def changed(**changes):
    row = {**ROW, **changes}
    return {key: value for key, value in row.items() if value is not ...}


def choices(texts, labels):
    return {"text": texts, "label": labels}


MALFORMED = [
    (changed(answerKey=...), 'expected a non-empty string "answerKey", got none'),
    (changed(answerKey="D"), "answerKey: expected one of A, B, C, got 'D'"),
    (changed(answerKey="b"), "answerKey: expected one of A, B, C, got 'b'"),
    (changed(question="  "), 'expected a non-empty string "question"'),
    (changed(question=""), "got ''"),
    (changed(id=None), 'expected a non-empty string "id"'),
    (changed(choices=choices(["a"], ["A"]), answerKey="A"), "expected 2 to 26 choices, got 1"),
    (changed(choices=choices(["a", "b"], ["A", "B", "C"])), "label per text, got 2 and 3"),
    (changed(choices=choices(["a", "b", "c"], ["A", "B", "B"])), "unique labels, got A, B, B"),
    (changed(choices=choices(["a", "", "c"], ["A", "B", "C"])), 'non-empty string "text"'),
    (changed(choices=choices(["a", None, "c"], ["A", "B", "C"])), 'non-empty string "text"'),
    (changed(choices={"text": ["a", "b"]}), 'expected "choices" to have a list "label"'),
]


@pytest.mark.parametrize(("row", "expected"), MALFORMED)
@pytest.mark.parametrize(("name", "where"), [("a.jsonl", "line 2"), ("a.parquet", "row 2")])
def test_a_malformed_question_is_named(tmp_path, name, where, row, expected):
    write = as_jsonl if name == "a.jsonl" else as_parquet
    (tmp_path / name).write_bytes(write(NUMBERED, row))
    check(tmp_path / name, f"{name}, {where}: ", expected)


def check(path, *expected):
    with pytest.raises(SourceError) as caught:
        load_questions(path)
    message = str(caught.value)
    assert all(part in message for part in expected) and "\n" not in message


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"", "a.jsonl contains no questions"),
        ("a.jsonl", b"\n \n", "a.jsonl contains no questions"),
        ("a.jsonl", as_jsonl(ROW, NUMBERED, ROW), "line 3: the id 'Mercury_1' is already in use"),
        ("a.jsonl", as_jsonl(ROW) + b"\n{", "a.jsonl, line 3: expected JSON"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: expected JSON"),
        ("a.jsonl", as_jsonl(ROW) + b"[1]", "line 2: expected an object with id, question"),
        ("a.jsonl", as_jsonl(ROW) + b"caf\xe9", "line 2: expected UTF-8 text, got byte 0xe9"),
        ("a.jsonl", as_jsonl(ROW).decode().encode("utf-16"), "expected UTF-8"),
        ("a.jsonl", as_jsonl(changed(question="\ud800?")), "line 1: 'utf-8' codec can't encode"),
        ("a.jsonl", as_jsonl(changed(question="a\0")), 'line 1: "question" contains a NUL'),
        ("a.jsonl", as_jsonl(changed(choices=["a", "b"])), 'line 1: expected "choices" to be'),
        ("a.jsonl", as_jsonl(changed(choices=choices("abc", "ABC"))), 'have a list "text"'),
        ("a.jsonl", as_jsonl(changed(choices=choices(["a"] * 27, ["A"] * 27))), "got 27"),
        ("a.jsonl", as_jsonl(changed(answerKey=2)), 'expected a non-empty string "answerKey"'),
        ("a.parquet", b"PAR1 and no more PAR1", "a.parquet: invalid parquet file"),
        ("a.parquet", as_parquet(changed(answerKey=...)), "got id, question, choices: add answer"),
        ("a.parquet", as_parquet(ROW, ROW), "row 2: the id 'Mercury_1' is already in use in row 1"),
        ("a.csv", b"", "a.csv: expected columns id, question, choices, answerKey, got none"),
        ("a.csv", b"id,question\n1,2\n", "got id, question: add choices, answerKey"),
        ("a.csv", as_csv(), "a.csv contains no questions"),
        ("a.csv", as_csv(ROW) + b"2,Why?,oops,A\n", "a.csv, line 4: choices: expected JSON"),
        ("a.csv", as_csv(ROW) + b"2,Why?\n", "a.csv, line 4: choices: expected JSON"),
        ("a.csv", as_csv(ROW) + b'2,"Why', "a.csv, near line 3: not CSV (unexpected end"),
        ("a.csv", as_csv(changed(answerKey="E")), "a.csv, line 3: answerKey: expected"),
        ("a.txt", b"Why?", "expected a .jsonl, .parquet or .csv file, got '.txt'"),
    ],
)
def test_malformed_files_are_refused(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    check(tmp_path / name, name, expected)


def test_unreadable_files_are_named(tmp_path):
    check(tmp_path / "none.jsonl", "none.jsonl: No such file or directory")
    (tmp_path / "a.parquet").mkdir()
    check(tmp_path / "a.parquet", "a.parquet")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    files = {
        "ARC-Easy/test-00000-of-00001.parquet": as_parquet(ROW),
        "ARC-Challenge/validation-00000-of-00001.parquet": as_parquet(NUMBERED),
    }
    with (
        FakeHub(repos={"datasets/allenai/ai2_arc": files}) as hub,
        hub.instead_of_the_real_one(monkeypatch, tmp_path / "cache"),
    ):
        yield hub


def test_fetches_arc_from_the_hub_once(hub):
    assert fetch_questions("arc_easy") == [QUESTION]
    (challenge,) = fetch_questions("arc_challenge", "validation")
    assert challenge.id == NUMBERED["id"]
    hub.close()
    assert fetch_questions("arc_easy") == [QUESTION]


def test_hub_errors_are_named(hub):
    hub.failure = Failure(status=403, code="GatedRepo")
    with pytest.raises(SourceError, match="allenai/ai2_arc: the repo is gated"):
        fetch_questions("arc_easy")


@pytest.mark.parametrize(
    ("task", "split", "expected"),
    [
        ("arc", "test", "expected arc_challenge or arc_easy, got 'arc'"),
        ("arc_easy", "dev", "expected one of train, validation, test, got 'dev'"),
    ],
)
def test_unknown_tasks_and_splits_are_rejected(task, split, expected):
    with pytest.raises(RecipeError, match=expected):
        fetch_questions(task, split)
