"""Three sets of rows that share no text: to train on, to search on, to report on.

The rows that are reported are those that a run of these settings would hold out anyway. The rows to
search on are drawn from the others, and what is left trains. All three are kept as files, so that
`best.yaml` trains on the very rows of its trial and is reported on rows that no choice was made by.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from polylens.artefacts import write_text
from polylens.config import RunConfig, changed
from polylens.corpora import ParallelCorpus
from polylens.errors import CorpusError
from polylens.plan import choose_rows


@dataclass(frozen=True)
class Split:
    """Rows by what they are for; no text is in two of them.

    Attributes:
        training: to train on; `train.rows` may use fewer.
        development: to compare trials on.
        report: to measure what was chosen, once.
    """

    training: ParallelCorpus
    development: ParallelCorpus
    report: ParallelCorpus


def split_rows(config: RunConfig, n_development: int, *, offline: bool = False) -> Split:
    """Divide the rows of a run.

    Args:
        config: of the run.
        n_development: rows to search on.
        offline: never use the network.

    Raises:
        CorpusError: too few rows, or one part lacks a language.
    """
    pool, report = choose_rows(changed(config, {"train.rows": None}), offline=offline)
    seen = _texts(report)
    pool = _without(pool, seen)
    if len(pool.rows) < n_development + 2:
        raise CorpusError(
            f"a search needs {n_development} rows to compare trials on and some to train on, but "
            f"{pool.name} has {len(pool.rows)} besides those that are reported on; add rows or "
            "lower --development-rows"
        )
    training, development = pool.split(n_development, config.seed)
    development = _without(development, _texts(training))
    for part, what in ((training, "training"), (development, "development"), (report, "report")):
        for language in config.all_languages:
            if not any(language in row for row in part.rows):
                raise CorpusError(
                    f"the {what} rows of a search must hold each language, but none of "
                    f"{len(part.rows)} has {language}; give more rows, or another seed"
                )
    return Split(training, development, report)


def _texts(corpus: ParallelCorpus) -> set[str]:
    return {text for row in corpus.rows for text in row.values()}


def _without(corpus: ParallelCorpus, seen: set[str]) -> ParallelCorpus:
    """Leave out the rows with a text that another part has."""
    rows = tuple(row for row in corpus.rows if seen.isdisjoint(row.values()))
    return dataclasses.replace(corpus, rows=rows)


def write_split(split: Split, folder: Path) -> None:
    """Write the rows, and their answers, as JSONL, one file a part."""
    for name in ("training", "development", "report"):
        corpus: ParallelCorpus = getattr(split, name)
        lines = []
        for row in corpus.rows:
            answers = {f"answer_{k}": corpus.answer(k, text) for k, text in row.items()}
            answered = {**row, **{k: answer for k, answer in answers.items() if answer}}
            lines.append(json.dumps(answered, ensure_ascii=False))
        write_text(folder / f"{name}.jsonl", "".join(f"{line}\n" for line in lines))


def development_config(config: RunConfig, folder: Path) -> RunConfig:
    """Return the run that trials are: trained on the training rows, measured on development rows.

    Languages that are only watched, and texts of their own, belong to the report.
    """
    return changed(
        report_config(config, folder),
        {
            "evaluate.corpus": str(folder / "development.jsonl"),
            "evaluate.rows": 10**9,
            "evaluate.texts": None,
            "evaluate.extra_languages": (),
        },
    )


def report_config(config: RunConfig, folder: Path) -> RunConfig:
    """Return the run that trains on the training rows and is measured on the report rows."""
    own = str(folder / "training.jsonl")
    return changed(
        config,
        {
            "train.corpus": own,
            # Texts of the rows that are measured would be among them.
            **({"probe.corpus": own} if config.probe.corpus == config.train.corpus else {}),
            "evaluate.corpus": str(folder / "report.jsonl"),
        },
    )
