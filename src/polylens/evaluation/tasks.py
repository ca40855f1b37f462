"""Benchmarks: which there are, in which protocol, and how they are read.

Tasks that lm-eval has are taken from it, and read their data from the Hub, or from a copy in the
data folder if there is one. XCOPA, COPA and MGSM are defined here: the library that lm-eval reads
them with refuses their loading scripts, and XCOPA's `question` field is wrong at the source in five
languages (mended from English COPA, whose translations the rows are).

Multiple choice comes in two protocols, which can disagree: the likelihood of each answer as a
continuation of the text, and `…_letters`, the paper's: a chat prompt that lists the answers as A
and B, and the probability of these letters as the first token of the reply.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from polylens.artefacts import parse_json, read_text, readable_storage_errors
from polylens.errors import MissingExtraError, UsageError, nearest
from polylens.languages import language_name

# What joins premise and alternative, as in lm-eval's xcopa (its own for all but en and ja).
_CONNECTORS = {
    "en": ("because", "so"),
    "et": ("sest", "seetõttu"),
    "ht": ("poukisa", "donk sa"),
    "id": ("karena", "maka"),
    "it": ("perché", "quindi"),
    "ja": ("なぜなら", "だから"),
    "qu": ("imataq", "chaymi"),
    "sw": ("kwa sababu", "kwa hiyo"),
    "ta": ("காரணமாக", "எனவே"),
    "th": ("เพราะ", "ดังนั้น"),
    "tr": ("çünkü", "bu yüzden"),
    "vi": ("bởi vì", "vì vậy"),
    "zh": ("因为", "所以"),
}
_XCOPA = ("et", "ht", "id", "it", "qu", "sw", "ta", "th", "tr", "vi", "zh")
_WRONG_QUESTIONS = frozenset(("th", "tr", "sw", "id", "it"))

# XCOPA's validation rows are rows 401 to 500 of English COPA.
_FIRST_COPA_ID = 401

_MGSM = ("bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh")
_MGSM_TOKENS = 256  # as lm-eval where a task does not say

_FETCH = {
    "xcopa": "git clone https://github.com/cambridgeltl/xcopa, and put its data/*/val.*.jsonl",
    "copa": "fetch COPA from https://people.ict.usc.edu/~gordon/copa.html, and put copa-dev.xml",
    "copa-ja": "git clone https://github.com/nlp-titech/copa-japanese, and put its dev file",
    "mgsm": "git clone https://github.com/google-research/url-nlp, and put mgsm/*.tsv",
}

# lm-eval's names of languages that we call by their code.
_BELEBELE = {
    "ar": "arb_Arab", "bn": "ben_Beng", "de": "deu_Latn", "en": "eng_Latn", "es": "spa_Latn",
    "fr": "fra_Latn", "hi": "hin_Deva", "id": "ind_Latn", "it": "ita_Latn", "ja": "jpn_Jpan",
    "ko": "kor_Hang", "pt": "por_Latn", "ru": "rus_Cyrl", "sw": "swh_Latn", "ta": "tam_Taml",
    "te": "tel_Telu", "th": "tha_Thai", "tr": "tur_Latn", "vi": "vie_Latn", "yo": "yor_Latn",
    "zh": "zho_Hans",
}  # fmt: skip
_HARNESS_FAMILIES: Mapping[str, Callable[[str], str]] = {
    "belebele": lambda language: f"belebele_{_BELEBELE.get(language, language)}",
    "global_mmlu": lambda language: f"global_mmlu_{language}",
    "include": lambda language: f"include_base_44_{language_name(language).lower()}",
    "xstorycloze": lambda language: f"xstorycloze_{language}",
    "xwinograd": lambda language: f"xwinograd_{'jp' if language == 'ja' else language}",
    "m_mmlu": lambda language: f"m_mmlu_{language}",
    "kmmlu": lambda language: "kmmlu" if language == "ko" else f"kmmlu_{language}",
}
_FAMILIES = ("xcopa", "xcopa_letters", "mgsm", *_HARNESS_FAMILIES)


@dataclass(frozen=True)
class TaskSpec:
    """A benchmark in one language and protocol.

    Attributes:
        name: e.g. "xcopa_sw_letters".
        language: of its texts; None where its name does not tell.
        chat: prompts go through the model's chat template.
        config: lm-eval's configuration of a task of ours, or the name of one of its own.
    """

    name: str
    language: str | None
    chat: bool
    config: Mapping[str, Any] | str


def choose_tasks(
    names: Sequence[str], languages: Sequence[str], data_dir: Path | None, *, chat: bool = False
) -> list[TaskSpec]:
    """Turn names, as users write them, into tasks.

    Args:
        names: families ("xcopa", "belebele", …), which stand for one task a language; tasks of
            ours ("xcopa_sw_letters"); or names that lm-eval knows.
        languages: the languages that families stand for; those that a family lacks are left out.
        data_dir: folder with local copies.
        chat: put lm-eval's own tasks through the chat template.

    Raises:
        UsageError: no such task, or its data are missing.
        MissingExtraError: lm-eval is not installed.
    """
    if names and importlib.util.find_spec("lm_eval") is None:
        raise MissingExtraError("lm-eval", "eval", "evaluation on benchmarks")
    known = _own(data_dir)
    chosen: dict[str, TaskSpec] = {}
    for name in names:
        members = [name]
        if name in _FAMILIES:
            members = [member for k in languages if (member := _member(name, k, known))]
            if not members:
                raise UsageError(
                    f"{name} must have a task in one of the languages asked for, but has none in "
                    f"{', '.join(languages)}; leave it out"
                )
        for member in members:
            if member in known:
                chosen[member] = known[member]()
            else:
                chosen[member] = _of_harness(member, languages, data_dir, chat)
    return list(chosen.values())


def _member(family: str, language: str, known: Mapping[str, Any]) -> str | None:
    """Name of a family's task in a language; None where there is none."""
    if family in _HARNESS_FAMILIES:
        name = _HARNESS_FAMILIES[family](language)
        return name if name in task_manager().all_tasks else None
    stem, _, protocol = family.partition("_")
    name = f"{stem}_{language}{'_' + protocol if protocol else ''}"
    return name if name in known else None


