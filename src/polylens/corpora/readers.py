"""From files to corpora.

Every format first becomes rows of dictionaries; `_columns` then finds which column holds which
language. JSON, JSONL and plain text are read here; CSV, TSV, Parquet and Hub data sets by the
`datasets` library. The layouts understood:

- one column a language: `en`, `zh`, `input_en`, `text_sw`, …
- a language column (`language`, `lang`) and a text column, and for parallel rows an id column
- plain text, one file a language (`en.txt`, `sw.txt`), line by line; parallel if the lines are
- Alpaca (`instruction`, `input`) and ShareGPT (`conversations`, `messages`) rows, in a file named
  after its language (`sw.json`) or with a language column
- the published `train.json` (`Instances` with `input_en`, `input_zh`, …) and `test.jsonl`

Surrounding white space is dropped from every text; nothing else is changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polylens.artefacts import readable_storage_errors
from polylens.corpora.corpus import Corpus, ParallelCorpus, require_languages
from polylens.corpora.starter import starter_corpus
from polylens.errors import CorpusError, DownloadError, MissingExtraError
from polylens.languages import is_language, normalize_language

Row = Mapping[str, Any]

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
_ID_COLUMNS = ("id", "idx", "row", "row_id", "parallel_id")
_TURN_COLUMNS = ("conversations", "messages", "conversation")
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")


def read_texts(spec: str | Path, languages: Sequence[str] | None = None) -> Corpus:
    """Read texts per language, for probing.

    Args:
        spec: a file, a folder with one file a language, a Hub data set id, or "starter".
        languages: those needed; None takes all.

    Raises:
        CorpusError: nothing there, nothing readable, or a language is missing.
    """
    if str(spec) == STARTER:
        corpus = starter_corpus().split(n_heldout=0)[0].to_corpus()
    else:
        texts: dict[str, list[str]] = {}
        for stem, rows in _read(spec).items():
            for row in _texts_by_language(rows, stem, str(spec)):
                for language, text in row.items():
                    texts.setdefault(language, []).append(text)
        corpus = Corpus.make(_name(spec), texts)
    if languages is not None:
        require_languages(corpus, languages)
    return corpus


def read_parallel(spec: str | Path, languages: Sequence[str] | None = None) -> ParallelCorpus:
    """Read parallel rows, for training and evaluation.

    Args:
        spec: as `read_texts`.
        languages: central language first, then targets; None takes all. Rows without the first, or
            with no other, are left out.

    Raises:
        CorpusError: nothing there, nothing readable, a language is missing, or rows are not
            parallel.
    """
    if str(spec) == STARTER:
        corpus = starter_corpus()
    else:
        files = _read(spec)
        if len(files) > 1:
            corpus = ParallelCorpus.make(_name(spec), _zip_files(files, str(spec)))
        else:
            ((stem, rows),) = files.items()
            corpus = ParallelCorpus.make(_name(spec), _parallel_rows(rows, stem, str(spec)))
    return corpus if languages is None else corpus.select(languages)


def _read(spec: str | Path) -> dict[str, list[Row]]:
    """Return the rows of each file, by the file's stem."""
    path = Path(spec).expanduser()
    with readable_storage_errors(path):
        if path.is_dir():
            files = sorted(
                file
                for file in path.iterdir()
                if file.suffix in _SUFFIXES and is_language(file.stem.split(".")[-1])
            )
            if not files:
                raise CorpusError(
                    "a corpus folder must hold one file a language, named after it (en.txt, "
                    f"sw.txt), but {path} holds none; rename the files or give one file"
                )
            return {file.stem.split(".")[-1]: _read_file(file) for file in files}
        if path.is_file():
            return {path.stem.split(".")[-1]: _read_file(path)}
    if re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", str(spec)) and not path.suffix:
        return {"": _read_hub(str(spec))}
    raise CorpusError(
        f"a corpus must be a file, a folder, a Hub data set id or '{STARTER}', but there is no "
        f"{spec}; check the path"
    )


def _read_file(path: Path) -> list[Row]:
    if path.suffix == ".txt":
        # Blank lines stay, so that the lines of parallel files keep their partners.
        rows: list[Row] = [{"text": line} for line in _read_lines(path)]
    elif path.suffix == ".jsonl":
        rows = _read_jsonl(path)
    elif path.suffix == ".json":
        rows = _read_json(path)
    elif path.suffix in (".csv", ".tsv", ".parquet"):
        rows = _read_with_datasets(path)
    else:
        raise CorpusError(
            f"a corpus file must end in {', '.join(_SUFFIXES)}, got {path.name}; convert or rename "
            "it"
        )
    if not rows:
        raise CorpusError(
            f"a corpus must hold at least one row, but {path} is empty; check the file"
        )
    return rows


