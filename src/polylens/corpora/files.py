"""Rows out of files of any kind: plain text, JSON Lines, JSON, CSV, TSV, Parquet, the Hub.

What the columns of a row mean is the business of `polylens.corpora.readers`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from polylens.artefacts import parse_json, readable_storage_errors, user_path
from polylens.errors import CorpusError, DownloadError, MissingExtraError
from polylens.languages import is_language
from polylens.offline import is_offline

Row = Mapping[str, Any]

_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")


def read_rows(spec: str | Path, *, offline: bool = False) -> dict[str, list[Row]]:
    """Return the rows of each file, by the file's stem; offline, no network is used."""
    path = user_path(spec)
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
        return {"": _read_hub(str(spec), offline)}
    raise CorpusError(
        f"a corpus must be a file, a folder, a Hub data set id or 'starter', but there is no "
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
    lines = _read_text(path).split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} must be text in UTF-8, but is not; convert it") from error


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(_read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
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
    text = _read_text(path)
    if not text.strip():
        return []
    try:
        loaded = parse_json(text)
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


def _read_hub(spec: str, offline: bool) -> list[Row]:
    """Read a Hub data set, "owner/name" or "owner/name:config"; offline, from the Hub's cache."""
    load_dataset = _load_dataset(f"the Hub data set {spec}")
    name, _, config = spec.partition(":")
    try:
        with _offline_hub() if is_offline(offline) else contextlib.nullcontext():
            found = load_dataset(name, config or None)
    except (ConnectionError, TimeoutError) as error:
        if is_offline(offline):
            raise CorpusError(
                f"{spec} must be in the cache of data sets to be used offline, but is not; load it "
                "once with a network first, or give a local file"
            ) from error
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


@contextlib.contextmanager
def _offline_hub() -> Iterator[None]:
    """Keep both libraries from the network for a while; they read `HF_HUB_OFFLINE` only once."""
    import datasets
    from huggingface_hub import constants

    places: tuple[Any, ...] = (datasets.config, constants)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = value


def _load_dataset(purpose: str) -> Any:
    try:
        from datasets import disable_progress_bars, load_dataset
    except ImportError as error:
        raise MissingExtraError("datasets", "data", purpose) from error
    disable_progress_bars()
    return load_dataset


def corpus_name(spec: str | Path) -> str:
    """Name a corpus without the path of the machine it lies on."""
    return str(spec) if not Path(spec).exists() else Path(spec).resolve().name
