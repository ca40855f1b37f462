"""What a search may change: ranges and choices over the settings of a run, by their dotted keys.

Every setting of `probe` and `train` can be searched, those that are added later too: a key is
looked up in the configuration's own classes, and every end of a range and every choice is checked
by them. The corpora cannot, since trials must be trained on the same rows to be compared.
`space.yaml` beside this module is the space that is taken by default.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from polylens.config import ProbeSettings, RunConfig, TrainSettings, changed, read_yaml
from polylens.errors import ConfigError, nearest
from polylens.subspaces import check_rank
from polylens.training import boundary_layers

_SECTIONS = {"probe": ProbeSettings, "train": TrainSettings}
_FIXED = ("probe.corpus", "train.corpus")

# Numbers drawn from a range are rounded: more digits than this only make settings hard to read.
_DIGITS = 3


@dataclass(frozen=True)
class Choice:
    """One of some values.

    Attributes:
        values: at least one, each once; None is the setting's own default.
    """

    values: tuple[Any, ...]

    def holds(self, value: Any) -> bool:
        """Whether a value is one of them."""
        return any(value == one and type(value) is type(one) for one in self.values)

    def to_dict(self) -> Any:
        """Return what stands for it in YAML."""
        return [list(one) if isinstance(one, tuple) else one for one in self.values]


@dataclass(frozen=True)
class Range:
    """A number between two.

    Attributes:
        low: the smallest.
        high: the largest.
        log: values are evenly spaced in the logarithm.
        whole: whole numbers alone.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def holds(self, value: Any) -> bool:
        """Whether a value lies between the ends."""
        return isinstance(value, int | float) and self.low <= value <= self.high

    def rounded(self, value: float) -> float:
        """Return a value in few digits, within the range."""
        if self.whole:
            return round(value)
        return min(self.high, max(self.low, float(f"{value:.{_DIGITS}g}")))

    def to_dict(self) -> Any:
        """Return what stands for it in YAML."""
        return {"low": self.low, "high": self.high, **({"log": True} if self.log else {})}


Dimension = Choice | Range


@dataclass(frozen=True)
class Space:
    """The settings that are searched.

    Attributes:
        dimensions: dotted key → what it may be, at least one.
    """

    dimensions: Mapping[str, Dimension]

    def start(self, config: RunConfig) -> dict[str, Any]:
        """Return the values that a configuration has, which are the first trial.

        Raises:
            ConfigError: one lies outside the space.
        """
        values = {key: _value(config, key) for key in self.dimensions}
        outside = [key for key, one in self.dimensions.items() if not one.holds(values[key])]
        if outside:
            faults = "; ".join(
                f"{key} is {values[key]!r}, outside {self.dimensions[key].to_dict()}"
                for key in outside
            )
            raise ConfigError(
                "the settings that a search starts from must lie within its space, so that they "
                f"are compared with the others, but {faults}; widen the space or start from others"
            )
        return values

    def boundary_layers(self, config: RunConfig, n_layers: int) -> tuple[int, ...]:
        """Return the layers whose input trials need, ascending; no crown begins below the first.

        Raises:
            ConfigError: the model has no such layers.
        """
        configs = [config]
        for key in ("train.layers", "train.loss_layers"):
            values = list(_all_values(self.dimensions.get(key)))
            configs = [changed(one, {key: value}) for one in configs for value in values] or configs
        needed = {layer for one in configs for layer in boundary_layers(one.train, n_layers)}
        return tuple(sorted(needed))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as a YAML file has them."""
        return {key: one.to_dict() for key, one in self.dimensions.items()}


def read_space(
    config: RunConfig, path: Path | None = None, vary: Mapping[str, Any] | None = None
) -> Space:
    """Make a space.

    Args:
        config: what the search starts from.
        path: a YAML file; None for none.
        vary: dimensions that win over the file's, by dotted key, as the file would have them.
            With neither, the space is the one that ships with the package.

    Raises:
        ConfigError: a key is unknown or a range faulty; all faults are in the message.
    """
    if path is None and not vary:
        text = resources.files("polylens.search").joinpath("space.yaml").read_text("utf-8")
        given = yaml.safe_load(text)
    else:
        given = {**(read_yaml(path) if path is not None else {}), **(vary or {})}
    dimensions, faults = {}, []
    for key, value in given.items():
        try:
            dimensions[str(key)] = _dimension(config, str(key), value)
        except ConfigError as error:
            faults.append(str(error))
    if not given:
        faults.append("a space must hold at least one setting, but holds none")
    if faults:
        source = f"{path}: " if path is not None else ""
        raise ConfigError(source + "; ".join(faults))
    return Space(dimensions)


def _dimension(config: RunConfig, key: str, given: Any) -> Dimension:
    """Make one dimension, and check that a configuration takes its values."""
    section, _, name = key.partition(".")
    if section not in _SECTIONS or not name:
        raise ConfigError(
            f"a space must hold settings of probe and train, such as train.epochs, got {key}"
        )
    fields = _SECTIONS[section].model_fields  # type: ignore[attr-defined]
    if name not in fields:
        raise ConfigError(f"unknown key {key}{nearest(name, fields)}")
    if key in _FIXED:
        raise ConfigError(f"{key} cannot be searched: all trials must have the same rows")
    if isinstance(given, list) and given:
        found = [_checked(config, key, value) for value in given]
        values = tuple(v for i, v in enumerate(found) if not Choice(tuple(found[:i])).holds(v))
        return Choice(values)
    if not isinstance(given, Mapping) or not {"low", "high"} <= set(given) <= {
        "low",
        "high",
        "log",
    }:
        raise ConfigError(
            f"{key} must be a list of values, or low and high (and log: true), got {given!r}"
        )
    low, high = (_number(key, given[end]) for end in ("low", "high"))
    log = given.get("log", False)
    if not low < high:
        raise ConfigError(f"{key} must have a low below its high, got {low:g} and {high:g}")
    if not isinstance(log, bool) or (log and low <= 0):
        raise ConfigError(f"{key} must have a low above 0 with log: true, got {given!r}")
    first, last = (_checked(config, key, end) for end in (low, high))
    return Range(first, last, log, isinstance(first, int) and isinstance(last, int))


def _number(key: str, value: Any) -> float:
    """Return an end of a range; YAML 1.1 reads 1e-5 as text."""
    with contextlib.suppress(ValueError):
        value = float(value) if isinstance(value, str) else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{key} must have numbers as low and high, got {value!r}")
    return value


def _checked(config: RunConfig, key: str, value: Any) -> Any:
    """Return a value as the configuration has it."""
    return _value(changed(config, {key: value}), key)


def _value(config: RunConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def _all_values(dimension: Dimension | None) -> Iterator[Any]:
    if isinstance(dimension, Choice):
        yield from dimension.values
    elif dimension is not None:
        yield from range(int(dimension.low), int(dimension.high) + 1)


def check_space(space: Space, config: RunConfig, n_layers: int) -> None:
    """Check what a configuration alone cannot tell: layers of the model, rank and languages.

    Raises:
        PolyLensError: some value of the space cannot be trained.
    """
    space.boundary_layers(config, n_layers)
    for rank in _all_values(space.dimensions.get("probe.rank")):
        if rank is not None:
            check_rank(rank, len(config.all_languages))
