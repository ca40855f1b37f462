"""A whole run that takes a second, and what of it must not depend on faults."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from polylens.config import RunConfig, Runtime, load_config
from polylens.run import enhance

SETTINGS: dict[str, Any] = {
    "languages": "sw",
    "probe.texts_per_language": 4,
    "train.rows": 4,
    "train.batch_size": 2,
    "train.epochs": 2,
    "evaluate.rows": 4,
    "evaluate.max_new_tokens": 2,
    "gate.text_margin": 9.0,  # four rows of a random model show nothing
    "gate.choice_margin": 9.0,  # nor do its guesses
    "gate.steps": 2,
}

# Batches follow the memory that is free, unless it is given.
RUNTIME = Runtime.model_validate({"memory": "4GB"})


def configure(model: Path, **changes: Any) -> RunConfig:
    return load_config(None, {**SETTINGS, "model": str(model), **changes})


def run(model: Path, out: Path) -> tuple[str, ...]:
    """Do what is left of the run; return the stages done."""
    return enhance(configure(model), out, runtime=RUNTIME).done


def contents(out: Path) -> dict[str, str]:
    """Checksum of every file, but the journal, which tells times."""
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "journal.jsonl"
    }
