"""How byte-level vocabularies cut text before their merges apply, by llama.cpp's names for it.

Each cut is a regular expression that is applied to what the cuts before it left; its matches, and
what lies between them, are pieces. The names are those of llama.cpp's src/llama-vocab.cpp, the
expressions those of the models' own tokenizer.json.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """How text is cut, and what else the name of the cut stands for.

    Args:
        cuts: regular expressions, in order.
        whole_pieces: a piece of the cut that is in the vocabulary is taken whole, merges or not.
        add_bos: start with the BOS token where the metadata does not say.
        compose: bring text to Unicode NFC first.
    """

    cuts: tuple[str, ...]
    whole_pieces: bool = False
    add_bos: bool = False
    compose: bool = False


CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
CJK = r"[\x{4e00}-\x{9fa5}\x{3040}-\x{309f}\x{30a0}-\x{30ff}]+"
ASCII_SYMBOLS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
# letters by case, by which tokenizers since GPT-4o tell words apart: "helloWorld" is two
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# the cased letters that DeepSeek's first tokenizer knows, of an older Unicode
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


def _named(names: str, *cuts: str, **settings: bool) -> dict[str, PreTokenizer]:
    return dict.fromkeys(names.split(), PreTokenizer(cuts=cuts, **settings))


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
        whole_pieces=True,
        add_bos=True,
    ),
    **_named("dbrx smaug-bpe chatglm-bpe", THREE_DIGITS),
    **_named("glm4 glm5", THREE_DIGITS, whole_pieces=True),
    **_named("qwen2 deepseek-r1-qwen megrez kormo f2llmv2", ONE_DIGIT, compose=True),
    **_named("stablelm2 hunyuan solar-open grok-2", ONE_DIGIT),
    **_named("ufakzeka", _words(r"\p{N}", contraction="")),
    **_named(
        "qwen35",
        rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
        rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{LINES}",
        compose=True,
    ),
    **_named("tekken", _cased_words(r"\p{N}"), whole_pieces=True, add_bos=True),
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
    **_named("minicpm5", r"\p{N}{1,3}", _words(r"\p{N}+"), whole_pieces=True),
}
