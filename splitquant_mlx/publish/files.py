"""Check a converted checkpoint and list the files to upload."""

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
        path: directory of the checkpoint.
        manifest: its manifest.
        recipe: recipe of the manifest.
        files: files of the checkpoint by name, without the card.
        left_out: names of other files in the directory, which are not uploaded.
    """

    path: Path
    manifest: Manifest
    recipe: Recipe
    files: tuple[Path, ...]
    left_out: tuple[str, ...]

    @property
    def needs_code(self) -> bool:
        """Return whether stock mlx-lm needs the model file to load it."""
        return any(layer.needs_code for layer in self.manifest.layers)

    @property
    def licences(self) -> list[str]:
        """Return the names of the licence files."""
        return [file.name for file in self.files if any(file.match(name) for name in LICENCES)]


def check_converted(path: Path) -> Converted:
    """Check that `path` is a complete checkpoint written by `convert`, without reading weights.

    Raises:
        SplitQuantError: when a file is missing, damaged or a link out of the directory, the
            manifest belongs to another checkpoint, or config.json names foreign code.
    """
    config = read_config(path)
    manifest = load_manifest(path)
    if manifest is None:
        raise CheckpointError(
            f"{path} was not made by `splitquant-mlx convert` (it has no {FILE_NAME}): convert the "
            "model first"
        )
    recipe = Recipe.from_dict(manifest.recipe)
    headers = read_headers(path)
    nbytes = sum(header.nbytes for header in headers.values())
    if nbytes != manifest.stored_bytes:
        raise CheckpointError(
            f"{path}: expected {manifest.stored_bytes} bytes of tensors by {FILE_NAME}, got "
            f"{nbytes}: they are of different models, convert the model again"
        )
    code = config.get("model_file")
    expected = MODEL_FILE if any(layer.needs_code for layer in manifest.layers) else None
    if code != expected:
        raise CheckpointError(
            f"{path}: config.json: model_file: expected "
            f"{expected or 'none'}, got {code!r:.80}: other code is never published, "
            "convert the model again"
        )
    names = {"config.json", FILE_NAME, *(header.file.name for header in headers.values())}
    names |= {file.relative_to(path).as_posix() for file in companions(path)}
    if expected:
        names.add(expected)
    if (path / INDEX).is_file():
        names.add(INDEX)
    files = tuple(path / name for name in sorted(names))
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing or not a file: convert the model again")
        refuse_foreign_link(path, file)
    included = {name.partition("/")[0] for name in (*names, CARD)}
    left_out = sorted(file.name for file in path.iterdir() if file.name not in included)
    return Converted(
        path=path, manifest=manifest, recipe=recipe, files=files, left_out=tuple(left_out)
    )
