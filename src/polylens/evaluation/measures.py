"""What is measured: examples with a value each, and what a model and its change make of them.

Benchmarks, answers in the language asked for, bits per byte and retrieval all come as a `TaskRun`:
every candidate's value on the same examples. `compare_runs` makes two of those a `Measure`: each
figure with its interval. A candidate's runs are kept as one JSONL file a task; see `Scorecard`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from polylens.artefacts import (
    parse_json,
    read_object,
    readable_storage_errors,
    write_json,
    write_text,
)
from polylens.errors import CorruptFileError, UsageError
from polylens.evaluation.letters import habit, right_shares
from polylens.evaluation.statistics import PairedDifference, compare_paired, holm, mean_interval

Protocol = Literal["continuation", "chat", "choice", "answers", "text", "states"]


@dataclass(frozen=True)
class Example:
    """One example of a task, answered by one candidate.

    Attributes:
        key: tells which example it is, to pair answers by.
        value: of the task's metric.
        prompt: what the model was given.
        target: the right answer, as the task has it; None where there is none.
        responses: log-likelihoods of the choices, the reply, or whatever the value comes from.
        log_odds: of a choice of letters, what it is compared by: of the right letter, where it is
            A and where it is B.
    """

    key: str
    value: float
    prompt: str = ""
    target: Any = None
    responses: Any = None
    log_odds: tuple[float, float] | None = None

    def brief(self) -> dict[str, Any]:
        """Return what comparing it takes, as plain values."""
        odds = {} if self.log_odds is None else {"log_odds": self.log_odds}
        return {"key": self.key, "value": self.value, **odds}


@dataclass(frozen=True)
class Task:
    """What is measured.

    Attributes:
        name: e.g. "xcopa_sw_letters".
        language: of its texts, if known.
        protocol: how the model is asked: continuations of plain text, the first token or a reply
            after a chat prompt, the built-in choice of a letter, the language of answers, plain
            texts, hidden states.
        metric: what a value is, e.g. "acc".
        higher_is_better: whether more of it is.
    """

    name: str
    language: str | None
    protocol: Protocol
    metric: str
    higher_is_better: bool = True


@dataclass(frozen=True)
class TaskRun:
    """A task, and the examples as each candidate answers them, in one order."""

    task: Task
    examples: tuple[tuple[Example, ...], ...]


@dataclass(frozen=True)
class Measure:
    """A figure before and after.

    Attributes:
        task: what is measured.
        before_interval: 95 % interval of the mean before.
        after_interval: and after.
        change: paired; its means are the figures.
        p_corrected: of no change, by Holm's method over all measures compared together.
    """

    task: Task
    before_interval: tuple[float, float]
    after_interval: tuple[float, float]
    change: PairedDifference
    p_corrected: float

    @property
    def gain(self) -> float:
        """The difference, signed so that more is better."""
        return self.change.difference if self.task.higher_is_better else -self.change.difference

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measure:
        """Make a measure from what `dataclasses.asdict` gave."""
        return cls(
            Task(**values["task"]),
            tuple(values["before_interval"]),
            tuple(values["after_interval"]),
            PairedDifference(**values["change"]),
            values["p_corrected"],
        )


def paired_values(
    task: Task, before: Sequence[Example], after: Sequence[Example]
) -> tuple[list[float], list[float]]:
    """Return the values of both sides.

    Of choices between letters, what the change adds to the habit of one letter counts, which
    neither side can know by itself.
    """
    if task.protocol == "choice":
        old, new = (_log_odds(side) for side in (before, after))
        return right_shares(old), right_shares(new, habit(old))
    return [one.value for one in before], [one.value for one in after]


def _log_odds(examples: Sequence[Example]) -> list[tuple[float, float]]:
    return [one.log_odds for one in examples if one.log_odds is not None]


def compare_runs(
    pairs: Sequence[tuple[Task, Sequence[Example], Sequence[Example]]], *, seed: int = 0
) -> list[Measure]:
    """Compare tasks before and after.

    Args:
        pairs: a task and its examples before and after.
        seed: of bootstraps.

    Raises:
        UsageError: the examples are not the same.
    """
    found = []
    for task, before, after in pairs:
        if [one.key for one in before] != [one.key for one in after]:
            raise UsageError(
                f"both sides must have answered the same examples of {task.name}, but have not; "
                "evaluate both with the same data and --limit"
            )
        old, new = paired_values(task, before, after)
        change = compare_paired(old, new, seed=seed)
        intervals = mean_interval(old, seed=seed), mean_interval(new, seed=seed)
        found.append(Measure(task, *intervals, change, 1.0))
    corrected = holm([one.change.p_value for one in found])
    return [
        dataclasses.replace(one, p_corrected=p) for one, p in zip(found, corrected, strict=True)
    ]


@dataclass(frozen=True)
class Scorecard:
    """A folder with one candidate's answers: `scorecard.json`, and a JSONL file a task."""

    folder: Path

    @property
    def path(self) -> Path:
        """What was evaluated, and its figures."""
        return self.folder / "scorecard.json"

    def open(self, identity: Mapping[str, Any]) -> None:
        """Begin, or go on with, a scorecard.

        Args:
            identity: what is evaluated and how; figures of another identity are not mixed in.

        Raises:
            UsageError: the folder holds answers of something else.
        """
        if not self.path.exists():
            with readable_storage_errors(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {"identity": identity, "tasks": {}})
        elif self.identity != json.loads(json.dumps(identity)):
            raise UsageError(
                f"{self.folder} must be new or hold answers of the same model and settings, but "
                f"its {self.path.name} tells of others; choose another --out or delete it"
            )

    @property
    def identity(self) -> Mapping[str, Any]:
        """What was evaluated and how."""
        return dict(self._content()["identity"])

    @property
    def tasks(self) -> dict[str, Task]:
        """Finished tasks by name."""
        return {name: Task(**entry["task"]) for name, entry in self._content()["tasks"].items()}

    @property
    def finished(self) -> frozenset[str]:
        """What `add` was called for: tasks, or groups of them."""
        return frozenset(entry["part_of"] for entry in self._content()["tasks"].values())

    def _content(self) -> Any:
        return read_object(self.path, _checked)

    def add(
        self,
        part_of: str,
        tasks: Sequence[tuple[Task, Sequence[Example]]],
        *,
        with_samples: bool,
    ) -> None:
        """Keep finished tasks.

        Args:
            part_of: what they were asked for as, e.g. the name of a group.
            tasks: with their examples, as the candidate answered them.
            with_samples: keep prompts, targets and responses too, not the values alone.
        """
        content = self._content()
        for task, examples in tasks:
            lines = []
            for example in examples:
                whole = {"prompt": example.prompt, "target": example.target}
                whole["responses"] = example.responses
                kept = {**example.brief(), **(whole if with_samples else {})}
                lines.append(json.dumps(kept, ensure_ascii=False, default=str))
            path = self._file(task.name)
            write_text(path, "".join(f"{line}\n" for line in lines))
            values = [example.value for example in examples]
            low, high = mean_interval(values)
            content["tasks"][task.name] = {
                "part_of": part_of,
                "task": dataclasses.asdict(task),
                "n": len(values),
                "mean": sum(values) / len(values),
                "low": low,
                "high": high,
                "file": path.name,
            }
        write_json(self.path, content)

    def figures(self) -> list[tuple[Task, int, float, float, float]]:
        """Return each task with its number of examples, mean, and 95 % interval."""
        return [
            (Task(**v["task"]), v["n"], v["mean"], v["low"], v["high"])
            for v in self._content()["tasks"].values()
        ]

    def examples(self, name: str) -> tuple[Example, ...]:
        """Return the examples of a finished task.

        Raises:
            CorruptFileError: a line is damaged.
        """
        path = self._file(name)
        with readable_storage_errors(path):
            content = path.read_bytes()
        try:
            is_choice = self.tasks[name].protocol == "choice"
            return tuple(
                _example(parse_json(line), is_choice)
                for line in content.decode("utf-8").split("\n")
                if line
            )
        except (ValueError, TypeError) as error:
            raise CorruptFileError(
                f"{path} must hold one example a line, but is damaged ({error}); delete it and "
                "evaluate again"
            ) from error

    def _file(self, name: str) -> Path:
        return self.folder / f"{name.replace('/', '_')}.jsonl"


