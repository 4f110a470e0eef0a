"""Name the files that belong to a model beside its config and weights, and where they may lie."""

from collections.abc import Iterator
from pathlib import Path

from splitquant_mlx.errors import CheckpointError

LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
# what transformers' tokenizers and chats read; any other file could be left from training, or be
# the user's own
COMPANIONS = (
    "tokenizer*.json", "tokenizer*.jinja", "special_tokens_map.json", "added_tokens.json",
    "vocab*.json", "vocab*.txt", "merges*.txt", "tekken.json", "*.model", "*.tiktoken",
    "chat_template*.jinja", "chat_template*.json", "additional_chat_templates/*.jinja",
    "generation_config.json", "preprocessor_config.json", "processor_config.json", *LICENCES,
)  # fmt: skip


def companions(directory: Path) -> Iterator[Path]:
    """Yield tokenizer, chat templates, generation settings and licence, those that are there.

    Raises:
        CheckpointError: when one is a link that is not followed; see `refuse_foreign_link`.
    """
    for pattern in COMPANIONS:
        for file in sorted(directory.glob(pattern)):
            if file.is_file() and not file.name.startswith("."):
                refuse_foreign_link(directory, file)
                yield file


def refuse_foreign_link(directory: Path, file: Path) -> None:
    """Raise CheckpointError for a link that leads neither to a hub cache nor to another model.

    A model that was unpacked or cloned could so have any file of the user's published with the
    result. In another model's directory only the file of the same name is taken.
    """
    found = file.resolve()
    in_cache = any(
        folder.name in ("blobs", "snapshots") and folder.parent.name.startswith("models--")
        for folder in found.parents
    )
    of_a_model = found.name == file.name and (found.parent / "config.json").is_file()
    if not (found.is_relative_to(directory.resolve()) or in_cache or of_a_model):
        raise CheckpointError(
            f"{file} links to a file outside of the model's directory, of a hub cache and of other "
            "models, which is not copied: put the file itself there, or remove the link"
        )
