"""Write docs/configuration.md from the settings' fields; with --check, fail if it is stale."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from polylens.baselines import (
    FewShotSettings,
    LowRankSettings,
    PretrainingSettings,
    SupervisedSettings,
)
from polylens.config import PRESETS, RunConfig, Runtime

PAGE = Path(__file__).parent / "configuration.md"

HEAD = """# Configuration

Every setting, generated from `src/polylens/config.py` by `make docs`. Values come, lowest first,
from the defaults below, the preset, the YAML file, and the command line: `train.epochs=5`, or a
flag where there is one ([command line](cli.md)). A misspelt key fails and names its place.
`resolved.yaml` in a run's folder holds every value as used.

```bash
polylens enhance examples/laptop.yaml train.epochs=5 train.strength='{sw: 1, es: 0.5}'
```
"""

OPTIONS = """## How a run is carried out

Options of the commands, with dashes (`--token-budget`). They stand in no file, since they are not
meant to change the numbers.
"""

BASELINES = """## Baselines

`-s key=value` of `polylens baseline` ([baselines](baselines.md)). What a kind shares with `train`
above has the same default, but where the table says otherwise.
"""

KINDS: Mapping[str, type[BaseModel]] = {
    "sft": SupervisedSettings,
    "sft-lora": LowRankSettings,
    "pretraining": PretrainingSettings,
    "few-shot": FewShotSettings,
}
_NAMES = {"integer": "whole number", "number": "number", "boolean": "true, false", "string": "text"}
_LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def kind(schema: Mapping[str, Any]) -> str:
    """Say what values a field takes, by its JSON schema."""
    if "anyOf" in schema:
        return " or ".join(kind(one) for one in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    of = schema["type"]
    if of == "null":
        return "null"
    if of == "array":
        return f"list of {kind(schema['items'])}s"
    if of == "object":
        return f"{kind(schema['additionalProperties'])} a language"
    limits = [f"{sign} {schema[name]:g}" for name, sign in _LIMITS.items() if name in schema]
    return " ".join([_NAMES[of], ", ".join(limits)]).strip()


def shown(value: Any) -> str:
    """Return a default as YAML has it."""
    text = f"{value:g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
    return f"`{text.strip(chr(34))}`"


def rows(model: type[BaseModel], *, leave_out: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yield a table of the fields of a model that hold no others."""
    schema = model.model_json_schema()
    yield "| key | values | default | what it is |"
    yield "|-|-|-|-|"
    for key, field in schema["properties"].items():
        if "$ref" in field or key in leave_out:
            continue
        default = shown(field["default"]) if "default" in field else "must be given"
        yield f"| `{key}` | {kind(field)} | {default} | {field['description']} |"


def differing(model: type[BaseModel], base: type[BaseModel]) -> frozenset[str]:
    """Return the fields that mean the same in both, default included."""
    ours, theirs = (one.model_json_schema()["properties"] for one in (model, base))
    return frozenset(key for key in ours if ours[key] == theirs.get(key))


def render() -> str:
    """Return the page."""
    parts = [HEAD, "## The run\n", *rows(RunConfig), ""]
    train = None
    for section, field in RunConfig.model_fields.items():
        model = field.annotation
        if isinstance(model, type) and issubclass(model, BaseModel):
            parts += [f"## {section}\n", f"{model.__doc__}\n", *rows(model), ""]
            train = model if section == "train" else train
    assert train is not None
    parts.append("## Presets\n")
    for preset, sections in PRESETS.items():
        changed = [
            f"`{section}.{key}: {json.dumps(value)}`"
            for section, values in sections.items()
            for key, value in values.items()
            if RunConfig.model_fields[section].default.model_dump()[key] != value
        ]
        parts.append(f"`preset: {preset}` differs from the tables above in {', '.join(changed)}.\n")
    parts += [OPTIONS, *rows(Runtime), "", BASELINES]
    for name, model in KINDS.items():
        parts += [f"### {name}\n", *rows(model, leave_out=differing(model, train)), ""]
    return "\n".join(parts)


def main() -> int:
    """Write or check the page."""
    page = render()
    if "--check" not in sys.argv:
        PAGE.write_text(page, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page:
        return 0
    print("docs/configuration.md is stale; run: make docs", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
