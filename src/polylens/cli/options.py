"""Options that mean the same in every command; their help comes from the settings they set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from polylens.config import RunConfig, Runtime, check
from polylens.errors import UsageError


def _help(model: type, field: str) -> str:
    description = model.model_fields[field].description  # type: ignore[attr-defined]
    assert description is not None
    return str(description)


Model = Annotated[
    str | None, typer.Option("--model", "-m", help=_help(RunConfig, "model"), show_default=False)
]
Revision = Annotated[
    str | None, typer.Option(help=_help(RunConfig, "revision"), show_default=False)
]
Languages = Annotated[
    str | None,
    typer.Option(
        "--languages",
        "-l",
        help="Target languages, separated by commas: codes or names.",
        show_default=False,
    ),
]
Central = Annotated[str | None, typer.Option(help=_help(RunConfig, "central"), show_default=False)]
Preset = Annotated[str | None, typer.Option(help="default, paper or answers.", show_default=False)]
Template = Annotated[
    str | None, typer.Option(help=_help(RunConfig, "template"), show_default=False)
]
TemplateOfRun = Annotated[
    str | None,
    typer.Option(
        "--template",
        help="Prompt template: 'auto', 'chat', 'plain', or a Jinja file; default: the run's own.",
        show_default=False,
    ),
]
Seed = Annotated[int | None, typer.Option(help=_help(RunConfig, "seed"), show_default=False)]
Device = Annotated[str, typer.Option(help=_help(Runtime, "device"))]
Dtype = Annotated[str, typer.Option(help=_help(Runtime, "dtype"))]
Memory = Annotated[
    str | None, typer.Option(help=_help(Runtime, "memory"), metavar="SIZE", show_default=False)
]
TokenBudget = Annotated[
    int | None, typer.Option(help=_help(Runtime, "token_budget"), show_default=False)
]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help=_help(Runtime, "deterministic"))
]
Offline = Annotated[bool, typer.Option("--offline", help=_help(Runtime, "offline"))]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help=_help(Runtime, "trust_remote_code"))
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
ConfigAndOverrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[CONFIG.yaml] [KEY=VALUE]...",
        help="A YAML file, and settings that win over it, e.g. train.epochs=3.",
        show_default=False,
    ),
]


def split_arguments(arguments: list[str] | None) -> tuple[Path | None, dict[str, Any]]:
    """Split positional arguments into the configuration file and its overrides.

    Raises:
        UsageError: an argument is neither.
    """
    path: Path | None = None
    overrides: dict[str, Any] = {}
    for argument in arguments or []:
        key, separator, value = argument.partition("=")
        if separator and key:
            overrides[key] = _parse(value)
        elif path is None and argument.endswith((".yaml", ".yml")):
            path = Path(argument)
        else:
            raise UsageError(
                f"arguments must be one YAML file and settings as key=value, got {argument!r}; "
                "for example: run.yaml train.epochs=3"
            )
    return path, overrides


def _parse(value: str) -> Any:
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        return value
    # YAML 1.1 reads 1e-5 as text; a person means the number.
    if isinstance(parsed, str):
        try:
            return float(parsed)
        except ValueError:
            return parsed
    return parsed


def make_runtime(**values: Any) -> Runtime:
    """Return how a command is carried out.

    Args:
        values: fields of `Runtime`; None leaves the default.

    Raises:
        ConfigError: a value is faulty.
    """
    return check(Runtime, {key: value for key, value in values.items() if value is not None})


def numbers(option: str, text: str) -> list[float]:
    """Read numbers by commas.

    Raises:
        UsageError: they are not.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} must be numbers by commas, e.g. 0.5,1, got {text!r}") from None


def layers(option: str, text: str | None) -> tuple[int, ...] | None:
    """Read layers by commas and from-to, e.g. "4,19-28"; None stays None.

    Raises:
        UsageError: they are not.
    """
    if text is None:
        return None
    found: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            found += range(int(first), int(last if dash else first) + 1)
    except ValueError:
        raise UsageError(
            f"{option} must be layers by commas or from-to, e.g. 4,19-28, got {text!r}"
        ) from None
    return tuple(found)
