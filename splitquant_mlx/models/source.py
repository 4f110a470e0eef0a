"""Resolve a model argument to a local directory or GGUF file.

An existing path takes precedence; any other name is a repo on the Hugging Face hub. A short request
lists the repo's files first, so that an unreachable hub is reported within seconds, and a missing
or unusable repo is refused before gigabytes are downloaded. Downloads, cache, progress bars and
log-in are those of huggingface_hub.
"""

import re
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import Any

from splitquant_mlx.errors import CheckpointError, SourceError, abbreviate
from splitquant_mlx.models.hub import answer_within, endpoint, explain
from splitquant_mlx.models.shards import INDEX, PICKLES, SUFFIX, read_index, shard_names

# Subfolders hold other formats (onnx, original) and training checkpoints, and `consolidated*` is a
# second copy of the same weights; pickles and Python files could run code, so none is fetched.
FETCHED = (
    "*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja",
    "README.md", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
TEMPLATES = "additional_chat_templates/*.jinja"
COMMIT = re.compile(r"[0-9a-f]{7,40}")
ABANDONED_S = 3600  # age of an unfinished download's last change


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model on this machine.

    Args:
        name: repo id or path, as passed by the user.
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
        timeout_s: time limit of the hub's answer; None is `HF_HUB_ETAG_TIMEOUT`, 10 s by default.
            An unreachable hub is not an error if its cache has the repo.

    Raises:
        SourceError: there is no such path or repo, or it cannot be fetched.
    """
    path = _local(model)
    if path is None:
        return _from_hub(model, revision, timeout_s)
    if revision is not None:
        raise SourceError(f"{model} is a local path: a revision ({revision}) is for hub repos only")
    return Source(name=model, path=path, revision=None)


def fetch_files(source: Source, names: Iterable[str]) -> None:
    """Download files of a hub repo that `resolve` does not; names that it lacks are skipped.

    Raises:
        SourceError: they cannot be fetched.
    """
    repo, revision = source.name, source.revision
    missing = [name for name in names if not (source.path / name).is_file()]
    if revision is None or not missing:
        return
    try:
        _ask_hub(repo, revision)  # if it cannot be reached, `_fetch` returns the cache
        _fetch(repo, revision, missing)
    except Exception as exc:
        otherwise = f"not in the cache, and {endpoint()} cannot be reached"
        raise SourceError(explain(exc, repo, revision=revision, otherwise=otherwise)) from exc


def cached(repo: str, *, revision: str | None = None) -> Source | None:
    """Return the copy of `repo` in the hub's cache, or None.

    Any program may have downloaded it: only config.json and all weights are required.
    """
    from huggingface_hub import try_to_load_from_cache

    commits = [commit for commit in _cached_commits(repo) if commit.startswith(revision or "/")]
    if len(commits) == 1 and COMMIT.fullmatch(revision or ""):
        revision = commits[0]
    try:
        config = try_to_load_from_cache(repo, "config.json", revision=revision)
        if not isinstance(config, str):
            return None
        path = Path(config).parent
        source = Source(name=repo, path=path, revision=path.name)
        _check_snapshot(source)
    except (OSError, ValueError, SourceError):
        return None
    return source


def _cached_commits(repo: str) -> list[str]:
    """Return the hashes of the commits that have files in the hub's cache."""
    from huggingface_hub import constants

    try:
        folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots"
        return sorted(path.name for path in folder.iterdir())
    except (OSError, ValueError):
        return []


def _local(model: str) -> Path | None:
    if not model.strip():
        raise SourceError("the model's name is empty: pass a directory, a .gguf file or a repo id")
    try:
        model.encode()  # mlx requires UTF-8 paths
        path = Path(model).expanduser()
        exists = path.exists()
    except OSError as exc:
        raise SourceError(f"cannot open {model!r}: {exc.strerror}") from exc
    except (ValueError, RuntimeError) as exc:
        raise SourceError(f"cannot open {model!a}: {exc}") from exc
    if exists:
        if path.is_dir() or path.suffix.lower() == ".gguf":
            return path
        raise SourceError(f"{model} is a file: pass the model's directory, or a .gguf file")
    if re.match(r"https?://", model):
        raise SourceError(f"{model} is a URL: pass only the repo id, such as org/name")
    if model.startswith((".", "/", "~")) or model.endswith((".gguf", ".safetensors")):
        raise SourceError(f"no such path: {model!r}")
    if model.count("/") > 1 or "\\" in model:
        raise SourceError(f"no such path: {model!r} (a repo id has one slash at most)")
    return None


def _ask_hub(repo: str, revision: str | None, timeout_s: float | None = None) -> Any:
    """Return the hub's description of a repo, within seconds."""
    from huggingface_hub import HfApi, constants

    limit_s = timeout_s or constants.HF_HUB_ETAG_TIMEOUT
    return answer_within(
        limit_s, lambda: HfApi().model_info(repo, revision=revision, timeout=limit_s)
    )


def _from_hub(repo: str, revision: str | None, timeout_s: float | None) -> Source:
    from huggingface_hub.errors import HFValidationError, RevisionNotFoundError

    # `Exception`, since errors of the hub client, its HTTP library (which depends on its version)
    # and its storage client share no other base class
    try:
        info = _ask_hub(repo, revision, timeout_s)
    except (HFValidationError, RevisionNotFoundError) as exc:
        raise SourceError(explain(exc, repo, revision=revision)) from exc
    except Exception as exc:
        if snapshot := cached(repo, revision=revision):
            return snapshot
        otherwise = None
        if revision is None and (commits := _cached_commits(repo)):
            only = f"the cache has no branch of it, only commit {abbreviate(commits)}"
            otherwise = f"{only}: pass one as --revision; {endpoint()} cannot be reached"
        message = explain(exc, repo, revision=revision, otherwise=otherwise)
        raise SourceError(message) from exc
    names = [file.rfilename for file in info.siblings or ()]
    _check_files(repo, names)
    files = [name for name in names if _is_fetched(name)]
    try:
        # weights last, so that a snapshot with all weights is complete
        commit = _fetch(repo, revision, [name for name in files if not name.endswith(SUFFIX)]).name
        path = _fetch(repo, commit, files)
    except Exception as exc:
        broken = "the download was interrupted; run the command again to resume it"
        raise SourceError(explain(exc, repo, revision=revision, otherwise=broken)) from exc
    source = Source(name=repo, path=path, revision=commit)
    _check_snapshot(source)
    _remove_abandoned(path.parents[1] / "blobs")
    return source


def _is_fetched(name: str) -> bool:
    if "/" in name:
        return fnmatchcase(name, TEMPLATES)
    fetched = any(fnmatchcase(name, pattern) for pattern in FETCHED)
    return fetched and not name.startswith("consolidated")


def _remove_abandoned(blobs: Path) -> None:
    """Remove files of killed downloads, which newer hub clients never reuse."""
    for file in blobs.glob("*.incomplete"):
        with suppress(OSError):
            if time.time() - file.stat().st_mtime > ABANDONED_S:
                file.unlink()


def _fetch(repo: str, revision: str | None, files: list[str]) -> Path:
    """Download files of a repo; return <cache>/<repo>/snapshots/<commit hash>."""
    from huggingface_hub import constants, snapshot_download

    path = snapshot_download(
        repo,
        revision=revision,
        etag_timeout=constants.HF_HUB_ETAG_TIMEOUT,
        allow_patterns=[escape(name) for name in files],
    )
    return Path(path)


def _check_files(repo: str, names: Iterable[str]) -> None:
    """Raise SourceError for a repo without a usable model."""
    top = sorted(name for name in names if "/" not in name)
    if not any(name.endswith(".safetensors") for name in top):
        if ggufs := [name for name in top if name.endswith(".gguf")]:
            raise SourceError(
                f"{repo} has only GGUF files ({abbreviate(ggufs)}): download one and pass its path"
            )
        if pickles := [name for name in top if name.endswith(PICKLES)]:
            raise SourceError(
                f"{repo} has only pickled weights ({abbreviate(pickles)}), which can run code when "
                "loaded: choose a repo with .safetensors files"
            )
        raise SourceError(f"{repo} has no weights: there is no .safetensors file at its top level")
    if "config.json" not in top:
        raise SourceError(
            f"{repo} has no config.json: it is not a complete language model, but an adapter or a "
            "pipeline"
        )


def _check_snapshot(source: Source) -> None:
    """Raise SourceError for an incomplete snapshot of an interrupted download."""
    names = {path.name for path in source.path.iterdir() if path.exists()}
    _check_files(source.name, names)
    try:
        indexed = set(read_index(source.path).values())
    except CheckpointError as exc:
        raise SourceError(f"{source.name}: its {INDEX} is corrupt") from exc
    existing = {name for name in names if name.endswith(SUFFIX)}
    if missing := shard_names(existing, indexed) - existing:
        raise SourceError(f"{source.name} lacks weight files: {abbreviate(missing)}")
