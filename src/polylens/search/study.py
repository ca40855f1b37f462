"""What to try next: Optuna's TPE sampler over a space, with a journal that several processes share.

A trial's settings follow from the seed, its number and the trials that are finished, so a search
that was killed goes on as if it had not been. A trial whose process is gone is taken over, under
its number and with its settings.

Needs the extra `search`; import this module where it is used.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from polylens.artefacts import readable_storage_errors
from polylens.errors import MissingExtraError
from polylens.search.space import Choice, Dimension, Range, Space
from polylens.search.trials import Point, Trial
from polylens.search.workbench import PREVIEW, REDUCTION

try:
    import optuna
    from optuna.distributions import (
        BaseDistribution,
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import FrozenTrial, TrialState
except ImportError as error:
    raise MissingExtraError("Optuna", "search", "a search") from error

# Trials drawn at random, after the first, before what was found is followed.
_N_RANDOM = 8

# Violation of the constraint where there is nothing to measure; the gate's are a few margins.
_REFUSED = 100.0

_PROCESS, _OUTCOME, _VIOLATION, _NOTED = "process", "outcome", "violation", "noted."


class Study:
    """Hands out trials and takes their outcomes; several processes may hold the same one.

    Attributes:
        space: what may vary.
        n_trials: of the whole search, those of other processes included.
    """

    def __init__(
        self, folder: Path, space: Space, start: Mapping[str, Any], *, n_trials: int, seed: int
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.space = space
        self.n_trials = n_trials
        self._lock = folder / "optuna.lock"
        self._distributions = {k: _distribution(one) for k, one in space.dimensions.items()}
        first = {k: _encoded(one, start[k]) for k, one in space.dimensions.items()}
        with _quiet(), self._alone():
            # A lock that a kill left behind is a link to this path, which has to be found by it.
            journal = folder.resolve() / "optuna.journal"
            _drop_torn_line(journal)
            self._study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(journal))),
                sampler=_Sampler(seed, first, self._distributions),
                study_name="search",
                direction="maximize",
                load_if_exists=True,
            )

    def claim(self) -> tuple[int, dict[str, Any]] | None:
        """Take a trial: one whose process is gone, else a new one; None where all are taken.

        Returns:
            Its number and settings.
        """
        with _quiet(), self._alone():
            trial = self._orphan()
            if trial is None:
                if len(self._study.get_trials(deepcopy=False)) >= self.n_trials:
                    return None
                trial = self._study.ask()
            trial.set_user_attr(_PROCESS, _this_process())
            settings = {
                key: _decoded(one, _suggest(trial, key, self._distributions[key]))
                for key, one in self.space.dimensions.items()
            }
        return trial.number, settings

    def _orphan(self) -> optuna.Trial | None:
        for frozen in self._running():
            if _is_gone(frozen.user_attrs.get(_PROCESS, "")):
                # Settings that it was given before are in the journal, and not drawn again.
                return optuna.Trial(self._study, frozen._trial_id)
        return None

    def _running(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    @property
    def n_elsewhere(self) -> int:
        """Trials that other processes are running."""
        return len(self._running())

    def stop(self, stage: str, points: Sequence[Point]) -> str:
        """Say why a trial should stop after a stage; "" where it should go on.

        Of the previews so far the best goes on, and one of the best quarter while no more than a
        quarter went on. After another stage a trial is clearly worse if the upper ends of its gains
        lie below the lower end of the best trial's gain on the same tasks; trials at which the gate
        fails in the end do not count.
        """
        if stage == PREVIEW:
            gain = max(point.gain.value for point in points)
            previews = self._noted(stage)
            n_better = sum(frozen.user_attrs[_NOTED + stage] > gain for frozen in previews)
            n_whole = sum(frozen.user_attrs[_OUTCOME] != "previewed" for frozen in previews)
            # A sampler finds better settings as it goes, so that more than a quarter of the
            # previews are among the best quarter of those so far.
            if n_better and max(n_better, n_whole) >= (len(previews) + 1) // REDUCTION:
                return (
                    f"on a part of the rows replies gain {gain:+.2f} %, less than {n_better} of "
                    f"the {len(previews)} trials before it, of which {n_whole} went on"
                )
            return ""
        lows = [
            frozen.user_attrs[_NOTED + stage]
            for frozen in self._noted(stage)
            if frozen.user_attrs[_OUTCOME] == "measured" and frozen.user_attrs[_VIOLATION] <= 0
        ]
        most = max(point.gain.high for point in points)
        if lows and most < max(lows):
            return (
                f"after {stage} the gain is at most {most:+.2f}, the best trial's at least "
                f"{max(lows):+.2f}"
            )
        return ""

    def _noted(self, stage: str) -> list[FrozenTrial]:
        """Finished trials of which `note` kept a figure after this stage."""
        finished = (TrialState.COMPLETE, TrialState.PRUNED)
        return [
            frozen
            for frozen in self._study.get_trials(deepcopy=False, states=finished)
            if _NOTED + stage in frozen.user_attrs
        ]

    def note(self, number: int, stage: str, points: Sequence[Point]) -> None:
        """Keep what later trials are compared with after the same stage."""
        best = max((point.gain for point in points), key=lambda gain: gain.value)
        with self._alone():
            noted = best.value if stage == PREVIEW else best.low
            self._trial(number).set_user_attr(_NOTED + stage, noted)

    def tell(self, trial: Trial) -> None:
        """Give Optuna a finished trial.

        Its value is the highest gain at which the gate holds; where it holds nowhere, that at the
        lowest strength, and the constraint is how far the loss is beyond the margin there.
        """
        with _quiet(), self._alone():
            handle = self._trial(trial.number)
            handle.set_user_attr(_OUTCOME, trial.outcome)
            if not trial.points:
                handle.set_user_attr(_VIOLATION, _REFUSED)
                self._study.tell(handle, state=TrialState.PRUNED)
                return
            holding = [point for point in trial.points if point.holds]
            point = max(holding or trial.points[:1], key=lambda one: one.gain.value)
            excess = point.loss_bound - 1
            violation = min(0.0, excess) if point.holds else max(1e-6, excess)
            handle.set_user_attr(_VIOLATION, violation)
            if trial.outcome == "measured":
                self._study.tell(handle, point.gain.value)
            else:  # the further it came, the better it is taken to be
                handle.report(point.gain.value, int(trial.outcome == "stopped"))
                self._study.tell(handle, state=TrialState.PRUNED)

    def _trial(self, number: int) -> optuna.Trial:
        (frozen,) = (t for t in self._study.get_trials(deepcopy=False) if t.number == number)
        return optuna.Trial(self._study, frozen._trial_id)

    def importances(self) -> dict[str, float]:
        """Return how much of the best gains each setting explains; empty where it cannot be told.

        By PED-ANOVA (Watanabe et al. 2023, arXiv 2304.10255), over trials that were measured.
        """
        with _quiet(), contextlib.suppress(ValueError, RuntimeError):
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            found = optuna.importance.get_param_importances(self._study, evaluator=evaluator)
            if any(found.values()):  # all 0: too few trials, or all alike
                return {key: float(value) for key, value in found.items()}
        return {}

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Let one process at a time write; the system ends the lock with its process."""
        with readable_storage_errors(self._lock), self._lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class _Sampler(optuna.samplers.BaseSampler):
    """A TPE sampler for each trial, seeded by its number; the first trial is given.

    Optuna's own sampler draws from one generator, which a process that starts again starts again.
    """

    def __init__(
        self, seed: int, first: Mapping[str, Any], distributions: Mapping[str, BaseDistribution]
    ) -> None:
        self._seed = seed
        self._first = first
        self._distributions = distributions
        self._of: tuple[int, optuna.samplers.TPESampler] | None = None

    def _sampler(self, trial: FrozenTrial) -> optuna.samplers.TPESampler:
        if self._of is None or self._of[0] != trial.number:
            sampler = optuna.samplers.TPESampler(
                seed=(1_000_003 * self._seed + trial.number) % 2**32,
                n_startup_trials=_N_RANDOM,
                multivariate=True,
                constant_liar=True,  # workers keep away from what others are trying
                constraints_func=lambda frozen: (frozen.user_attrs[_VIOLATION],),
            )
            self._of = (trial.number, sampler)
        return self._of[1]

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        if trial.number == 0:
            return dict(self._distributions)
        return self._sampler(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        search_space: dict[str, BaseDistribution],
    ) -> dict[str, Any]:
        if trial.number == 0:
            return dict(self._first)
        return self._sampler(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        return self._sampler(trial).sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        self._sampler(trial).after_trial(study, trial, state, values)


def _distribution(dimension: Dimension) -> BaseDistribution:
    if isinstance(dimension, Choice):
        return CategoricalDistribution([_encoded(dimension, one) for one in dimension.values])
    if dimension.whole:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _encoded(dimension: Dimension, value: Any) -> Any:
    """Turn a value into what Optuna keeps: of a choice its JSON, since it may be a list."""
    return json.dumps(value, sort_keys=True) if isinstance(dimension, Choice) else value


def _decoded(dimension: Dimension, value: Any) -> Any:
    return dimension.rounded(value) if isinstance(dimension, Range) else json.loads(value)


def _suggest(trial: optuna.Trial, key: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(key, distribution.choices)
    if isinstance(distribution, IntDistribution):
        low, high = distribution.low, distribution.high
        return trial.suggest_int(key, low, high, log=distribution.log)
    assert isinstance(distribution, FloatDistribution)
    return trial.suggest_float(key, distribution.low, distribution.high, log=distribution.log)


def _this_process() -> str:
    """Name this process so that another can tell when it is gone, though its number comes again."""
    started = int(psutil.Process().create_time())
    return f"{uuid.getnode():x}-{os.getpid()}-{started}"


def _is_gone(process: str) -> bool:
    """Whether a process of this machine has ended; one of another machine never has."""
    machine, _, rest = process.partition("-")
    if process == _this_process() or not rest:
        return True  # a trial that this process holds no more, or that nobody held yet
    if machine != f"{uuid.getnode():x}":
        return False
    pid, _, started = rest.partition("-")
    try:
        return int(psutil.Process(int(pid)).create_time()) != int(started)
    except psutil.Error:
        return True


def _drop_torn_line(journal: Path) -> None:
    """Cut off what a kill left of a line; Optuna would refuse the journal."""
    if not journal.exists():
        return
    with readable_storage_errors(journal), journal.open("r+b") as file:
        content = file.read()
        if not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna's warnings from users: what they are about is our business."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # constraints_func, from Optuna 5 on
        warnings.simplefilter("ignore", UserWarning)  # too few trials to tell importances
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
