"""The main job: a run folder, from a configuration to a better model, the proof and a report.

`enhance` does the stages in order: probe, train, choose the strength, evaluate, save, report. Each
writes its artefact whole and then notes itself in the journal, so a run that was killed goes on
where it was, and one that is finished is not repeated. The folder is described in docs/runs.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from polylens import distributed
from polylens.artefacts import (
    read_object,
    read_text,
    readable_storage_errors,
    remove_leftovers,
    save_tensors,
    write_json,
    write_text,
)
from polylens.config import RunConfig, Runtime, TrainSettings, check, dump_yaml
from polylens.crown import CrownDelta
from polylens.errors import RunError
from polylens.evaluation import (
    Evaluation,
    answer,
    compare,
    read_answers,
    summarise,
    write_answers,
)
from polylens.evaluation.choices import CHOICES
from polylens.evaluation.gate import Dial, turn_dial
from polylens.evaluation.measures import compare_scorecards
from polylens.evaluation.scoring import Candidate
from polylens.evaluation.sides import tokenizer_fingerprint
from polylens.evaluation.suite import (
    BITS_PER_BYTE,
    FIDELITY,
    RETRIEVAL,
    Suite,
    answer_runs,
    measure_retrieval,
    run_suite,
)
from polylens.execution import load_as_planned
from polylens.journal import versions
from polylens.locks import LOCK, alone_in
from polylens.machine import deterministic
from polylens.merging import choose_dtype, save_model
from polylens.model_card import model_card
from polylens.models.loading import LanguageModel
from polylens.models.source import resolve
from polylens.plan import Plan, make_plan
from polylens.progress import Progress, silent
from polylens.report import read_report_data, render_report
from polylens.run_folder import STAGES, RunFolder
from polylens.steps import probe_prompts, train_prompts
from polylens.subspaces import Subspaces

logger = logging.getLogger(__name__)


def _check_inputs(folder: RunFolder, record: Mapping[str, Any]) -> None:
    """Refuse to go on with other inputs than those that the finished stages read."""
    if not folder.plan.exists():
        raise RunError(
            f"the output folder must be on storage that all processes share, but {folder.path} "
            "is not there for one of them; choose another --out"
        )
    before, now = folder.read_plan(), json.loads(json.dumps(record))
    for part in ("model", "template", "corpora"):
        if before[part] != now[part]:
            raise RunError(
                f"a run must go on with the inputs that it began with, but {part} in "
                f"{folder.plan} differs from what is there now; restore it or choose another --out"
            )


@dataclass(frozen=True)
class RunResult:
    """What a run left.

    Attributes:
        folder: names of its files.
        evaluation: before and after.
        dial: what each strength costs and brings. Where its gate holds at none, no model was saved.
        done: stages done now; the others had been finished before.
    """

    folder: RunFolder
    evaluation: Evaluation
    dial: Dial
    done: tuple[str, ...]


def enhance(
    config: RunConfig,
    out: str | Path,
    *,
    runtime: Runtime | None = None,
    given: str | None = None,
    progress: Progress = silent,
    on_plan: Callable[[Plan], None] = lambda plan: None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> RunResult:
    """Make a model better in some languages, prove it, and write a report.

    Args:
        config: what to do.
        out: the run's folder; if it holds the same run unfinished, that goes on.
        runtime: how to carry it out.
        given: text of the configuration file as given, for the record.
        progress: told how far each piece of work is.
        on_plan: told what is about to be done, and how.
        on_stage: told the name of each stage that starts.

    Raises:
        RunError: the folder holds another run, or something else.
        PolyLensError: see the stages.
    """
    distributed.start()
    runtime = runtime or Runtime()
    folder = RunFolder(Path(out))
    with distributed.first_alone():
        _check_folder(folder, config)
    run = _Run(config, runtime, folder, progress)
    if len(run.finished()) == len(STAGES):  # nothing is written, and a folder may be read-only
        run.check(STAGES)
        return _result(folder, ())
    with distributed.first_alone():  # what is downloaded or converted, is once
        resolve(config.model, revision=config.revision, offline=runtime.offline, progress=progress)
    plan = run.plan  # everything cheap that can be wrong is found before the folder is made
    with alone_in(folder.path):
        if distributed.is_first():
            _check_folder(folder, config)  # another process may have begun a run there
            _set_up(folder, config, given, run.record())
        distributed.wait()
        _check_inputs(folder, run.record())
        finished = run.finished()
        run.check(finished)
        on_plan(plan)
        done = []
        with deterministic(runtime.deterministic):
            for stage in STAGES:
                if stage in finished:
                    continue
                on_stage(stage)
                with _noting(folder, stage, run.stages[stage].outputs) as noted:
                    run.stages[stage].do(noted)
                distributed.wait()
                done.append(stage)
    return _result(folder, tuple(done))


def _result(folder: RunFolder, done: tuple[str, ...]) -> RunResult:
    evaluation = read_object(folder.summary, Evaluation.from_dict)
    return RunResult(folder, evaluation, read_object(folder.gate, Dial.from_dict), done)


def _set_up(
    folder: RunFolder, config: RunConfig, given: str | None, record: Mapping[str, Any]
) -> None:
    """Make the run's folder, and note in it what is about to be done."""
    with readable_storage_errors(folder.path):
        folder.path.mkdir(parents=True, exist_ok=True)
        folder.evaluation.mkdir(exist_ok=True)
        scorecards = [folder.scorecard(when).folder for when in ("before", "after")]
        for place in (folder.path, folder.evaluation, *scorecards):
            remove_leftovers(place)
    if not folder.resolved.exists():
        write_text(folder.given, given or dump_yaml(config))
        write_text(folder.resolved, dump_yaml(config))
    if not folder.plan.exists():
        write_json(folder.plan, record)


