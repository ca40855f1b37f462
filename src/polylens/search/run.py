"""A search in a folder: trials until there are enough, then what was chosen is measured once more.

Several processes may be started with the same command on one folder; each takes trials until none
is left, and the one that finishes last measures the report rows. What is there is never done again,
so a search that was killed goes on where it was, and one with more trials adds them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polylens import distributed
from polylens.artefacts import (
    read_json,
    read_object,
    readable_storage_errors,
    remove_leftovers,
    write_json,
    write_text,
)
from polylens.config import RunConfig, Runtime
from polylens.errors import RunError, UsageError
from polylens.execution import Execution, load_as_planned, plan_execution
from polylens.journal import versions
from polylens.machine import deterministic
from polylens.plan import Plan, make_plan
from polylens.progress import Progress, silent
from polylens.search.conclusion import SearchResult, conclude
from polylens.search.folder import SearchFolder
from polylens.search.space import Space, check_space, read_space
from polylens.search.split import development_config, report_config, split_rows, write_split
from polylens.search.trials import Point, Trial
from polylens.search.workbench import Workbench, run_trial
from polylens.states_cache import Collect, KeptStates, cached_hidden_states

if TYPE_CHECKING:
    from polylens.search.study import Study

# Of the dial, at which each trained crown is measured; one more costs a forward, no training.
STRENGTHS = (0.25, 0.5, 1.0, 1.5)


def search(
    config: RunConfig,
    out: str | Path,
    *,
    space: Space | None = None,
    n_trials: int = 30,
    strengths: Sequence[float] = STRENGTHS,
    n_development: int = 32,
    answers: bool = False,
    runtime: Runtime | None = None,
    collect: Collect = cached_hidden_states,
    progress: Progress = silent,
    on_plan: Callable[[Plan], None] = lambda plan: None,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> SearchResult:
    """Find the settings of a run that help its target languages most and leave the centre unharmed.

    Args:
        config: the run to start from; its settings are the first trial.
        out: the search's folder; if it holds the same search, that goes on.
        space: what may vary; None takes the space that ships with the package.
        n_trials: of the search, those that are finished included.
        strengths: of the dial at which each trained crown is measured, rising.
        n_development: rows to compare trials on; they are taken from those that would train.
        answers: let candidates answer prompts, too.
        runtime: how to carry it out.
        collect: how the hidden states that are kept are had the first time.
        progress: told how far each piece of work is, and the trials done.
        on_plan: told what one trial is.
        on_trial: told each trial that this process finished.

    Raises:
        MissingExtraError: Optuna is not installed.
        ConfigError: the space does not fit the model, or the gate could hold for no model at all.
        CorpusError: too few rows.
        RunError: the folder holds another search, or something else.
    """
    from polylens.search.study import Study

    if distributed.size() > 1:
        raise UsageError(
            "a search must run in processes of their own, got a distributed job; start the same "
            "command several times on one folder instead"
        )
    strengths = tuple(sorted(set(strengths)))
    in_order = all(0 < strength < math.inf for strength in strengths)
    if not strengths or not in_order or n_trials < 1 or n_development < 2:
        raise UsageError(
            "a search needs at least one trial, two development rows and strengths above 0, got "
            f"{n_trials}, {n_development} and {list(strengths)}"
        )
    space = space or read_space(config)
    start = space.start(config)
    runtime = runtime or Runtime()
    folder = SearchFolder(Path(out))
    split = split_rows(config, n_development, offline=runtime.offline)
    plan = make_plan(config, runtime, progress)
    check_space(space, config, plan.facts.n_layers)
    boundaries = space.boundary_layers(config, plan.facts.n_layers)
    identity = {
        "config": config.model_dump(mode="json"),
        "space": space.to_dict(),
        "strengths": strengths,
        "answers": answers,
        "rows": {k: getattr(split, k).fingerprint for k in ("training", "development", "report")},
        "model": dataclasses.asdict(plan.facts),
    }
    n_crown_layers = plan.facts.n_layers - min(boundaries)
    execution = plan_execution(plan.facts, runtime, n_crown_layers=n_crown_layers)
    execution = _open_folder(folder, identity, execution, runtime)
    write_split(split, folder.rows)
    on_plan(dataclasses.replace(plan, execution=execution))
    with deterministic(runtime.deterministic):
        bench = Workbench(
            load_as_planned(config.model, execution, runtime, config.revision, progress),
            development_config(config, folder.rows),
            runtime=runtime,
            execution=execution,
            collect=KeptStates(boundaries, collect),
            answers=answers,
            progress=progress,
        )
        study = Study(folder.path, space, start, n_trials=n_trials, seed=config.seed)
        _do_trials(bench, study, folder, strengths, progress, on_trial)
        if study.n_elsewhere:
            return SearchResult(folder, tuple(folder.finished()), study.n_elsewhere)
        return conclude(bench, study, folder, report_config(config, folder.rows))


def _open_folder(
    folder: SearchFolder, identity: Mapping[str, Any], execution: Execution, runtime: Runtime
) -> Execution:
    """Make the folder, or check that it holds this search; return how the model is run in it."""
    with readable_storage_errors(folder.path):
        own = (folder.rows, folder.trial(0).parent, folder.reported(0).parent)
        present = list(folder.path.iterdir()) if folder.path.exists() else []
        others = [path for path in present if path not in own and path.suffix != ".part"]
        if others and not folder.search.exists():
            raise RunError(
                f"the output folder must be new, empty or hold this search, but {folder.path} "
                "holds other files; choose another --out"
            )
        for path in (folder.path, *own):
            path.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path)
    if not folder.search.exists():
        how = {"batch_bytes": execution.batch_bytes, "versions": versions()}
        write_json(folder.search, {**identity, **how})
    before = read_json(folder.search)
    now = json.loads(json.dumps(identity))
    differing = [key for key in now if now[key] != before.get(key)]
    if differing:
        raise RunError(
            f"the output folder must be new or hold this search, but {', '.join(differing)} in "
            f"{folder.search} differs from what was given now; choose another --out or delete it"
        )
    if runtime.memory is None:
        # Other batches than those that the search began with would change its last bits.
        execution = dataclasses.replace(execution, batch_bytes=before["batch_bytes"])
    return execution


def _do_trials(
    bench: Workbench,
    study: Study,
    folder: SearchFolder,
    strengths: Sequence[float],
    progress: Progress,
    on_trial: Callable[[Trial], None],
) -> None:
    """Do trials until none is left to take."""
    sample = bench.sample("development", bench.config)
    n_before = len(folder.finished())
    n_left = study.n_trials - n_before
    if n_left > 0:
        progress(0, n_left, "trials")
    while (claimed := study.claim()) is not None:
        number, settings = claimed

        def stop(stage: str, points: Sequence[Point], number: int = number) -> str:
            study.note(number, stage, points)
            return study.stop(stage, points)

        path = folder.trial(number)
        if path.exists():  # killed between writing it and telling Optuna
            trial = read_object(path, Trial.from_dict)
        else:
            trial = run_trial(bench, number, settings, strengths, sample, stop)
            write_json(path, trial.to_dict())
        study.tell(trial)
        finished = folder.finished()
        lines = [json.dumps(one.to_dict(), ensure_ascii=False) for one in finished]
        write_text(folder.trials, "".join(f"{line}\n" for line in lines))
        progress(len(finished) - n_before, n_left, "trials")
        on_trial(trial)
