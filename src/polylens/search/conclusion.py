"""The end of a search: what was chosen is measured once on rows that nothing was chosen by.

The highest of many figures is high partly by luck, so both stand side by side: the figure that a
crown was chosen by, and the one on the report rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polylens.artefacts import read_object, write_json, write_text
from polylens.config import RunConfig, changed, dump_yaml
from polylens.evaluation.measures import Example, Task, TaskRun, compare_runs
from polylens.report.search_page import render_search
from polylens.search.folder import SearchFolder
from polylens.search.trials import Figure, Point, Trial, pareto_front, target_gain
from polylens.search.workbench import Sample, Workbench

if TYPE_CHECKING:
    from polylens.search.study import Study


@dataclass(frozen=True)
class Chosen:
    """A crown on the rows that it was chosen by, and on those that nothing was chosen by.

    Attributes:
        trial: its number.
        settings: by dotted key.
        development: on the development rows.
        report: on the report rows.
    """

    trial: int
    settings: Mapping[str, Any]
    development: Point
    report: Point


@dataclass(frozen=True)
class SearchResult:
    """What a search left.

    Attributes:
        folder: names of its files.
        trials: that are finished, by number.
        n_elsewhere: trials that other processes are still running; there is no front until they
            are finished.
        default: the settings that the search started from.
        best: those of the highest gain at which the gate holds on the development rows; None where
            it holds nowhere.
        front: the points that none beats in both gain and loss and at which the gate holds, by
            rising loss.
        over_default: gain of the best over the default settings on the report rows, in percent.
        importances: how much of the best gains each setting explains.
    """

    folder: SearchFolder
    trials: tuple[Trial, ...]
    n_elsewhere: int = 0
    default: Chosen | None = None
    best: Chosen | None = None
    front: tuple[Chosen, ...] = ()
    over_default: Figure | None = None
    importances: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def holds(self) -> bool:
        """Whether the gate holds for the best settings on the report rows, too."""
        return self.best is not None and self.best.report.holds

    def sentence(self) -> str:
        """Say what was found, in plain words."""
        if self.best is None:
            return (
                f"No setting can be used: the gate fails for each of {len(self.trials)} trials on "
                "the development rows, at every strength."
            )
        best, over = self.best, self.over_default
        text = (
            f"Best of {len(self.trials)} trials is number {best.trial} at strength "
            f"{best.development.strength:g}: the target languages gain {best.development.gain} % "
            f"on the development rows, {best.report.gain} % on the report rows"
        )
        if over is not None and self.default is not None and best.trial != self.default.trial:
            text += f", where that is {over} % more than the default settings bring"
        text += f". {best.report.gate}"
        if best.report.gain.low <= 0:
            text += " No setting helped for sure: the interval on the report rows reaches 0."
        return text

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; the trials are in `trials.jsonl`."""
        parts = ("default", "best", "over_default")
        found = {name: getattr(self, name) for name in parts}
        return {
            "n_trials": len(self.trials),
            "holds": self.holds,
            **{k: None if one is None else dataclasses.asdict(one) for k, one in found.items()},
            "front": [dataclasses.asdict(one) for one in self.front],
            "importances": dict(self.importances),
        }


def conclude(
    bench: Workbench, study: Study, folder: SearchFolder, config: RunConfig
) -> SearchResult:
    """Measure what was chosen on the report rows, and write it down.

    Args:
        bench: see `Workbench`.
        study: whose trials are all finished.
        folder: of the search.
        config: of the run that is measured on the report rows; see `report_config`.
    """
    trials = folder.finished()
    sample = bench.sample("report", config)
    allowed = [(trial, trial.best) for trial in trials if trial.best is not None]
    best = max(allowed, key=lambda pair: pair[1].gain.value, default=None)
    front = [pair for pair in pareto_front(trials) if pair[1].holds]
    first = trials[0]
    default = (first, first.best or first.points[0]) if first.points else None
    wanted = [*front, *([default] if default else []), *([best] if best else [])]
    reports = _report(bench, folder, sample, wanted)

    def chosen(pair: tuple[Trial, Point] | None) -> Chosen | None:
        if pair is None:
            return None
        trial, point = pair
        (report,) = bench.points(reports[trial.number, point.strength], [point.strength], sample)
        return Chosen(trial.number, trial.settings, point, report)

    result = SearchResult(
        folder,
        tuple(trials),
        default=chosen(default),
        best=chosen(best),
        front=tuple(one for pair in front if (one := chosen(pair)) is not None),
        over_default=None,
        importances=study.importances(),
    )
    if best is not None and default is not None:
        runs = [reports[trial.number, point.strength] for trial, point in (default, best)]
        pairs = [
            (old.task, old.examples[1], new.examples[1]) for old, new in zip(*runs, strict=True)
        ]
        gain = target_gain(compare_runs(pairs), config.languages)
        result = dataclasses.replace(result, over_default=gain)
    write_json(folder.front, result.to_dict())
    if best is not None:
        settings = {**best[0].settings, "output.strength": best[1].strength}
        write_text(folder.best, dump_yaml(changed(config, settings)))
    write_text(folder.page, render_search(result, config))
    return result


def _report(
    bench: Workbench,
    folder: SearchFolder,
    sample: Sample,
    wanted: Sequence[tuple[Trial, Point]],
) -> dict[tuple[int, float], list[TaskRun]]:
    """Measure points on the report rows, each once: (number, strength) → untouched, and the crown.

    Their crowns are trained again, which gives the same ones, rather than kept.
    """
    found: dict[tuple[int, float], list[TaskRun]] = {}
    by_number = {trial.number: trial for trial, _ in wanted}
    for number, trial in by_number.items():
        path = folder.reported(number)
        kept = read_object(path, dict) if path.exists() else {}
        strengths = sorted({point.strength for one, point in wanted if one.number == number})
        missing = [strength for strength in strengths if f"{strength:g}" not in kept]
        if missing:
            delta = bench.train(trial.settings)
            runs = [
                run
                for stage in bench.stages(sample)
                for run in bench.measure(delta, missing, sample, stage)
            ]
            for index, strength in enumerate(missing, start=1):
                kept[f"{strength:g}"] = [
                    {
                        "task": dataclasses.asdict(run.task),
                        "before": [one.brief() for one in run.examples[0]],
                        "after": [one.brief() for one in run.examples[index]],
                    }
                    for run in runs
                ]
            write_json(path, kept)
        for strength in strengths:
            found[number, strength] = [_task_run(one) for one in kept[f"{strength:g}"]]
    return found


def _task_run(kept: Mapping[str, Any]) -> TaskRun:
    """Make of what a report file holds the untouched model's examples, and the crown's."""
    sides = (kept["before"], kept["after"])
    examples = tuple(tuple(Example(**one) for one in side) for side in sides)
    return TaskRun(Task(**kept["task"]), examples)
