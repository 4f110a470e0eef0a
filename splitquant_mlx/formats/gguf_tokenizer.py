"""Rebuild the Hugging Face tokenizer that a GGUF file's metadata describes.

GGUF keeps a vocabulary, not a tokenizer: the pieces in id order, their types, and either ranked
merges ("gpt2": byte-level BPE) or scores ("llama": sentencepiece BPE with byte fallback). How text
is cut before the merges apply is only a name, `tokenizer.ggml.pre`, so the names this module does
not know are refused: a wrong cut gives a model that runs and is quietly worse.
"""

import json
import math
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from splitquant_mlx.errors import CheckpointError, SplitQuantWarning
from splitquant_mlx.formats.gguf_pretokenizers import PRE_TOKENIZERS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = range(1, 6)
# The longest in use are runs of some 250 blanks.
MAX_PIECE_CHARS = 2048
# Cutting a piece everywhere is quadratic in its length; a vocabulary of 256,000 needs some 2^24.
MAX_CUT_CHARS = 1 << 27
SPACE = "▁"
ELSEWHERE = "take the model from a Hugging Face directory instead"


# role: GGUF name
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot", "eom": "eom"}
# llama.cpp's list of what ends an answer, whatever the metadata says of it
END_TOKENS = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <turn|> "
    "<|endoftext|> <|end_of_text|> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <end_of_utterance> <eos> "
    "<\uff5cend▁of▁sentence\uff5c> [e~[".split()
)
# in OpenAI's harmony format, `<|end|>` ends a message and not the answer
HARMONY = "<|channel|>"


def end_token_ids(metadata: dict[str, Any]) -> list[int]:
    """Return the ids of the tokens that end an answer: EOS first, then EOT, EOM and the like."""
    ids = [metadata.get(f"tokenizer.ggml.{role}_token_id") for role in ("eos", "eot", "eom")]
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    types = metadata.get("tokenizer.ggml.token_type") or []
    ids += [
        number
        for number, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if token in END_TOKENS and kind in (CONTROL, USER_DEFINED)
    ]
    found = list(dict.fromkeys(number for number in ids if number is not None))
    if HARMONY in tokens:
        found = [number for number in found if tokens[number] != "<|end|>"]
    return found


