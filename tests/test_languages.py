"""Languages by any name."""

from __future__ import annotations

import pytest

from polylens.errors import LanguageError
from polylens.languages import language_name, normalize_language, normalize_languages


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        *(
            (code, "zh")
            for code in (
                "zh",
                "zho",
                "chi",
                "Chinese",
                "zh-CN",
                "zh-Hans",
                "zh_CN",
                "zho_Hans",
                "cmn",
            )
        ),
        *((code, "sw") for code in ("sw", "swa", "swh_Latn", "Swahili", "SW")),
        *((code, "en") for code in ("en", "eng_Latn", "English", "en-US")),
        ("zh-TW", "zh-TW"),
        ("pt-BR", "pt"),
        ("pt-PT", "pt-PT"),
        ("Bengali", "bn"),
        ("arb_Arab", "ar"),
    ],
)
def test_names(given: str, expected: str) -> None:
    assert normalize_language(given) == expected


@pytest.mark.parametrize("given", ["xx", "qq", "", "zz-ZZ", "e n"])
def test_unknown(given: str) -> None:
    with pytest.raises(LanguageError, match="must be a BCP 47 code or an English name"):
        normalize_language(given)


def test_the_nearest_is_suggested() -> None:
    with pytest.raises(LanguageError, match="did you mean 'swahili'"):
        normalize_language("swahilli")


def test_the_same_language_twice() -> None:
    assert normalize_languages(["sw", "zho"]) == ("sw", "zh")
    with pytest.raises(LanguageError, match="'zh' and 'Chinese' are both zh"):
        normalize_languages(["zh", "Chinese"])


def test_display_names() -> None:
    assert language_name("sw") == "Swahili"
