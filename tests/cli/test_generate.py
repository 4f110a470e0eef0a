import inspect
import io
import json
import os
import shutil
from typing import Any

import pytest

from splitquant_mlx.cli import run
from splitquant_mlx.models.loader import load

STORY = "Once upon a time"
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[{{ mood or 'assistant' }}] {% endif %}"
)


def generate(capsys, *arguments: str) -> tuple[int, str, str]:
    """Run `generate` and return its exit code, stdout and stderr."""
    code = run(["generate", "--device", "cpu", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def chatty(split_stories, tmp_path_factory):
    """Return a copy of the checkpoint with a chat template."""
    copy = tmp_path_factory.mktemp("chatty") / "model"
    shutil.copytree(split_stories, copy)
    path = copy / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"chat_template": TEMPLATE}
    path.write_text(json.dumps(config))
    return copy


@pytest.fixture(scope="module")
def reference(split_stories):
    """Return a function that generates with mlx_lm, which runs the code of the checkpoint."""
    import mlx_lm

    # older releases of mlx-lm run the code without the option
    options = inspect.signature(mlx_lm.load).parameters.keys() & {"trust_remote_code"}
    trusted: Any = dict.fromkeys(options, True)
    model, tokenizer, *_ = mlx_lm.load(str(split_stories), **trusted)

    def answer(prompt, special_tokens=True, max_tokens=30, **options):
        tokens = tokenizer.encode(prompt, add_special_tokens=special_tokens)
        return mlx_lm.generate(model, tokenizer, tokens, max_tokens=max_tokens, **options)

    return answer


def test_the_default_prompt_is_shown(stories, capsys):
    options = ["--model", str(stories), "-m", "3"]
    code, out, err = generate(capsys, *options)
    assert code == 0 and "no --prompt: 'hello', as in mlx_lm.generate" in err
    code, answer, err = generate(capsys, *options, "-p", "hello", "--quiet")
    assert (code, err) == (0, "") and answer.strip() in out


def test_same_text_and_footer_as_mlx_lm(split_stories, reference, capsys):
    code, out, _ = generate(capsys, "--model", str(split_stories), "-p", STORY, "-m", "30")
    reference(STORY, verbose=True)
    expected = capsys.readouterr().out

    def without_numbers(text):
        return "".join(c for c in text if not c.isdigit())

    assert code == 0
    assert out.splitlines()[:3] == expected.splitlines()[:3]
    assert without_numbers(out) == without_numbers(expected)


def test_same_samples_as_mlx_lm_with_the_same_seed(split_stories, reference, capsys):
    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler

    mx.random.seed(7)
    expected = reference(STORY, sampler=make_sampler(0.8, top_p=0.9))
    options = ("--temp", "0.8", "--top-p", "0.9", "--seed", "7", "--verbose", "False")
    _, out, _ = generate(capsys, "--model", str(split_stories), "-p", STORY, "-m", "30", *options)
    assert out == expected + "\n"


@pytest.mark.parametrize(
    ("options", "prompt"),
    [
        ([], "[user] Hi\n[assistant] "),
        (["--system-prompt", "Be kind"], "[system] Be kind\n[user] Hi\n[assistant] "),
        (["--chat-template-config", '{"mood": "happy"}'], "[user] Hi\n[happy] "),
        (["--prefill-response", "Well"], "[user] Hi\n[assistant] Well"),
    ],
)
def test_the_chat_template_is_used(chatty, reference, capsys, options, prompt):
    arguments = ("--model", str(chatty), "-p", "Hi", "-m", "20", "--verbose", "False", *options)
    _, out, _ = generate(capsys, *arguments)
    assert out == reference(prompt, special_tokens=False, max_tokens=20) + "\n"


def test_the_chat_template_can_be_ignored(chatty, reference, capsys):
    arguments = ("--model", str(chatty), "--prompt", "Hi", "--verbose", "F", "-m", "20")
    _, out, _ = generate(capsys, *arguments, "--ignore-chat-template", "--system-prompt", "No")
    assert out == reference("Hi", max_tokens=20) + "\n"


def test_the_prompt_can_come_from_standard_input(split_stories, reference, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(STORY))
    arguments = ("--model", str(split_stories), "-p", "-", "--verbose", "False", "-m", "30")
    _, out, _ = generate(capsys, *arguments)
    assert out == reference(STORY) + "\n"


def test_an_extra_token_ends_the_answer(split_stories, reference, capsys):
    _, tokenizer = load(split_stories)
    whole = reference(STORY)
    last = tokenizer.tokenize(whole)[5]
    arguments = ("--model", str(split_stories), "-p", STORY, "--verbose", "False", "-m", "30")
    _, out, _ = generate(capsys, *arguments, "--extra-eos-token", last)
    assert whole.startswith(out.rstrip("\n"))
    assert len(out) < len(whole)


def test_a_limited_kv_cache_changes_nothing_until_it_is_full(split_stories, reference, capsys):
    arguments = ("--model", str(split_stories), "-p", STORY, "--verbose", "False")
    _, out, _ = generate(capsys, *arguments, "-m", "30", "--max-kv-size", "40")
    assert out == reference(STORY) + "\n"
    code, longer, _ = generate(capsys, *arguments, "-m", "90", "--max-kv-size", "16")
    assert code == 0
    assert longer != reference(STORY, max_tokens=90) + "\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-tokens", "0"], "--max-tokens: expected 1 or more, or -1, got 0"),
        (["--temp", "-1"], "--temp: expected at least 0, got -1.0"),
        (["--temp", "1", "--top-k", "9999"], "cannot run this model with these settings"),
        (["--chat-template-config", "{"], "expected JSON, got"),
        (["--chat-template-config", "[]"], "expected a JSON object"),
        (["--revision", "main"], "a revision (main) is for hub repos only"),
        (["--device", "tpu"], "expected one of 'cpu', 'gpu', got 'tpu'"),
    ],
)
def test_refusals_are_one_line(split_stories, capsys, options, message):
    code, _, err = generate(capsys, "--model", str(split_stories), *options)
    assert code == 2
    assert message in err.splitlines()[-1]
    assert (
        len([line for line in err.splitlines() if not line.startswith(("Loading ", "no --prompt"))])
        == 1
    )


