"""Pre-tokenization of byte-level BPE vocabularies, by llama.cpp's names.

The patterns are applied in order, each to the pieces of the one before; matches and the text
between them become pieces. Names are those of llama.cpp's src/llama-vocab.cpp, patterns those of
the models' tokenizer.json.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """Settings that llama.cpp derives from the name of a pre-tokenizer.

    Args:
        patterns: regular expressions, in order.
        ignore_merges: a piece that is in the vocabulary is one token, whatever the merges.
        add_bos: whether to add the BOS token when the metadata does not say.
        nfc: normalize text to Unicode NFC first.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
CJK = r"[\x{4e00}-\x{9fa5}\x{3040}-\x{309f}\x{30a0}-\x{30ff}]+"
ASCII_SYMBOLS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
# letters by case: tokenizers since GPT-4o split "helloWorld" in two
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# cased letters of the older Unicode version that DeepSeek's first tokenizer uses
OLD_CASED = (
    r"[\p{Lu}\p{Ll}\p{Lt}&&[^\x{560}-\x{588}\x{10c7}-\x{10ff}\x{1c80}-\x{1c8a}\x{2d00}-\x{2d2d}"
    r"\x{a790}-\x{a7fa}\x{ab30}-\x{ab68}\x{10570}-\x{105bc}\x{10d50}-\x{10d85}\x{16e40}-\x{16e7f}"
    r"\x{1d400}-\x{1df2a}]]"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
NO_MARKS = r" ?[^(\s|.,!?\x{2026}\x{3002}\x{ff0c}\x{3001}\x{964}\x{6d4}\x{60c})]+"


def _words(numbers: str, contraction: str = CONTRACTION + "|") -> str:
    word, symbols = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*"
    return f"{contraction}{word}|{numbers}|{symbols}|{LINES}"


def _cased_words(numbers: str, contraction: str = "") -> str:
    start = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{start}{UPPER}*{LOWER}+{contraction}|{start}{UPPER}+{LOWER}*{contraction}|{numbers}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{LINES}"
    )


def _named(names: str, *patterns: str, **settings: bool) -> dict[str, PreTokenizer]:
    return dict.fromkeys(names.split(), PreTokenizer(patterns=patterns, **settings))


THREE_DIGITS, ONE_DIGIT = _words(r"\p{N}{1,3}"), _words(r"\p{N}")
SYMBOLS_OR_WORDS = rf"{ASCII_SYMBOLS}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
PRE_TOKENIZERS = {
    **_named("gpt-2 phi-2 olmo mpt jais trillion granite-docling exaone4 gigachat mellum", GPT2),
    **_named("a.x-4.0", GPT2),
    **_named("smollm starcoder refact command-r codeshell exaone minerva-7b", r"\p{N}", GPT2),
    **_named("mellum2", r"\p{N}", GPT2),
    **_named(
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
        THREE_DIGITS,
        ignore_merges=True,
        add_bos=True,
    ),
    **_named("dbrx smaug-bpe chatglm-bpe", THREE_DIGITS),
    **_named("glm4 glm5", THREE_DIGITS, ignore_merges=True),
    **_named("qwen2 deepseek-r1-qwen megrez kormo f2llmv2", ONE_DIGIT, nfc=True),
    **_named("stablelm2 hunyuan solar-open grok-2", ONE_DIGIT),
    **_named("ufakzeka", _words(r"\p{N}", contraction="")),
    **_named(
        "qwen35",
        rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{LINES}",
        nfc=True,
    ),
    **_named("tekken", _cased_words(r"\p{N}"), ignore_merges=True, add_bos=True),
    **_named("superbpe", r"\p{N}+", r"(?=(\d{3})+(?!\d))"),
    **_named("gpt-4o llama4 kanana2 minimax-m2", _cased_words(r"\p{N}{1,3}", f"{CONTRACTION}?")),
    **_named(
        "deepseek-coder",
        r"[\r\n]",
        r"\s?\p{L}+",
        r"\s?\p{P}+",
        r"[\x{4e00}-\x{9fa5}\x{800}-\x{4e00}\x{ac00}-\x{d7ff}]+",
        r"\p{N}",
    ),
    **_named(
        "deepseek-llm",
        r"[\r\n]",
        rf"\s?{OLD_CASED}+",
        r"\s?[!-/:-~\x{ff01}-\x{ff0f}\x{ff1a}-\x{ff5e}\x{2018}-\x{201f}\x{3000}-\x{3002}]+",
        r"\s+$",
        r"[\x{4e00}-\x{9fa5}\x{800}-\x{4e00}\x{ac00}-\x{d7ff}]+",
        r"\p{N}+",
    ),
    **_named(
        "deepseek-v3 hunyuan-dense joyai-llm",
        r"\p{N}{1,3}",
        CJK,
        rf"{SYMBOLS_OR_WORDS}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{LINES}",
    ),
    **_named("falcon", r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]"),
    **_named("bloom poro-chat gpt3-finnish", NO_MARKS),
    **_named("viking", NO_MARKS, r"\p{N}"),
    **_named(
        "bailingmoe bailingmoe2 llada-moe",
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
    **_named(
        "seed-coder",
        rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{LINES}",
    ),
    **_named("minicpm5", r"\p{N}{1,3}", _words(r"\p{N}+"), ignore_merges=True),
}
