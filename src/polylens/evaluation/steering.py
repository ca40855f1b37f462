"""What steerings do to answers: language, leakage of the central one, repetition, bits per byte.

Steerings are candidates like any other: the trunk runs once for the texts, and each answers the
same held-out prompts. Every figure is compared with the untouched model's, pair by pair.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polylens.artefacts import write_json, write_text
from polylens.evaluation.comparison import Heldout
from polylens.evaluation.fidelity import Fidelity, is_repeating, measure_fidelity
from polylens.evaluation.measures import Example, Measure, Task, TaskRun, compare_runs
from polylens.evaluation.scoring import Candidate
from polylens.evaluation.suite import BITS_PER_BYTE, FIDELITY, Suite, run_suite
from polylens.models.loading import LanguageModel
from polylens.progress import Progress, silent
from polylens.scratch import Scratch
from polylens.steering import Steering

UNTOUCHED = "before"


@dataclass(frozen=True)
class SteeringResult:
    """How one steering answers, or the untouched model.

    Attributes:
        label: its name; "before" for the untouched model.
        actions: what is done, one mapping an action with its layers; none for the untouched model.
        fidelity: language of the questions → its answers.
        measures: against the untouched model, with intervals; none for that one itself. By
            language: `fidelity`, `in_…` (answers in the central language), `repeating` and
            `bits_per_byte`.
        answers: language of the questions → one example a question.
    """

    label: str
    actions: tuple[Mapping[str, Any], ...]
    fidelity: Mapping[str, Fidelity]
    measures: tuple[Measure, ...]
    answers: Mapping[str, tuple[Example, ...]]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, without the answers."""
        return {
            "label": self.label,
            "actions": self.actions,
            "fidelity": {k: dataclasses.asdict(one) for k, one in self.fidelity.items()},
            "measures": [dataclasses.asdict(one) for one in self.measures],
        }


def measure_steerings(
    model: LanguageModel,
    steerings: Mapping[str, Steering],
    heldout: Heldout,
    *,
    max_new_tokens: int = 48,
    token_budget: int | None = None,
    scratch: Scratch | None = None,
    progress: Progress = silent,
    on_part: Callable[[str], None] = lambda name: None,
) -> list[SteeringResult]:
    """Ask the untouched model and each steering the same held-out prompts.

    Args:
        model: the untouched model.
        steerings: by label.
        heldout: prompts in every language that is asked.
        max_new_tokens: longest answer.
        token_budget: padded tokens of a batch; None takes what is fastest on this machine.
        scratch: room for the states; None takes memory without limit.
        progress: told how far each piece of work is.
        on_part: told the name of each part that starts.

    Returns:
        The untouched model's result, then one a steering.
    """
    suite = Suite((BITS_PER_BYTE, FIDELITY), (), heldout, max_new_tokens)
    parts = dict(
        run_suite(
            model,
            [Candidate(), *map(Candidate, steerings.values())],
            suite,
            token_budget=token_budget,
            scratch=scratch,
            progress=progress,
            on_part=on_part,
        )
    )
    answers = parts[FIDELITY]
    runs = [
        *answers,
        *(_in_central(run, heldout.central) for run in answers[1:]),  # the first is its own
        *map(_repeating, answers),
        *parts[BITS_PER_BYTE],
    ]
    results = []
    for number, label in enumerate((UNTOUCHED, *steerings)):
        steering = steerings[label] if number else None
        pairs = [(run.task, run.examples[0], run.examples[number]) for run in runs]
        results.append(
            SteeringResult(
                label=label,
                actions=() if steering is None else describe_actions(steering),
                fidelity={_language(run): _fidelity(run, number) for run in answers},
                measures=() if steering is None else tuple(compare_runs(pairs)),
                answers={_language(run): run.examples[number] for run in answers},
            )
        )
    return results


def describe_actions(steering: Steering) -> tuple[Mapping[str, Any], ...]:
    """Return a steering's actions as plain values, with the layers that they act at."""
    return tuple(
        {"action": type(one).__name__.lower(), **dataclasses.asdict(one)}
        for one in steering.resolved
    )


def write_results(folder: Path, results: list[SteeringResult], about: Mapping[str, Any]) -> Path:
    """Write `steering.json`, and `answers.jsonl` with one answer a line; return the former.

    Args:
        folder: made if it is not there.
        results: from `measure_steerings`.
        about: what was measured and how: model, corpus, settings, versions.
    """
    lines = [
        json.dumps(
            {"steering": result.label, "language": language, "prompt": one.prompt, **one.responses},
            ensure_ascii=False,
        )
        for result in results
        for language, examples in result.answers.items()
        for one in examples
    ]
    write_text(folder / "answers.jsonl", "".join(f"{line}\n" for line in lines))
    path = folder / "steering.json"
    write_json(path, {**about, "results": [result.to_dict() for result in results]})
    return path


def _language(run: TaskRun) -> str:
    assert run.task.language is not None
    return run.task.language


def _fidelity(run: TaskRun, number: int) -> Fidelity:
    responses = [one.responses for one in run.examples[number]]
    texts, detected = ([one[key] for one in responses] for key in ("answer", "detected"))
    prompts = [one.prompt for one in run.examples[number]]
    return measure_fidelity(_language(run), prompts, texts, detected)


def _in_central(run: TaskRun, central: str) -> TaskRun:
    """Whether answers to another language's questions are in the central one."""
    name = f"in_{central}"
    task = Task(f"{name}_{_language(run)}", run.task.language, "answers", name, False)
    return _revalued(run, task, lambda one: one["detected"] == central)


def _repeating(run: TaskRun) -> TaskRun:
    task = Task(f"repeating_{_language(run)}", run.task.language, "answers", "repeating", False)
    return _revalued(run, task, lambda one: is_repeating(one["answer"]))


def _revalued(run: TaskRun, task: Task, value: Callable[[Any], bool]) -> TaskRun:
    return TaskRun(
        task,
        tuple(
            tuple(dataclasses.replace(one, value=float(value(one.responses))) for one in examples)
            for examples in run.examples
        ),
    )
