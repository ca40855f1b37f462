"""Configuration: precedence, presets, and faults that name their place."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from polylens.config import (
    PRESETS,
    RunConfig,
    Runtime,
    TrainSettings,
    check,
    dump_yaml,
    load_config,
)
from polylens.errors import ConfigError

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").rglob("*.yaml"))


def test_precedence_default_preset_file_command_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("languages: [sw]\npreset: paper\ntrain:\n  epochs: 2\n  batch_size: 4\n")
    config = load_config(file, {"train.batch_size": 16, "seed": 3})
    assert config.train.batch_size == 16  # command line
    assert config.train.epochs == 2  # file
    assert config.evaluate.corpus == "starter"  # preset
    assert config.train.weight_decay == 0.1
    assert config.seed == 3


def test_languages_by_any_name() -> None:
    config = load_config(None, {"languages": "Swahili, zho_Hans,bn-BD", "central": "English"})
    assert config.all_languages == ("en", "sw", "zh", "bn")


def test_the_resolved_file_gives_the_same_run(tmp_path: Path) -> None:
    config = load_config(None, {"languages": "sw,zh", "train.strength": {"sw": 2.0}})
    file = tmp_path / "resolved.yaml"
    file.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(file) == config
    assert config.train.strength_of("sw") == 2.0
    assert config.train.strength_of("zh") == 1.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({}, "languages is missing"),
        ({"languages": ""}, "languages"),
        ({"languages": "swahilli"}, "did you mean 'swahili'"),
        ({"languages": "en"}, "must differ from the central language, got 'en' as both"),
        ({"languages": "zh,zho"}, "'zh' and 'zho' are both zh"),
        ({"languages": "sw", "train.epoch": 2}, "unknown key train.epoch, did you mean 'epochs'"),
        ({"languages": "sw", "lenguages": 1}, "unknown key lenguages, did you mean 'languages'"),
        (
            {"languages": "sw", "preset": "papre"},
            "preset must be one of default, paper, answers, got 'papre'",
        ),
        ({"languages": "sw", "train.strength": {"zh": 1}}, "must name target languages"),
        ({"languages": "sw", "train.learning_rate": 0}, "train.learning_rate.*got 0"),
        ({"languages": "sw", "train.position": "first"}, "train.position.*got 'first'"),
        (
            {
                "languages": "sw",
                "train.align_weight": 0,
                "train.separate_weight": 0,
                "train.retain_weight": 0,
            },
            "at least one of align_weight",
        ),
        (
            {"languages": "sw", "train.retain_targets": True, "train.position": "mean"},
            "position 'mean' moves; use position 'last' or 'answer', or retain_targets false",
        ),
    ],
)
def test_faults(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


def test_all_faults_come_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, {"languages": "sw", "train.epochs": 0, "probe.rank": "x", "seed": -1})
    for place in ("train.epochs", "probe.rank", "seed"):
        assert place in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [("languages: [", "must be YAML"), ("- sw", "got list"), ("", "got NoneType")],
)
def test_files_that_are_no_settings(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_a_missing_file() -> None:
    with pytest.raises(ConfigError, match="must be a readable YAML file"):
        load_config(Path("nowhere.yaml"))


def test_the_paper_preset_states_every_published_value() -> None:
    """The values of the paper and its scripts, so that a changed default cannot change them."""
    stated = PRESETS["paper"]["train"]
    assert stated.keys() == TrainSettings.model_fields.keys() - {"corpus"}


_SECTIONS = ("probe", "train", "evaluate", "gate", "output")


def test_every_setting_has_a_help_text() -> None:
    for model in (RunConfig, *(RunConfig.model_fields[k].annotation for k in _SECTIONS)):
        for name, field in model.model_fields.items():  # type: ignore[union-attr]
            assert field.description or name in _SECTIONS


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_parses(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# polylens enhance "), "begin with the command that runs it"
    assert yaml.safe_load(text)
    load_config(path)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 7


@pytest.mark.parametrize("memory", ["4QB", "0", "-1", "much"])
def test_memory_must_be_a_size(memory: str) -> None:
    with pytest.raises(ConfigError, match="memory: "):
        check(Runtime, {"memory": memory})


def test_memory_is_read_with_its_unit() -> None:
    assert check(Runtime, {"memory": "1.5GB"}).memory == 1_500_000_000
