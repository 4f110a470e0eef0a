import subprocess
import sys
from functools import partial
from importlib import import_module
from types import SimpleNamespace

import mlx.core as mx
import pytest

from splitquant_mlx.cli import run
from splitquant_mlx.cli.console import printable
from splitquant_mlx.errors import CheckpointError, RecipeError
from splitquant_mlx.inference.chat import (
    Conversation,
    Decoder,
    encode,
    load_messages,
    save_messages,
)
from splitquant_mlx.inference.decoding import Decoding, recommended_sampling
from splitquant_mlx.models.loader import load

COMMAND = [sys.executable, "-m", "splitquant_mlx", "chat", "--device", "cpu"]
STORY = "Once upon a time"


class Letters:
    """A fake tokenizer: one token per character, and a template that marks roles."""

    has_chat_template = True

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt, **options):
        assert not tokenize
        if any(message["content"] == "refuse this" for message in messages):
            raise TypeError("roles must alternate")
        turns = "".join(f"<{message['role'][0]}>{message['content']}" for message in messages)
        return turns + "<a>" * add_generation_prompt

    def encode(self, text, add_special_tokens):
        return [ord(letter) for letter in "^" * add_special_tokens + text]


class Parrot:
    """A fake model that records the prompts and always gives the same answer."""

    def __init__(self, *words):
        self.words = words
        self.prompts = []

    def __call__(self, prompt, stop):
        self.prompts.append("".join(map(chr, prompt)))
        for word in self.words:
            yield SimpleNamespace(text=word)
            if stop():
                return


def say(conversation, message, stop=lambda: False) -> str:
    return "".join(response.text for response in conversation.answer(message, stop))


def test_the_whole_conversation_is_in_every_prompt():
    parrot = Parrot("yes", "!")
    conversation = Conversation(Letters(), parrot, system_prompt="be brief")
    assert say(conversation, "one") == "yes!"
    say(conversation, "two")
    conversation.reset()
    say(conversation, "three")
    assert parrot.prompts == [
        "<s>be brief<u>one<a>",
        "<s>be brief<u>one<a>yes!<u>two<a>",
        "<s>be brief<u>three<a>",
    ]


def test_without_a_template_the_text_is_continued():
    parrot = Parrot("b")
    tokenizer = Letters()
    tokenizer.has_chat_template = False
    conversation = Conversation(tokenizer, parrot)
    say(conversation, "a")
    say(conversation, "c")
    assert parrot.prompts == ["^a", "^ab\nc"]


def test_a_stopped_answer_is_kept():
    conversation = Conversation(Letters(), Parrot("one", "two", "three"))
    heard = []
    for response in conversation.answer("count", stop=lambda: len(heard) == 2):
        heard.append(response.text)
    for _ in conversation.answer("again"):
        break  # leaving the loop stops it, too
    assert [message["content"] for message in conversation.messages[1::2]] == ["onetwo", "one"]


@pytest.mark.parametrize("stream", [Parrot(), Parrot("")])
def test_a_message_without_an_answer_is_removed(stream):
    conversation = Conversation(Letters(), stream, system_prompt="be brief")
    assert say(conversation, "hello") == ""
    assert [message["role"] for message in conversation.messages] == ["system"]


def test_a_message_that_the_template_rejects_is_removed():
    conversation = Conversation(Letters(), Parrot("yes"))
    with pytest.raises(CheckpointError, match="roles must alternate"):
        say(conversation, "refuse this")
    assert conversation.messages == []


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -2),
        ("temp", -1.0),
        ("temp", float("nan")),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("top_k", -1),
        ("max_kv_size", 4),
        ("kv_bits", 7),
        ("kv_group_size", 48),
        ("quantized_kv_start", -1),
    ],
)
def test_settings_out_of_range_are_refused(setting, value):
    with pytest.raises(RecipeError, match=f"{setting}: expected .*{value}"):
        Decoding(**{setting: value})


def test_a_limited_kv_cache_cannot_be_quantized():
    with pytest.raises(RecipeError, match="kv_bits: mlx-lm cannot quantize a KV cache"):
        Decoding(kv_bits=4, max_kv_size=512)


def test_generated_text_cannot_control_the_terminal():
    assert printable("a\x1b[2Jb\x07\r\n\tc\x9b5n\x7f") == "a[2Jb\n\tc5n"
    assert printable("naïve 👩\u200d🚀 日本\u3000語") == "naïve 👩\u200d🚀 日本\u3000語"


@pytest.fixture(scope="module")
def loaded(split_stories):
    return load(split_stories)


