"""Send a checkpoint to the hub. Requests, retries, bars and the token are huggingface_hub's."""

from collections.abc import Sequence
from glob import escape
from pathlib import Path

from splitquant_mlx.errors import UploadError
from splitquant_mlx.formats.manifest import FILE_NAME, MODEL_FILE
from splitquant_mlx.models.hub import LOG_IN, answer_within, endpoint, explain
from splitquant_mlx.settings import settings

AGAIN = "`splitquant-mlx upload` goes on from there"


@settings
class Commit:
    """How files are put in a repo.

    Attributes:
        private: make a new repo private.
        revision: branch to commit to; created if there is none.
        create_pr: open a pull request instead of committing.
        overwrite: replace a model of another origin in the repo.

    Raises:
        UploadError: for a pull request to a branch.
    """

    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.create_pr and self.revision is not None:
            raise UploadError("a pull request is always for the main branch: give no --revision")


def check_name(repo: str) -> None:
    """Raise UploadError unless `repo` is a name that a repo can have, USER/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as exc:
        raise UploadError(f"expected a repo name USER/NAME, got {repo!r:.100}") from exc
    if repo.count("/") != 1:
        raise UploadError(f"expected a repo name USER/NAME, got {repo!r:.100}")


def check_login(repo: str) -> None:
    """Ask the hub who the user is, so that nobody converts for an hour and is refused then.

    Raises:
        UploadError: when the name is no repo's, nobody is logged in, or the token only reads.
    """
    from huggingface_hub import HfApi, constants

    check_name(repo)
    try:
        user = answer_within(constants.HF_HUB_ETAG_TIMEOUT, lambda: HfApi().whoami())
    except Exception as exc:
        raise _upload_error(exc, repo) from exc
    token = user.get("auth", {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise UploadError(f"{repo}: the token may only read: {LOG_IN} with one that may write")


def send(path: Path, files: Sequence[str], repo: str, commit: Commit) -> str:
    """Make the repo if there is none and put the files there, in one commit; returns its address.

    Args:
        path: the directory.
        files: names of the files in it to send.
        repo: USER/NAME.
        commit: how they are put there.

    Raises:
        UploadError: when the hub refuses or is lost. Large files that it has by then it keeps: a
            second call sends only the rest.
    """
    from huggingface_hub import HfApi

    api, revision = HfApi(), commit.revision
    try:
        # None leaves it to the organization whether its new repos are private
        api.create_repo(repo, private=commit.private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        there = {file.rfilename for file in api.model_info(repo, revision=revision).siblings or ()}
        weights = {name for name in there if name.endswith(".safetensors") and "/" not in name}
        if weights and FILE_NAME not in there and not commit.overwrite:
            raise UploadError(
                f"{repo} holds a model that splitquant-mlx did not make ({min(weights)}): choose "
                "another name, or replace it with `splitquant-mlx upload --overwrite`"
            )
        stale = (weights | (there & {MODEL_FILE})).difference(files)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=path,
            allow_patterns=[escape(name) for name in files],
            # mlx-lm loads every model*.safetensors, those of an older conversion too
            delete_patterns=[escape(name) for name in stale] or None,
            commit_message="Upload a model converted by splitquant-mlx",
            revision=revision,
            create_pr=commit.create_pr,
        )
    except UploadError:
        raise
    except Exception as exc:  # of the hub client, its HTTP library and its storage client
        raise _upload_error(exc, repo) from exc
    return str(done.pr_url or f"{endpoint()}/{repo}")


def _upload_error(exc: BaseException, repo: str) -> UploadError:
    lost = f"{endpoint()} cannot be reached, or was lost"
    return UploadError(f"{explain(exc, repo, otherwise=lost)}; {AGAIN}")
