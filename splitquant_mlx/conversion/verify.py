"""Check a converted checkpoint: against its manifest, by running it, and against its original.

A manifest alone proves little: whoever changes a weight file can also change its hash. Only the
comparison with the original shows that the weights are its weights.
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
from splitquant_mlx.errors import CheckpointError, DeviceError, SourceError
from splitquant_mlx.formats.head_file import COPIED
from splitquant_mlx.formats.manifest import FILE_NAME, LayerRecord, Manifest, load_manifest
from splitquant_mlx.formats.safetensors import TensorHeader
from splitquant_mlx.models.config import read_config
from splitquant_mlx.models.directory import as_directory
from splitquant_mlx.models.left_out import same_bytes
from splitquant_mlx.models.loader import load_model
from splitquant_mlx.models.shards import read_headers
from splitquant_mlx.models.source import Source, fetch_files, resolve
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
        problems: one line each; empty if the check passed.
        unchecked: what could not be checked and why, one line each.
    """

    name: str
    detail: str
    problems: tuple[str, ...]
    unchecked: tuple[str, ...] = ()


def verify(
    directory: str | Path | Source,
    *,
    source: str | Path | Source | None = None,
    progress: Progress = SILENT,
) -> list[Check]:
    """Check a checkpoint that `convert` wrote.

    Args:
        directory: the checkpoint: directory, hub repo id, or a resolved source.
        source: the original model, to compare the weights with: hub repo id, directory, .gguf
            file, or a resolved source.
        progress: progress reporter.

    Returns:
        The results of all checks.

    Raises:
        SplitQuantError: there is no manifest, or the source cannot be read.
    """
    converted = directory if isinstance(directory, Source) else resolve(str(directory))
    directory = converted.path
    manifest = load_manifest(directory)
    if manifest is None:
        raise CheckpointError(
            f"{converted.name} has no {FILE_NAME}: verify checks what `splitquant-mlx convert` "
            "wrote"
        )
    not_fetched = ""
    try:
        fetch_files(converted, manifest.files)
    except SourceError as exc:
        not_fetched = str(exc)
    checks = [
        check_files(directory, manifest, progress, not_fetched),
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


def check_files(
    directory: Path, manifest: Manifest, progress: Progress, not_fetched: str = ""
) -> Check:
    """Compare the SHA-256 of every file with the manifest's.

    Args:
        directory: the checkpoint.
        manifest: its manifest.
        progress: progress reporter.
        not_fetched: why missing files were not downloaded; empty if they do not exist.
    """
    problems, unchecked = [], []
    with progress.task("Hashing", len(manifest.files)) as advance:
        for name, digest in manifest.files.items():
            file = directory / name
            try:
                inside = not Path(name).is_absolute() and ".." not in Path(name).parts
                if inside and not_fetched and not file.exists():
                    unchecked.append(f"{name!r} was not checked: {not_fetched}")
                elif not inside or not file.is_file():
                    problems.append(
                        f"{name!r} is in the manifest, but is not a file in this directory"
                    )
                elif sha256(file) != digest:
                    problems.append(f"{name} has changed: its SHA-256 differs from the manifest")
            except (OSError, ValueError) as exc:
                problems.append(f"{name!r} cannot be read: {exc}")
            advance(1)
    weights = {file.name for file in directory.glob("*.safetensors")} | {"config.json"}
    problems += [
        f"{name} has no hash in the manifest" for name in sorted(weights - {*manifest.files})
    ]
    return Check(
        name="files",
        detail=f"SHA-256 of {len(manifest.files) - len(unchecked)} files",
        problems=tuple(problems),
        unchecked=tuple(unchecked),
    )


def _check(name: str, detail: str, find: Callable[[], list[str]]) -> Check:
    problems, unchecked = [], []
    try:
        problems = find()
    except CheckpointError as exc:
        problems = [str(exc)]
    except DeviceError as exc:
        unchecked = [str(exc)]
    return Check(name=name, detail=detail, problems=tuple(problems), unchecked=tuple(unchecked))


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
            problems.append(f"{copy} differs from {name}")
    for layer in manifest.layers:
        tensors = {
            leaf: headers[f"{layer.path}.{leaf}"]
            for leaf in LEAVES
            if f"{layer.path}.{leaf}" in headers
        }
        if layer.path in recorded:
            problems.append(f"{layer.path} is in the manifest twice")
        elif problem := _layer_problem(layer, tensors):
            problems.append(f"{layer.path}: {problem}")
        elif layer.kind in ("linear", "experts") and layer.action != "keep":
            bits, entries = bits + 8 * layer.nbytes, entries + math.prod(layer.shape)
        recorded.add(layer.path)
    if problems:
        return problems
    stored_bytes = sum(header.nbytes for header in headers.values())
    if stored_bytes != manifest.stored_bytes:
        problems.append(f"stored_bytes: expected {stored_bytes}, got {manifest.stored_bytes}")
    if not _equal(manifest.linear_bits_per_weight * entries, bits):
        problems.append(
            f"linear_bits_per_weight: expected {bits / max(entries, 1):.4f}, got "
            f"{manifest.linear_bits_per_weight:.4f}"
        )
    parameters = sum(math.prod(layer.shape) for layer in manifest.layers)
    for name, header in headers.items():
        if name in copies:
            continue
        path, _, leaf = name.rpartition(".")
        if path not in recorded or leaf not in LEAVES:
            parameters += math.prod(header.shape)
            if leaf == "scales" or (leaf == "weight" and len(header.shape) > 1):
                problems.append(f"tensor {name} belongs to no layer in the manifest")
    if not _equal(manifest.bits_per_weight * parameters, 8 * stored_bytes):
        problems.append(
            f"bits_per_weight: expected {8 * stored_bytes / max(parameters, 1):.4f}, "
            f"{stored_bytes} bytes for {parameters} parameters, got {manifest.bits_per_weight:.4f}"
        )
    return problems


def _layer_problem(layer: LayerRecord, tensors: Headers) -> str:
    """Return how a layer's record contradicts its tensors; "" if it does not."""
    expected = _shapes(layer)
    if expected and tensors.keys() != expected.keys():
        return f"expected {', '.join(sorted(expected))}, got {', '.join(tensors) or 'no tensor'}"
    shapes = {leaf: header.shape for leaf, header in tensors.items()}
    if shapes != expected or (layer.action != "keep" and tensors["weight"].dtype != "U32"):
        shown = ", ".join(f"{leaf} {list(shape)}" for leaf, shape in shapes.items())
        record = f"{layer.action}, shape {list(layer.shape)}, bits {layer.bits}"
        return f"{shown} do not match the manifest: {record}"
    nbytes = sum(header.nbytes for header in tensors.values())
    if nbytes != layer.nbytes:
        return f"nbytes: expected {nbytes}, got {layer.nbytes}"
    entries = math.prod(layer.shape)
    if not _equal(layer.bits_per_weight * entries, 8 * nbytes):
        expected_bits = 8 * nbytes / max(entries, 1)
        return f"bits_per_weight: expected {expected_bits:.4f}, got {layer.bits_per_weight:.4f}"
    return ""


def _shapes(layer: LayerRecord) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a layer's tensors by its record; empty if the record is invalid."""
    *rows, width = layer.shape or (0,)
    bits, group_size = layer.bits or 0, layer.group_size or 0
    clusters = (layer.clusters or 1) if layer.action == "split" else 1
    if layer.action == "keep":
        valid = bool(rows)
    elif layer.mode == "lut":
        valid = len(rows) == 1 and bits in OWN_LAYERS["lut"] and width % 32 == 0
    else:
        valid = bool(rows and bits and group_size and width * clusters * bits % 32 == 0)
        valid = valid and width * clusters % group_size == 0
    if not valid:
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
    config, expected = read_config(directory), config_tables(manifest.layers)
    return [
        f"{table} differs from the layers in the manifest"
        for table in TABLES
        if config.get(table) != expected.get(table)
    ]


def _forward(directory: Path, progress: Progress) -> list[str]:
    with progress.task("Running"):
        model = load_model(directory)
        try:
            logits = model(mx.array([[0, 1, 2, 3]]))
            finite = mx.all(mx.isfinite(logits)).item()
        except Exception as exc:  # mlx-lm's models may raise anything
            raise CheckpointError(f"the model does not run: {type(exc).__name__}: {exc}") from exc
    return [] if finite else ["the logits contain NaN or infinite values"]
