"""Publishing a merged model on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from polylens.errors import DownloadError, UsageError


def check_target(repo_id: str) -> None:
    """Find what would refuse a push before hours of work: the form of the name, a missing token.

    Raises:
        UsageError: the name is not of the form user/name, or nobody is logged in.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"a Hub id must look like user/name, got {repo_id!r} ({error})") from error
    if repo_id.count("/") != 1:
        raise UsageError(f"a Hub id must look like user/name, got {repo_id!r}; add the user")
    if get_token() is None:
        raise UsageError(
            f"pushing to {repo_id} needs a Hub token, but there is none; run `hf auth login` "
            "or set HF_TOKEN"
        )


def push_model(folder: Path, repo_id: str) -> str:
    """Upload a model folder in one commit; a repository that is not there is made, private.

    Args:
        folder: a folder that `save_model` wrote.
        repo_id: user/name.

    Returns:
        Address of the commit.

    Raises:
        UsageError: see `check_target`.
        DownloadError: the Hub cannot be reached or refuses.
    """
    check_target(repo_id)
    api = HfApi()
    try:
        api.create_repo(repo_id, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message="Add a model enhanced by PolyLens"
        )
    except Exception as error:  # the client's own errors and those of the network below it
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DownloadError(
            f"{repo_id} must accept the model, but the Hub does not ({reason}); the model is safe "
            f"in {folder}, run the same command to push it again"
        ) from error
    return str(commit.commit_url)