def _checked(content: Any) -> Any:
    """Return what a scorecard holds if it is all there."""
    for entry in content["tasks"].values():
        Task(**entry["task"])
        _ = entry["part_of"] + "", [entry[key] + 0.0 for key in ("n", "mean", "low", "high")]
    _ = [content["identity"][key] for key in ("model", "tokenizer")]
    return content


def _example(values: Any, is_choice: bool) -> Example:
    example = Example(**values)
    if is_choice:
        as_a, as_b = example.log_odds  # type: ignore[misc]  # None raises TypeError
        example = dataclasses.replace(example, log_odds=(as_a + 0.0, as_b + 0.0))
    if not isinstance(example.key, str) or not isinstance(example.value, int | float):
        raise TypeError("a line has no key or no value")
    return example


def compare_scorecards(before: Scorecard, after: Scorecard) -> list[Measure]:
    """Compare the tasks that two scorecards have in common.

    Raises:
        UsageError: they have none, or not the same examples, or their tokenizers differ.
    """
    tasks = [task for name, task in before.tasks.items() if name in after.tasks]
    if not tasks:
        raise UsageError(
            f"both sides must have a task in common, but {before.folder} and {after.folder} have "
            "none; evaluate both on the same tasks"
        )
    check_tokenizers(before.identity, after.identity)
    return compare_runs(
        [(task, before.examples(task.name), after.examples(task.name)) for task in tasks]
    )


def check_tokenizers(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Refuse to compare models that do not read the same tokens.

    Raises:
        UsageError: their tokenizers differ.
    """
    if before["tokenizer"] != after["tokenizer"]:
        raise UsageError(
            "base and candidate must have the same tokenizer, so that they are given the same "
            f"tokens, but those of {before['model']} and {after['model']} differ; compare models "
            "of one family"
        )
