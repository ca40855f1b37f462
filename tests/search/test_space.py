"""Spaces: any setting by its name, and faults that name their path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from polylens.config import ProbeSettings, TrainSettings, changed, load_config
from polylens.errors import ConfigError, PolyLensError
from polylens.search import Choice, Range, read_space
from polylens.search.space import check_space

CONFIG = load_config(None, {"languages": "sw,zh"})


def test_the_space_that_ships_starts_from_the_default_settings() -> None:
    for config in (CONFIG, load_config(None, {"languages": "sw", "preset": "paper"})):
        space = read_space(config)
        start = space.start(config)
        assert changed(config, start) == config
        check_space(space, config, n_layers=4)
        assert space.boundary_layers(config, 32) == (28, 29, 30, 31)


@pytest.mark.parametrize("section", ["probe", "train"])
def test_every_setting_can_be_searched_by_its_name(section: str) -> None:
    """Those too that are added to the configuration later."""
    fields = {"probe": ProbeSettings, "train": TrainSettings}[section].model_fields
    for name in set(fields) - {"corpus"}:
        key = f"{section}.{name}"
        value = getattr(getattr(CONFIG, section), name)
        space = read_space(CONFIG, vary={key: [value]})
        assert space.start(CONFIG) == {key: value}


def test_ranges_are_whole_where_the_setting_is() -> None:
    vary: dict[str, Any] = {
        "train.epochs": {"low": 1, "high": 5},
        "train.align_weight": {"low": 0, "high": 2},
        "train.learning_rate": {"low": "1e-5", "high": 1e-3, "log": True},  # as YAML 1.1 reads 1e-5
        "train.layers": {"low": 1, "high": 3},
        "train.strength": {"low": 1, "high": 2},
    }
    dimensions = read_space(CONFIG, vary=vary).dimensions
    assert dimensions == {
        "train.epochs": Range(1, 5, whole=True),
        "train.align_weight": Range(0.0, 2.0),
        "train.learning_rate": Range(1e-5, 1e-3, log=True),
        "train.layers": Range(1, 3, whole=True),
        "train.strength": Range(1.0, 2.0),
    }
    space = read_space(CONFIG, vary=vary)
    assert space.boundary_layers(CONFIG, 8) == (5, 6, 7)
    assert read_space(CONFIG, vary=space.to_dict()) == space


def test_choices_keep_each_value_once() -> None:
    vary = {"train.layers": [2, [3, 1], 2, "2"], "probe.rank": [None, 1]}
    space = read_space(CONFIG, vary=vary)
    assert space.dimensions["train.layers"] == Choice((2, (3, 1)))
    assert space.dimensions["probe.rank"] == Choice((None, 1))
    assert space.boundary_layers(CONFIG, 8) == (1, 6)


def test_a_file_and_what_wins_over_it(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text("train.epochs: [1, 3]\ntrain.layers: [1, 2]\n")
    space = read_space(CONFIG, path, {"train.layers": [2, 4]})
    assert space.to_dict() == {"train.epochs": [1, 3], "train.layers": [2, 4]}


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ({"train.epoch": [1]}, "unknown key train.epoch, did you mean 'epochs'?"),
        ({"epochs": [1]}, "settings of probe and train, such as train.epochs, got epochs"),
        ({"gate.margin": [0.01]}, "settings of probe and train"),
        ({"train.corpus": ["a", "b"]}, "train.corpus cannot be searched"),
        ({"train.epochs": 3}, "train.epochs must be a list of values, or low and high"),
        ({"train.epochs": []}, "train.epochs must be a list of values"),
        ({"train.epochs": {"low": 1}}, "train.epochs must be a list of values, or low and high"),
        ({"train.epochs": {"low": 1, "high": 2, "step": 1}}, "train.epochs must be a list"),
        ({"train.epochs": {"low": 3, "high": 1}}, "train.epochs must have a low below its high"),
        ({"train.epochs": {"low": 0, "high": 3}}, "train.epochs: input should be greater"),
        ({"train.epochs": {"low": 1, "high": 2.5}}, "train.epochs: input should be a valid int"),
        ({"train.strength": {"low": "a", "high": 2}}, "train.strength must have numbers"),
        ({"train.strength": {"low": True, "high": 2}}, "train.strength must have numbers"),
        ({"train.align_weight": {"low": 0, "high": 2, "log": True}}, "train.align_weight must"),
        ({"train.position": ["last", "first"]}, "train.position: input should be 'last'"),
        ({"train.position": {"low": 1, "high": 2}}, "train.position: input should be 'last'"),
        ({"train.epoch": [1], "train.layers": [0]}, "'epochs'?; train.layers"),
    ],
)
def test_faults_name_their_path(vary: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_space(CONFIG, vary=vary)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ({"train.layers": [2, 9]}, "train.layers must be between 1 and 4"),
        ({"train.layers": [2, [7]]}, "train.layers must be layers between 0 and 3"),
        ({"probe.rank": [None, 3]}, "rank must be between 1 and 2 for 3 languages"),
    ],
)
def test_what_the_model_cannot_have_is_refused(vary: dict[str, Any], message: str) -> None:
    with pytest.raises(PolyLensError, match=message):
        check_space(read_space(CONFIG, vary=vary), CONFIG, n_layers=4)


def test_the_start_must_lie_within() -> None:
    space = read_space(CONFIG, vary={"train.epochs": [5, 6]})
    with pytest.raises(ConfigError, match=r"train.epochs is 3, outside \[5, 6\]"):
        space.start(CONFIG)
