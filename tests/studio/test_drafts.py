"""A form becomes the configuration it shows, or one sentence that says what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polylens.config import PRESETS, RunConfig, load_config
from polylens.errors import ConfigError, PolyLensError, UsageError
from polylens.studio.drafts import FIELDS, compose, cost_rows, preset_values
from polylens.studio.folders import Folders


def fill(folders: Folders, changed: dict[str, Any] | None = None, **changes: Any) -> RunConfig:
    shown = dict(zip((one.key for one in FIELDS), preset_values("default"), strict=True))
    form = {
        "model": "smollm2-135m-instruct",
        "languages": "Swahili, es",
        "central": "en",
        "corpus": "starter",
        "preset": "default",
        "values": list({**shown, **(changed or {})}.values()),
        **changes,
    }
    return compose(folders, **form)


@pytest.fixture
def folders(tmp_path: Path, tiny_folder: Path) -> Folders:
    return Folders(tmp_path / "runs", tiny_folder.parent)


@pytest.mark.parametrize("preset", PRESETS)
def test_an_untouched_form_is_its_preset(folders: Folders, preset: str) -> None:
    config = fill(folders, preset=preset, values=preset_values(preset))
    assert config == load_config(None, {"languages": "sw,es", "preset": preset})


def test_what_is_left_empty_is_the_presets(folders: Folders) -> None:
    config = fill(folders, values=[None if one.kind != "text" else "" for one in FIELDS])
    assert config == load_config(None, {"languages": "sw,es"})


def test_what_is_filled_in_is_used(folders: Folders) -> None:
    config = fill(folders, {"train.rows": 8, "train.strength": "auto", "train.learning_rate": 1e-3})
    assert (config.train.rows, config.train.strength) == (8, "auto")
    assert config.train.learning_rate == 1e-3
    assert fill(folders, {"train.strength": "0.5"}).train.strength == 0.5


@pytest.mark.parametrize(
    ("values", "changes", "said"),
    [
        (
            {"train.epochs": 0},
            {},
            "train.epochs: input should be greater than or equal to 1, got 0",
        ),
        ({"train.strength": "much"}, {}, "train.strength"),
        ({}, {"languages": "swahilli"}, "did you mean 'swahili'"),
        ({}, {"languages": ""}, "languages"),
        ({}, {"languages": "en"}, "must differ from the central language"),
        ({}, {"preset": "papr"}, "preset must be one of default, paper"),
    ],
)
def test_faults_are_said_in_a_sentence(
    folders: Folders, values: Any, changes: Any, said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        fill(folders, values, **changes)
    assert "\n" not in str(caught.value)


def test_all_faults_are_said_at_once(folders: Folders) -> None:
    with pytest.raises(ConfigError, match=r"train\.epochs.*evaluate\.max_new_tokens"):
        fill(folders, {"train.epochs": 0, "evaluate.max_new_tokens": 0})


def test_models_and_corpora_come_from_the_folders(folders: Folders, tiny_folder: Path) -> None:
    assert fill(folders, model="tiny").model == str(tiny_folder.resolve())
    with pytest.raises(UsageError):
        fill(folders, model=str(tiny_folder.parent.parent))
    with pytest.raises(UsageError):
        fill(folders, corpus="/etc/passwd")


def test_the_forecast_reads_the_model_and_counts(folders: Folders) -> None:
    rows = dict(cost_rows(fill(folders, {"train.rows": 4}, model="tiny")))
    assert rows["model"].startswith("tiny, ")
    assert "TFLOP" in rows["probing, training"]
    with pytest.raises(PolyLensError, match=r"train\.layers|layers"):
        cost_rows(fill(folders, {"train.layers": 99}, model="tiny"))
