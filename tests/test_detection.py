"""The detector is limited to the languages in play, and leaves py3langid's own state alone."""

from __future__ import annotations

import py3langid
import pytest

from polylens.detection import LanguageDetector
from polylens.errors import LanguageError

TEXTS = {
    "en": "The children went to school early in the morning.",
    "sw": "Watoto walienda shuleni mapema asubuhi.",
    "zh": "孩子们一大早就去上学了。",
    "bn": "শিশুরা খুব সকালে স্কুলে গেল।",
}


def test_each_language_is_recognised() -> None:
    detector = LanguageDetector(TEXTS)
    assert {k: detector.detect(text) for k, text in TEXTS.items()} == {k: k for k in TEXTS}


def test_only_languages_in_play_are_answered() -> None:
    detector = LanguageDetector(["en", "zh"])
    assert detector.detect(TEXTS["sw"]) == "en"
    assert py3langid.classify(TEXTS["sw"])[0] == "sw"  # the global identifier knows nothing of it


def test_regional_codes_come_back_as_given() -> None:
    assert LanguageDetector(["en", "zh-TW"]).detect(TEXTS["zh"]) == "zh-TW"


@pytest.mark.parametrize("text", ["", "12 + 5 = 17", "ok", "?!"])
def test_too_short_to_judge(text: str) -> None:
    assert LanguageDetector(["en", "sw"]).detect(text) is None


def test_unknown_to_the_detector() -> None:
    with pytest.raises(LanguageError, match="does not know tlh"):
        LanguageDetector(["en", "tlh"])
