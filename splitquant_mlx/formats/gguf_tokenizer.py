"""Rebuild the Hugging Face tokenizer that a GGUF file's metadata describes.

GGUF stores a vocabulary, not a tokenizer: the pieces in id order, their types, and either ranked
merges ("gpt2": byte-level BPE) or scores ("llama": sentencepiece BPE with byte fallback). The
pre-tokenizer is only a name, `tokenizer.ggml.pre`. Unknown names are refused: with a wrong
pre-tokenizer the model runs but silently gives worse answers.
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
# The longest in use are runs of about 250 spaces.
MAX_PIECE_CHARS = 2048
# Splitting a piece everywhere is quadratic in its length; 256,000 pieces need about 2^24.
MAX_SPLIT_CHARS = 1 << 27
SPACE = "▁"
ELSEWHERE = "use the model's Hugging Face repo or directory instead"
# role -> GGUF name
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot", "eom": "eom"}
# llama.cpp's list of tokens that end an answer, whatever the metadata says
END_TOKENS = frozenset(
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <turn|> "
    "<|endoftext|> <|end_of_text|> <|eom_id|> <EOT> _<EOT> [EOT] [EOS] <end_of_utterance> <eos> "
    "<\uff5cend▁of▁sentence\uff5c> [e~[".split()
)
# in OpenAI's harmony format, `<|end|>` ends a message, not the answer
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
    unique = list(dict.fromkeys(number for number in ids if number is not None))
    if HARMONY in tokens:
        return [number for number in unique if tokens[number] != "<|end|>"]
    return unique


def write_tokenizer(metadata: dict[str, Any], directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json for `metadata` into `directory`.

    Raises:
        CheckpointError: the metadata is incomplete or inconsistent, or its type is unknown.
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
    """Return the tokenizer that `metadata` describes; token ids are those of the file.

    Raises:
        CheckpointError: the metadata is incomplete or inconsistent, or its type is unknown.
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
    except Exception as exc:  # the tokenizers library raises plain Exception
        reason = f"{str(exc)!r:.200}"
        raise CheckpointError(f"tokenizer.ggml is corrupt ({reason}); download it again") from exc
    if kind == "gpt2" and metadata.get("tokenizer.ggml.pre", "default") == "default":
        warnings.warn(
            "tokenizer.ggml.pre is missing: using GPT-2's pre-tokenizer, which may make answers "
            f"worse; {ELSEWHERE}, or a newer file",
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
        # padding repeats a piece; the first id is the token's
        ids[token if token not in ids else f"[PAD{number}]"] = number
    if len(ids) != len(tokens):
        raise CheckpointError("tokenizer.ggml.tokens: duplicate pieces; the file is corrupt")
    types = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(ids))
    return _Vocabulary(ids, _numbers(types, "token_type", len(ids)), _named_tokens(metadata))


def _numbers(values: Any, key: str, count: int) -> list[Any]:
    values = values if isinstance(values, list) else []
    numbers = [x for x in values if isinstance(x, int | float) and math.isfinite(x)]
    if not count == len(values) == len(numbers):
        raise CheckpointError(
            f"tokenizer.ggml.{key}: expected {count} finite numbers, one per token, got "
            f"{len(numbers)}; the file is incomplete or corrupt"
        )
    return numbers


def _named_tokens(metadata: dict[str, Any]) -> dict[str, str]:
    """Return role -> text of the special tokens; see `ROLES`."""
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
    tokenizer = Tokenizer(models.BPE(vocabulary.ids, pairs, ignore_merges=pre.ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if pre.nfc:
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
    """Return merges equivalent to the scores, highest score first.

    Sentencepiece joins the two adjacent pieces whose union scores highest, so every split of a
    piece into two pieces is a merge, ranked by the score of the whole.
    """
    pieces = vocabulary.of_type(NORMAL, UNUSED)
    if (size := sum(len(piece) ** 2 for piece in pieces)) > MAX_SPLIT_CHARS:
        raise CheckpointError(
            f"tokenizer.ggml.tokens: expected pieces whose squared lengths sum to at most "
            f"{MAX_SPLIT_CHARS}, got {size}; {ELSEWHERE}"
        )
    return [
        (piece[:end], piece[end:])
        for piece in sorted(pieces, key=lambda piece: (-scores[pieces[piece]], pieces[piece]))
        for end in range(len(piece) - 1, 0, -1)
        if piece[:end] in pieces and piece[end:] in pieces
    ]


def _add_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Add control, named and user-defined tokens, which are never split."""
    special = {*vocabulary.of_type(UNKNOWN, CONTROL), *vocabulary.named.values()}
    added = sorted({*special, *vocabulary.of_type(USER_DEFINED)}, key=vocabulary.ids.__getitem__)
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=t in special) for t in added])


def _add_template(
    tokenizer: Tokenizer, metadata: dict[str, Any], named: dict[str, str], add_bos: bool
) -> None:
    """Add BOS and EOS when encoding, if the metadata says so."""

    def added(role: str, default: bool) -> list[str]:
        add = metadata.get(f"tokenizer.ggml.add_{role}_token", default)
        return [named[role]] if add and role in named else []

    bos, eos = added("bos", add_bos), added("eos", False)
    if bos or eos:
        ids = [(token, tokenizer.token_to_id(token)) for token in (*bos, *eos)]
        pair = [*bos, "$A", *eos, *bos, "$B", *eos]
        tokenizer.post_processor = TemplateProcessing([*bos, "$A", *eos], pair, ids)
