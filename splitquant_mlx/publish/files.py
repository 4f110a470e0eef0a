"""Check a converted checkpoint, and list the files that belong to it and are sent."""

from dataclasses import dataclass
from pathlib import Path

from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.formats.manifest import FILE_NAME, MODEL_FILE, Manifest, load_manifest
from splitquant_mlx.models.companions import LICENCES, companions, refuse_foreign_link
from splitquant_mlx.models.config import read_config
from splitquant_mlx.models.shards import INDEX, read_headers
from splitquant_mlx.recipe import Recipe

CARD = "README.md"


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A complete converted checkpoint.

    Attributes:
        path: its directory.
        manifest: how it was made.
        recipe: of the manifest.
        files: of the checkpoint, without the card, by name.
        left_out: names of what else lies in the directory.
    """

    path: Path
    manifest: Manifest
    recipe: Recipe
    files: tuple[Path, ...]
    left_out: tuple[str, ...]

    @property
    def needs_code(self) -> bool:
        """Tell whether stock mlx-lm needs the model file."""
        return any(layer.needs_code for layer in self.manifest.layers)

    @property
    def licences(self) -> list[str]:
        """Return the names of the licence files."""
        return [file.name for file in self.files if any(file.match(name) for name in LICENCES)]


def check_converted(path: Path) -> Converted:
    """Check that `path` is a whole checkpoint that `convert` made. No weights are read.

    Raises:
        SplitQuantError: when a file is missing, damaged or a link to elsewhere, the manifest is
            another checkpoint's, or there is code that is not ours.
    """
    config = read_config(path)
    manifest = load_manifest(path)
    if manifest is None:
        raise CheckpointError(
            f"{path} was not made by `splitquant-mlx convert` (it has no {FILE_NAME}), so there is "
            "nothing to put on a card: convert the model first"
        )
    recipe = Recipe.from_dict(manifest.recipe)
    headers = read_headers(path)
    nbytes = sum(header.nbytes for header in headers.values())
    if nbytes != manifest.stored_bytes:
        raise CheckpointError(
            f"{path}: expected {manifest.stored_bytes} bytes of tensors by {FILE_NAME}, got "
            f"{nbytes}: one of the two is another model's, convert it again"
        )
    code = config.get("model_file")
    expected = MODEL_FILE if any(layer.needs_code for layer in manifest.layers) else None
    if code != expected:
        raise CheckpointError(
            f"{path}: config.json: model_file: expected "
            f"{expected or 'none'}, got {code!r:.80}: other code is never published, "
            "convert it again"
        )
    wanted = {"config.json", FILE_NAME, *(header.file.name for header in headers.values())}
    found = {*wanted, *([expected] if expected else [])}
    found |= {file.relative_to(path).as_posix() for file in companions(path)}
    found |= {file.name for file in [path / INDEX] if file.is_file()}
    files = tuple(path / name for name in sorted(found))
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, or no file: convert the model again")
        refuse_foreign_link(path, file)
    kept = {name.partition("/")[0] for name in (*found, CARD)}
    left_out = sorted(file.name for file in path.iterdir() if file.name not in kept)
    return Converted(
        path=path, manifest=manifest, recipe=recipe, files=files, left_out=tuple(left_out)
    )
