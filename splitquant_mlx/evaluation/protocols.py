"""Turn multiple-choice questions into contexts and continuations to score, by one of two protocols.

`loglikelihood` is the tasks arc_challenge and arc_easy of lm-evaluation-harness 0.4.13, to the
token: the model reads the question without its options, and each option's text is a continuation.
Few-shot examples are drawn for each question anew, by the same random numbers as there.

`letter` shows the options as A, B, C, .., whatever the data calls them, in the tokenizer's chat
template (as plain text if there is none), and the letters are the continuations. The assistant's
turn is begun with the words of `LEAD`, so that a letter after a space is what comes next: one
token in the usual vocabularies. Right after a template's header a model would sooner begin a
sentence, and whether a letter has a space before it there depends on the model.
"""

import random
from collections.abc import Iterable, Sequence
from string import ascii_uppercase
from typing import Any, get_args

from splitquant_mlx.data.questions import Question
from splitquant_mlx.errors import CheckpointError, RecipeError, one_line
from splitquant_mlx.evaluation.loglikelihood import Pair, fit
from splitquant_mlx.evaluation.settings import Protocol

MAX_SHOTS = 25
SHOT_SEED = 1234  # of lm-evaluation-harness
INSTRUCTION = "Read the question and say which of the options answers it best."
LEAD = "The best answer is"
# Llama 3's template writes today's date unless it is told another: figures must not depend on it.
# Reasoning, where a template offers it, would stand before the letter.
TEMPLATE_OPTIONS = {"date_string": "26 Jul 2024", "enable_thinking": False}


def draw_shots(
    shots: Sequence[Question], num_shots: int, questions: Sequence[Question]
) -> list[list[Question]]:
    """Draw the solved examples that each question is asked after.

    Raises:
        RecipeError: when there are too few, too many are wanted, or one is asked itself.
    """
    if not 0 <= num_shots <= MAX_SHOTS:
        raise RecipeError(f"num_shots: expected 0 to {MAX_SHOTS}, got {num_shots}")
    if num_shots > len(shots):
        raise RecipeError(
            f"num_shots: expected {num_shots} examples, got {len(shots)} to draw from"
        )
    if num_shots and (both := {shot.id for shot in shots} & {asked.id for asked in questions}):
        raise RecipeError(
            f"the question {min(both)!r} is also an example with its answer: draw examples from "
            "another split"
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
    """Return the tokens of a question's context and continuation, once for each option.

    As in lm-evaluation-harness, the continuation is what the tokens of both have beyond those of
    the context alone.

    Args:
        tokenizer: mlx-lm's TokenizerWrapper.
        question: to ask.
        examples: solved ones that come before it.
        protocol: "loglikelihood" or "letter".
        length: of what the model reads, tokens; earlier ones are dropped, see `loglikelihood.fit`.

    Raises:
        RecipeError: when there is no such protocol, or an option is too long.
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
        raise RecipeError(f"protocol: expected {' or '.join(get_args(Protocol))}, got {protocol!r}")

    def encode(text: str) -> list[int]:
        # a template writes the special tokens itself
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
    """Return what the user says and what the assistant answers, of the last answer its begin."""
    solved = [
        (_ask_for_letter(shot), f"{LEAD} {ascii_uppercase[shot.answer]}.") for shot in examples
    ]
    return [*solved, (_ask_for_letter(question), LEAD)]


def _plain(tokenizer: Any, question: Question, examples: Iterable[Question]) -> str:
    turns = _letter_turns(question, examples)
    return "\n\n".join(f"{asked}\n\n{answered}" for asked, answered in turns)


def _chat(tokenizer: Any, question: Question, examples: Iterable[Question]) -> str:
    turns = _letter_turns(question, examples)
    messages = [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]
    try:
        opened = tokenizer.apply_chat_template(
            messages[:-1], tokenize=False, add_generation_prompt=True, **TEMPLATE_OPTIONS
        )
    except Exception as exc:  # a template raises what it likes
        raise CheckpointError(
            f"the chat template refuses a question: {type(exc).__name__}: {one_line(exc)}"
        ) from exc
    return opened + LEAD
