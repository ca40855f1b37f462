"""What an evaluation found: typed, saved as JSON, with one line an answer beside it.

`Evaluation` is the summary; `Answer` is one line of the answers before, or after.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polylens.artefacts import parse_json, readable_storage_errors, write_text
from polylens.errors import CorruptFileError
from polylens.evaluation.drift import StateChange
from polylens.evaluation.fidelity import Fidelity
from polylens.evaluation.measures import Measure


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        language: of the question, a BCP 47 code.
        id: row of the question in the held-out corpus, from 0; the same in every language.
        prompt: the user's text, without template.
        answer: the model's text, without special tokens.
        detected: language of the answer, "unknown" or "empty"; see `detect_answers`.
        passed: whether that is the language of the question.
    """

    language: str
    id: int
    prompt: str
    answer: str
    detected: str
    passed: bool


@dataclass(frozen=True)
class BeforeAfter:
    """Fidelity before and after, for one language.

    Attributes:
        before: of the untouched model.
        after: of the enhanced model, on the same questions.
    """

    before: Fidelity
    after: Fidelity


@dataclass(frozen=True)
class BitsPerByte:
    """Bits per byte of the held-out texts of one language: all their bits over all their bytes.

    Attributes:
        before: of the untouched model. Lower is better.
        after: of the enhanced model, on the same texts. Lower is better.
        n_texts: texts scored.
        n_bytes: UTF-8 bytes of the tokens scored.
    """

    before: float
    after: float
    n_texts: int
    n_bytes: int


@dataclass(frozen=True)
class Evaluation:
    """Before and after, per language.

    Attributes:
        central: the language to protect.
        languages: the targets.
        watched: languages that were neither trained nor central.
        max_new_tokens: longest answer allowed.
        repetition_penalty: on tokens that the prompt or the answer has; 1 is none.
        fidelity: language → answers in the language asked for.
        bits_per_byte: language → bits per byte.
        state_change: language → change of states.
        measures: the same figures, and benchmarks and retrieval, each with its interval.
    """

    central: str
    languages: tuple[str, ...]
    watched: tuple[str, ...]
    max_new_tokens: int
    fidelity: Mapping[str, BeforeAfter]
    bits_per_byte: Mapping[str, BitsPerByte]
    state_change: Mapping[str, StateChange]
    measures: tuple[Measure, ...] = ()
    repetition_penalty: float = 1.0

    @property
    def all_languages(self) -> tuple[str, ...]:
        """Central language, targets, watched."""
        return (self.central, *self.languages, *self.watched)

    @property
    def how_answered(self) -> str:
        """How answers were written, for those who read what came of them."""
        penalised = self.repetition_penalty != 1
        penalty = f" with a repetition penalty of {self.repetition_penalty:g}" if penalised else ""
        return f"greedy answers of at most {self.max_new_tokens} tokens{penalty}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evaluation:
        """Make an evaluation from what `to_dict` gave."""
        return cls(
            central=values["central"],
            languages=tuple(values["languages"]),
            watched=tuple(values["watched"]),
            max_new_tokens=values["max_new_tokens"],
            fidelity={
                language: BeforeAfter(Fidelity(**pair["before"]), Fidelity(**pair["after"]))
                for language, pair in values["fidelity"].items()
            },
            bits_per_byte={k: BitsPerByte(**v) for k, v in values["bits_per_byte"].items()},
            state_change={k: StateChange(**v) for k, v in values["state_change"].items()},
            measures=tuple(map(Measure.from_dict, values.get("measures", ()))),
            repetition_penalty=values.get("repetition_penalty", 1.0),
        )


def write_answers(path: Path, answers: Iterable[Answer]) -> None:
    """Write answers as JSONL, whole or not at all."""
    lines = [json.dumps(dataclasses.asdict(answer), ensure_ascii=False) for answer in answers]
    write_text(path, "".join(f"{line}\n" for line in lines))


def _answer(values: Any) -> Answer:
    answer = Answer(**values)
    texts = (answer.language, answer.prompt, answer.answer, answer.detected)
    if not all(isinstance(text, str) for text in texts) or not isinstance(answer.id, int):
        raise TypeError("an answer is no text, or has no number")
    return answer


def read_answers(path: Path) -> list[Answer]:
    """Read what `write_answers` wrote.

    Raises:
        CorruptFileError: a line is damaged.
    """
    with readable_storage_errors(path):
        content = path.read_bytes()
    try:
        # Not `splitlines`: an answer may hold U+2028 and other breaks that JSON leaves as they are.
        lines = content.decode("utf-8").split("\n")
        return [_answer(parse_json(line)) for line in lines if line]
    except (ValueError, TypeError) as error:
        raise CorruptFileError(
            f"{path} must hold answers, but is damaged ({error}); delete it and run again"
        ) from error
