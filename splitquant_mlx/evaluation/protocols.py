"""Turn multiple-choice questions into contexts and continuations to score, by one of two protocols.

`loglikelihood` matches the tasks arc_challenge and arc_easy of lm-evaluation-harness 0.4.13 token
by token: the context is the question without its options, and each option's text is a
continuation. Few-shot examples are drawn separately for each question, with the harness's random
numbers.

`letter` lists the options as A, B, C, ... in the tokenizer's chat template (as plain text if it has
none); the letters are the continuations. The assistant's turn starts with `LEAD`, so that the next
token is a space and a letter, one token in the usual vocabularies. Directly after a template's
header a model tends to start a sentence, and the space before a letter depends on the model.
"""

import random
from collections.abc import Iterable, Sequence
from string import ascii_uppercase
from typing import Any, get_args

from splitquant_mlx.data.questions import Question
from splitquant_mlx.errors import RecipeError
from splitquant_mlx.evaluation.loglikelihood import Pair, fit
from splitquant_mlx.evaluation.settings import Protocol
from splitquant_mlx.models.chat_template import render

MAX_SHOTS = 25
SHOT_SEED = 1234  # lm-evaluation-harness's
INSTRUCTION = "Read the question and say which of the options answers it best."
LEAD = "The best answer is"
# Llama 3's template inserts today's date by default: results must not depend on it.
# Reasoning, if a template supports it, would come before the letter.
TEMPLATE_OPTIONS = {"date_string": "26 Jul 2024", "enable_thinking": False}


def draw_shots(
    shots: Sequence[Question], num_shots: int, questions: Sequence[Question]
) -> list[list[Question]]:
    """Draw the few-shot examples of each question.

    Raises:
        RecipeError: when `num_shots` is out of range, or a question is in both lists.
    """
    if not 0 <= num_shots <= MAX_SHOTS:
        raise RecipeError(f"expected 0 to {MAX_SHOTS}, got {num_shots}", field="num_shots")
    if num_shots > len(shots):
        raise RecipeError(
            f"expected at least {num_shots} examples to draw from, got {len(shots)}",
            field="num_shots",
        )
    if num_shots and (both := {shot.id for shot in shots} & {q.id for q in questions}):
        raise RecipeError(
            f"question {min(both)!r} is also a few-shot example: draw examples from another split"
        )
    generator = random.Random(SHOT_SEED)
    return [generator.sample(list(shots), num_shots) if num_shots else [] for _ in questions]


def encode_question(
    tokenizer: Any,
    question: Question,
    examples: Iterable[Question],
    *,
    protocol: str,
    length: int | None,
) -> list[Pair]:
    """Return the tokens of (context, continuation) for each option of a question.

    As in lm-evaluation-harness, the continuation is the tokens of the whole text after the first
    len(context).

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
        question: the question.
        examples: few-shot examples before it.
        protocol: "loglikelihood" or "letter".
        length: the model's context length, tokens; pairs are truncated by `loglikelihood.fit`.

    Raises:
        RecipeError: when the protocol is unknown, or an option is too long.
        CheckpointError: when the chat template fails.
    """
    templated = False
    if protocol == "loglikelihood":
        text = "".join(f"{_ask(shot)} {shot.choices[shot.answer]}\n\n" for shot in examples)
        text += _ask(question)
        continuations = question.choices
    elif protocol == "letter":
        templated = tokenizer.has_chat_template
        text = (_chat if templated else _plain)(tokenizer, question, examples)
        continuations = ascii_uppercase[: len(question.choices)]
    else:
        raise RecipeError(
            f"expected {' or '.join(get_args(Protocol))}, got {protocol!r}", field="protocol"
        )

    def encode(text: str) -> list[int]:
        # a chat template contains the special tokens
        return tokenizer.encode(text, add_special_tokens=not templated, verbose=False)

    context = encode(text)
    wholes = (encode(f"{text} {continuation}") for continuation in continuations)
    return [fit(context, whole[len(context) :], length) for whole in wholes]


def _ask(question: Question) -> str:
    return f"Question: {question.question}\nAnswer:"


def _ask_for_letter(question: Question) -> str:
    options = zip(ascii_uppercase, question.choices, strict=False)
    lines = (f"{letter}. {choice}" for letter, choice in options)
    return "\n".join((INSTRUCTION, "", f"Question: {question.question}", *lines))


def _letter_turns(question: Question, examples: Iterable[Question]) -> list[tuple[str, str]]:
    """Return (user, assistant) turns; the last answer is only its beginning."""
    shots = [
        (_ask_for_letter(shot), f"{LEAD} {ascii_uppercase[shot.answer]}.") for shot in examples
    ]
    return [*shots, (_ask_for_letter(question), LEAD)]


def _plain(tokenizer: Any, question: Question, examples: Iterable[Question]) -> str:
    turns = _letter_turns(question, examples)
    return "\n\n".join(f"{user}\n\n{assistant}" for user, assistant in turns)


def _chat(tokenizer: Any, question: Question, examples: Iterable[Question]) -> str:
    turns = _letter_turns(question, examples)
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    return render(tokenizer, messages[:-1], TEMPLATE_OPTIONS) + LEAD
