"""Pushing to the Hub, up to the calls of its client."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi

from polylens import hub
from polylens.errors import DownloadError, UsageError


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """A user who is logged in; the client's two calls are noted instead of made."""
    made: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(hub, "get_token", lambda: "hf_token")

    def create_repo(self: HfApi, repo_id: str, **keywords: Any) -> None:
        made.append(("create_repo", {"repo_id": repo_id, **keywords}))

    def upload_folder(self: HfApi, **keywords: Any) -> SimpleNamespace:
        made.append(("upload_folder", keywords))
        return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return made


def test_the_folder_goes_up_to_a_private_repository(
    calls: list[tuple[str, dict[str, Any]]], tmp_path: Path
) -> None:
    assert hub.push_model(tmp_path, "me/better") == "https://hub/commit/1"
    (create, repository), (upload, commit) = calls
    assert (create, upload) == ("create_repo", "upload_folder")
    assert repository == {"repo_id": "me/better", "private": True, "exist_ok": True}
    assert commit["repo_id"] == "me/better"
    assert commit["folder_path"] == tmp_path


@pytest.mark.parametrize("repo_id", ["", "better", "a/b/c", "me/bet ter"])
def test_a_name_of_another_form(calls: list[Any], repo_id: str) -> None:
    with pytest.raises(UsageError, match="must look like user/name"):
        hub.check_target(repo_id)


def test_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(UsageError, match="needs a Hub token"):
        hub.check_target("me/better")


def test_a_refusal_keeps_the_model(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(self: HfApi, repo_id: str, **keywords: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(DownloadError, match=r"no route.*the model is safe in"):
        hub.push_model(tmp_path, "me/better")
