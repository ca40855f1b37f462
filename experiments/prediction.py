"""How well signs and sentences of `polylens doctor --forecast` have predicted what was measured.

A model and a language are one case; there are few. So signs are compared by ranks alone, and chance
is what permuting the gains among the languages of each model gives: a model that gains more than
another in all languages says nothing for a sign.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from design import CENTRAL
from polylens.evaluation.statistics import holm
from polylens.forecast import Outlook, Signs, forecast_gain

SIGNS = {
    "told apart": "separability",
    "distance, spreads": "distance",
    "tokens a word": "tokens_per_word",
    "tokens a byte": "tokens_per_byte",
    "tokens, relative": "relative_tokens",
    "bits per byte": "bits_per_byte",
    "bits, relative": "relative_bits",
    "bits per byte of replies": "reply_bits_per_byte",
    "answers in it": "fidelity",
    "answers repeating": "repeating",
}

# Points from which on a share of answers has risen; one answer in ten is what a forecast can see.
RISE = 10.0

_N_PERMUTATIONS = 9999


@dataclass(frozen=True)
class Gains:
    """What a setting brought a language; None where it was not measured.

    Attributes:
        replies: percent by which the bits of replies fell.
        fidelity: points by which the share of answers in the language rose.
        repeating: points by which the share of repeating answers rose.
    """

    replies: float | None = None
    fidelity: float | None = None
    repeating: float | None = None

    @property
    def outcome(self) -> Outlook | None:
        """What the sentence should have said, had it been known."""
        if self.fidelity is None or self.repeating is None:
            return None
        if self.fidelity < RISE:
            return "nothing to gain"
        return "hardly known" if self.repeating >= RISE else "worth a run"


@dataclass(frozen=True)
class Case:
    """A language of a model: its signs, and setting → gains."""

    model: str
    language: str
    signs: Signs
    gains: Mapping[str, Gains]


def rank_correlation(
    sign: Sequence[float], gain: Sequence[float], models: Sequence[str]
) -> tuple[float, float] | None:
    """Return Spearman's rho and its two-sided p-value, by permutation within each model.

    None where it is not defined: fewer than three cases, or all alike on one side.
    """
    if len(sign) < 3 or min(len(set(sign)), len(set(gain))) == 1:
        return None
    x, y = (rankdata(side) - (len(sign) + 1) / 2 for side in (sign, gain))
    generator = np.random.default_rng(0)
    permuted = np.tile(y, (_N_PERMUTATIONS, 1))
    for model in dict.fromkeys(models):
        own = [index for index, name in enumerate(models) if name == model]
        permuted[:, own] = generator.permuted(permuted[:, own], axis=1)
    norm = np.sqrt((x @ x) * (y @ y))
    rho = float(x @ y / norm)
    as_far = np.abs(permuted @ x / norm) >= abs(rho) - 1e-12
    return rho, (int(as_far.sum()) + 1) / (_N_PERMUTATIONS + 1)


def correlation_table(cases: Sequence[Case], settings: Sequence[str]) -> str:
    """One row a sign, one column a gain; bold is what Holm's correction leaves below 0.05."""
    columns = {
        f"{setting}: {title}": [(one, getattr(one.gains[setting], kind)) for one in cases]
        for setting in settings
        for title, kind in (("replies, %", "replies"), ("in language, points", "fidelity"))
    }
    measured = {
        title: [(case, gain) for case, gain in column if gain is not None]
        for title, column in columns.items()
    }
    measured = {title: column for title, column in measured.items() if column}
    found = {
        (sign, title): rank_correlation(
            [getattr(case.signs, sign) for case, _ in column],
            [gain for _, gain in column],
            [case.model for case, _ in column],
        )
        for sign in SIGNS.values()
        for title, column in measured.items()
    }
    defined = [key for key, value in found.items() if value is not None]
    corrected = dict(zip(defined, holm([found[key][1] for key in defined]), strict=True))
    heads = [f"{title} (n = {len(column)})" for title, column in measured.items()]
    lines = [f"| {' | '.join(['sign', *heads])} |", f"|{'-|' * (len(heads) + 1)}"]
    for name, sign in SIGNS.items():
        cells = []
        for title in measured:
            value = found[sign, title]
            text = "–" if value is None else f"{value[0]:+.2f} (p {value[1]:.2g})"
            cells.append(f"**{text}**" if corrected.get((sign, title), 1) < 0.05 else text)
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def sentence_table(cases: Sequence[Case], settings: Sequence[str]) -> str:
    """What was said of each case, and what came of it."""
    heads = ["model", "language", "answers in it", "bits, relative", "said", *settings]
    lines = [f"| {' | '.join(heads)} |", f"|{'-|' * len(heads)}"]
    for case in cases:
        said = forecast_gain(case.signs, CENTRAL).outlook
        cells = [
            case.model,
            case.language,
            f"{case.signs.fidelity:.0%}",
            f"{case.signs.relative_bits:.1f}",
            said,
        ]
        for setting in settings:
            gains = case.gains[setting]
            if gains.outcome is None:
                cells.append("")
                continue
            text = f"{gains.outcome} ({gains.fidelity:+.0f}, {gains.repeating:+.0f})"
            cells.append(f"**{text}**" if gains.outcome == said else text)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def how_often_right(cases: Sequence[Case], setting: str) -> str | None:
    """How often the sentence was right, beside the best that one sentence for all could be."""
    outcomes = [(case, case.gains[setting].outcome) for case in cases]
    known = [(case, outcome) for case, outcome in outcomes if outcome is not None]
    if not known:
        return None
    n_right = sum(forecast_gain(case.signs, CENTRAL).outlook == outcome for case, outcome in known)
    ((commonest, n_commonest),) = Counter(outcome for _, outcome in known).most_common(1)
    return (
        f"`{setting}`: the sentence was right for {n_right} of {len(known)}; "
        f'"{commonest}", said of all, for {n_commonest}.'
    )


def forecast_block(cases: Sequence[Case], settings: Sequence[str]) -> str:
    """Return the block of the page."""
    right = [text for setting in settings if (text := how_often_right(cases, setting))]
    parts = [correlation_table(cases, settings), *right]
    if right:
        parts.append(sentence_table(cases, settings))
    return "\n\n".join(parts)
