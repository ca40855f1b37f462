"""Trains and measures trials of one model from states that are kept: a trial costs a crown.

What a trial does is what `polylens enhance` does with the same settings, stage for stage and to the
bit: the same plan, subspaces and training. Only the trunk passes are not repeated. `run_trial`
trains on a part of the rows first, measures the cheap parts first, and stops where the rest would
hardly change the outcome.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polylens.config import RunConfig, Runtime, TrainSettings, changed
from polylens.crown import CrownDelta
from polylens.errors import ConfigError, SubspaceError, TrainingError
from polylens.evaluation.choices import CHOICES
from polylens.evaluation.comparison import Heldout
from polylens.evaluation.gate import check_gate, turn_dial
from polylens.evaluation.measures import TaskRun
from polylens.evaluation.replies import measure_replies
from polylens.evaluation.scoring import Candidate
from polylens.evaluation.suite import BITS_PER_BYTE, FIDELITY, Suite, run_suite
from polylens.evaluation.tasks import TaskSpec
from polylens.execution import Execution
from polylens.merging import choose_dtype
from polylens.models.loading import LanguageModel
from polylens.plan import choose_rows, make_plan
from polylens.progress import Progress, silent
from polylens.prompts import ParallelPrompts
from polylens.search.trials import Outcome, Point, Trial, central_loss, target_gain
from polylens.shortfall import measure_shortfall, strengths_of
from polylens.states_cache import Collect
from polylens.steps import probe_prompts, train_prompts

# Examples of a benchmark, and of the built-in choices: every other one to search on, those between
# to report on. Tasks that are translations of each other in one order keep an example on one side
# in all languages.
_EXAMPLES = {"development": (0, 2), "report": (1, 2)}

# The stage before a trial trains on all rows. Replies alone are measured, which cost half as much
# and tell nearly the same order of settings as with texts (docs/results.md, A search).
PREVIEW = "preview"
# It has one row in so many, and one trial in so many goes on from it (successive halving: Li et al.
# 2020, ASHA, arXiv 1810.05934, with its usual factor).
REDUCTION = 4
# With fewer rows there is no preview: they would be too few to tell one setting from another.
_MIN_PREVIEW_ROWS = 8


@dataclass(frozen=True)
class Sample:
    """What trials are measured on.

    Attributes:
        name: "development" or "report".
        config: the run whose held-out rows these are.
        heldout: the rows.
        benchmarks: tasks.
    """

    name: str
    config: RunConfig
    heldout: Heldout
    benchmarks: tuple[TaskSpec, ...]


class Workbench:
    """Trains and measures candidates of one model.

    Attributes:
        model: the untouched model.
        config: of the run that trials are; see `development_config`.
        answers: let candidates answer prompts, too, which costs more than all the rest.
        previews: whether there are rows enough to train on a part of them first.
    """

    def __init__(
        self,
        model: LanguageModel,
        config: RunConfig,
        *,
        runtime: Runtime,
        execution: Execution,
        collect: Collect,
        answers: bool = False,
        progress: Progress = silent,
    ) -> None:
        self.model = model
        self.config = config
        self.answers = answers
        training, _ = choose_rows(config, offline=runtime.offline)
        self.previews = len(training.rows) >= REDUCTION * _MIN_PREVIEW_ROWS
        self._runtime = runtime
        self._execution = execution
        self._collect = collect
        self._progress = progress
        self._untouched: dict[tuple[str, str, int], list[TaskRun]] = {}
        self._strengths: dict[tuple[tuple[int, ...], ...], dict[str, float]] = {}

    def sample(self, name: str, config: RunConfig) -> Sample:
        """Prepare what trials are measured on."""
        plan = make_plan(config, self._runtime, self._progress)
        first, step = _EXAMPLES[name]
        heldout = dataclasses.replace(plan.heldout, choices=plan.heldout.choices[first::step])
        return Sample(name, config, heldout, plan.benchmarks)

    def stages(self, sample: Sample) -> tuple[str, ...]:
        """Return what is measured one after the other, cheapest first.

        Tasks of one protocol belong together, since the gate pools them: what fails after a stage
        fails after all.
        """
        protocols = {_protocol(spec) for spec in sample.benchmarks}
        tasks = tuple(name for name in ("continuation", "chat") if name in protocols)
        return ("texts", *tasks, *(("answers",) if self.answers else ()))

    def train(self, settings: Mapping[str, Any], share: float = 1.0) -> CrownDelta:
        """Train a crown with some settings, as `polylens enhance` would.

        Args:
            settings: by dotted key.
            share: of the rows to train on, the first ones.

        Raises:
            ConfigError: the settings do not go together.
            TrainingError: training runs away.
        """
        config = changed(self.config, {**settings, "evaluate.tasks": ()})
        plan = make_plan(config, self._runtime, self._progress)
        subspaces = probe_prompts(
            self.model,
            plan.probing,
            central=config.central,
            settings=config.probe,
            template=plan.prompt_format.name,
            token_budget=self._runtime.token_budget,
            scratch=self._execution.scratch(),
            collect=self._collect,
            progress=self._progress,
        )
        (delta,) = train_prompts(
            self.model,
            subspaces,
            plan.training.first(share),
            settings=[self._with_strengths(config, plan.training)],
            seed=config.seed,
            token_budget=self._runtime.token_budget,
            scratch=self._execution.scratch(),
            collect=self._collect,
            progress=self._progress,
        )
        return delta

    def _with_strengths(self, config: RunConfig, prompts: ParallelPrompts) -> TrainSettings:
        """Put numbers for `strength: auto`: the untouched model answers the same prompts once."""
        settings = config.train
        if not settings.pushes_by_shortfall:
            return settings
        asked = prompts.without_answers()
        key = tuple(asked.ids[index] for row in asked.rows for index in row.values())
        if key not in self._strengths:
            shortfall = measure_shortfall(
                self.model, asked, config.central, config.languages, progress=self._progress
            )
            self._strengths[key] = strengths_of(shortfall)
        return settings.model_copy(update={"strength": self._strengths[key]})

    def measure(
        self, delta: CrownDelta, strengths: Sequence[float], sample: Sample, stage: str
    ) -> list[TaskRun]:
        """Measure one stage by the untouched model, then by the crown at each strength.

        The untouched model is measured once for each layer at which crowns begin, so that a crown
        that changes nothing gives the same to the bit.

        Raises:
            ConfigError: there are too few development examples for the gate to hold at all.
        """
        candidates = [
            Candidate(delta, one, choose_dtype(self.model, delta, self.config.output.dtype, one))
            for one in strengths
        ]
        # Answers are written by the whole model, wherever the crown begins.
        key = (sample.name, stage, 0 if stage == "answers" else min(delta.layers))
        if key not in self._untouched:
            runs = self._measure([Candidate(), *candidates], sample, stage)
            if sample.name == "development":
                self._require_a_gate(runs, sample)
            self._untouched[key] = [TaskRun(run.task, run.examples[:1]) for run in runs]
            return runs
        runs = self._measure(candidates, sample, stage)
        return [
            TaskRun(run.task, (*before.examples, *run.examples))
            for before, run in zip(self._untouched[key], runs, strict=True)
        ]

    def _require_a_gate(self, runs: Sequence[TaskRun], sample: Sample) -> None:
        config = sample.config
        unchanged = [(run.task, run.examples[0], run.examples[0]) for run in runs]
        verdict = check_gate(unchanged, (config.central,), config.gate)
        if verdict is not None and not verdict.holds:
            raise ConfigError(
                "the gate must be able to hold on half of the benchmarks' examples, but would fail "
                f"for a model that has not changed ({verdict.sentence()}); raise gate.margin, or "
                "add tasks of the central language"
            )

    def _measure(
        self, candidates: Sequence[Candidate], sample: Sample, stage: str
    ) -> list[TaskRun]:
        how: dict[str, Any] = {
            "token_budget": self._runtime.token_budget,
            "scratch": self._execution.scratch(),
            "collect": self._collect,
            "progress": self._progress,
        }
        evaluate = sample.config.evaluate
        built_in = {"texts": (BITS_PER_BYTE, CHOICES), "answers": (FIDELITY,)}.get(stage, ())
        suite = Suite(
            built_in,
            tuple(spec for spec in sample.benchmarks if _protocol(spec) == stage),
            sample.heldout,
            max_new_tokens=evaluate.max_new_tokens,
            repetition_penalty=evaluate.repetition_penalty,
            limit=evaluate.limit,
            data_dir=Path(evaluate.data_dir) if evaluate.data_dir else None,
            every=_EXAMPLES[sample.name],
        )
        parts = run_suite(self.model, candidates, suite, **how)
        runs = [run for _, part in parts for run in part]
        if stage in (PREVIEW, "texts"):
            runs += measure_replies(self.model, candidates, sample.heldout, **how)
        return runs

    def points(
        self, runs: Sequence[TaskRun], strengths: Sequence[float], sample: Sample
    ) -> tuple[Point, ...]:
        """Make a point of each strength: what `measure` found, and what the gate says."""
        config = sample.config
        watched = config.evaluate.extra_languages if config.gate.watched else ()
        dial = turn_dial(runs, strengths, (config.central, *watched), config.gate)
        points = []
        for strength, verdict in dial.verdicts.items():
            assert verdict is not None  # the texts of the central language are always measured
            loss, bound = central_loss(verdict)
            points.append(
                Point(
                    strength=strength,
                    gain=target_gain(dial.measures[strength], config.languages),
                    loss=loss,
                    loss_bound=bound,
                    holds=dial.holds and strength <= dial.strength,
                    gate=verdict.sentence(),
                    measures=dial.measures[strength],
                )
            )
        return tuple(points)


def _protocol(spec: TaskSpec) -> str:
    return "chat" if spec.chat else "continuation"


class _RefusedError(Exception):
    """Training cannot be done with some settings."""


# Given a stage and its points, of all but the preview those at which the gate holds: why the trial
# should stop, or "".
Stop = Callable[[str, Sequence[Point]], str]


def run_trial(
    bench: Workbench,
    number: int,
    settings: Mapping[str, Any],
    strengths: Sequence[float],
    sample: Sample,
    stop: Stop,
) -> Trial:
    """Train and measure one trial: on a part of the rows and at one strength first, then whole.

    Each stage climbs the dial: a strength above one at which the gate fails is not measured, as the
    dial would never be turned there. Nor, in the last stage, one above a strength at which the
    gain is lower than below, where the untouched model has a gain of 0. Where the gate fails at the
    lowest strength, the trial stops. The first trial is measured whole, since the others are
    compared with it.

    Args:
        bench: see `Workbench`.
        number: of the trial.
        settings: by dotted key.
        strengths: of the dial, rising.
        sample: what it is measured on.
        stop: asked after each stage but the last.
    """
    seconds: dict[str, float] = {}

    def ended(outcome: Outcome, reason: str = "", points: Iterable[Point] = ()) -> Trial:
        return Trial(number, settings, outcome, reason, tuple(points), seconds)

    try:
        if bench.previews:
            with _timed(seconds, PREVIEW):
                delta = _train(bench, settings, 1 / REDUCTION)
                strength = (min(strengths, key=lambda one: abs(one - 1)),)
                runs = bench.measure(delta, strength, sample, PREVIEW)
                found = bench.points(runs, strength, sample)
            reason = stop(PREVIEW, found)
            if reason and number > 0:
                return ended("previewed", reason, found)
        with _timed(seconds, "training"):
            delta = _train(bench, settings)
    except _RefusedError as error:
        return ended("refused", str(error))
    # Strength → what was measured of it in all stages, the untouched model's side first.
    of_strength: dict[float, list[TaskRun]] = {strength: [] for strength in strengths}
    points: dict[float, Point] = {}
    reason = ""
    stages = bench.stages(sample)
    for stage in stages:
        is_last = stage == stages[-1]
        with _timed(seconds, stage):
            found = _climb(bench, delta, of_strength, sample, stage, is_last=is_last)
        # A strength that an earlier stage allowed and this one did not reach is no point.
        failing = {strength: point for strength, point in points.items() if not point.holds}
        points = failing | {point.strength: point for point in found}
        holding = [point for point in found if point.holds]
        if is_last:
            break
        reason = (
            stop(stage, holding) if holding else f"the gate fails at the lowest strength on {stage}"
        )
        if reason:
            break
        of_strength = {point.strength: of_strength[point.strength] for point in holding}
    in_order = (points[strength] for strength in sorted(points))
    return ended("stopped" if reason else "measured", reason, in_order)


def _train(bench: Workbench, settings: Mapping[str, Any], share: float = 1.0) -> CrownDelta:
    try:
        return bench.train(settings, share)
    except (ConfigError, SubspaceError, TrainingError) as error:
        raise _RefusedError(str(error)) from error


def _climb(
    bench: Workbench,
    delta: CrownDelta,
    of_strength: dict[float, list[TaskRun]],
    sample: Sample,
    stage: str,
    *,
    is_last: bool,
) -> tuple[Point, ...]:
    """Measure a stage from the lowest strength up, adding to `of_strength`; return the points."""
    points: list[Point] = []
    gain = 0.0
    for strength, runs in of_strength.items():
        runs += bench.measure(delta, (strength,), sample, stage)
        points += bench.points(runs, (strength,), sample)
        below, gain = gain, points[-1].gain.value
        if not points[-1].holds or (is_last and gain < below):
            break
    return tuple(points)


@contextmanager
def _timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[what] = round(time.monotonic() - started, 2)
