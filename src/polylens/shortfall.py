"""How often a model fails to answer in a language, and how far to push it there.

Pushing a language that the model answers in anyway costs and brings nothing: the last token of its
prompts moves, and with it answers that are right already. So `strength: auto` lets the untouched
model answer some of the training prompts, and pushes each language by what it lacks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from polylens import distributed
from polylens.config import TrainSettings
from polylens.detection import LanguageDetector
from polylens.evaluation.fidelity import detect_answers
from polylens.evaluation.generation import generate_answers
from polylens.languages import language_name
from polylens.models.loading import LanguageModel
from polylens.progress import Progress, silent
from polylens.prompts import ParallelPrompts

N_PROMPTS = 32
MAX_NEW_TOKENS = 32

# The strength is 1, the published one, where this share of the answers or more is in another
# language, and in proportion to it below.
FULL_SHORTFALL = 0.25


def measure_shortfall(
    model: LanguageModel,
    prompts: ParallelPrompts,
    central: str,
    languages: Sequence[str],
    *,
    n_prompts: int = N_PROMPTS,
    max_new_tokens: int = MAX_NEW_TOKENS,
    progress: Progress = silent,
) -> dict[str, float]:
    """Return, for each language, the share of answers that are not in the language of the question.

    Args:
        model: the untouched model.
        prompts: of training rows; the first of each language are asked.
        central: the central language, in which answers are expected otherwise.
        languages: target languages.
        n_prompts: most questions a language.
        max_new_tokens: longest answer.
        progress: told the answers done.

    Raises:
        LanguageError: the detector does not know a language.
    """
    detector = LanguageDetector((central, *languages))
    asked = [
        (language, row[language])
        for language in languages
        for row in [row for row in prompts.rows if language in row][:n_prompts]
    ]
    own = generate_answers(
        model,
        distributed.own([prompts.ids[index] for _, index in asked]),
        max_new_tokens=max_new_tokens,
        progress=progress,
    )
    answered = detect_answers(distributed.collect_all(own), detector)
    missed: dict[str, list[bool]] = {language: [] for language in languages}
    for (language, _), found in zip(asked, answered, strict=True):
        missed[language].append(found != language)
    return {language: sum(each) / len(each) for language, each in missed.items() if each}


def strengths_of(shortfall: Mapping[str, float]) -> dict[str, float]:
    """Return how far to push each language.

    Example:
        >>> strengths_of({"zh": 0.0, "es": 0.125, "sw": 0.5})
        {'zh': 0.0, 'es': 0.5, 'sw': 1.0}
    """
    return {language: min(1.0, share / FULL_SHORTFALL) for language, share in shortfall.items()}


def push_sentence(settings: TrainSettings, languages: Sequence[str]) -> str:
    """Say how far each language is pushed; "" where the loss that pushes is off.

    Args:
        settings: as trained, so that `strength` is a number or has one a language.
        languages: the targets.

    Example:
        >>> settings = TrainSettings(strength={"sw": 0.875, "es": 0.0})
        >>> push_sentence(settings, ["sw", "es"])
        'Pushed along their own direction: Swahili by 0.875; not Spanish.'
    """
    if settings.separate_weight == 0:
        return ""
    strengths = {language: settings.strength_of(language) for language in languages}
    moved = [f"{language_name(k)} by {one:.3g}" for k, one in strengths.items() if one]
    still = [language_name(k) for k, one in strengths.items() if not one]
    parts = [", ".join(moved) or "none", *([f"not {', '.join(still)}"] if still and moved else [])]
    return f"Pushed along their own direction: {'; '.join(parts)}."
