"""Downloads hold what the run's folder holds, byte for byte."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from polylens.errors import UsageError
from polylens.run_folder import RunFolder
from polylens.studio.downloads import download, offered


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / ("r" * 64))
    folder.model.mkdir(parents=True)
    (folder.model / "empty").write_bytes(b"")
    (folder.model / "block").write_bytes(b"x" * 512)
    (folder.model / ("n" * 120)).write_bytes(b"long name")
    (folder.model / "deeper").mkdir()
    (folder.model / "deeper" / "weights").write_bytes(bytes(range(256)) * 10_000)
    folder.report.write_text("<!doctype html>")
    return folder


def test_an_archive_unpacks_to_the_model(folder: RunFolder) -> None:
    found = download(folder, "model")
    content = b"".join(found.content)
    assert len(content) == found.n_bytes
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = archive.getmembers()
        name = folder.path.name
        unpacked = {
            member.name.removeprefix(f"{name}/"): archive.extractfile(member).read()  # type: ignore[union-attr]
            for member in members
        }
        assert all(member.name.startswith(f"{name}/") and member.isreg() for member in members)
    wanted = {
        path.relative_to(folder.model).as_posix(): path.read_bytes()
        for path in folder.model.rglob("*")
        if path.is_file()
    }
    assert unpacked == wanted


def test_only_what_is_there_is_offered(folder: RunFolder) -> None:
    assert offered(folder) == ["report", "model"]
    folder.delta.write_bytes(b"delta")
    assert offered(folder) == ["report", "delta", "model"]
    found = download(folder, "delta")
    assert b"".join(found.content) == b"delta"
    assert found.n_bytes == 5
    assert download(folder, "report").file_name is None  # it is shown


@pytest.mark.parametrize("what", ["delta", "journal", "../report", "", "resolved.yaml"])
def test_nothing_else_is(folder: RunFolder, what: str) -> None:
    with pytest.raises(UsageError, match="report, model"):
        download(folder, what)
