"""Files are whole or absent."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
import torch

from polylens.artefacts import (
    load_tensors,
    read_json,
    save_tensors,
    write_json,
    write_text,
    writing,
)
from polylens.errors import CorruptFileError, StorageError
from polylens.journal import Journal


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), writing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for content in ("one", "two"):
        with writing(path) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert os.listdir(path) == ["two"]
    assert os.listdir(tmp_path) == ["folder"]


def test_tensors_come_back_with_their_metadata(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    tensors = {"a": torch.randn(3, 2), "b": torch.arange(4), "c": torch.randn(2).bfloat16()}
    save_tensors(path, tensors, {"languages": ["zh", "sw"], "n": 3})
    loaded, metadata = load_tensors(path)
    assert metadata == {"languages": ["zh", "sw"], "n": 3}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert stat.S_IMODE(path.stat().st_mode) & 0o044  # others may read it, if the umask lets them


@pytest.mark.parametrize("position", [20, -3])
def test_a_changed_byte_is_noticed(tmp_path: Path, position: int) -> None:
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.randn(30)}, {"k": "v"})
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(CorruptFileError):
        load_tensors(path)


def test_a_missing_and_a_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="there is none"):
        load_tensors(tmp_path / "none.safetensors")
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(CorruptFileError, match="must hold JSON"):
        read_json(tmp_path / "x.json")


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="is full; free some space") as error:
        write_json(tmp_path / "x.json", {})
    assert error.value.exit_code == 1
    assert os.listdir(tmp_path) == []


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="in the way"):
        write_text(tmp_path / "file" / "x.txt", "")


def test_the_journal_forgets_a_line_that_was_cut_short(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    with journal.stage("probe") as noted:
        noted["tokens"] = 5
    with pytest.raises(ValueError, match="stop"), journal.stage("train"):
        raise ValueError("stop")
    with journal.path.open("a") as file:
        file.write('{"stage": "train", "seco')
    assert journal.finished("train") is None
    assert journal.finished("probe")["tokens"] == 5  # type: ignore[index]
    with journal.stage("train"):
        pass
    assert [entry["stage"] for entry in journal.entries()] == ["probe", "train"]
