"""Check a converted checkpoint: against its manifest, by running it, and against its original.

A manifest is a claim like any other. Whoever can change a weight file can change the hash of it
too; that the weights are those of the original is known only by comparing them with it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from splitquant_mlx.conversion.original import compare
from splitquant_mlx.conversion.plan import LayerPlan
from splitquant_mlx.conversion.quantizers import LEAVES
from splitquant_mlx.conversion.save import TABLES, config_tables
from splitquant_mlx.errors import CheckpointError
from splitquant_mlx.formats.head_file import COPIED
from splitquant_mlx.formats.manifest import FILE_NAME, LayerRecord, Manifest, load_manifest
from splitquant_mlx.formats.safetensors import TensorHeader
from splitquant_mlx.models.config import read_config
from splitquant_mlx.models.directory import as_directory
from splitquant_mlx.models.left_out import same_bytes
from splitquant_mlx.models.loader import load_model
from splitquant_mlx.models.shards import read_headers
from splitquant_mlx.models.source import Source, resolve
from splitquant_mlx.progress import SILENT, Progress
from splitquant_mlx.recipe import OWN_LAYERS
from splitquant_mlx.runtime.disk import sha256

Headers = dict[str, TensorHeader]


@dataclass(frozen=True, kw_only=True)
class Check:
    """Result of one check.

    Attributes:
        name: what was checked.
        detail: what it was checked for.
        problems: one line each; empty when all is well.
    """

    name: str
    detail: str
    problems: tuple[str, ...]


def verify(
    directory: str | Path,
    *,
    source: str | Path | Source | None = None,
    progress: Progress = SILENT,
) -> list[Check]:
    """Check a checkpoint that `convert` wrote.

    Args:
        directory: of the checkpoint.
        source: the model it was made from, to compare the weights with: hub repo id, directory,
            .gguf file, or a source already resolved.
        progress: progress reporter.

    Returns:
        The checks, each with the problems it found.

    Raises:
        SplitQuantError: when there is no manifest, or the source cannot be read.
    """
    directory = Path(directory)
    manifest = load_manifest(directory)
    if manifest is None:
        raise CheckpointError(
            f"{directory} has no {FILE_NAME}: verify checks what `splitquant-mlx convert` wrote"
        )
    checks = [
        check_files(directory, manifest, progress),
        _check("tensors", "shapes, bytes and bits/weight", lambda: _tensors(directory, manifest)),
        _check("config.json", "layers and their bits", lambda: _config(directory, manifest)),
        _check("forward pass", "finite logits", lambda: _forward(directory, progress)),
    ]
    if source is not None:
        source = source if isinstance(source, Source) else resolve(str(source))
        with as_directory(source, progress) as original:
            detail = f"every weight against {source.name}"
            checks.append(
                _check("original", detail, lambda: compare(directory, manifest, original, progress))
            )
    return checks


def check_files(directory: Path, manifest: Manifest, progress: Progress) -> Check:
    """Compare the SHA-256 of every file with the manifest's."""
    problems = []
    with progress.task("Hashing", len(manifest.files)) as advance:
        for name, digest in manifest.files.items():
            file = directory / name
            try:
                if Path(name).is_absolute() or ".." in Path(name).parts or not file.is_file():
                    problems.append(
                        f"{name!r} is in the manifest, and is no file of this directory"
                    )
                elif sha256(file) != digest:
                    problems.append(f"{name} is not the file that was written")
            except (OSError, ValueError) as exc:
                problems.append(f"{name!r} cannot be read: {exc}")
            advance(1)
    weights = {file.name for file in directory.glob("*.safetensors")} | {"config.json"}
    problems += [
        f"{name} has no hash in the manifest" for name in sorted(weights - {*manifest.files})
    ]
    detail = f"SHA-256 of {len(manifest.files)} files"
    return Check(name="files", detail=detail, problems=tuple(problems))


def _check(name: str, detail: str, find: Callable[[], list[str]]) -> Check:
    try:
        problems = find()
    except CheckpointError as exc:
        problems = [str(exc)]
    return Check(name=name, detail=detail, problems=tuple(problems))