def tokens(loaded, prompt, decoding=None, decoder=None):
    """Return the tokens that a decoder, by default a new one, generates; and the last response."""
    decoder = decoder or Decoder(*loaded, decoding=decoding or Decoding(max_tokens=24))
    responses = list(decoder(prompt, lambda: False))
    return [response.token for response in responses], responses[-1]


@pytest.mark.parametrize("trimmable", [True, False])
def test_reusing_the_kv_cache_does_not_change_answers(loaded, monkeypatch, trimmable):
    from mlx_lm.models.cache import KVCache

    monkeypatch.setattr(KVCache, "is_trimmable", lambda self: trimmable)
    decoder = Decoder(*loaded, decoding=Decoding(max_tokens=24))
    first = loaded[1].encode(STORY + " there was a dog")
    answer, _ = tokens(loaded, first, decoder=decoder)
    extended = first + answer + loaded[1].encode("\nThe dog")
    other_end = extended[:-2] + loaded[1].encode("cat")
    for prompt, in_cache in (
        (extended, len(first + answer)),
        (other_end, len(extended) - 2 if trimmable else 0),
        (other_end, len(other_end) - 1 if trimmable else 0),
        (loaded[1].encode("A"), 1 if trimmable else 0),
    ):
        generated, last = tokens(loaded, prompt, decoder=decoder)
        assert generated == tokens(loaded, prompt)[0]
        assert last.prompt_tokens == len(prompt) - in_cache


def test_a_conversation_equals_a_fresh_start(split_stories):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    loaded = load(split_stories, tokenizer_config={"chat_template": template})
    decoding = Decoding(max_tokens=24)
    conversation = Conversation(loaded[1], Decoder(*loaded, decoding), system_prompt="Be kind")
    for message in ("Tell me a story", "And then?", "Why?"):
        generated = say(conversation, message)
        prompt = encode(loaded[1], conversation.messages[:-1])
        fresh = Decoder(*loaded, decoding)(prompt, lambda: False)
        assert generated == "".join(response.text for response in fresh)
    assert len(conversation.messages) == 7


def test_invalid_utf8_can_be_encoded(loaded):
    assert encode(loaded[1], [{"role": "user", "content": "caf\udcff"}])


def test_an_empty_prompt_is_refused():
    tokenizer = Letters()
    tokenizer.encode = lambda text, add_special_tokens: []
    with pytest.raises(RecipeError, match="the prompt is empty"):
        encode(tokenizer, [{"role": "user", "content": ""}])


def test_a_full_rotating_cache_is_extended_or_rebuilt(loaded):
    decoder = Decoder(*loaded, decoding=Decoding(max_tokens=24, max_kv_size=16))
    first = loaded[1].encode(STORY + " there was a dog and a cat and a big red ball")
    assert len(first) > 16
    answer, _ = tokens(loaded, first, decoder=decoder)
    extended = first + answer + loaded[1].encode("\nThe dog")
    _, last = tokens(loaded, extended, decoder=decoder)
    assert last.prompt_tokens == len(extended) - len(first + answer)
    generated, last = tokens(loaded, first, decoder=decoder)
    assert last.prompt_tokens == len(first)
    assert generated == answer


def test_the_cache_is_valid_after_a_stop(loaded):
    decoder = Decoder(*loaded, decoding=Decoding(max_tokens=24))
    prompt = loaded[1].encode(STORY)
    heard = []
    for response in decoder(prompt, lambda: len(heard) == 3):
        heard.append(response.token)
    assert len(heard) == 3
    for response in decoder(prompt + heard, lambda: False):
        assert response.prompt_tokens == 1
        heard.append(response.token)
        if len(heard) == 6:
            break
    assert (
        heard + tokens(loaded, prompt + heard, decoder=decoder)[0][:18] == tokens(loaded, prompt)[0]
    )


def test_a_long_prompt_can_be_stopped(loaded, monkeypatch):
    module = sys.modules["mlx_lm.generate"]
    in_chunks = partial(module.stream_generate, prefill_step_size=16)
    monkeypatch.setattr(module, "stream_generate", in_chunks)
    decoder = Decoder(*loaded, decoding=Decoding(max_tokens=24))
    prompt = loaded[1].encode(STORY) * 10
    calls = iter([False, False, True])
    assert list(decoder(prompt, lambda: next(calls))) == []
    generated, last = tokens(loaded, prompt, decoder=decoder)
    assert last.prompt_tokens == len(prompt) - 2 * 16
    assert generated == tokens(loaded, prompt)[0]


