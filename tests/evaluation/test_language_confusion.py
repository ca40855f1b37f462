"""Language confusion: what counts as an answer in the language asked for, on real sentences."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from polylens.errors import UsageError
from polylens.evaluation.language_confusion import (
    Judgement,
    fasttext_detector,
    judge_answer,
    second_detector,
    summarise_confusion,
)

SENTENCES = {
    "en": "The rain in the mountains did not stop until the evening.",
    "zh": "山里的雨一直下到傍晚才停,我们只好在屋里喝茶聊天。",
    "ja": "山の雨は夕方まで止まなかったので、家でお茶を飲みました。",
    "ko": "산에 내린 비는 저녁까지 그치지 않아서 우리는 집에 있었다.",
    "ar": "لم يتوقف المطر في الجبال حتى المساء فبقينا في البيت نشرب الشاي.",
    "bn": "পাহাড়ে সন্ধ্যা পর্যন্ত বৃষ্টি থামেনি, তাই আমরা ঘরে বসে চা খেলাম।",
    "th": "ฝนบนภูเขาตกจนถึงเย็น เราจึงนั่งดื่มชาอยู่ในบ้าน",
    "ru": "Дождь в горах не прекращался до самого вечера, и мы остались дома.",
    "sw": "Mvua katika milima haikukoma hadi jioni, kwa hiyo tulikaa nyumbani tukinywa chai.",
    "es": "La lluvia en las montañas no paró hasta la tarde y nos quedamos en casa.",
}


DETECT, SECOND = fasttext_detector(), second_detector(tuple(SENTENCES))


def judge(language: str, answer: str) -> Judgement:
    return judge_answer(language, answer, DETECT, SECOND)


@pytest.mark.parametrize("language", SENTENCES)
def test_a_sentence_is_in_its_language_and_in_no_other(language: str) -> None:
    for asked in SENTENCES:
        found = judge(asked, SENTENCES[language])
        assert found.answered == language
        assert found.line_passed is (asked == language)
        assert found.disagree is False


def test_one_wrong_line_is_enough() -> None:
    found = judge("ru", "\n".join((SENTENCES["ru"], SENTENCES["en"], SENTENCES["ru"])))
    assert found.wrong_lines == (SENTENCES["en"],)
    assert found.answered == "ru"
    assert found.line_passed is False
    assert found.word_passed is None  # judged only where every line passes


@pytest.mark.parametrize(("language", "word"), [("ar", "weather"), ("ja", "mountain")])
def test_one_english_word_is_enough(language: str, word: str) -> None:
    found = judge(language, f"{SENTENCES[language]} {word}")
    assert (found.line_passed, found.word_passed) == (True, False)
    assert found.wrong_words == (word,)


@pytest.mark.parametrize("harmless", ["NASA", "Python", "pip", "xqzzk"])
def test_names_and_what_is_in_no_dictionary_are_no_english(harmless: str) -> None:
    assert judge("ar", f"{SENTENCES['ar']} {harmless}").word_passed is True


def test_words_are_not_judged_in_latin_letters() -> None:
    assert judge("es", f"{SENTENCES['es']} weather").word_passed is None


@pytest.mark.parametrize(
    "left_out",
    [
        f"```python\n{SENTENCES['en']}\n```",
        "`return the weather`",
        f"“{SENTENCES['en']}”",
        f"「{SENTENCES['en']}」",
        f"https://example.org/{SENTENCES['en'].replace(' ', '/')}",
        f"```\n{SENTENCES['en']}",  # cut off by the longest answer
    ],
)
def test_code_quotations_and_addresses_are_left_out(left_out: str) -> None:
    found = judge("zh", f"{SENTENCES['zh']}\n{left_out}")
    assert (found.line_passed, found.word_passed) == (True, True)


@pytest.mark.parametrize("answer", ["", " \n "])
def test_an_empty_answer(answer: str) -> None:
    found = judge("zh", answer)
    assert (found.answered, found.line_passed) == ("empty", None)


@pytest.mark.parametrize("answer", ["42", "oui", "12. 7 + 5 = 12", "山雨", "...", "😀" * 20])
def test_a_short_answer_is_not_judged(answer: str) -> None:
    found = judge("zh", answer)
    assert (found.answered, found.n_lines, found.disagree) == ("unknown", 0, None)
    (summary,) = summarise_confusion([found])
    assert (summary.n, summary.too_short, summary.empty, summary.line.n) == (1, 1, 0, 0)


def test_scripts_that_belong_together_are_not_mixed() -> None:
    assert not judge("ja", SENTENCES["ja"]).mixed  # Han, Hiragana and Katakana
    assert judge("ja", SENTENCES["ja"] + SENTENCES["en"]).mixed
    assert not judge("ja", SENTENCES["en"]).mixed  # wrong, but not mixed


def test_rates_by_hand() -> None:
    answers = [SENTENCES["ar"], SENTENCES["ar"], f"{SENTENCES['ar']} weather", SENTENCES["en"], ""]
    (found,) = summarise_confusion([judge("ar", answer) for answer in answers])
    assert (found.n, found.empty, found.line.n, found.line.passed) == (5, 1, 4, 3)
    assert (found.word.n, found.word.passed) == (3, 2)
    assert found.both == pytest.approx(2 * (3 / 4) * (2 / 3) / (3 / 4 + 2 / 3))
    assert found.answered == {"ar": 3, "en": 1, "empty": 1}
    assert found.line.low is not None
    assert found.line.high is not None
    assert found.line.low < 3 / 4 < found.line.high


def test_settings_are_counted_apart() -> None:
    both = [
        judge_answer("ar", SENTENCES["ar"], DETECT, setting="monolingual"),
        judge_answer("ar", SENTENCES["en"], DETECT, setting="crosslingual"),
    ]
    assert [(one.setting, one.line.rate) for one in summarise_confusion(both)] == [
        ("monolingual", 1.0),
        ("crosslingual", 0.0),
    ]


def test_a_detector_that_is_no_fasttext_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        fasttext_detector(tmp_path / "none.bin")
    (tmp_path / "model.bin").write_bytes(b"pickle")
    with pytest.raises(UsageError, match=r"must be a fastText model \(\.bin or \.ftz\)"):
        fasttext_detector(tmp_path / "model.bin")


BENCHMARK = Path(__file__).parents[3] / "shared/data/language-confusion/monolingual_okapi"


@pytest.mark.skipif(not BENCHMARK.is_dir(), reason="the benchmark's prompts are not here")
@pytest.mark.parametrize("language", ["ar", "de", "es", "fr", "id", "it", "pt", "vi", "zh"])
def test_the_benchmarks_prompts_pass_as_answers_in_their_language(language: str) -> None:
    """They were written by people. fastText takes one in ten of the Chinese ones for Japanese."""
    with (BENCHMARK / f"{language}.csv").open(encoding="utf-8") as file:
        prompts = [row["prompt"] for row in csv.DictReader(file)]
    (found,) = summarise_confusion([judge(language, prompt) for prompt in prompts])
    assert found.line.n > 60
    assert found.line.rate is not None
    assert found.line.rate > 0.85
