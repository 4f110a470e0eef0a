"""Turn what the user typed after `--model` into a local directory or a GGUF file.

An existing path wins; any other name is a repo on the Hugging Face hub. One short request lists
the repo's files before anything else: a hub that does not answer is noticed in seconds, and a repo
that is missing or holds nothing to quantize is refused before gigabytes are downloaded. Downloads,
their cache, progress bars and log-in are those of huggingface_hub.
"""

import json
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from splitquant_mlx.errors import SourceError
from splitquant_mlx.models.hub import answer_within, explain

# Subfolders hold other formats (onnx, original) and training checkpoints, and `consolidated*` is a
# second copy of the same weights; pickles and Python files could run code, so none is fetched.
ALLOW = (
    "*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja",
    "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
IGNORE = ("*/*", "consolidated*")
WEIGHTS = "*.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pickle", ".pkl")
ABANDONED_S = 3600  # since a download wrote last


@dataclass(frozen=True, kw_only=True)
class Source:
    """Name a model and where it lies on this machine.

    Args:
        name: as given: a repo id or a path.
        path: a local directory, or a .gguf file.
        revision: commit hash of a hub repo; None for a local path.
    """

    name: str
    path: Path
    revision: str | None


def resolve(model: str, *, revision: str | None = None, timeout_s: float | None = None) -> Source:
    """Find `model` on this machine, else download it from the hub.

    Args:
        model: a directory, a .gguf file or a hub repo id such as `org/name`.
        revision: branch, tag or commit hash of a hub repo; None is its main branch.
        timeout_s: how long the hub may take to answer; None is `HF_HUB_ETAG_TIMEOUT`, 10 s by
            default. A hub that cannot be reached is no error while its cache holds the repo.

    Raises:
        SourceError: there is no such path or repo, or it cannot be fetched.
    """
    path = _local(model)
    if path is None:
        return _from_hub(model, revision, timeout_s)
    if revision is not None:
        raise SourceError(f"{model} is a local path: a revision ({revision}) is for hub repos only")
    return Source(name=model, path=path, revision=None)


def cached(repo: str, *, revision: str | None = None) -> Source | None:
    """Find a complete copy of `repo` in the hub's cache, without any network; None without one."""
    try:
        source = _snapshot(repo, revision, local_files_only=True)
        _check_snapshot(source)
    except (OSError, SourceError):
        return None
    return source


def _local(model: str) -> Path | None:
    if not model.strip():
        raise SourceError("the model's name is empty: give a directory, a .gguf file or a repo id")
    try:
        path = Path(model).expanduser()
        exists = path.exists()
    except OSError as exc:
        raise SourceError(f"cannot open {model!r}: {exc.strerror}") from exc
    except (ValueError, RuntimeError) as exc:
        raise SourceError(f"cannot open {model!r}: {exc}") from exc
    if exists:
        if path.is_dir() or path.suffix.lower() == ".gguf":
            return path
        raise SourceError(f"{model} is a file: give the model's directory, or a .gguf file")
    if re.match(r"https?://", model):
        raise SourceError(f"{model} is an address: give the repo id alone, such as org/name")
    if model.startswith((".", "/", "~")) or model.endswith((".gguf", ".safetensors")):
        raise SourceError(f"no such path: {model!r}")
    if model.count("/") > 1 or "\\" in model:
        raise SourceError(f"no such path: {model!r} (a repo id has one slash at most)")
    return None


def _from_hub(repo: str, revision: str | None, timeout_s: float | None) -> Source:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, RevisionNotFoundError

    limit_s = timeout_s or constants.HF_HUB_ETAG_TIMEOUT
    # The exceptions of the hub client, its HTTP library (which changed between its releases) and
    # its storage client share no root, hence `Exception`.
    try:
        info = answer_within(
            limit_s, lambda: HfApi().model_info(repo, revision=revision, timeout=limit_s)
        )
    except (HFValidationError, RevisionNotFoundError) as exc:
        raise SourceError(explain(exc, repo, revision=revision)) from exc
    except Exception as exc:
        if found := cached(repo, revision=revision):
            return found
        raise SourceError(explain(exc, repo, revision=revision)) from exc
    _check_files(repo, [file.rfilename for file in info.siblings or ()])
    try:
        # the weights last: where they all are, a download that was killed had got all the rest
        companions = _snapshot(repo, revision, ignore=WEIGHTS)
        source = _snapshot(repo, companions.revision)
    except Exception as exc:
        broken = "the download broke off; the same command carries on with the files it lacks"
        raise SourceError(explain(exc, repo, revision=revision, otherwise=broken)) from exc
    _check_snapshot(source)
    _remove_abandoned(source.path.parents[1] / "blobs")
    return source


def _remove_abandoned(blobs: Path) -> None:
    """Remove what killed downloads left: newer clients of the hub never use it again."""
    for file in blobs.glob("*.incomplete"):
        with suppress(OSError):
            if time.time() - file.stat().st_mtime > ABANDONED_S:
                file.unlink()


def _snapshot(
    repo: str, revision: str | None, *, ignore: str | None = None, local_files_only: bool = False
) -> Source:
    from huggingface_hub import constants, snapshot_download

    path = snapshot_download(
        repo,
        revision=revision,
        etag_timeout=constants.HF_HUB_ETAG_TIMEOUT,
        allow_patterns=list(ALLOW),
        ignore_patterns=[*IGNORE, *([ignore] if ignore else [])],
        local_files_only=local_files_only,
    )
    # The cache's layout is <repo>/snapshots/<commit hash>.
    return Source(name=repo, path=Path(path), revision=Path(path).name)


def _check_files(repo: str, names: Iterable[str]) -> None:
    """Refuse a repo with nothing to quantize. Raises SourceError."""
    top = sorted(name for name in names if "/" not in name)
    if not any(name.endswith(".safetensors") for name in top):
        if ggufs := [name for name in top if name.endswith(".gguf")]:
            raise SourceError(
                f"{repo} holds GGUF files only ({_some(ggufs)}): download one and give its path"
            )
        if pickles := [name for name in top if name.endswith(PICKLES)]:
            raise SourceError(
                f"{repo} holds pickled weights only ({_some(pickles)}), which can run code when "
                "loaded: choose a repo with .safetensors files"
            )
        raise SourceError(f"{repo} holds no weights: there is no .safetensors file at its top")
    if "config.json" not in top:
        raise SourceError(
            f"{repo} has no config.json: it is not a whole language model (an adapter, a pipeline)"
        )


def _check_snapshot(source: Source) -> None:
    """Refuse a snapshot that lacks a file, as a broken download leaves it. Raises SourceError."""
    names = {path.name for path in source.path.iterdir() if path.exists()}
    _check_files(source.name, names)
    if "model.safetensors.index.json" in names:
        try:
            text = (source.path / "model.safetensors.index.json").read_text(encoding="utf-8")
            shards = {str(name) for name in json.loads(text)["weight_map"].values()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as exc:
            raise SourceError(f"{source.name}: its model.safetensors.index.json is broken") from exc
        if missing := sorted(shards - names):
            raise SourceError(f"{source.name} lacks files that its index names: {_some(missing)}")


def _some(names: list[str]) -> str:
    """Join the first few names."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
