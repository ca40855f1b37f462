"""From files to corpora.

Every format first becomes rows of dictionaries (`polylens.corpora.files`); `_columns` then finds
which column holds which language. The layouts understood:

- one column a language: `en`, `zh`, `input_en`, `text_sw`, …
- a language column (`language`, `lang`) and a text column, and for parallel rows an id column
- plain text, one file a language (`en.txt`, `sw.txt`), line by line; parallel if the lines are
- Alpaca (`instruction`, `input`) and ShareGPT (`conversations`, `messages`) rows, in a file named
  after its language (`sw.json`) or with a language column
- the published `train.json` (`Instances` with `input_en`, `input_zh`, …) and `test.jsonl`

Answers, where they are wanted, stand in a column of their own (`answer`, `output`, `output_sw`, …)
or are the turn that follows the user's.

Surrounding white space is dropped from every text; nothing else is changed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from polylens.corpora.corpus import AnsweredCorpus, Corpus, ParallelCorpus, require_languages
from polylens.corpora.files import Row, corpus_name, read_rows
from polylens.corpora.starter import starter_corpus
from polylens.errors import CorpusError
from polylens.languages import is_language, normalize_language

STARTER = "starter"
_LANGUAGE_COLUMNS = ("language", "lang", "language_code", "locale")
_TEXT_COLUMNS = (
    "text",
    "prompt",
    "instruction",
    "input",
    "sentence",
    "content",
    "question",
    "inputs",
)
_ANSWER_COLUMNS = ("answer", "output", "response", "completion", "target", "targets")
_ID_COLUMNS = ("id", "idx", "row", "row_id", "parallel_id")
_TURN_COLUMNS = ("conversations", "messages", "conversation")


def read_texts(
    spec: str | Path, languages: Sequence[str] | None = None, *, offline: bool = False
) -> Corpus:
    """Read texts per language, for probing.

    Args:
        spec: a file, a folder with one file a language, a Hub data set id, or "starter".
        languages: those needed; None takes all.
        offline: never use the network.

    Raises:
        CorpusError: nothing there, nothing readable, or a language is missing.
    """
    if str(spec) == STARTER:
        corpus = starter_corpus().split(n_heldout=0)[0].to_corpus()
    else:
        texts: dict[str, list[str]] = {}
        for stem, rows in read_rows(spec, offline=offline).items():
            for row in _texts_by_language(rows, stem, str(spec)):
                for language, text in row.items():
                    texts.setdefault(language, []).append(text)
        corpus = Corpus.make(corpus_name(spec), texts)
    if languages is not None:
        require_languages(corpus, languages)
    return corpus


def read_parallel(
    spec: str | Path, languages: Sequence[str] | None = None, *, offline: bool = False
) -> ParallelCorpus:
    """Read parallel rows, with answers where there are any, for training and evaluation.

    Args:
        spec: as `read_texts`.
        languages: central language first, then targets; None takes all. Rows without the first, or
            with no other, are left out.
        offline: never use the network.

    Raises:
        CorpusError: nothing there, nothing readable, a language is missing, or rows are not
            parallel.
    """
    if str(spec) == STARTER:
        corpus = starter_corpus()
    else:
        files = read_rows(spec, offline=offline)
        if len(files) > 1:
            corpus = ParallelCorpus.make(corpus_name(spec), _zip_files(files, str(spec)))
        else:
            ((stem, rows),) = files.items()
            corpus = ParallelCorpus.make(corpus_name(spec), _parallel_rows(rows, stem, str(spec)))
        answers = {k: dict(pairs) for k, pairs in _pairs(files, spec).items()}
        corpus = dataclasses.replace(corpus, answers=answers)
    return corpus if languages is None else corpus.select(languages)


def read_answered(spec: str | Path, *, offline: bool = False) -> AnsweredCorpus:
    """Read prompts with their answers, for supervised fine-tuning.

    Args:
        spec: as `read_texts`.
        offline: never use the network.

    Returns:
        Those that have an answer, and a language that can be told; there may be none.

    Raises:
        CorpusError: nothing there, or nothing readable.
    """
    if str(spec) == STARTER:
        return starter_corpus().split(n_heldout=0)[0].to_answered()
    return AnsweredCorpus.make(corpus_name(spec), _pairs(read_rows(spec, offline=offline), spec))


def _pairs(
    files: Mapping[str, Sequence[Row]], spec: str | Path
) -> dict[str, list[tuple[str, str]]]:
    """Return language → (prompt, answer), neither of them blank."""
    pairs: dict[str, list[tuple[str, str]]] = {}
    for stem, rows in files.items():
        for language, prompt, answer in _answered(rows, stem, str(spec)):
            if prompt and answer:
                pairs.setdefault(language, []).append((prompt, answer))
    return pairs


def _answered(rows: Sequence[Row], stem: str, where: str) -> Iterator[tuple[str, str, str]]:
    """Yield language, prompt and answer of rows of any layout; an answer may be blank."""
    language_column = next((column for column in _LANGUAGE_COLUMNS if column in rows[0]), None)
    columns = {} if language_column else _columns(rows)
    if columns:
        answers = {language: name for name, language in _columns(rows, answers=True).items()}
        for row in rows:
            for column, language in columns.items():
                yield language, _text(row.get(column)), _text(row.get(answers.get(language, "")))
        return
    if language_column is None and not is_language(stem):
        return
    for row in rows:
        code = row.get(language_column) if language_column else stem
        if code and (answer := _reply(row)):
            yield normalize_language(str(code)), _turn(row, where), answer


def _texts_by_language(rows: Sequence[Row], stem: str, where: str) -> list[dict[str, str]]:
    """Turn rows of any layout into rows of language → text."""
    first = rows[0]
    language_column = next((column for column in _LANGUAGE_COLUMNS if column in first), None)
    columns = {} if language_column else _columns(rows)
    if columns:
        return [
            {
                language: text
                for column, language in columns.items()
                if (text := _text(row.get(column)))
            }
            for row in rows
        ]
    if language_column:
        return [
            {normalize_language(str(row[language_column])): text}
            for row in rows
            if row.get(language_column) and (text := _turn(row, where))
        ]
    if is_language(stem):
        return [{normalize_language(stem): _turn(row, where)} for row in rows]
    raise CorpusError(
        f"{where} must have a column for each language (en, zh, input_en, …), or a language column "
        f"and a text column, or be named after its language, but its columns are "
        f"{', '.join(map(str, first))}; rename them"
    )


def _columns(rows: Sequence[Row], *, answers: bool = False) -> dict[str, str]:
    """Return column → language for columns named after a language, by code alone or as "…_code".

    Args:
        rows: of any layout.
        answers: return those that hold answers, instead of those that hold texts.
    """
    names = dict.fromkeys(key for row in rows[:100] for key in row)
    found = {}
    for name in names:
        code = name if _is_code(name) else re.split(r"[_.]", name, maxsplit=1)[-1]
        if _is_code(code):
            found[name] = normalize_language(code)
    if answers:
        return {name: language for name, language in found.items() if _is_answer(name)}
    # "id" and "url" name a row or its source far more often than they mean Indonesian or Urali.
    for name in list(found):
        if name.endswith("_id") or name == "url" or (name == "id" and len(found) < 2):
            del found[name]
    if "id" in found and not all(" " in str(row.get("id", "")) for row in rows[:100]):
        del found["id"]
    if len(set(found.values())) < len(found):  # input_en and output_en: the prompts are meant
        found = {name: language for name, language in found.items() if not _is_answer(name)}
    return found if len(set(found.values())) > 1 or "text" not in names else {}


def _is_answer(name: str) -> bool:
    return re.split(r"[_.]", name)[0] in _ANSWER_COLUMNS


def _is_code(name: str) -> bool:
    return (
        bool(re.fullmatch(r"[a-zA-Z]{2,3}([-_][a-zA-Z]{2,4})?", name))
        and is_language(name)
        and name
        not in (
            *_ID_COLUMNS[1:],
            *_TEXT_COLUMNS,
        )
    )


def _parallel_rows(rows: Sequence[Row], stem: str, where: str) -> list[dict[str, str]]:
    """Return rows of language → text; long layouts are joined by their id."""
    language_column = next((column for column in _LANGUAGE_COLUMNS if column in rows[0]), None)
    if language_column is None:
        return _texts_by_language(rows, stem, where)
    id_column = next((column for column in _ID_COLUMNS if column in rows[0]), None)
    if id_column is None:
        raise CorpusError(
            f"rows of {where} must be parallel: with a language column they need an id column "
            f"({', '.join(_ID_COLUMNS)}) that says which texts belong together; add one"
        )
    joined: dict[Any, dict[str, str]] = {}
    for row, texts in zip(rows, _texts_by_language(rows, stem, where), strict=True):
        if not isinstance(row.get(id_column), str | int | float):
            raise CorpusError(
                f"each row of {where} must have an id in its column {id_column}, but one has "
                f"{str(row.get(id_column))[:40]!r}; add it"
            )
        joined.setdefault(row[id_column], {}).update(texts)
    return list(joined.values())


def _zip_files(files: Mapping[str, Sequence[Row]], where: str) -> list[dict[str, str]]:
    """Join files of one language each, line by line."""
    counts = {stem: len(rows) for stem, rows in files.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{stem} has {count}" for stem, count in counts.items())
        raise CorpusError(
            f"the files of {where} must be parallel line by line, but their lengths differ: "
            f"{listed}; give files of equal length"
        )
    languages = {stem: normalize_language(stem) for stem in files}
    return [
        {
            languages[stem]: text
            for stem, row in zip(files, group, strict=True)
            if (text := _turn(row, where))
        }
        for group in zip(*files.values(), strict=True)
    ]


def _turn(row: Row, where: str) -> str:
    """Return a row's text: Alpaca's instruction with its input, ShareGPT's first human turn."""
    for column in _TURN_COLUMNS:
        if isinstance(row.get(column), list):
            turns = map(_fields, row[column])
            asked = next(filter(_is_users, turns), {})
            return _text(asked.get("value", asked.get("content")))
    if "instruction" in row:
        return "\n\n".join(filter(None, (_text(row["instruction"]), _text(row.get("input")))))
    for column in _TEXT_COLUMNS:
        if column in row:
            return _text(row[column])
    raise CorpusError(
        f"{where} must have a text column ({', '.join(_TEXT_COLUMNS)}) or conversations, but its "
        f"columns are {', '.join(map(str, row))}; rename one"
    )


def _reply(row: Row) -> str:
    """Return a row's answer: of a conversation, the turn after the first human one."""
    for column in _TURN_COLUMNS:
        if isinstance(row.get(column), list):
            turns = map(_fields, row[column])
            if not any(map(_is_users, turns)):
                return ""
            answer = next(turns, {})
            return _text(answer.get("value", answer.get("content")))
    return next((_text(row[column]) for column in _ANSWER_COLUMNS if column in row), "")


def _fields(turn: Any) -> Row:
    return turn if isinstance(turn, dict) else {}


def _is_users(turn: Row) -> bool:
    return turn.get("from") in ("human", "user") or turn.get("role") == "user"


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""