def _own(data_dir: Path | None) -> dict[str, Callable[[], TaskSpec]]:
    """Our own tasks by name; their data are read when one is called for."""
    found: dict[str, Callable[[], TaskSpec]] = {}
    for language in ("en", "ja", *_XCOPA):
        for letters in (False, True):
            name = f"xcopa_{language}{'_letters' if letters else ''}"
            found[name] = lambda name=name, language=language, letters=letters: _choice(  # type: ignore[misc]
                name, language, letters, _alternatives(data_dir, language)
            )
    for language in _MGSM:
        name = f"mgsm_{language}"
        found[name] = lambda name=name, language=language: _maths(name, language, data_dir)  # type: ignore[misc]
    return found


def _choice(name: str, language: str, letters: bool, rows: Sequence[dict[str, Any]]) -> TaskSpec:
    """XCOPA, or COPA, in one language."""
    because, so = _CONNECTORS[language]
    spaced = language not in ("ja", "th", "zh")

    def text(doc: Mapping[str, Any]) -> str:
        connector = because if doc["question"] == "cause" else so
        return f"{doc['premise'].strip()[:-1]} {connector}"

    def choices(doc: Mapping[str, Any]) -> list[str]:
        return [_lowered(doc[key]) for key in ("choice1", "choice2")]

    def prompt(doc: Mapping[str, Any]) -> str:
        asked = (
            "What was the cause?" if doc["question"] == "cause" else "What happened as a result?"
        )
        return (
            f"{doc['premise'].strip()}\n{asked}\nA. {doc['choice1']}\nB. {doc['choice2']}\n"
            "Answer with the letter alone, A or B."
        )

    config = task_config(
        name,
        rows,
        output_type="multiple_choice",
        doc_to_text=prompt if letters else text,
        doc_to_choice=["A", "B"] if letters else choices,
        doc_to_target="label",
        target_delimiter="" if letters or not spaced else " ",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    return TaskSpec(name, language, letters, config)


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]


