import pytest

from polylens.detection import LanguageDetector
from polylens.evaluation.fidelity import (
    Fidelity,
    detect_answers,
    is_echo,
    is_repeating,
    measure_fidelity,
)


def test_answers_are_told_apart():
    answers = [
        "The weather is nice today, so we should go for a walk.",
        "Leo hali ya hewa ni nzuri, kwa hiyo tunapaswa kwenda kutembea.",
        "今天天气很好，我们应该去散步。",
        "42.",
        " \n",
        "",
    ]
    detector = LanguageDetector(("en", "sw", "zh"))
    assert detect_answers(answers, detector) == ["en", "sw", "zh", "unknown", "empty", "empty"]


def test_only_the_language_asked_for_passes():
    detected = ["sw", "sw", "en", "unknown", "empty"]
    answers = ["habari", "mambo vipi " * 9, "hello", "42", ""]
    prompts = ["Habari yako?", *["Mambo vipi?"] * 4]
    assert measure_fidelity("sw", prompts, answers, detected) == Fidelity(
        n=5,
        passed=2,
        rate=pytest.approx(0.4),
        standard_error=pytest.approx((0.4 * 0.6 / 5) ** 0.5),
        answered={"empty": 1, "en": 1, "sw": 2, "unknown": 1},
        repeating=1,
        echoing=2,
    )


@pytest.mark.parametrize(("detected", "rate"), [(["sw", "sw"], 1.0), (["en", "en"], 0.0)])
def test_a_rate_of_none_or_all_has_no_spread(detected, rate):
    fidelity = measure_fidelity("sw", ["?", "?"], ["a b c", "d e f"], detected)
    assert (fidelity.rate, fidelity.standard_error) == (rate, 0.0)


@pytest.mark.parametrize(
    "answer",
    [
        "I am a language model. " * 4,
        "好的。我可以帮助你。" * 5,
        "the the the the the the the the",
        "1. Eat well.\n" * 6,
        "ああああああああああああ",
        # Cut off before half of the 4-grams are old.
        "Mji mkuu wa Ufaransa ni mji wa kila kila kila kila ki",
        "Picha ya muundo wa nyumba, kwa kila kipato, kwa kila kipato, Kwa kila kipato. kwa k",
        "DNA代表什么？ DNA是一种系统，它是一种系统，它是一种系统，它",
    ],
)
def test_repeating_answers_are_noticed(answer):
    assert is_repeating(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Yes.",
        "好",
        "no no no",
        "好好好好",
        "Twice is no loop, as in going on and on, going on and on",
        "First, mix flour and water. Second, knead the dough. Third, let it rest for an hour.",
        "保持健康的三个建议是：每天运动三十分钟，多吃蔬菜和水果，保证充足的睡眠。",
        "สามเคล็ดลับในการดูแลสุขภาพคือออกกำลังกายทุกวันและนอนหลับให้เพียงพอ",
        "Leo ni siku nzuri. Leo ni siku ya kazi. Kesho ni siku ya kupumzika na familia yangu.",
    ],
)
def test_ordinary_answers_do_not_repeat(answer):
    assert not is_repeating(answer)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("صف بنية الذرة.", "صف بنية الذرة."),
        ("Je! ni rangi gani tatu za msingi?", "je ni rangi gani tatu za msingi.\n\nJe, rangi"),
        ("পরমাণুর গঠন বর্ণনা কর এবং উদাহরণ দাও।", "পরমাণুর গঠন বর্ণ"),  # cut off
        ("건강을 유지하기 위한 세 가지 요령을 제시하세요.", "건강을 유지하기 위한 세 가지"),
        ("描述原子的结构。", "描述原子的结构：原子"),
    ],
)
def test_answers_that_say_the_question_again_are_noticed(prompt, answer):
    assert is_echo(prompt, answer)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("What are the three primary colors?", ""),
        ("What are the three primary colors?", "Why, of course."),
        ("What are the three primary colors?", "The three primary colors are red, yellow, blue."),
        ("描述原子的结构。", "原子的结构是原子核和电子。"),
        ("?!", "…"),
    ],
)
def test_answers_of_their_own_are_no_echo(prompt, answer):
    assert not is_echo(prompt, answer)