def _read_lines(path: Path) -> list[str]:
    """Lines of a UTF-8 file; not `splitlines`, since a text may hold U+2028 and other breaks."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} must be text in UTF-8, but is not; convert it") from error
    return lines[:-1] if lines[-1] == "" else lines


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(_read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CorpusError(
                f"{path} must hold JSON in each line, but line {number} does not ({error})"
            ) from error
        if not isinstance(row, dict):
            raise CorpusError(
                f"{path} must hold a JSON object in each line, but line {number} holds none; mend "
                "it"
            )
        rows.append(row)
    return rows


def _read_json(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8")
    if not text.strip():
        return []
    try:
        loaded = json.loads(text)
    except ValueError as error:
        raise CorpusError(f"{path} must hold JSON, but does not ({error}); mend it") from error
    if isinstance(loaded, dict):  # the published layout, or rows under some other name
        lists = [value for value in loaded.values() if isinstance(value, list) and value]
        loaded = loaded.get("Instances") or (lists[0] if len(lists) == 1 else loaded)
    if not isinstance(loaded, list) or not all(isinstance(row, dict) for row in loaded):
        raise CorpusError(
            f"{path} must hold a list of objects, or Instances with one; see docs/data.md"
        )
    return loaded


def _read_with_datasets(path: Path) -> list[Row]:
    load_dataset = _load_dataset(f"reading {path.suffix} files")
    kind = "parquet" if path.suffix == ".parquet" else "csv"
    options = {"sep": "\t"} if path.suffix == ".tsv" else {}
    if path.stat().st_size == 0:
        return []
    try:
        return list(load_dataset(kind, data_files=str(path), split="train", **options))
    except Exception as error:  # datasets wraps whatever pandas and Arrow raise
        cause = error.__cause__ or error
        raise CorpusError(
            f"{path} must be a readable {path.suffix} file, but is not ({cause}); mend it"
        ) from error


def _read_hub(spec: str) -> list[Row]:
    """Read a Hub data set, "owner/name" or "owner/name:config"."""
    load_dataset = _load_dataset(f"the Hub data set {spec}")
    name, _, config = spec.partition(":")
    try:
        found = load_dataset(name, config or None)
    except (ConnectionError, TimeoutError) as error:
        raise DownloadError(
            f"{spec} must be downloadable from the Hub, but the Hub cannot be reached; give a "
            "local file"
        ) from error
    except Exception as error:  # a library boundary: missing, gated, scripted, malformed
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CorpusError(
            f"{spec} must be a file, a folder or a readable Hub data set, but is not ({reason})"
        ) from error
    split = "train" if "train" in found else next(iter(found))
    return list(found[split])


def _load_dataset(purpose: str) -> Any:
    try:
        from datasets import disable_progress_bars, load_dataset
    except ImportError as error:
        raise MissingExtraError("datasets", "data", purpose) from error
    disable_progress_bars()
    return load_dataset


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


def _columns(rows: Sequence[Row]) -> dict[str, str]:
    """Return column → language for columns named after a language, by code alone or as "…_code"."""
    names = dict.fromkeys(key for row in rows[:100] for key in row)
    found = {}
    for name in names:
        code = name if _is_code(name) else re.split(r"[_.]", name, maxsplit=1)[-1]
        if _is_code(code):
            found[name] = normalize_language(code)
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
    return re.split(r"[_.]", name)[0] in ("output", "answer", "response", "target", "completion")


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
            for turn in row[column]:
                if turn.get("from") in ("human", "user") or turn.get("role") == "user":
                    return _text(turn.get("value", turn.get("content")))
            return ""
    if "instruction" in row:
        return "\n\n".join(filter(None, (_text(row["instruction"]), _text(row.get("input")))))
    for column in _TEXT_COLUMNS:
        if column in row:
            return _text(row[column])
    raise CorpusError(
        f"{where} must have a text column ({', '.join(_TEXT_COLUMNS)}) or conversations, but its "
        f"columns are {', '.join(map(str, row))}; rename one"
    )


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""


def _name(spec: str | Path) -> str:
    """Name a corpus without the path of the machine it lies on."""
    return str(spec) if not Path(spec).exists() else Path(spec).resolve().name