@pytest.mark.parametrize("command", ["generate", "chat", "serve"])
def test_without_a_converted_model_the_error_names_convert(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run([command]) == 2
    err = capsys.readouterr().err
    assert "splitquant-mlx convert M" in err
    assert err.count("\n") == 1


def test_model_and_prompt_as_arguments(split_stories, reference, capsys):
    _, out, err = generate(capsys, str(split_stories), STORY, "--quiet", "-m", "30")
    assert (out, err) == (reference(STORY) + "\n", "")


def test_a_truncated_answer_has_a_note(split_stories, capsys):
    _, _, err = generate(capsys, str(split_stories), STORY, "-m", "5")
    assert "cut off at 5 tokens (--max-tokens)" in err


def test_a_prompt_longer_than_the_context_has_a_warning(split_stories, capsys):
    _, _, err = generate(capsys, str(split_stories), f"{STORY} " * 200, "-m", "2")
    assert "exceed the context of 512 tokens" in err


def test_json_is_the_only_output(split_stories, reference, capsys):
    _, out, _ = generate(capsys, str(split_stories), STORY, "-m", "30", "--json", "-")
    values = json.loads(out)
    assert (values["text"], values["finish_reason"]) == (reference(STORY), "length")


def test_the_newest_converted_model_here_is_used(split_stories, tmp_path, monkeypatch, capsys):
    for number, name in enumerate(("old", "new")):
        shutil.copytree(split_stories, tmp_path / name)
        os.utime(tmp_path / name / "splitquant.json", (number, number))
    monkeypatch.chdir(tmp_path)
    _, _, err = generate(capsys, STORY, "-m", "2")
    assert "Using new, the newest converted model here." in err
    (tmp_path / "new").rename(tmp_path / "llama-auto")
    code, _, err = generate(capsys, "llama-atuo")
    assert code == 2 and "did you mean llama-auto?" in err


def test_a_model_too_large_for_memory_is_refused(split_stories, monkeypatch, capsys):
    from splitquant_mlx.runtime import memory

    monkeypatch.setattr(memory, "memory_bytes", lambda: 10_000_000)
    code, _, err = generate(capsys, str(split_stories), STORY, "-m", "2")
    assert code == 2 and "of memory, this machine has 0.0 GB" in err
    monkeypatch.setenv("SPLITQUANT_MEMORY_CHECK", "off")
    code, _, err = generate(capsys, str(split_stories), STORY, "-m", "2")
    assert code == 0 and "expect it to fail" in err