def test_an_interrupted_computation_leaves_no_cache(loaded):
    def interrupt():
        raise KeyboardInterrupt

    decoder = Decoder(*loaded, decoding=Decoding(max_tokens=24))
    prompt = loaded[1].encode(STORY)
    expected, _ = tokens(loaded, prompt, decoder=decoder)
    with pytest.raises(KeyboardInterrupt):
        list(decoder(prompt + expected, interrupt))
    generated, last = tokens(loaded, prompt, decoder=decoder)
    assert (generated, last.prompt_tokens) == (expected, len(prompt))


def test_settings_that_the_model_does_not_support_are_named(loaded):
    with pytest.raises(RecipeError, match=r"cannot run this model with these settings: .*top_k"):
        tokens(loaded, [1], Decoding(temp=1, top_k=100_000))
    assert 0 <= float(mx.random.uniform()) < 1, "the random state is of no use any more"


def test_piped_lines_are_answered(split_stories, loaded):
    lines = f"{STORY}\n/help\n/nonsense \x07\n\n/reset\n{STORY}\n/exit\nThis is not read\n"
    result = subprocess.run(
        [*COMMAND, str(split_stories), "-m", "24", "--temp", "0"],
        input=lines,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    generated = loaded[1].decode(tokens(loaded, loaded[1].encode(STORY))[0])
    assert (
        result.stdout.split("\n") == [generated.strip(), generated.strip(), ""]
        or result.stdout == (generated + "\n") * 2
    )
    assert "no chat template" in result.stderr
    assert "Ctrl-D" in result.stderr
    assert "unknown command /nonsense" in result.stderr
    assert "Conversation cleared." in result.stderr
    assert "cut off at 24 tokens (--max-tokens)" in result.stderr
    assert "context 512 tokens" in result.stderr


def test_ctrl_c_before_the_warning_exits(split_stories, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    reading = import_module("splitquant_mlx.cli.reading")
    monkeypatch.setattr(reading.Reader, "_message", interrupt)
    monkeypatch.setattr(reading, "note", interrupt)
    assert run(["chat", "--model", str(split_stories)]) == 0


def test_several_lines_are_one_message(monkeypatch):
    lines = iter(['"""one', "", 'two"""', "three"])
    monkeypatch.setattr("builtins.input", lambda: next(lines))
    reading = import_module("splitquant_mlx.cli.reading")
    messages = iter(reading.Reader(interactive=False))
    assert [next(messages), next(messages)] == ["one\n\ntwo", "three"]


def test_an_answer_is_regenerated_or_continued():
    parrot = Parrot("yes", "!")
    conversation = Conversation(Letters(), parrot)
    with pytest.raises(RecipeError, match="no message to answer again"):
        next(conversation.retry())
    with pytest.raises(RecipeError, match="no answer to continue"):
        next(conversation.resume())
    say(conversation, "one")
    parrot.words = ("no",)
    assert [response.text for response in conversation.retry()] == ["no"]
    assert [message["content"] for message in conversation.messages] == ["one", "no"]
    parrot.words = (" way",)
    assert [response.text for response in conversation.resume()] == [" way"]
    assert conversation.messages[-1] == {"role": "assistant", "content": "no way"}
    parrot.words = ()
    list(conversation.retry())
    assert conversation.messages[-1]["content"] == "no way"


def test_a_system_prompt_is_set_in_the_middle():
    conversation = Conversation(Letters(), Parrot("yes"))
    say(conversation, "one")
    conversation.set_system_prompt("be brief")
    assert [m["role"] for m in conversation.messages] == ["system", "user", "assistant"]
    conversation.set_system_prompt(None)
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"]


def test_a_conversation_is_saved_and_loaded(tmp_path):
    messages = [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "yes"}]
    save_messages(messages, tmp_path / "saved.json")
    assert load_messages(tmp_path / "saved.json") == messages
    for content in ("{", "[1]", '[{"role": "pirate", "content": "x"}]', '[{"role": "user"}]'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(RecipeError, match="expected a conversation"):
            load_messages(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"temperature": 0.6, "top_p": 0.9}', {"temp": 0.6, "top_p": 0.9}),
        ('{"do_sample": true, "top_k": 20, "eos_token_id": 2}', {"top_k": 20}),
        ('{"do_sample": false, "temperature": 0.6}', {"temp": 0.0}),
        ('{"temperature": -1}', {}),
        ('{"temperature": "warm"}', {}),
        ("[]", {}),
    ],
)
def test_sampling_is_what_the_model_recommends(tmp_path, content, expected):
    (tmp_path / "generation_config.json").write_text(content)
    assert recommended_sampling(tmp_path) == expected
