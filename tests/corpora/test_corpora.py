"""Corpora: what they hold, every layout, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from polylens.corpora import (
    Corpus,
    ParallelCorpus,
    read_answered,
    read_parallel,
    read_texts,
    starter_corpus,
)
from polylens.corpora.inspection import inspect_corpus
from polylens.detection import LanguageDetector
from polylens.errors import CorpusError, LanguageError
from polylens.evaluation.fidelity import is_echo, is_repeating
from tiny import tiny_tokenizer

LENS = Path(__file__).parents[2] / ".." / "shared" / "data" / "lens"
NTREX = LENS.parent / "ntrex"
EN, SW = ["Hello there", "Good night"], ["Habari gani", "Usiku mwema"]


def jsonl(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


PARALLEL: dict[str, Callable[[Path], object]] = {
    "columns.jsonl": lambda p: p.write_text(
        jsonl([{"id": i, "en": a, "sw": b} for i, (a, b) in enumerate(zip(EN, SW, strict=True))])
    ),
    "prefixed.json": lambda p: p.write_text(
        json.dumps(
            [{"input_en": a + "\n", "input_swh_Latn": b} for a, b in zip(EN, SW, strict=True)]
        )
    ),
    "published.json": lambda p: p.write_text(
        json.dumps(
            {
                "Definition": [""],
                "Positive Examples": [],
                "Instances": [
                    {"input_en": a, "input_sw": b, "output": ""}
                    for a, b in zip(EN, SW, strict=True)
                ],
            }
        )
    ),
    "columns.csv": lambda p: p.write_text(
        "en,sw\n" + "".join(f"{a},{b}\n" for a, b in zip(EN, SW, strict=True))
    ),
    "columns.tsv": lambda p: p.write_text(
        "en\tsw\n" + "".join(f"{a}\t{b}\n" for a, b in zip(EN, SW, strict=True))
    ),
    "long.jsonl": lambda p: p.write_text(
        jsonl(
            [
                {"id": i, "lang": language, "text": text}
                for language, texts in (("en", EN), ("Swahili", SW))
                for i, text in enumerate(texts)
            ]
        )
    ),
    "columns.parquet": lambda p: _parquet(p),
    "folder": lambda p: [
        p.mkdir(),
        (p / "en.txt").write_text("\n".join(EN)),
        (p / "sw.txt").write_text("\n".join(SW)),
        (p / "README.md").write_text("not a language"),
    ],
    "alpaca": lambda p: [
        p.mkdir(),
        *(
            (p / f"{k}.json").write_text(
                json.dumps([{"instruction": t, "output": "-"} for t in texts])
            )
            for k, texts in (("en", EN), ("sw", SW))
        ),
    ],
    "sharegpt": lambda p: [
        p.mkdir(),
        *(
            (p / f"{k}.jsonl").write_text(
                jsonl(
                    [
                        {
                            "conversations": [
                                {"from": "human", "value": t},
                                {"from": "gpt", "value": "-"},
                            ]
                        }
                        for t in texts
                    ]
                )
            )
            for k, texts in (("en", EN), ("sw", SW))
        ),
    ],
}


def _parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"en": EN, "sw": SW}), path)


@pytest.mark.parametrize("name", PARALLEL)
def test_every_layout_gives_the_same_corpus(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    PARALLEL[name](path)
    corpus = read_parallel(path, ["en", "sw"])
    assert [dict(row) for row in corpus.rows] == [
        {"en": a, "sw": b} for a, b in zip(EN, SW, strict=True)
    ]
    texts = read_texts(path, ["sw"])
    assert texts.texts["sw"] == tuple(SW)
    assert corpus.name == name


def test_alpaca_input_follows_its_instruction(tmp_path: Path) -> None:
    path = tmp_path / "sw.json"
    path.write_text(json.dumps([{"instruction": "Fupisha:", "input": "Maandishi", "output": "x"}]))
    assert read_texts(path).texts == {"sw": ("Fupisha:\n\nMaandishi",)}


def test_messages_take_the_first_user_turn(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "Habari"}]
    path.write_text(jsonl([{"language": "sw", "messages": messages}]))
    assert read_texts(path).texts == {"sw": ("Habari",)}


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("", "x.jsonl", "is empty"),
        ('{"en": "a"}\nnonsense\n', "x.jsonl", "line 2 does not"),
        ("[1, 2]", "x.json", "list of objects"),
        ("{", "x.json", "must hold JSON"),
        (jsonl([{"question": "a", "answer": "b"}]), "x.jsonl", "its columns are question, answer"),
        (jsonl([{"lang": "sw", "foo": "b", "id": 1}]), "x.jsonl", "must have a text column"),
        (jsonl([{"lang": "sw", "text": "b"}]), "x.jsonl", "they need an id column"),
        ("a,b", "x.xlsx", "must end in"),
        (jsonl([{"en": " ", "sw": ""}]), "x.jsonl", "holds none"),
    ],
)
def test_files_that_are_no_corpus(tmp_path: Path, content: str, name: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(CorpusError, match=message):
        read_parallel(path)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"input_en": "a", "output_en": "b", "input_sw": "c", "output_sw": "d"}], ["a", "c"]),
        ([{"en": "a", "sw": "c", "question_id": "q1", "id": "x_1", "url": "u"}], ["a", "c"]),
    ],
)
def test_answers_and_names_of_rows_are_not_taken_for_prompts(
    tmp_path: Path, rows: list[dict[str, object]], expected: list[str]
) -> None:
    (tmp_path / "x.jsonl").write_text(jsonl(rows))
    (row,) = read_parallel(tmp_path / "x.jsonl").rows
    assert [row["en"], row["sw"]] == expected
    assert len(row) == 2


def test_answers_stay_with_their_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    rows: list[dict[str, object]] = [{"en": a, "sw": b} for a, b in zip(EN, SW, strict=True)]
    path.write_text(jsonl(rows))
    bare = read_parallel(path, ["en", "sw"])
    assert bare.n_answers == {"en": 0, "sw": 0}
    rows[1] |= {"answer_en": "Sleep well", "answer_sw": " Lala salama "}
    path.write_text(jsonl(rows))
    corpus = read_parallel(path, ["en", "sw"])
    assert corpus.rows == bare.rows
    assert corpus.n_answers == {"en": 1, "sw": 1}
    assert corpus.answer("sw", SW[1]) == "Lala salama"
    assert corpus.answer("sw", SW[0]) is corpus.answer("zh", SW[1]) is None
    for part in (*corpus.split(1), corpus.limit(1)):
        (row,) = part.rows
        assert (part.answer("en", row["en"]) is None) == (row["en"] == EN[0])
        without = ParallelCorpus("x", part.rows)
        assert (part.fingerprint == without.fingerprint) == (row["en"] == EN[0])
    assert corpus.fingerprint != bare.fingerprint


def test_encodings(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl([{"en": "a", "sw": "b"}]).encode())
    assert read_parallel(tmp_path / "x.jsonl").rows[0]["en"] == "a"
    (tmp_path / "en.txt").write_text("one\u2028line\nsecond\n", encoding="utf-8")
    assert len(read_texts(tmp_path / "en.txt").texts["en"]) == 2
    (tmp_path / "sw.txt").write_bytes("\xe9t\xe9".encode("latin-1"))
    with pytest.raises(CorpusError, match="must be text in UTF-8"):
        read_texts(tmp_path / "sw.txt")


def test_files_of_different_length_are_not_parallel(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text("a\nb\nc")
    (tmp_path / "sw.txt").write_text("a\nb")
    with pytest.raises(CorpusError, match="en has 3, sw has 2"):
        read_parallel(tmp_path)
    assert len(read_texts(tmp_path).texts["en"]) == 3


def test_rows_may_lack_a_language_and_are_counted() -> None:
    corpus = ParallelCorpus.make(
        "x", [{"en": "a", "sw": "b"}, {"en": "c", "zh": "d"}, {"sw": "e"}, {"en": "f"}]
    )
    assert corpus.n_missing == {"en": 1, "sw": 2, "zh": 3}
    kept = corpus.select(["en", "sw", "zh"])
    assert [dict(row) for row in kept.rows] == [{"en": "a", "sw": "b"}, {"en": "c", "zh": "d"}]
    with pytest.raises(CorpusError, match="none holds both sw and zh"):
        corpus.select(["sw", "zh"])
    with pytest.raises(CorpusError, match="has none in ko; it holds en, sw, zh"):
        corpus.select(["en", "ko"])


def test_splits_are_disjoint_whole_and_fixed_by_the_seed() -> None:
    corpus = ParallelCorpus.make("x", [{"en": f"t{i}", "sw": f"s{i}"} for i in range(20)])
    train, heldout = corpus.split(5, seed=3)
    assert len(heldout.rows) == 5
    assert {r["en"] for r in train.rows} | {r["en"] for r in heldout.rows} == {
        f"t{i}" for i in range(20)
    }
    assert corpus.split(5, seed=3)[1] == heldout != corpus.split(5, seed=4)[1]
    with pytest.raises(CorpusError, match=r"holds 20 and evaluate\.rows is 20"):
        corpus.split(20)


def test_sampling_and_fingerprints() -> None:
    corpus = Corpus.make("x", {"en": [str(i) + " text" for i in range(50)], "sw": ["moja"]})
    few = corpus.select(["en", "sw"], 10, seed=1)
    assert len(few.texts["en"]) == 10
    assert few == corpus.select(["en", "sw"], 10, seed=1)
    assert few.fingerprint != corpus.fingerprint
    with pytest.raises(LanguageError):
        Corpus.make("x", {"qq": ["a"]})


def test_the_starter_corpus() -> None:
    corpus = starter_corpus()
    assert len(corpus.rows) == 128
    assert corpus.n_heldout == 32
    assert corpus.languages == ("en", "zh", "ja", "ko", "ar", "bn", "sw", "es", "fr", "de")
    detector = LanguageDetector(corpus.languages)
    for language in corpus.languages:
        texts = [row[language] for row in corpus.rows]
        assert len(set(texts)) == 128
        assert sum(detector.detect(text) == language for text in texts) >= 122
        if language != "en":
            assert not any(row[language] == row["en"] for row in corpus.rows)
        answers = [corpus.answer(language, text) or "" for text in texts]
        assert len(set(answers)) == 128
        assert all(detector.detect(answer) == language for answer in answers)
        assert not any(map(is_echo, texts, answers))
        assert not any(map(is_repeating, answers))
    train, heldout = corpus.split(32)
    assert (len(train.rows), len(heldout.rows)) == (96, 32)
    assert read_texts("starter").texts["sw"] == tuple(row["sw"] for row in train.rows)
    learned = read_answered("starter").pairs["sw"]
    assert learned == tuple((row["sw"], corpus.answer("sw", row["sw"])) for row in train.rows)


def test_inspection_finds_what_is_wrong() -> None:
    rows = [
        {"en": "The weather is fine today", "sw": "Hali ya hewa ni nzuri leo"},
        {"en": "The weather is fine today", "sw": "The weather is fine today"},
        {"en": "Where is the old market", "sw": "Wapi ni soko la zamani hapa mjini"},
        {"en": "I would like some water"},
    ]
    report = inspect_corpus(
        ParallelCorpus.make("x", rows), tokenizer=tiny_tokenizer(), max_tokens=30
    )
    en, sw = report.languages
    assert (en.n_texts, en.n_missing, en.n_duplicates, en.n_untranslated) == (4, 0, 1, 0)
    assert (sw.n_texts, sw.n_missing, sw.n_untranslated) == (3, 1, 1)
    assert sw.foreign == ((1, "en"),)
    assert en.n_tokens == sum(len(row["en"]) for row in rows)
    pairs = [row for row in rows if "sw" in row]
    premium = sum(len(row["sw"]) for row in pairs) / sum(len(row["en"]) for row in pairs)
    assert sw.token_premium == pytest.approx(premium)
    assert sw.n_truncated == 1
    assert any("equal the central language's text" in warning for warning in report.warnings)
    assert inspect_corpus(ParallelCorpus.make("x", rows)).languages[0].n_tokens is None


@pytest.mark.skipif(not LENS.exists(), reason="the paper's data is not here")
def test_the_published_files_load_as_they_are() -> None:
    languages = ("en", "zh", "ja", "ko", "ar", "bn", "sw")
    texts = read_texts(LENS / "probing_texts_7_languages.jsonl", languages)
    assert {k: len(v) for k, v in texts.texts.items()} == dict.fromkeys(languages, 300)
    rows = read_parallel(LENS / "parallel_instructions_7_languages.json", languages)
    assert len(rows.rows) == 200
    assert rows.rows[0]["en"] == "Give three tips for staying healthy."


@pytest.mark.skipif(not NTREX.exists(), reason="NTREX is not here")
def test_a_folder_of_plain_text_files() -> None:
    rows = read_parallel(NTREX, ["en", "sw", "yo"])
    assert len(rows.rows) > 1990


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_offline_reads_no_data_set_of_the_hub(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    from huggingface_hub import constants

    for place in (datasets.config, constants):
        monkeypatch.setattr(place, "HF_HUB_OFFLINE", False)  # as without the tests' own setting
    monkeypatch.delenv("HF_HUB_OFFLINE")
    if by == "environment":
        monkeypatch.setenv("POLYLENS_OFFLINE", "1")

    def connect(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr("socket.socket.connect", connect)
    monkeypatch.setattr("socket.getaddrinfo", connect)
    with pytest.raises(CorpusError, match="to be used offline, but is not"):
        read_parallel("nobody/nothing", offline=by == "argument")
    assert not constants.HF_HUB_OFFLINE
