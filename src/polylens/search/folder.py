"""The folder of a search: names of its files, and the finished trials in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from polylens.artefacts import read_object
from polylens.search.trials import Trial


@dataclass(frozen=True)
class SearchFolder:
    """Names of the files of a search."""

    path: Path

    @property
    def search(self) -> Path:
        """What is searched, and how."""
        return self.path / "search.json"

    @property
    def rows(self) -> Path:
        """Folder of the rows to train, to search and to report on."""
        return self.path / "rows"

    def trial(self, number: int) -> Path:
        """A finished trial."""
        return self.path / "trials" / f"{number:04}.json"

    def reported(self, number: int) -> Path:
        """A trial that was chosen, on the report rows."""
        return self.path / "report" / f"{number:04}.json"

    @property
    def trials(self) -> Path:
        """All finished trials, one line each."""
        return self.path / "trials.jsonl"

    @property
    def front(self) -> Path:
        """What was chosen: front, best and default settings, on both sets of rows."""
        return self.path / "front.json"

    @property
    def best(self) -> Path:
        """The best settings, as a run that `polylens enhance` takes."""
        return self.path / "best.yaml"

    @property
    def page(self) -> Path:
        """Pictures."""
        return self.path / "search.html"

    def finished(self) -> list[Trial]:
        """Read the finished trials, by number."""
        paths = sorted((self.path / "trials").glob("[0-9]*.json"))
        return [read_object(path, Trial.from_dict) for path in paths]
