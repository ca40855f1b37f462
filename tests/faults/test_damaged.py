"""A finished run of which a file was damaged: every command notices, or the damage is undone."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from small_run import contents, run

from polylens.crown import CrownDelta
from polylens.errors import PolyLensError
from polylens.evaluation.sides import choose_sides
from polylens.models import load_model
from polylens.report import read_report_data, render_report
from polylens.run_folder import RunFolder
from polylens.subspaces import Subspaces

# What no command can know to be damaged: the text as the user gave it, the card that is theirs to
# edit, the report, which is written again at will, an empty file, and of plan.json what a run does
# not compare with what is there now.
FREE = ("run.yaml", "model/README.md", ".lock", "plan.json", "report.html")


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A finished run to damage."""
    return shutil.copytree(finished, tmp_path / "run")


def damages(path: Path, seed: str) -> list[bytes]:
    """The contents of a file, cut short and with a bit flipped, at places drawn by a seed."""
    content = path.read_bytes()
    if not content:
        return []
    draw = random.Random(seed)
    flipped = bytearray(content)
    flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return [content[: draw.randrange(len(content))], bytes(flipped), b""]


def test_damage_to_any_file_is_noticed(finished: Path, tiny_folder: Path, copy: Path) -> None:
    expected = contents(finished)
    n_noticed = 0
    for name in [*expected, "journal.jsonl"]:
        path = copy / name
        whole = path.read_bytes()
        for content in damages(path, name):
            path.write_bytes(content)
            told = None
            try:
                run(tiny_folder, copy)
            except PolyLensError as error:
                told = str(error)
            if told is not None:
                assert "\n" not in told
                n_noticed += 1
            else:
                assert name in FREE or contents(copy) == expected, f"{name} is damaged, unnoticed"
            for done in copy.rglob("*"):  # made again, perhaps
                if done.is_file():
                    shutil.copy(finished / done.relative_to(copy), done)
            assert path.read_bytes() == whole
    assert n_noticed > 60


def test_what_is_damaged_is_made_again_when_it_is_deleted(
    finished: Path, tiny_folder: Path, copy: Path
) -> None:
    for name in ("delta.safetensors", "gate.json", "evaluation/after.jsonl", "model"):
        path = copy / name
        damaged = path / "model.safetensors" if path.is_dir() else path
        damaged.write_bytes(damages(damaged, name)[1])
        with pytest.raises(PolyLensError, match=f"delete .*{name} to have it made again"):
            run(tiny_folder, copy)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert len(run(tiny_folder, copy)) == 1
        assert contents(copy) == contents(finished)


def test_an_edited_card_stays(finished: Path, tiny_folder: Path, copy: Path) -> None:
    card = copy / "model" / "README.md"
    card.write_text("My own words.")
    assert run(tiny_folder, copy) == ()
    assert card.read_text() == "My own words."


def test_reports_exports_and_steering_notice_damage(
    finished: Path, tiny_folder: Path, copy: Path
) -> None:
    model = load_model(tiny_folder, device="cpu")

    def report() -> None:
        render_report(read_report_data(RunFolder(copy)))

    def evaluate_or_export() -> None:
        for side in choose_sides(str(copy), None, None):
            if side.delta is not None:
                CrownDelta.load(side.delta, fingerprint=model.fingerprint)

    def steer() -> None:
        Subspaces.load(copy / "subspaces.safetensors", fingerprint=model.fingerprint)

    read_by = {
        "summary.json": report,
        "before.jsonl": report,
        "after.jsonl": report,
        "states.safetensors": report,
        "gate.json": evaluate_or_export,
        "delta.safetensors": evaluate_or_export,
        "subspaces.safetensors": steer,
    }
    for use in (report, evaluate_or_export, steer):
        use()
    for name, use in read_by.items():
        (path,) = copy.rglob(name)
        whole = path.read_bytes()
        for content in damages(path, name):
            path.write_bytes(content)
            with pytest.raises(PolyLensError):
                use()
        path.write_bytes(whole)


def test_text_of_plan_json_of_another_layout(copy: Path, tiny_folder: Path) -> None:
    for values in ([], {}, {"model": 5, "template": None, "corpora": []}):
        (copy / "plan.json").write_text(json.dumps(values))
        (copy / "report.html").unlink(missing_ok=True)
        with pytest.raises(PolyLensError):
            run(tiny_folder, copy)
        with pytest.raises(PolyLensError):
            render_report(read_report_data(RunFolder(copy)))
