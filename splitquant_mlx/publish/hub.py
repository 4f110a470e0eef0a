"""Upload a checkpoint to the hub with huggingface_hub."""

from collections.abc import Sequence
from glob import escape
from pathlib import Path

from splitquant_mlx.errors import UploadError
from splitquant_mlx.formats.manifest import FILE_NAME, MODEL_FILE
from splitquant_mlx.models.hub import LOG_IN, answer_within, endpoint, explain
from splitquant_mlx.settings import settings

RESUME = "run `splitquant-mlx upload` to resume"


@settings
class Commit:
    """Settings of a commit to a repo.

    Attributes:
        private: make a new repo private.
        revision: branch to commit to; created if missing.
        create_pr: open a pull request instead of committing.
        overwrite: replace a model in the repo that this package did not make.

    Raises:
        UploadError: for a pull request to a branch.
    """

    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.create_pr and self.revision is not None:
            raise UploadError("a pull request targets the main branch: leave out --revision")


def check_name(repo: str) -> None:
    """Raise UploadError unless `repo` is a valid repo name, USER/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError
    except HFValidationError as exc:
        raise UploadError(f"expected a repo name USER/NAME, got {repo!r:.100}") from exc


def check_login(repo: str) -> None:
    """Check that the user is logged in with write access, before a long conversion.

    Raises:
        UploadError: when the name is invalid, no user is logged in, or the token is read-only.
    """
    from huggingface_hub import HfApi, constants

    check_name(repo)
    try:
        user = answer_within(constants.HF_HUB_ETAG_TIMEOUT, lambda: HfApi().whoami())
    except Exception as exc:
        raise _upload_error(exc, repo) from exc
    token = user.get("auth", {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise UploadError(f"{repo}: the token is read-only: {LOG_IN} with one that can write")


def send(path: Path, files: Sequence[str], repo: str, commit: Commit) -> str:
    """Upload files in one commit and return the address; creates the repo if missing.

    Args:
        path: directory of the files.
        files: names of the files in it to upload.
        repo: USER/NAME.
        commit: settings of the commit.

    Raises:
        UploadError: when the hub refuses or the connection is lost. The hub keeps large files
            uploaded so far; another call uploads only the others.
    """
    from huggingface_hub import HfApi

    api, revision = HfApi(), commit.revision
    try:
        # None: the default of the organization
        api.create_repo(repo, private=commit.private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        info = api.model_info(repo, revision=revision)
        existing = {file.rfilename for file in info.siblings or ()}
        weights = {name for name in existing if name.endswith(".safetensors") and "/" not in name}
        if weights and FILE_NAME not in existing and not commit.overwrite:
            raise UploadError(
                f"{repo} contains a model that splitquant-mlx did not make ({min(weights)}): "
                "choose another name, or replace it with `splitquant-mlx upload --overwrite`"
            )
        stale = (weights | (existing & {MODEL_FILE})).difference(files)
        result = api.upload_folder(
            repo_id=repo,
            folder_path=path,
            allow_patterns=[escape(name) for name in files],
            # mlx-lm loads every model*.safetensors, also those of an older conversion
            delete_patterns=[escape(name) for name in stale] or None,
            commit_message="Upload a model converted by splitquant-mlx",
            revision=revision,
            create_pr=commit.create_pr,
        )
    except UploadError:
        raise
    except Exception as exc:  # of huggingface_hub, its HTTP library or its storage client
        raise _upload_error(exc, repo) from exc
    return str(result.pr_url or f"{endpoint()}/{repo}")


def _upload_error(exc: BaseException, repo: str) -> UploadError:
    lost = f"{endpoint()} cannot be reached, or the connection was lost"
    return UploadError(f"{explain(exc, repo, otherwise=lost)}; {RESUME}")