def _tensors(directory: Path, manifest: Manifest) -> list[str]:
    headers = read_headers(directory)
    problems, bits, entries, recorded = [], 0, 0, set()
    copies = {
        f"{layer.head}.{leaf}": f"{layer.path}.{leaf}"
        for layer in manifest.layers
        for leaf in COPIED
        if layer.head and f"{layer.path}.{leaf}" in headers
    }
    for copy, name in copies.items():
        if copy not in headers or not same_bytes(headers[copy], headers[name]):
            problems.append(f"{copy} is not what {name} is")
    for layer in manifest.layers:
        found = {
            leaf: headers[f"{layer.path}.{leaf}"]
            for leaf in LEAVES
            if f"{layer.path}.{leaf}" in headers
        }
        if layer.path in recorded:
            problems.append(f"{layer.path} is in the manifest twice")
        elif wrong := _layer_problem(layer, found):
            problems.append(f"{layer.path}: {wrong}")
        elif layer.kind in ("linear", "experts") and layer.action != "keep":
            bits, entries = bits + 8 * layer.nbytes, entries + math.prod(layer.shape)
        recorded.add(layer.path)
    if problems:
        return problems
    stored_bytes = sum(header.nbytes for header in headers.values())
    if stored_bytes != manifest.stored_bytes:
        problems.append(f"stored_bytes is {manifest.stored_bytes}, the files hold {stored_bytes}")
    if not _equal(manifest.linear_bits_per_weight * entries, bits):
        problems.append(f"linear_bits_per_weight is {manifest.linear_bits_per_weight}")
    parameters = sum(math.prod(layer.shape) for layer in manifest.layers)
    for name, header in headers.items():
        if name in copies:
            continue
        path, _, leaf = name.rpartition(".")
        if path not in recorded or leaf not in LEAVES:
            parameters += math.prod(header.shape)
            if leaf == "scales" or (leaf == "weight" and len(header.shape) > 1):
                problems.append(f"tensor {name} is of no layer in the manifest")
    if not _equal(manifest.bits_per_weight * parameters, 8 * stored_bytes):
        problems.append(
            f"bits_per_weight is {manifest.bits_per_weight:.4f}, {stored_bytes} bytes for "
            f"{parameters} parameters are {8 * stored_bytes / max(parameters, 1):.4f}"
        )
    return problems


def _layer_problem(layer: LayerRecord, found: Headers) -> str:
    """Tell what of a layer's record does not fit its tensors; "" when all does."""
    expected = _shapes(layer)
    if expected and found.keys() != expected.keys():
        return f"expected {', '.join(sorted(expected))}, got {', '.join(found) or 'no tensor'}"
    shapes = {leaf: header.shape for leaf, header in found.items()}
    if shapes != expected or (layer.action != "keep" and found["weight"].dtype != "U32"):
        shown = ", ".join(f"{leaf} {list(shape)}" for leaf, shape in shapes.items())
        return f"{shown} do not fit {layer.action}, shape {list(layer.shape)}, bits {layer.bits}"
    nbytes = sum(header.nbytes for header in found.values())
    if nbytes != layer.nbytes:
        return f"it has {nbytes} bytes, the manifest says {layer.nbytes}"
    if not _equal(layer.bits_per_weight * math.prod(layer.shape), 8 * nbytes):
        return f"it has not the {layer.bits_per_weight} bits/weight of the manifest"
    return ""


def _shapes(layer: LayerRecord) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a layer, by its record; none where it is no layer's."""
    *rows, width = layer.shape or (0,)
    bits, group_size = layer.bits or 0, layer.group_size or 0
    clusters = (layer.clusters or 1) if layer.action == "split" else 1
    if layer.action == "keep":
        fits = bool(rows)
    elif layer.mode == "lut":
        fits = len(rows) == 1 and bits in OWN_LAYERS["lut"] and width % 32 == 0
    else:
        fits = bool(rows and bits and group_size and width * clusters * bits % 32 == 0)
        fits = fits and width * clusters % group_size == 0
    if not fits:
        return {}
    plan = LayerPlan(
        path=layer.path,
        kind=layer.kind,
        action=layer.action,
        shape=layer.shape,
        bits=bits,
        group_size=group_size,
        mode=layer.mode or "",
        clusters=clusters,
        outliers=layer.outliers or 0,
    )
    return {leaf: shape for leaf, (_, shape) in plan.tensors(mx.float16).items()}


def _equal(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6)


def _config(directory: Path, manifest: Manifest) -> list[str]:
    config, wanted = read_config(directory), config_tables(manifest.layers)
    return [
        f"its {table} is not that of the manifest"
        for table in TABLES
        if config.get(table) != wanted.get(table)
    ]


def _forward(directory: Path, progress: Progress) -> list[str]:
    with progress.task("Running"):
        model = load_model(directory)
        try:
            logits = model(mx.array([[0, 1, 2, 3]]))
            finite = mx.all(mx.isfinite(logits)).item()
        except Exception as exc:  # mlx-lm's models raise whatever their arithmetic meets
            raise CheckpointError(f"the model does not run: {type(exc).__name__}: {exc}") from exc
    return [] if finite else ["the logits hold NaN or infinite values"]
