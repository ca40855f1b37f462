"""From a form to a run: the settings that the studio offers, checked, and what they would cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from polylens.cli import doctor
from polylens.config import RunConfig, Runtime, load_config
from polylens.plan import make_plan
from polylens.studio.folders import Folders


@dataclass(frozen=True)
class Field:
    """A setting that the form offers.

    Attributes:
        key: dotted, of `RunConfig`.
        label: what the form calls it.
        kind: "count" for a whole number, "number", or "text".
    """

    key: str
    label: str
    kind: str


# The main ones; the others keep their preset's values.
FIELDS = (
    Field("probe.texts_per_language", "Texts to probe of each language, at most", "count"),
    Field("train.rows", "Training rows, at most", "count"),
    Field("evaluate.rows", "Held-out rows", "count"),
    Field("train.layers", "Top layers that train", "count"),
    Field("train.epochs", "Epochs", "count"),
    Field("train.learning_rate", "Learning rate", "number"),
    Field("train.strength", "Push along a language's direction (a number, or auto)", "text"),
    Field(
        "gate.text_margin", "Rise of bits per byte that the gate tolerates, as a share", "number"
    ),
    Field("evaluate.max_new_tokens", "Longest answer, in tokens", "count"),
    Field("seed", "Seed", "count"),
)


def preset_values(preset: str) -> list[Any]:
    """Return what a preset gives to `FIELDS`.

    Raises:
        ConfigError: there is no such preset.
    """
    config = load_config(None, {"preset": preset, "central": "en", "languages": "es"})
    values: list[Any] = []
    for field in FIELDS:
        value: Any = config
        for part in field.key.split("."):
            value = getattr(value, part)
        values.append(str(value) if field.kind == "text" else value)
    return values


def compose(
    folders: Folders,
    *,
    model: str,
    languages: str,
    central: str,
    corpus: str,
    preset: str,
    values: Sequence[Any],
) -> RunConfig:
    """Make a configuration of what a form holds.

    Args:
        folders: where models and corpora are.
        model: one of `Folders.models_there`.
        languages: targets by commas, codes or names.
        central: the language to pull towards and to protect.
        corpus: one of `Folders.corpora_there`, to probe and to train on.
        preset: starting values of what the form leaves out.
        values: of `FIELDS`, in their order; None or an empty text leaves the preset's.

    Raises:
        ConfigError: a value is faulty; all faults are in the message.
        UsageError: the model or the corpus is not among those offered.
    """
    settings: dict[str, Any] = {
        "model": folders.model(model),
        "languages": languages,
        "central": central,
        "preset": preset,
        "probe.corpus": folders.corpus(corpus),
        "train.corpus": folders.corpus(corpus),
    }
    for field, value in zip(FIELDS, values, strict=True):
        if value is not None and value != "":
            settings[field.key] = _number(value) if field.kind == "text" else value
    return load_config(None, settings)


def cost_rows(config: RunConfig) -> list[list[str]]:
    """Return what a run would cost here, in words; finds whatever is wrong with corpus and model.

    Nothing is downloaded for it.

    Raises:
        PolyLensError: the run cannot be done, and why.
    """
    plan = make_plan(config, Runtime(offline=True))
    return doctor.cost_rows(plan, doctor.cost_of(plan))


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text