def _maths(name: str, language: str, data_dir: Path | None) -> TaskSpec:
    """MGSM without examples: the reply to a chat prompt, whose last number is the answer."""
    path = _data_file(data_dir, "mgsm", f"mgsm_{language}.tsv")
    with readable_storage_errors(path), path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    rows = [{"question": line[0], "answer": line[1]} for line in lines if len(line) == 2]
    if not rows:
        raise UsageError(f"{path} must hold questions and answers between tabs, but holds none")

    def prompt(doc: Mapping[str, Any]) -> str:
        return (
            f"{doc['question']}\n\nReason step by step in {language_name(language)}, and end with "
            "the answer as a number."
        )

    def judge(doc: Mapping[str, Any], replies: Sequence[str]) -> dict[str, float]:
        right = _numbers(doc["answer"])
        given = _numbers(replies[0])
        return {"acc": float(bool(given) and given[-1] == right[-1])}

    config = task_config(
        name,
        rows,
        output_type="generate_until",
        doc_to_text=prompt,
        doc_to_target="answer",
        process_results=judge,
        generation_kwargs={"until": [], "do_sample": False, "max_gen_toks": _MGSM_TOKENS},
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    return TaskSpec(name, language, True, config)


def _numbers(text: str) -> list[float]:
    """Numbers in a text, in any script's digits.

    Example:
        >>> _numbers("৭ + 1,200.50 = １２０７.5 元。")
        [7.0, 1200.5, 1207.5]
    """
    digits = "".join(str(unicodedata.digit(c)) if c.isdigit() else c for c in text)
    digits = digits.replace("٫", ".").replace("٬", ",").replace("，", ",")
    return [
        float(found.replace(",", "")) for found in re.findall(r"-?\d+(?:,\d{3})*(?:\.\d+)?", digits)
    ]


def task_config(name: str, rows: Sequence[dict[str, Any]], **settings: Any) -> dict[str, Any]:
    """What lm-eval makes a task of."""

    def read(**_: Any) -> dict[str, Any]:
        import datasets

        return {"test": datasets.Dataset.from_list(list(rows))}

    return {
        "task": name,
        "custom_dataset": read,
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {},
        **settings,
    }


def _alternatives(data_dir: Path | None, language: str) -> list[dict[str, Any]]:
    """Rows of XCOPA's validation part (or COPA's dev part): premise, question, choices, label."""
    if language == "en":
        return list(_copa(data_dir).values())
    if language == "ja":
        return [
            {
                "premise": _without_antecedents(row["premise"]),
                "question": "cause" if row["asks_for"] == "原因" else "effect",
                "choice1": _without_antecedents(row["answer1"]),
                "choice2": _without_antecedents(row["answer2"]),
                "label": int(row["correct_answer"]) - 1,
            }
            for row in _json_rows(_data_file(data_dir, "copa-ja", "copa-ja-dev.jsonl", "copa"))
        ]
    rows = _json_rows(_data_file(data_dir, "xcopa", f"val.{language}.jsonl"))
    if language in _WRONG_QUESTIONS:
        english = _copa(data_dir)
        for row in rows:
            row["question"] = english[row["idx"] + _FIRST_COPA_ID]["question"]
    keys = ("premise", "question", "choice1", "choice2", "label")
    return [{key: row[key] for key in keys} for row in rows]


def _copa(data_dir: Path | None) -> dict[int, dict[str, Any]]:
    """English COPA's dev part by id."""
    path = _data_file(data_dir, "copa", "copa-dev.xml")
    try:
        root = ElementTree.fromstring(read_text(path))
    except ElementTree.ParseError as error:
        raise UsageError(f"{path} must be COPA's XML, but is not ({error})") from error
    return {
        int(item.attrib["id"]): {
            "premise": item.findtext("p", "").strip(),
            "question": item.attrib["asks-for"],
            "choice1": item.findtext("a1", "").strip(),
            "choice2": item.findtext("a2", "").strip(),
            "label": int(item.attrib["most-plausible-alternative"]) - 1,
        }
        for item in root.iter("item")
    }


def _without_antecedents(text: str) -> str:
    """Japanese COPA writes pronouns as `[pronoun](antecedent)`.

    Example:
        >>> _without_antecedents("女性は[彼女の](女性の)友人")
        '女性は彼女の友人'
    """
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)


def _json_rows(path: Path) -> list[dict[str, Any]]:
    lines = read_text(path).splitlines()
    try:
        return [parse_json(line) for line in lines if line.strip()]
    except ValueError as error:
        raise UsageError(
            f"{path} must hold one JSON object a line, but does not ({error})"
        ) from error


def _data_file(data_dir: Path | None, kind: str, name: str, folder: str | None = None) -> Path:
    """Find a file of a benchmark in the data folder, or say where it comes from."""
    folder = folder or kind
    if data_dir is None:
        raise UsageError(
            f"{kind} must be read from a local copy, but --data-dir is not given; {_FETCH[kind]} "
            f"in DATA/{folder}, then give --data-dir DATA"
        )
    path = data_dir / folder / name
    if not path.is_file():
        raise UsageError(
            f"{kind} must be in {data_dir / folder}, but {name} is not there; {_FETCH[kind]} there"
        )
    return path


@functools.cache
def task_manager() -> Any:
    """Return lm-eval's index of tasks; making it takes seconds.

    Raises:
        MissingExtraError: lm-eval is not installed.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtraError("lm-eval", "eval", "evaluation on benchmarks") from error
    return TaskManager()


def _of_harness(name: str, languages: Sequence[str], data_dir: Path | None, chat: bool) -> TaskSpec:
    """A task of lm-eval's own."""
    manager = task_manager()
    if name not in manager.all_tasks:
        known = [*_FAMILIES, *_own(data_dir), *manager.all_tasks]
        raise UsageError(
            f"a task must be one of PolyLens or lm-eval, got {name!r}{nearest(name, known)}; "
            "`polylens evaluate --list-tasks` shows them"
        )
    languages_of = {
        _HARNESS_FAMILIES[family](language): language
        for family in _HARNESS_FAMILIES
        for language in languages
    }
    return TaskSpec(name, languages_of.get(name), chat, name)


def list_tasks(data_dir: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield families with a word on each, then our own tasks."""
    yield from ((name, "lm-eval, one task a language") for name in _HARNESS_FAMILIES)
    yield "xcopa", "XCOPA and COPA, likelihood of the alternatives"
    yield "xcopa_letters", "the same as a chat prompt, by the letters A and B"
    yield "mgsm", "school maths, last number of the reply"
