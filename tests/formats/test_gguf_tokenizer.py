"""Tokenizers rebuilt from GGUF metadata give the token ids of the originals."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from splitquant_mlx.errors import CheckpointError, SplitQuantWarning
from splitquant_mlx.formats.gguf_tokenizer import build_tokenizer, end_token_ids, write_tokenizer

STORIES = Path(__file__).resolve().parents[1] / "trained" / "llama"
TEXTS = [
    "Once upon a time, there was a little girl named Lily.",
    " leading and trailing ",
    "two  blanks   three\n\nnew\tlines \r\n end",
    "Don't, they'LL, I'd; we've: it's 'quoted' (1) [2] {3}",
    "0 12 345 6789 3.14159 1,000,000 ½ ²",
    "naïve café 日本語 Привет мир 🙂🙃 e\u0301 ﬁ",
    "snake_case CamelCase x==y; a->b /* c */ #!",
    "<s> is no token here, nor is <unk",
    "",
]


def stories_metadata():
    """Return the metadata that llama.cpp's converter writes for the tokenizer."""
    model = json.loads((STORIES / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merged = list(dict.fromkeys("".join(merge) for merge in model["merges"]))
    ranks = {piece: rank for rank, piece in enumerate(merged)}
    types = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
    scores = [-float(ranks.get(token, len(ranks) + i)) for i, token in enumerate(tokens)]
    return {
        "general.architecture": "llama",
        "llama.context_length": 512,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + scores[259:],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.fixture(scope="module")
def stories():
    return stories_metadata()


@pytest.fixture(scope="module")
def rebuilt(stories):
    return build_tokenizer(stories)


@pytest.fixture(scope="module")
def original():
    return Tokenizer.from_file(str(STORIES / "tokenizer.json"))


def test_sentencepiece_ids_are_those_of_the_original(rebuilt, original, story_text):
    texts = TEXTS + story_text.split("\n")[:400]
    for text in texts:
        ids = original.encode(text).ids
        assert rebuilt.encode(text).ids == ids
        assert rebuilt.decode(ids) == original.decode(ids)
    assert rebuilt.get_vocab() == original.get_vocab()


@given(text=st.text(max_size=60))
@settings(max_examples=200, deadline=1000)
def test_sentencepiece_ids_of_any_text(rebuilt, original, text):
    assert rebuilt.encode(text).ids == original.encode(text).ids


def test_merges_are_those_transformers_derives_from_scores(stories, rebuilt):
    import transformers.convert_slow_tokenizer as slow

    tokens, scores = stories["tokenizer.ggml.tokens"], stories["tokenizer.ggml.scores"]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = slow.generate_merges  # type: ignore[attr-defined]
    expected = merges(vocab, dict(zip(tokens, scores, strict=True)))
    merges = json.loads(rebuilt.to_str())["model"]["merges"]
    assert [tuple(merge) for merge in merges] == expected


def test_special_tokens_stay_whole_inside_text(rebuilt, original):
    text = "One</s><s> two"
    assert rebuilt.encode(text).ids == original.encode(text).ids


def test_equal_scores_merge_in_the_order_of_ids(stories, original):
    # converters that have only a tokenizer.json write equal scores
    flat = {**stories, "tokenizer.ggml.scores": [-1000.0] * 512}
    assert build_tokenizer(flat).encode(TEXTS[0]).ids == original.encode(TEXTS[0]).ids


@pytest.mark.parametrize(
    ("flags", "first", "last"),
    [
        ({}, 1, None),
        ({"add_bos_token": True, "add_eos_token": True}, 1, 2),
        ({"add_bos_token": False}, None, None),
        ({"add_bos_token": False, "add_eos_token": True}, None, 2),
    ],
)
def test_bos_and_eos_are_added_as_the_metadata_says(stories, flags, first, last):
    keys = {f"tokenizer.ggml.{key}": value for key, value in flags.items()}
    tokenizer = build_tokenizer({**stories, **keys})
    bare = tokenizer.encode("the end", add_special_tokens=False).ids
    before, after = [i for i in [first] if i], [i for i in [last] if i]
    assert tokenizer.encode("the end").ids == [*before, *bare, *after]
    pair = tokenizer.encode("the end", "the end").ids
    assert pair == [*before, *bare, *after] * 2


def test_no_space_prefix(stories):
    tokenizer = build_tokenizer({**stories, "tokenizer.ggml.add_space_prefix": False})
    ids = tokenizer.encode("the end", add_special_tokens=False).ids
    assert tokenizer.id_to_token(ids[0]) in {"t", "th", "the"}
    assert tokenizer.decode(ids) == "the end"


def test_written_directory_loads_as_a_transformers_tokenizer(stories, original, tmp_path):
    from transformers import AutoTokenizer

    template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    write_tokenizer({**stories, "tokenizer.chat_template": template}, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert loaded.encode(text) == original.encode(text).ids
    assert (loaded.bos_token, loaded.eos_token, loaded.unk_token) == ("<s>", "</s>", "<unk>")
    assert loaded.model_max_length == 512
    message = [{"role": "user", "content": "hi"}]
    assert loaded.apply_chat_template(message, tokenize=False) == "<s>hi</s>"


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def byte_level(use_regex):
    options = {"add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    return {"type": "ByteLevel", **options}


WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|@| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# pre_tokenizer and normalizer in the published tokenizer.json of one model per family
PUBLISHED = {
    "gpt-2": ([byte_level(True)], None),
    "smollm": ([{"type": "Digits", "individual_digits": True}, byte_level(True)], None),
    "llama-bpe": ([split(WORDS.replace("@", r"\p{N}{1,3}")), byte_level(False)], None),
    "qwen2": ([split(WORDS.replace("@", r"\p{N}")), byte_level(False)], {"type": "NFC"}),
}


def published(pre):
    """Train a small tokenizer with a published pre-tokenizer; return it and its metadata."""
    steps, normalizer = PUBLISHED[pre]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    control = ["<|begin|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=alphabet, special_tokens=control, show_progress=False
    )
    words = ["1234 123 12 56 789 they'll THEY'LL don't x== y== \n\n \t 日本語 café e\u0301 end"]
    trained.train_from_iterator((TEXTS + words) * 3, trainer)
    content = json.loads(trained.to_str())
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    content["normalizer"] = normalizer
    content["model"]["ignore_merges"] = pre == "llama-bpe"
    vocab = content["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3] + [1] * (len(tokens) - 2),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in content["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": False,
    }
    return Tokenizer.from_str(json.dumps(content)), metadata


@pytest.mark.parametrize("pre", PUBLISHED)
def test_byte_level_ids_are_those_of_the_published_pipeline(pre):
    reference, metadata = published(pre)
    rebuilt = build_tokenizer(metadata)
    for text in [*TEXTS, "they'll THEY'LL 1234 12345", "x==\n\n  y==\r\n", "a<|end|>b <|begin|>"]:
        ids = reference.encode(text).ids
        assert rebuilt.encode(text).ids == ids
        assert rebuilt.decode(ids) == reference.decode(ids)
    assert rebuilt.get_vocab() == reference.get_vocab()


def test_pre_tokenizers_differ_where_they_should():
    _, metadata = published("gpt-2")
    text = "1234 they'LL"
    ids = {
        pre: tuple(build_tokenizer({**metadata, "tokenizer.ggml.pre": pre}).encode(text).ids)
        for pre in PUBLISHED
    }
    assert len(set(ids.values())) >= 3


def test_missing_or_default_pre_is_gpt2_with_a_warning():
    reference, metadata = published("gpt-2")
    without = {key: value for key, value in metadata.items() if not key.endswith(".pre")}
    for variant in (without, {**metadata, "tokenizer.ggml.pre": "default"}):
        with pytest.warns(SplitQuantWarning, match="GPT-2's pre-tokenizer"):
            rebuilt = build_tokenizer(variant)
        assert rebuilt.encode(TEXTS[3]).ids == reference.encode(TEXTS[3]).ids


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "1234 don't", ["1234", " don", "'t"]),
        ("smollm", "1234 x", ["1", "2", "3", "4", " x"]),
        ("llama-bpe", "1234 DON'T", ["123", "4", " DON", "'T"]),
        ("qwen2", "12 a.b", ["1", "2", " a", ".b"]),
        ("tekken", "helloWorld 12", ["hello", "World", " ", "1", "2"]),
        ("gpt-4o", "don't 1234/x/\n", ["don't", " ", "123", "4", "/x", "/\n"]),
        ("deepseek-v3", "1234日本 x_y", ["123", "4", "日本", " x", "_y"]),
        ("deepseek-coder", "a\nb 12!", ["a", "\n", "b", " ", "1", "2", "!"]),
        (
            "deepseek-llm",
            "I'm x=12\n \u00e9t\u4e2dab",
            ["I", "'", "m", " x", "=", "12", "\n", " \u00e9", "t", "\u4e2d", "ab"],
        ),
        ("superbpe", "a 1234567", ["a ", "1", "234", "567"]),
        ("falcon", "a==b 1234", ["a", "==", "b", " ", "123", "4"]),
        ("viking", "moi 12!", ["moi", " ", "1", "2", "!"]),
    ],
)
def test_pieces_of_text(pre, text, pieces):
    # checked against llama.cpp's own tokenizer
    metadata = published("gpt-2")[1] | {"tokenizer.ggml.pre": pre}
    spans = build_tokenizer(metadata).pre_tokenizer.pre_tokenize_str(text)
    decode = decoders.ByteLevel().decode
    assert [decode([piece]) for piece, _ in spans] == pieces


def test_end_tokens_are_recognized_by_name_too():
    metadata = {
        "tokenizer.ggml.tokens": ["a", "<|im_end|>", "<|endoftext|>", "<|end|>", "<EOT>"],
        "tokenizer.ggml.token_type": [1, 3, 4, 3, 1],
        "tokenizer.ggml.eos_token_id": 2,
    }
    assert end_token_ids(metadata) == [2, 1, 3]
    metadata["tokenizer.ggml.tokens"][0] = "<|channel|>"  # harmony: the answer continues
    assert end_token_ids(metadata) == [2, 1]


def test_a_duplicate_piece_has_its_first_id():
    _, metadata = published("gpt-2")
    count = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += ["[PAD]", "[PAD]"]
    metadata["tokenizer.ggml.token_type"] += [5, 5]
    tokenizer = build_tokenizer(metadata)
    assert tokenizer.get_vocab_size() == count + 2
    assert tokenizer.token_to_id("[PAD]") == count


def test_llama_bpe_ignores_merges_and_adds_bos_by_default():
    _, metadata = published("llama-bpe")
    metadata["tokenizer.ggml.tokens"].append("unmerged")
    metadata["tokenizer.ggml.token_type"].append(1)
    del metadata["tokenizer.ggml.add_bos_token"]
    last = len(metadata["tokenizer.ggml.tokens"]) - 1
    assert build_tokenizer(metadata).encode("unmerged").ids == [0, last]


def test_user_defined_tokens_are_whole_but_not_special():
    _, metadata = published("smollm")
    metadata["tokenizer.ggml.tokens"] += ["<think>", "   "]
    metadata["tokenizer.ggml.token_type"] += [4, 4]
    tokenizer = build_tokenizer(metadata)
    first = len(metadata["tokenizer.ggml.tokens"]) - 2
    ids = tokenizer.encode("a<think>   b").ids
    assert ids[1:3] == [first, first + 1]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>   b"
    assert tokenizer.decode([0, *ids], skip_special_tokens=True) == "a<think>   b"


def test_without_types_special_tokens_are_not_split():
    _, metadata = published("smollm")
    del metadata["tokenizer.ggml.token_type"]
    assert build_tokenizer(metadata).encode("<|begin|>a<|end|>").ids[::2] == [0, 1]


GPT2_ERRORS = {
    "unknown pre": ({"pre": "brand-new"}, "one of .*smollm.*got 'brand-new'"),
    "pre no string": ({"pre": [1]}, "tokenizer.ggml.pre"),
    "unknown model": ({"model": "t5"}, "'gpt2' or 'llama', got 't5'"),
    "no model": ({"model": None}, "'llama', got None"),
    "no tokens": ({"tokens": None}, "expected a list of strings"),
    "numbers for tokens": ({"tokens": [1, 2]}, "expected a list of strings"),
    "giant token": ({"tokens": ["a" * 5000]}, r"tokens\[0\]"),
    "types short": ({"token_type": [1]}, "token_type: .*got 1"),
    "bos too large": ({"bos_token_id": 10**6}, "bos_token_id: .*got 1000000"),
    "eos no integer": ({"eos_token_id": "x"}, "eos_token_id: .*got 'x'"),
    "no merges": ({"merges": None}, "merges: expected a list"),
    "foreign merge": ({"merges": ["zz qq"]}, "corrupt"),
    "merge without blank": ({"merges": ["ab"]}, "corrupt"),
    "merge no string": ({"merges": [3]}, "corrupt"),
}


@pytest.mark.parametrize("name", GPT2_ERRORS)
def test_unusable_metadata_is_refused_before_writing(name, tmp_path):
    changes, message = GPT2_ERRORS[name]
    _, metadata = published("gpt-2")
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        write_tokenizer({k: v for k, v in metadata.items() if v is not None}, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scores", [None, [0.0], [float("nan")] * 512, ["x"] * 512, 3])
def test_scores_must_be_finite_and_one_per_token(stories, scores):
    with pytest.raises(CheckpointError, match="scores: expected 512 finite numbers"):
        build_tokenizer({**stories, "tokenizer.ggml.scores": scores})


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), 1 << 64)
    | st.floats()
    | st.text(max_size=5),
    lambda children: st.lists(children, max_size=5),
    max_leaves=8,
)


@settings(max_examples=200, deadline=2000)
@given(data=st.data())
def test_any_metadata_gives_a_tokenizer_or_a_checkpoint_error(data):
    metadata = {
        "tokenizer.ggml.model": data.draw(st.sampled_from(["gpt2", "llama"])),
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["<s>", "a", "b", "ab", "<0x00>"],
        "tokenizer.ggml.scores": [0.0, -1.0, -2.0, -3.0, 0.0],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 0,
    }
    keys = ["tokens", "scores", "merges", "token_type", "pre", "model", "add_bos_token"]
    keys += ["bos_token_id", "unknown_token_id", "add_space_prefix"]
    for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3)):
        metadata[f"tokenizer.ggml.{key}"] = data.draw(ANYTHING)
    try:
        build_tokenizer(metadata).encode("ab c")
    except CheckpointError as exc:
        assert "\n" not in str(exc)
