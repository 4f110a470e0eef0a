"""`serve` and OpenAI's own client: answers, errors, several at a time."""

from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest
from serving import STORY, serve_to

openai = pytest.importorskip("openai")

# Whoever speaks is named, and one who speaks out of turn is an error, as in many real templates.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.role }}: {{ m.content }} {% endfor %}"
)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": STORY}]


@pytest.fixture
def talk(split_stories):
    """Return a function that serves the model to function(openai client)."""
    mx.disable_compile()  # which takes seconds for every way to sample, on a CPU

    def talk(function, *options, api_key="secret", **limits):
        def client(raw):
            with openai.OpenAI(
                base_url=f"{raw.url}/v1", api_key="secret", max_retries=0, timeout=30
            ) as client:
                function(client)

        options = ("--chat-template", TEMPLATE, *options)
        serve_to(client, split_stories, *options, api_key=api_key, **limits)

    yield talk
    mx.enable_compile()


def test_answers_whole_and_streamed(talk, split_stories):
    model = str(split_stories)

    def client(api):
        assert [listed.id for listed in api.models.list()] == [model]
        assert api.models.retrieve(model).id == model

        chat = {"model": model, "messages": MESSAGES, "max_tokens": 20}
        whole = api.chat.completions.create(**chat)
        text = whole.choices[0].message.content
        assert text and whole.choices[0].finish_reason == "length"
        assert whole.usage.completion_tokens == 20
        usage = {"include_usage": True}
        *pieces, end = api.chat.completions.create(**chat, stream=True, stream_options=usage)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == text
        assert end.usage == whole.usage or end.usage.total_tokens == whole.usage.total_tokens
        list(api.chat.completions.create(**chat, stream=True, stream_options={}))

        plain = {"model": model, "prompt": STORY, "max_tokens": 20}
        text = api.completions.create(**plain).choices[0].text
        stream = api.completions.create(**plain, stream=True)
        assert text and "".join(piece.choices[0].text for piece in stream) == text
        word = text.split()[2]
        stopped = api.completions.create(**plain, stop=[word]).choices[0]
        assert stopped.finish_reason == "stop" and word not in stopped.text
        assert text.startswith(stopped.text.strip())

    talk(client)


def test_settings_of_sampling(talk, split_stories):
    model = str(split_stories)

    def client(api):
        def say(**settings):
            answer = api.completions.create(model=model, prompt=STORY, max_tokens=8, **settings)
            return answer.choices[0].text

        greedy = say()
        assert say(temperature=1.9, seed=7) == say(temperature=1.9, seed=7) != greedy
        assert say(temperature=0, seed=-1) == greedy
        # null is OpenAI's word for: not given
        assert say(temperature=None, stop=None) == greedy
        extra = {"top_k": 10**6, "min_p": 1, "xtc_probability": 0, "repetition_penalty": 1}
        assert say(extra_body=extra) == greedy
        assert "!!!" in say(logit_bias={str(_token(split_stories, "!")): 100})

    talk(client)


def _token(model, text):
    from splitquant_mlx.models.loader import load

    return load(model)[1].encode(text, add_special_tokens=False)[-1]


def test_errors_are_those_of_the_client(talk, split_stories):
    model = str(split_stories)

    def client(api):
        def refusal(kind, message, **changes):
            body = {"model": model, "messages": MESSAGES, "max_tokens": 4, **changes}
            with pytest.raises(kind, match=message) as caught:
                api.chat.completions.create(**body)
            return caught.value

        bad = openai.BadRequestError
        assert refusal(openai.NotFoundError, "only", model="gpt").code == "model_not_found"
        assert refusal(bad, "max_tokens: wanted .* 1 to 50", max_tokens=51).param == "max_tokens"
        assert refusal(bad, "n: wanted", n=2).type == "invalid_request_error"
        refusal(bad, "no tools", messages=[*MESSAGES, {"role": "tool", "content": "x"}])
        long = [{"role": "user", "content": STORY * 20}]
        assert refusal(bad, "wanted 1 to 60", messages=long).code == "context_length_exceeded"
        assert refusal(bad, "60", messages=long, seed=1).code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError):
            api.models.retrieve("gpt")
        with pytest.raises(openai.AuthenticationError) as caught:
            api.with_options(api_key="Secret").models.list()
        assert caught.value.code == "invalid_api_key"
        with pytest.raises(openai.NotFoundError):
            api.embeddings.create(model=model, input="x")

    talk(client, max_tokens_limit=50, max_prompt_tokens=60)


def test_eight_clients_at_once(talk, split_stories):
    prompts = ["Tom", "The dog", "One day", "She", "They ran", "Mom", "A big", "It was"]

    def client(api):
        def say(prompt):
            answer = api.completions.create(
                model=str(split_stories), prompt=prompt, max_tokens=30, temperature=0
            )
            return answer.choices[0].text

        alone = [say(prompt) for prompt in prompts]
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(say, prompts)) == alone
        assert len(set(alone)) == 8  # or mixing them up would not show

    talk(client, max_concurrent=8)