@contextlib.contextmanager
def _noting(folder: RunFolder, stage: str, outputs: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Note a stage in the journal when it is finished; one process of several does."""
    if not distributed.is_first():
        yield {}
        return
    with folder.journal.stage(stage, outputs) as noted:
        yield noted


def _check_folder(folder: RunFolder, config: RunConfig) -> None:
    """Refuse a folder that holds something else than this run."""
    with readable_storage_errors(folder.path):
        if not folder.path.exists():
            return
        if not folder.path.is_dir():
            raise RunError(
                f"the output must be a folder, but {folder.path} is a file; choose another --out"
            )
        present = [
            path
            for path in folder.path.iterdir()
            if not path.name.endswith(".part") and path.name != LOCK
        ]
        if not present:
            return
        if not folder.resolved.exists():
            if {path.name for path in present} <= {folder.given.name, folder.evaluation.name}:
                return  # killed between the first two files
            raise RunError(
                f"the output folder must be new, empty or hold this run, but {folder.path} holds "
                "other files; choose another --out"
            )
        if read_text(folder.resolved) != dump_yaml(config):
            raise RunError(
                f"the output folder must be new or hold this run, but {folder.path} holds a run "
                f"with other settings (see its {folder.resolved.name}); choose another --out or "
                "delete it"
            )


@dataclass(frozen=True)
class _Stage:
    """Files that a stage leaves, and the function that makes them."""

    outputs: tuple[Path, ...]
    do: Callable[[dict[str, Any]], None]


class _Run:
    """One run under way: the plan and the model are made when a stage first needs them."""

    def __init__(
        self, config: RunConfig, runtime: Runtime, folder: RunFolder, progress: Progress
    ) -> None:
        self.config = config
        self.runtime = runtime
        self.folder = folder
        self.progress = progress
        scorecards = (folder.scorecard("before").folder, folder.scorecard("after").folder)
        self.stages: Mapping[str, _Stage] = {
            "probe": _Stage((folder.subspaces,), self._probe),
            "train": _Stage((folder.delta,), self._train),
            "gate": _Stage((folder.gate, *scorecards), self._turn_dial),
            "answers-before": _Stage((folder.answers("before"),), self._answer_before),
            "answers-after": _Stage((folder.answers("after"),), self._answer_after),
            # It adds to the scorecards.
            "states": _Stage((folder.summary, folder.map_states, *scorecards), self._compare),
            "model": _Stage((folder.model,), self._save_model),
            "report": _Stage((folder.report,), self._report),
        }

    def finished(self) -> list[str]:
        """Stages that need not be done again."""
        finished = []
        if distributed.is_first():
            finished = [stage for stage in STAGES if self._is_finished(stage)]
        return distributed.from_first(finished)

    def check(self, finished: Sequence[str]) -> None:
        """Compare the files of finished stages with what the journal notes of them.

        Raises:
            CorruptFileError: one is not as its stage left it.
        """
        if distributed.is_first():
            left = {p for k, one in self.stages.items() if k not in finished for p in one.outputs}
            outputs = (path for stage in finished for path in self.stages[stage].outputs)
            self.folder.journal.check(dict.fromkeys(path for path in outputs if path not in left))

    def _is_finished(self, stage: str) -> bool:
        """Whether a stage is noted in the journal and its files are there."""
        noted = self.folder.journal.finished(stage)
        if noted is None:
            return False
        return "refused" in noted or all(path.exists() for path in self.stages[stage].outputs)

    @cached_property
    def plan(self) -> Plan:
        plan = make_plan(self.config, self.runtime, self.progress)
        if self.runtime.memory is None and self.folder.plan.exists():
            # Other batches than those that the run began with would change its last bits.
            before = self.folder.read_plan()["batch_bytes"]
            execution = dataclasses.replace(plan.execution, batch_bytes=before)
            plan = dataclasses.replace(plan, execution=execution)
        return plan

    @cached_property
    def model(self) -> LanguageModel:
        plan = self.plan
        return load_as_planned(
            self.config.model, plan.execution, self.runtime, self.config.revision, self.progress
        )

    @cached_property
    def subspaces(self) -> Subspaces:
        return Subspaces.load(self.folder.subspaces, fingerprint=self.model.fingerprint)

    @cached_property
    def delta(self) -> CrownDelta:
        return CrownDelta.load(self.folder.delta, fingerprint=self.model.fingerprint)

    @cached_property
    def dial(self) -> Dial:
        return read_object(self.folder.gate, Dial.from_dict)

    @cached_property
    def candidate(self) -> Candidate:
        """The crown as it will be saved."""
        return self.candidate_at(self.dial.strength)

    def candidate_at(self, strength: float) -> Candidate:
        """The crown as it would be saved at a strength; that is what is evaluated."""
        dtype = choose_dtype(self.model, self.delta, self.config.output.dtype, strength)
        return Candidate(self.delta, strength, dtype)

    def record(self) -> dict[str, Any]:
        """What plan.json holds: no path of the machine, so that runs can be compared."""
        plan = self.plan
        return {
            "model": {
                "name": plan.source.name,
                "kind": plan.source.kind,
                "revision": plan.source.revision,
                "license": plan.source.license,
                **dataclasses.asdict(plan.facts),
            },
            "template": plan.prompt_format.name,
            "corpora": plan.corpora,
            "batch_bytes": plan.execution.batch_bytes,
            "versions": versions(),
        }

    def _probe(self, noted: dict[str, Any]) -> None:
        subspaces = probe_prompts(
            self.model,
            self.plan.probing,
            central=self.config.central,
            settings=self.config.probe,
            template=self.plan.prompt_format.name,
            token_budget=self.runtime.token_budget,
            scratch=self.plan.execution.scratch(),
            progress=self.progress,
        )
        if distributed.is_first():
            subspaces.save(self.folder.subspaces)
        noted["tokens"] = sum(prompts.n_tokens for prompts in self.plan.probing.values())

    def _train(self, noted: dict[str, Any]) -> None:
        (delta,) = train_prompts(
            self.model,
            self.subspaces,
            self.plan.training,
            settings=[self.config.train],
            seed=self.config.seed,
            token_budget=self.runtime.token_budget,
            scratch=self.plan.execution.scratch(),
            checkpoint=self.folder.checkpoint,
            progress=self.progress,
        )
        if distributed.is_first():
            delta.save(self.folder.delta)
            self.folder.checkpoint.unlink(missing_ok=True)
        noted["tokens"] = self.plan.training.n_tokens
        noted["strength"] = delta.metadata["settings"]["strength"]

    @property
    def trained_with(self) -> TrainSettings:
        """The settings of the training, with the strengths that `auto` found."""
        return check(TrainSettings, self.delta.metadata["settings"], self.folder.delta)

    def _turn_dial(self, noted: dict[str, Any]) -> None:
        wanted, steps = self.config.output.strength, self.config.gate.steps
        # A strength of 0 is the untouched model; it needs no steps.
        strengths = [wanted * step / steps for step in range(1, steps + 1)] if wanted else [0.0]
        evaluate = self.config.evaluate
        suite = Suite(
            (BITS_PER_BYTE, CHOICES),
            self.plan.benchmarks,
            self.plan.heldout,
            limit=evaluate.limit,
            data_dir=Path(evaluate.data_dir) if evaluate.data_dir else None,
        )
        runs = [
            run
            for _, part in run_suite(
                self.model,
                [Candidate(), *map(self.candidate_at, strengths)],
                suite,
                token_budget=self.runtime.token_budget,
                scratch=self.plan.execution.scratch(),
                progress=self.progress,
            )
            for run in part
        ]
        watched = evaluate.extra_languages if self.config.gate.watched else ()
        dial = turn_dial(
            runs,
            strengths,
            (self.config.central, *watched),
            self.config.gate,
            texts_of=self.config.languages if self.config.gate.targets else (),
        )
        if not distributed.is_first():
            return
        chosen = strengths.index(dial.strength) + 1
        for when, number, strength in (("before", 0, None), ("after", chosen, dial.strength)):
            card = self.folder.scorecard(when)
            card.open(
                {
                    "model": self.config.model,
                    "fingerprint": self.model.fingerprint,
                    "strength": strength,
                    "tokenizer": tokenizer_fingerprint(self.model.tokenizer),
                    "limit": evaluate.limit,
                    "corpus": self.plan.heldout.corpus.fingerprint,
                }
            )
            card.add("gate", [(run.task, run.examples[number]) for run in runs], with_samples=True)
        noted["strength"] = dial.strength
        write_json(self.folder.gate, dial.to_dict())

    def _answer_before(self, noted: dict[str, Any]) -> None:
        self._answer("before")

    def _answer_after(self, noted: dict[str, Any]) -> None:
        with self.candidate.applied(self.model.structure):
            self._answer("after")

    def _answer(self, when: str) -> None:
        answers = answer(
            self.model,
            self.plan.heldout,
            self.config.evaluate.max_new_tokens,
            self.progress,
            repetition_penalty=self.config.evaluate.repetition_penalty,
        )
        if distributed.is_first():
            write_answers(self.folder.answers(when), answers)

    def _compare(self, noted: dict[str, Any]) -> None:
        (comparison,) = compare(
            self.model,
            [self.delta],
            self.plan.heldout,
            strength=self.candidate.strength,
            dtype=self.candidate.dtype,
            token_budget=self.runtime.token_budget,
            scratch=self.plan.execution.scratch(),
            progress=self.progress,
        )
        retrieval = measure_retrieval(
            self.model,
            [Candidate(), self.candidate],
            self.plan.heldout,
            self.runtime.token_budget,
            self.plan.execution.scratch(),
            self.progress,
        )
        if not distributed.is_first():
            return
        save_tensors(
            self.folder.map_states,
            {
                f"{when}.{language}": states
                for when, by_language in comparison.last_states.items()
                for language, states in by_language.items()
            },
            {"position": "last", "layer": self.model.structure.n_layers},
        )
        before, after = (read_answers(self.folder.answers(when)) for when in ("before", "after"))
        cards = [self.folder.scorecard(when) for when in ("before", "after")]
        fidelity = answer_runs([before, after], self.plan.heldout.all_languages)
        for number, card in enumerate(cards):
            for part, runs in ((FIDELITY, fidelity), (RETRIEVAL, retrieval)):
                card.add(
                    part, [(run.task, run.examples[number]) for run in runs], with_samples=True
                )
        how = self.config.evaluate
        evaluation = summarise(
            self.plan.heldout, before, after, comparison, how.max_new_tokens, how.repetition_penalty
        )
        evaluation = dataclasses.replace(evaluation, measures=tuple(compare_scorecards(*cards)))
        write_json(self.folder.summary, evaluation.to_dict())

    def _save_model(self, noted: dict[str, Any]) -> None:
        if not self.dial.holds:
            noted["refused"] = "gate"
        if not distributed.is_first() or not self.dial.holds:
            return
        dtype = self.candidate.dtype
        assert dtype is not None
        save_model(
            self.model,
            self.delta,
            self.folder.model,
            strength=self.candidate.strength,
            dtype=dtype,
            card=model_card(
                self.config.model_copy(update={"train": self.trained_with}),
                read_object(self.folder.summary, Evaluation.from_dict),
                self.folder.read_plan(),
                self.dial,
            ),
        )
        noted["dtype"] = str(dtype).removeprefix("torch.")

    def _report(self, noted: dict[str, Any]) -> None:
        if not distributed.is_first():
            return
        write_text(self.folder.report, render_report(read_report_data(self.folder)))
