"""Which of a few languages a text is in: py3langid, limited to the languages in play.

Limiting it lifts its accuracy (docs/evaluation.md). py3langid's own way of limiting is global
state; here every set of languages has an identifier of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from polylens.errors import LanguageError
from polylens.languages import primary_subtag

# Fewer letters than this are too few to tell a language by.
MIN_LETTERS = 3

# py3langid separates Chinese languages that users and benchmarks do not.
_MERGED = {"wuu": "zh", "yue": "zh"}


class LanguageDetector:
    """Tells which language of a fixed set a text is in.

    Attributes:
        languages: BCP 47 codes; two codes of one primary language cannot be told apart.
    """

    def __init__(self, languages: Iterable[str]) -> None:
        self.languages = tuple(languages)
        self._by_primary = {primary_subtag(language): language for language in self.languages}
        known = supported_languages()
        unknown = [k for k in self.languages if primary_subtag(k) not in known]
        if unknown:
            raise LanguageError(
                f"the detector must know every language it tells apart, but does not know "
                f"{', '.join(unknown)}; leave them out"
            )

    def detect(self, text: str) -> str | None:
        """Return the language of a text, or None if it has fewer than three letters."""
        if sum(character.isalpha() for character in text) < MIN_LETTERS:
            return None
        label, _ = _limited(tuple(sorted(self._by_primary))).classify(text)
        return self._by_primary[_MERGED.get(label, label)]


@functools.cache
def supported_languages() -> frozenset[str]:
    """Primary codes of the languages that the detector knows."""
    return frozenset(_MERGED.get(label, label) for label in _identifier().labels)


def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)


@functools.cache
def _limited(languages: tuple[str, ...]) -> Any:
    """An identifier of our own for one set of languages."""
    identifier = _identifier()
    labels = [k for k in identifier.labels if _MERGED.get(k, k) in languages]
    identifier.set_languages(labels)
    return identifier
