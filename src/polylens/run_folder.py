"""The folder of a run: its stages and the names of its files, as docs/files.md describes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polylens.artefacts import read_object
from polylens.evaluation.measures import Scorecard
from polylens.journal import Journal

STAGES = (
    "probe",
    "train",
    "gate",
    "answers-before",
    "answers-after",
    "states",
    "model",
    "report",
)


@dataclass(frozen=True)
class RunFolder:
    """Names of the files of a run."""

    path: Path

    @property
    def given(self) -> Path:
        """The configuration as given."""
        return self.path / "run.yaml"

    @property
    def resolved(self) -> Path:
        """Every value as used."""
        return self.path / "resolved.yaml"

    @property
    def plan(self) -> Path:
        """What was read: corpora, counts, model."""
        return self.path / "plan.json"

    def read_plan(self) -> dict[str, Any]:
        """Read the plan's file.

        Raises:
            CorruptFileError: it is damaged.
        """

        def check(values: Any) -> dict[str, Any]:
            _ = values["template"], values["batch_bytes"], values["model"]["name"]
            _ = [values["corpora"][role]["name"] for role in ("probing", "training", "heldout")]
            return dict(values)

        return read_object(self.plan, check)

    @property
    def journal(self) -> Journal:
        """Finished stages."""
        return Journal(self.path / "journal.jsonl")

    @property
    def subspaces(self) -> Path:
        """Result of probing."""
        return self.path / "subspaces.safetensors"

    @property
    def delta(self) -> Path:
        """What training changed."""
        return self.path / "delta.safetensors"

    @property
    def checkpoint(self) -> Path:
        """State of a training that is under way, or failed."""
        return self.path / "checkpoint.safetensors"

    @property
    def gate(self) -> Path:
        """What each strength costs and brings, and the one that was chosen."""
        return self.path / "gate.json"

    @property
    def evaluation(self) -> Path:
        """Folder of answers and summary."""
        return self.path / "evaluation"

    @property
    def summary(self) -> Path:
        """Before and after, per language."""
        return self.evaluation / "summary.json"

    @property
    def map_states(self) -> Path:
        """One state a held-out prompt, before and after, for the report's picture."""
        return self.evaluation / "states.safetensors"

    def answers(self, when: str) -> Path:
        """Answers "before" or "after"."""
        return self.evaluation / f"{when}.jsonl"

    def scorecard(self, when: str) -> Scorecard:
        """Every example's value "before" or "after"."""
        return Scorecard(self.evaluation / when)

    @property
    def model(self) -> Path:
        """The merged model."""
        return self.path / "model"

    @property
    def report(self) -> Path:
        """The report."""
        return self.path / "report.html"
