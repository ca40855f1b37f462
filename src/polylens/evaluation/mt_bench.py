"""MT-Bench: open questions of two turns, and a model's answers to them.

A question is asked, answered, and followed by a second one that builds on the answer (Zheng et al.
2023, https://arxiv.org/abs/2306.05685). `read_questions` reads the questions, `answer_sides` lets
models answer, `read_conversations` reads what they said. Grades are `polylens.evaluation.judge`'s.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polylens import distributed
from polylens.artefacts import (
    parse_json,
    read_json,
    readable_storage_errors,
    write_json,
    write_text,
)
from polylens.config import Runtime
from polylens.detection import LanguageDetector, supported_languages
from polylens.errors import CorpusError, UsageError
from polylens.evaluation.generation import TOKEN_BUDGET, generate_answers
from polylens.evaluation.sides import Side, candidate_of, identity_of
from polylens.execution import Execution, open_model
from polylens.languages import normalize_language
from polylens.locks import alone_in
from polylens.models.loading import LanguageModel
from polylens.progress import Progress, silent
from polylens.prompts import PromptFormat, choose_format

N_TURNS = 2

# Questions that are answered together, and lost together if the process is killed.
_CHUNK = 16


@dataclass(frozen=True)
class Question:
    """A question of two turns.

    Attributes:
        id: tells which question it is, within its language.
        category: e.g. "writing".
        language: BCP 47 code.
        turns: the user's texts.
        reference: a right answer to each turn, "" where there is none; or nothing at all.
    """

    id: str
    category: str
    language: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        """Language and id."""
        return self.language, self.id


@dataclass(frozen=True)
class Conversation:
    """A question with a model's answers.

    Attributes:
        question: what was asked.
        answers: one a turn, without special tokens.
        model: the model's name, with the strength of its delta if it has one.
    """

    question: Question
    answers: tuple[str, ...]
    model: str

    def to_dict(self) -> dict[str, Any]:
        """Return one line of a file of answers."""
        asked = dataclasses.asdict(self.question)
        reference = asked.pop("reference")
        given = {"answers": self.answers, "model": self.model}
        return {**asked, **given, **({"reference": reference} if reference else {})}


def read_questions(path: Path, language: str | None = None) -> list[Question]:
    """Read questions.

    Args:
        path: JSONL with `question_id` or `id`, `category`, `turns`, and perhaps `reference` and
            `language` in each line.
        language: of lines that state none; None detects it from all their texts together.

    Raises:
        CorpusError: a line is damaged or lacks something, or two have one id.
        LanguageError: no such language.
    """
    rows = _read_rows(path, "questions")
    unmarked = [values for values, _ in rows if "language" not in values]
    if unmarked:
        code = _detect(unmarked, path) if language is None else normalize_language(language)
        for values in unmarked:
            values["language"] = code
    return _distinct([_question(values, where) for values, where in rows], path)


def read_conversations(path: Path) -> list[Conversation]:
    """Read the answers that `answer_sides` wrote, or others of the same layout.

    Raises:
        CorpusError: a line is damaged or lacks something, or two have one id.
    """
    found = []
    for values, where in _read_rows(path, "answers"):
        answers = _texts(values, "answers", where)
        found.append(Conversation(_question(values, where), answers, str(values.get("model", ""))))
    _distinct([one.question for one in found], path)
    return found


def answer_sides(
    sides: Sequence[Side],
    questions: Sequence[Question],
    out: Path,
    runtime: Runtime,
    *,
    limit: int | None = None,
    template: str = "auto",
    max_new_tokens: int = 512,
    progress: Progress = silent,
    on_execution: Callable[[Execution], None] = lambda execution: None,
) -> list[Path]:
    """Let each side answer every question greedily, and keep its answers in a file of its own.

    `out/LABEL.jsonl` holds one conversation a line, and is written whole after every few
    questions; `out/LABEL.json` says who answered and how. What is answered is not asked again.

    Args:
        sides: from `choose_sides`.
        questions: from `read_questions`.
        out: folder.
        runtime: how it is carried out.
        limit: ask only the first so many; None asks all.
        template: "auto", "chat", "plain" or a Jinja file.
        max_new_tokens: longest answer of a turn, in tokens.
        progress: told how far each piece of work is.
        on_execution: told how each model is run.

    Returns:
        The file of each side.

    Raises:
        UsageError: a conversation cannot fit in the model's context, or the folder holds answers
            of something else.
        RunError: another command is at work in the folder.
    """
    with alone_in(out):
        return _answer_sides(
            sides, questions, out, runtime, limit, template, max_new_tokens, progress, on_execution
        )


def _answer_sides(
    sides: Sequence[Side],
    questions: Sequence[Question],
    out: Path,
    runtime: Runtime,
    limit: int | None,
    template: str,
    max_new_tokens: int,
    progress: Progress,
    on_execution: Callable[[Execution], None],
) -> list[Path]:
    by_model: dict[tuple[str, str | None], list[Side]] = {}
    for side in sides:
        by_model.setdefault((side.model, side.revision), []).append(side)
    for (spec, revision), own in by_model.items():
        model, execution = open_model(
            spec, runtime, revision=revision, with_head=True, progress=progress
        )
        on_execution(execution)
        chat = choose_format(model.tokenizer, template)
        _check_context(model, questions[:limit], chat, max_new_tokens)
        candidates = [candidate_of(side, model) for side in own]
        ready = []
        for side, candidate in zip(own, candidates, strict=True):  # before the first answer
            identity = {
                **identity_of(side, model, execution),
                "questions": _fingerprint(questions),
                "template": template,
                "max_new_tokens": max_new_tokens,
            }
            path = out / f"{side.label}.jsonl"
            ready.append((side, candidate, path, _open(path, identity)))
        for side, candidate, path, kept in ready:
            name = model.name
            if candidate.delta is not None:
                name += f" + delta at {side.strength:g}"
            with candidate.applied(model.structure):
                for conversations in _answer(
                    model,
                    name,
                    questions[:limit],
                    kept,
                    chat,
                    max_new_tokens,
                    token_budget=runtime.token_budget or TOKEN_BUDGET,
                    progress=progress,
                    what=f"questions ({side.label})",
                ):
                    if distributed.is_first():
                        lines = [
                            json.dumps(one.to_dict(), ensure_ascii=False) for one in conversations
                        ]
                        write_text(path, "".join(f"{line}\n" for line in lines))
        del model
    return [out / f"{side.label}.jsonl" for side in sides]


def _answer(
    model: LanguageModel,
    name: str,
    questions: Sequence[Question],
    kept: Sequence[Conversation],
    chat: PromptFormat,
    max_new_tokens: int,
    *,
    token_budget: int,
    progress: Progress,
    what: str,
) -> Iterator[list[Conversation]]:
    """Answer what is not in `kept`, and yield all answers so far after each chunk."""
    found = list(kept)
    there = {one.question.key for one in found}
    left = [question for question in questions if question.key not in there]
    n_done = len(questions) - len(left)
    progress(n_done, len(questions), what)
    for start in range(0, len(left), _CHUNK):
        chunk = left[start : start + _CHUNK]
        said: list[list[str]] = [[] for _ in chunk]  # the user's texts and the model's in turn
        for turn in range(N_TURNS):
            for texts, question in zip(said, chunk, strict=True):
                texts.append(question.turns[turn])
            prompts = [chat.encode_conversation(model.tokenizer, texts) for texts in said]
            own = generate_answers(
                model,
                distributed.own(prompts),
                max_new_tokens=max_new_tokens,
                token_budget=token_budget,
                progress=progress,
            )
            for texts, text in zip(said, distributed.collect_all(own), strict=True):
                texts.append(text)
        found += [
            Conversation(question, tuple(texts[1::2]), name)
            for question, texts in zip(chunk, said, strict=True)
        ]
        yield found
        n_done += len(chunk)
        progress(n_done, len(questions), what)


def _check_context(
    model: LanguageModel, questions: Sequence[Question], chat: PromptFormat, max_new_tokens: int
) -> None:
    """Refuse questions that do not fit in the model's context with the longest answers.

    Raises:
        UsageError: one does not.
    """
    context = model.context_length
    if context is None:
        return
    for question in questions:
        first, second = question.turns
        n_tokens = len(chat.encode_conversation(model.tokenizer, [first, "", second]))
        needed = n_tokens + N_TURNS * max_new_tokens
        if needed > context:
            raise UsageError(
                f"a conversation must fit in the model's context of {context} tokens, but question "
                f"{question.id} needs up to {needed} with answers of {max_new_tokens}; lower "
                "--max-new-tokens"
            )


def _fingerprint(questions: Sequence[Question]) -> str:
    """Return a hash of the questions."""
    plain = [dataclasses.asdict(question) for question in questions]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]


def _open(path: Path, identity: Mapping[str, Any]) -> list[Conversation]:
    """Begin, or go on with, a file of answers.

    Raises:
        UsageError: it holds answers of something else.
    """
    stated = path.with_suffix(".json")
    if stated.exists():
        if read_json(stated) != json.loads(json.dumps(identity)):
            raise UsageError(
                f"{path.parent} must be new or hold answers of the same model, questions and "
                f"settings, but its {stated.name} tells of others; choose another --out or delete "
                "it"
            )
        return read_conversations(path) if path.exists() else []
    if path.exists():
        raise UsageError(
            f"{path} must be new or have {stated.name} beside it, but has not; choose another "
            "--out or delete it"
        )
    if distributed.is_first():
        write_json(stated, identity)
    return []


def _read_rows(path: Path, what: str) -> list[tuple[dict[str, Any], str]]:
    """Return the object of each line, with words that say where it stands."""
    if not path.is_file():
        raise CorpusError(f"{what} must be a JSONL file, but {path} is none; check the path")
    with readable_storage_errors(path):
        content = path.read_bytes()
    rows = []
    try:
        # Not `splitlines`: a text may hold U+2028 and other breaks that JSON leaves as they are.
        lines = content.decode("utf-8-sig").split("\n")
    except ValueError as error:
        raise CorpusError(f"{path} must be UTF-8, but is not ({error}); convert it") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        try:
            values = parse_json(line)
        except ValueError as error:
            raise CorpusError(f"{where} must be JSON, but is not ({error}); mend it") from None
        if not isinstance(values, dict):
            raise CorpusError(f"{where} must be a JSON object, got {line[:40]}; mend it")
        rows.append((values, where))
    if not rows:
        raise CorpusError(f"{what} must stand in {path}, one a line, but it is empty")
    return rows


def _question(values: Mapping[str, Any], where: str) -> Question:
    number = values.get("question_id", values.get("id"))
    category, language = values.get("category"), values.get("language")
    if not isinstance(number, int | str) or not isinstance(category, str):
        raise CorpusError(
            f"{where} must have an id and a category, got {number!r} and {category!r}; add them"
        )
    if not isinstance(language, str):
        raise CorpusError(f"{where} must have a language, got {language!r}; add its code")
    reference = () if values.get("reference") is None else _texts(values, "reference", where)
    turns = _texts(values, "turns", where)
    if not all(turn.strip() for turn in turns):
        raise CorpusError(f"{where} must have turns with text in them, but one is empty; fill it")
    return Question(str(number), category, normalize_language(language), turns, reference)


def _texts(values: Mapping[str, Any], name: str, where: str) -> tuple[str, ...]:
    texts = values.get(name)
    if (
        not isinstance(texts, list)
        or len(texts) != N_TURNS
        or not all(isinstance(text, str) for text in texts)
    ):
        raise CorpusError(
            f"{where} must have {name!r} as a list of {N_TURNS} texts, got {str(texts)[:60]}; "
            "mend it"
        )
    return tuple(texts)


def _detect(rows: Sequence[Mapping[str, Any]], path: Path) -> str:
    """Return the language of the texts that stand in the turns of all rows together."""
    texts = "\n".join(str(row.get("turns", "")) for row in rows)
    found = LanguageDetector(sorted(supported_languages())).detect(texts)
    if found is None:
        raise CorpusError(f"the language of {path} must be stated, since it is hard to tell")
    return found


def _distinct(questions: list[Question], path: Path) -> list[Question]:
    seen: set[tuple[str, str]] = set()
    for question in questions:
        if question.key in seen:
            raise CorpusError(
                f"each question of {path} must have an id of its own, but {question.id!r} occurs "
                f"twice in {question.language}; rename one"
            )
        seen.add(question.key)
    return questions
