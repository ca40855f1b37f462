"""Nothing outside the chosen folders can be named, whatever a browser sends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polylens.config import dump_yaml, load_config
from polylens.errors import PolyLensError, RunError, UsageError
from polylens.run_folder import RunFolder
from polylens.studio.folders import Folders

LEADING_OUT = [
    "..",
    ".",
    "",
    "../secret",
    "../runs2",
    "first/../../secret",
    "first/../first",
    "/etc",
    "/etc/passwd",
    "~",
    "~root",
    "first\x00",
    "first\n",
    "..\\secret",
    "%2e%2e/secret",
    ".studio",
    "link",
    "loop",
    "x" * 65,
    "ｆｉｒｓｔ",
]


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    """A run, a model and a corpus, each with a neighbour outside and a link to it."""
    for outside in ("secret", "runs2"):
        (tmp_path / outside).mkdir()
        for name in ("resolved.yaml", "config.json", "text.jsonl"):
            (tmp_path / outside / name).write_text("{}")
    for inside in ("runs/first", "models/family/good", "data"):
        (tmp_path / inside).mkdir(parents=True)
    (tmp_path / "runs/first/resolved.yaml").write_text("{}")
    (tmp_path / "models/family/good/config.json").write_text("{}")
    (tmp_path / "models/small.gguf").write_text("GGUF")
    (tmp_path / "data/own.jsonl").write_text("{}")
    (tmp_path / "runs/.studio").mkdir()
    for root in ("runs", "models", "data"):
        (tmp_path / root / "link").symlink_to(tmp_path / "secret")
        (tmp_path / root / "loop").symlink_to("loop")
    (tmp_path / "data/link.jsonl").symlink_to(tmp_path / "secret/text.jsonl")
    return Folders(tmp_path / "runs", tmp_path / "models", tmp_path / "data")


def test_what_is_offered_is_what_lies_inside(folders: Folders) -> None:
    assert folders.runs_there() == ["first"]
    assert folders.models_there()[-2:] == ["family/good", "small.gguf"]
    assert folders.corpora_there() == ["starter", "own.jsonl"]
    assert folders.run("first").path == folders.runs / "first"
    assert Path(folders.model("family/good")).name == "good"
    assert folders.model("smollm2-135m-instruct") == "smollm2-135m-instruct"
    assert Path(folders.corpus("own.jsonl")).name == "own.jsonl"
    assert folders.corpus("starter") == "starter"


@pytest.mark.parametrize("name", LEADING_OUT)
def test_no_name_leads_out(folders: Folders, name: str) -> None:
    for find in (folders.run, folders.new_run, folders.model, folders.corpus):
        with pytest.raises(UsageError):
            find(name)


@given(
    st.lists(st.sampled_from(["..", ".", "/", "first", "link", "family", "good", "own.jsonl"]))
    | st.lists(st.characters(), max_size=12)
)
def test_whatever_is_found_is_inside(tmp_path_factory: pytest.TempPathFactory, parts: Any) -> None:
    folders = Folders(*(tmp_path_factory.getbasetemp() / one for one in ("r", "m", "d")))
    for root, below in zip(
        (folders.runs, folders.models, folders.data), ("first", "family/good", "x"), strict=True
    ):
        assert root is not None
        (root / below).mkdir(parents=True, exist_ok=True)
        if not (root / "link").is_symlink():
            (root / "link").symlink_to("/etc")
    for name in ("/".join(parts), "".join(parts)):
        for root, find in (
            (folders.runs, lambda name: folders.run(name).path),
            (folders.runs, folders.new_run),
            (folders.models, folders.model),
            (folders.data, folders.corpus),
        ):
            try:
                found = Path(find(name))
            except PolyLensError:
                continue
            assert root is not None
            assert found.resolve().is_relative_to(root.resolve())
            assert found.resolve() != root.resolve()


def test_links_out_within_a_run_or_a_model_are_refused(folders: Folders, tmp_path: Path) -> None:
    assert folders.models is not None
    (folders.runs / "first/report.html").symlink_to(tmp_path / "secret/text.jsonl")
    (folders.models / "family/good/tokenizer.json").symlink_to(tmp_path / "secret/text.jsonl")
    with pytest.raises(UsageError, match=r"report\.html is a link out of it"):
        folders.run("first")
    with pytest.raises(UsageError, match=r"tokenizer\.json is a link out of it"):
        folders.model("family/good")


def test_links_within_the_models_are_followed(folders: Folders) -> None:
    assert folders.models is not None
    (folders.models / "blob").write_text("{}")
    (folders.models / "family/good/tokenizer.json").symlink_to("../../blob")
    assert folders.model("family/good")


def test_without_folders_only_what_ships_is_offered(tmp_path: Path) -> None:
    folders = Folders(tmp_path / "none")
    assert folders.runs_there() == []
    assert "smollm2-135m-instruct" in folders.models_there()
    assert folders.corpora_there() == ["starter"]
    with pytest.raises(UsageError, match="--models"):
        folders.model("own")
    with pytest.raises(UsageError, match="--data"):
        folders.corpus("own.jsonl")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", "secret"),
        ("model", "owner/name"),
        ("model", "models/../secret"),
        ("template", "secret/text.jsonl"),
        ("probe.corpus", "/etc/passwd"),
        ("train.corpus", "secret/text.jsonl"),
        ("evaluate.corpus", "secret/text.jsonl"),
        ("evaluate.texts", "secret/text.jsonl"),
        ("evaluate.data_dir", "secret"),
        ("train.corpus", "data/missing.jsonl"),
    ],
)
def test_a_run_that_reads_elsewhere_is_refused(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, key: str, value: str
) -> None:
    monkeypatch.chdir(folders.runs.parent)
    folder = RunFolder(folders.runs / "first")
    folder.resolved.write_text(dump_yaml(load_config(None, {"languages": "sw"})))
    assert folders.config(folder).languages == ("sw",)
    folder.resolved.write_text(dump_yaml(load_config(None, {"languages": "sw", key: value})))
    with pytest.raises(RunError, match=key):
        folders.config(folder)


def test_a_run_of_what_is_offered_is_not(folders: Folders) -> None:
    settings = {
        "languages": "sw",
        "model": folders.model("family/good"),
        "train.corpus": folders.corpus("own.jsonl"),
    }
    folders.check(load_config(None, settings))
