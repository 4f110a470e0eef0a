"""List the files that belong to a model in addition to its config and weights."""

from collections.abc import Iterator
from pathlib import Path

from splitquant_mlx.errors import CheckpointError

LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
# files that transformers' tokenizers and chat templates are read from; others may be from training,
# or the user's
COMPANIONS = (
    "tokenizer*.json", "tokenizer*.jinja", "special_tokens_map.json", "added_tokens.json",
    "vocab*.json", "vocab*.txt", "merges*.txt", "tekken.json", "*.model", "*.tiktoken",
    "chat_template*.jinja", "chat_template*.json", "additional_chat_templates/*.jinja",
    "generation_config.json", "preprocessor_config.json", "processor_config.json", *LICENCES,
)  # fmt: skip


def companions(directory: Path) -> Iterator[Path]:
    """Yield the existing files of tokenizer, chat templates, generation settings and licence.

    Raises:
        CheckpointError: when one is a link to elsewhere; see `refuse_foreign_link`.
    """
    for pattern in COMPANIONS:
        for file in sorted(directory.glob(pattern)):
            if file.is_file() and not file.name.startswith("."):
                refuse_foreign_link(directory, file)
                yield file


def refuse_foreign_link(directory: Path, file: Path) -> None:
    """Raise CheckpointError for a link to a file outside of model directories and hub caches.

    Otherwise a downloaded model could publish any file of the user. In another model's directory
    only a file of the same name is allowed.
    """
    target = file.resolve()
    in_cache = any(
        folder.name in ("blobs", "snapshots") and folder.parent.name.startswith("models--")
        for folder in target.parents
    )
    in_model = target.name == file.name and (target.parent / "config.json").is_file()
    if not (target.is_relative_to(directory.resolve()) or in_cache or in_model):
        raise CheckpointError(
            f"{file} links to a file outside of the model's directory, a hub cache and other "
            "models, which is not copied: replace the link by the file, or remove it"
        )