def write_tokenizer(metadata: dict[str, Any], directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json for `metadata` into `directory`.

    Raises:
        CheckpointError: the metadata is incomplete, inconsistent, or of an unknown kind.
    """
    tokenizer = build_tokenizer(metadata)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{
            f"{role}_token": token
            for role, token in _named_tokens(metadata).items()
            if role not in ("eot", "eom")
        },
    }
    context_length = metadata.get(f"{metadata.get('general.architecture')}.context_length")
    if isinstance(context_length, int):
        config["model_max_length"] = context_length
    chat_template = metadata.get("tokenizer.chat_template")
    if isinstance(chat_template, str):
        config["chat_template"] = chat_template
    tokenizer.save(str(directory / "tokenizer.json"))
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def build_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer that `metadata` describes; every piece keeps its id.

    Raises:
        CheckpointError: the metadata is incomplete, inconsistent, or of an unknown kind.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(
            f"tokenizer.ggml.model: expected 'gpt2' or 'llama', got {kind!r:.80}; {ELSEWHERE}"
        )
    build = _byte_level if kind == "gpt2" else _sentencepiece
    vocabulary = _read_vocabulary(metadata)
    try:
        tokenizer, add_bos = build(metadata, vocabulary)
        _add_tokens(tokenizer, vocabulary)
        _add_template(tokenizer, metadata, vocabulary.named, add_bos)
    except CheckpointError:
        raise
    except Exception as exc:  # what the tokenizers library raises has no class of its own
        reason = f"{str(exc)!r:.200}"
        raise CheckpointError(f"tokenizer.ggml is corrupt ({reason}); fetch it again") from exc
    if kind == "gpt2" and metadata.get("tokenizer.ggml.pre", "default") == "default":
        warnings.warn(
            "the file does not say how its tokenizer cuts text (tokenizer.ggml.pre): cut as GPT-2 "
            f"does it, which may make answers worse; {ELSEWHERE}, or a newer file",
            SplitQuantWarning,
            stacklevel=2,
        )
    return tokenizer


class _Vocabulary(NamedTuple):
    ids: dict[str, int]
    types: list[int]
    named: dict[str, str]

    def of_type(self, *types: int) -> dict[str, int]:
        return {token: i for token, i in self.ids.items() if self.types[i] in types}


def _read_vocabulary(metadata: dict[str, Any]) -> _Vocabulary:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError(
            f"tokenizer.ggml.tokens: expected a list of strings, got {tokens!r:.80}; {ELSEWHERE}"
        )
    ids: dict[str, int] = {}
    for number, token in enumerate(tokens):
        if len(token) > MAX_PIECE_CHARS:
            raise CheckpointError(
                f"tokenizer.ggml.tokens[{number}]: expected at most {MAX_PIECE_CHARS} characters, "
                f"got {token!r:.80}; the file is corrupt"
            )
        # padding of a vocabulary repeats a piece, which only the first id stands for
        ids[token if token not in ids else f"[PAD{number}]"] = number
    if len(ids) != len(tokens):
        raise CheckpointError("tokenizer.ggml.tokens: pieces occur twice; the file is corrupt")
    types = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(ids))
    return _Vocabulary(ids, _numbers(types, "token_type", len(ids)), _named_tokens(metadata))


def _numbers(values: Any, key: str, count: int) -> list[Any]:
    values = values if isinstance(values, list) else []
    numbers = [x for x in values if isinstance(x, int | float) and math.isfinite(x)]
    if not count == len(values) == len(numbers):
        raise CheckpointError(
            f"tokenizer.ggml.{key}: expected {count} finite numbers, one for each token, got "
            f"{len(numbers)}; the file is incomplete or corrupt"
        )
    return numbers


def _named_tokens(metadata: dict[str, Any]) -> dict[str, str]:
    """Return the text of the tokens that have a role: bos, eos, unk, pad, and other ends."""
    tokens = metadata["tokenizer.ggml.tokens"]
    named = {}
    for role, key in ROLES.items():
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is None:
            continue
        if type(number) is not int or not 0 <= number < len(tokens):
            raise CheckpointError(
                f"tokenizer.ggml.{key}_token_id: expected an id below {len(tokens)}, got "
                f"{number!r:.80}; the file is corrupt"
            )
        named[role] = tokens[number]
    return named


def _byte_level(metadata: dict[str, Any], vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    name = metadata.get("tokenizer.ggml.pre", "default")
    pre = PRE_TOKENIZERS.get("gpt-2" if name == "default" else str(name))
    if pre is None:
        known = ", ".join(PRE_TOKENIZERS)
        raise CheckpointError(
            f"tokenizer.ggml.pre: expected one of {known}, got {name!r:.80}; {ELSEWHERE}"
        )
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise CheckpointError(f"tokenizer.ggml.merges: expected a list, got none; {ELSEWHERE}")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocabulary.ids, pairs, ignore_merges=pre.whole_pieces))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(cut), "isolated") for cut in pre.cuts),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if pre.compose:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer, pre.add_bos


def _sentencepiece(metadata: dict[str, Any], vocabulary: _Vocabulary) -> tuple[Tokenizer, bool]:
    scores = metadata.get("tokenizer.ggml.scores", [])
    model = models.BPE(
        vocabulary.ids,
        _merges(vocabulary, _numbers(scores, "scores", len(vocabulary.ids))),
        unk_token=vocabulary.named.get("unk"),
        fuse_unk=True,
        byte_fallback="<0x00>" in vocabulary.ids,
    )
    tokenizer = Tokenizer(model)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    before = [normalizers.Prepend(SPACE)] if prefix else []
    after = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    return tokenizer, True


def _merges(vocabulary: _Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """Return the merges that make the pieces, best score first.

    Sentencepiece joins the two neighbours whose union scores highest, so each way to cut a piece
    in two pieces is a merge of the rank of the whole.
    """
    pieces = vocabulary.of_type(NORMAL, UNUSED)
    if (size := sum(len(piece) ** 2 for piece in pieces)) > MAX_CUT_CHARS:
        raise CheckpointError(
            f"tokenizer.ggml.tokens: expected pieces whose squared lengths sum to at most "
            f"{MAX_CUT_CHARS}, got {size}; {ELSEWHERE}"
        )
    return [
        (piece[:cut], piece[cut:])
        for piece in sorted(pieces, key=lambda piece: (-scores[pieces[piece]], pieces[piece]))
        for cut in range(len(piece) - 1, 0, -1)
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]


def _add_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Keep control, named and user-defined tokens whole wherever they stand in a text."""
    special = {*vocabulary.of_type(UNKNOWN, CONTROL), *vocabulary.named.values()}
    whole = sorted({*special, *vocabulary.of_type(USER_DEFINED)}, key=vocabulary.ids.__getitem__)
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=t in special) for t in whole])


def _add_template(
    tokenizer: Tokenizer, metadata: dict[str, Any], named: dict[str, str], add_bos: bool
) -> None:
    """Let encoding add BOS and EOS where the metadata asks for it."""

    def added(role: str, default: bool) -> list[str]:
        wanted = metadata.get(f"tokenizer.ggml.add_{role}_token", default)
        return [named[role]] if wanted and role in named else []

    bos, eos = added("bos", add_bos), added("eos", False)
    if bos or eos:
        ids = [(token, tokenizer.token_to_id(token)) for token in (*bos, *eos)]
        pair = [*bos, "$A", *eos, *bos, "$B", *eos]
        tokenizer.post_processor = TemplateProcessing([*bos, "$A", *eos], pair, ids)
