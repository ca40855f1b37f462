"""Languages by any name, as BCP 47 codes: zh, zho, Chinese, zh-CN and zho_Hans all mean "zh".

A code is standardised, and subtags that are the likely ones for what is left are dropped: zh-CN is
zh, pt-BR is pt, but zh-TW and pt-PT stay what they are.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import langcodes

from polylens.errors import LanguageError, nearest

# Of what is given as a language, in characters; no name is as long.
_LONGEST = 80

# Individual languages whose macrolanguage code is what corpora and detectors use.
_USUAL = {"cmn": "zh", "arb": "ar", "swh": "sw", "nob": "no", "ekk": "et", "zsm": "ms", "pes": "fa"}


def normalize_language(code: str) -> str:
    """Return the shortest BCP 47 code of a language given by code or English name.

    Args:
        code: BCP 47 or ISO 639 code, with "-" or "_", or the language's name.

    Raises:
        LanguageError: no such language; the message suggests the nearest.

    Example:
        >>> [normalize_language(code) for code in ("zho", "Chinese", "zh-CN", "zh_TW", "swh_Latn")]
        ['zh', 'zh', 'zh', 'zh-TW', 'sw']
    """
    given = code.strip()
    language = _parse(given)
    if language is None:
        raise LanguageError(
            f"a language must be a BCP 47 code or an English name, got {code[:_LONGEST]!r}"
            f"{nearest(given[:_LONGEST].lower(), _known_names())}; for example zh, sw or Bengali"
        )
    primary = _USUAL.get(language.language or "", language.language)
    full = language.update_dict({"language": primary}).maximize()
    for shorter in (
        {"language": primary},
        {"language": primary, "script": language.script},
        {"language": primary, "territory": language.territory},
    ):
        candidate = langcodes.Language.make(**shorter)
        if candidate.maximize().to_tag() == full.to_tag():
            return str(candidate.to_tag())
    return str(language.update_dict({"language": primary}).to_tag())


def normalize_languages(codes: Iterable[str]) -> tuple[str, ...]:
    """Normalise several languages.

    Raises:
        LanguageError: one is unknown, or two are the same language.
    """
    seen: dict[str, str] = {}
    for code in codes:
        language = normalize_language(code)
        if language in seen:
            raise LanguageError(
                f"languages must differ, but {seen[language]!r} and {code!r} are both {language}; "
                "leave one out"
            )
        seen[language] = code
    return tuple(seen)


def is_language(code: str) -> bool:
    """Whether a language code or name is known."""
    return _parse(code.strip()) is not None


def language_name(code: str) -> str:
    """English name of a language.

    Example:
        >>> language_name("sw")
        'Swahili'
    """
    return str(langcodes.Language.get(code).display_name())


def primary_subtag(code: str) -> str:
    """The language without script and territory: "zh" for "zh-TW"."""
    return code.split("-")[0]


def _parse(given: str) -> langcodes.Language | None:
    if len(given) > _LONGEST:  # looking for it would take long
        return None
    try:
        language = langcodes.Language.get(given.replace("_", "-"))
        if language.is_valid() and language.language and language.language != "und":
            return language
    except (langcodes.tag_parser.LanguageTagError, UnicodeEncodeError):
        pass
    try:
        return langcodes.find(given)
    except (LookupError, UnicodeEncodeError):  # half a surrogate pair is in no name
        return None


@functools.cache
def _known_names() -> tuple[str, ...]:
    """Codes and English names of the languages with a million speakers, for suggestions."""
    from language_data.population_data import LANGUAGE_SPEAKING_POPULATION

    spoken = [tag for tag, n_speakers in LANGUAGE_SPEAKING_POPULATION.items() if n_speakers > 1e6]
    plain = [tag for tag in spoken if "-" not in tag and tag != "und"]
    return (*(language_name(tag).lower() for tag in plain), *plain)
