"""Will it work? What a run is likely to bring each language, from signs that cost minutes.

`measure_signs` looks at the untouched model: how it tells languages apart, what their texts cost it
in tokens and bits, and what it answers. `forecast_gain` makes a sentence of one language's signs,
by rules that are few and coarse. `experiments/prediction.py` compares both with measured gains;
what a run costs is `polylens.plan`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from polylens.corpora import ParallelCorpus
from polylens.corpora.inspection import inspect_corpus
from polylens.errors import CorpusError
from polylens.evaluation.comparison import Heldout, answer
from polylens.evaluation.fidelity import is_repeating
from polylens.evaluation.measures import TaskRun
from polylens.evaluation.replies import measure_replies
from polylens.evaluation.scoring import Candidate
from polylens.evaluation.suite import measure_texts
from polylens.hidden_states import Keep
from polylens.languages import language_name
from polylens.models.loading import LanguageModel
from polylens.progress import Progress, silent
from polylens.prompts import choose_format, encode_parallel
from polylens.scratch import Scratch
from polylens.states_cache import fresh_hidden_states
from polylens.subspaces import probe_subspaces, told_apart

Outlook = Literal["nothing to gain", "hardly known", "worth a run"]

# Rows of each language that are read, and that are answered.
N_ROWS = 32
N_ANSWERS = 10

# As long as `evaluate.max_new_tokens`: an answer shows only with time that it repeats itself.
MAX_NEW_TOKENS = 48

# From this share of answers in the language on there is nothing to gain in fidelity. Assumed: of
# ten answers, one in another language may be chance, and so may none (up to 26 % at 95 %).
ANSWERED = 0.9

# From this many times the bits of the same texts in the central language on, a model hardly knows a
# language. Assumed, between what was measured: at 3.4 (Swahili, SmolLM2-135M) and 3.0 (Swahili,
# Qwen2.5-Coder-1.5B) answers that repeat themselves rose from 7 to 13 and from 2 to 15 of 32; at
# 2.1 (Spanish and Chinese, SmolLM2) and 1.2 (Chinese, Qwen) from 3 to 9, 4 to 3, and 0 to 0.
HARDLY_KNOWN = 2.5


@dataclass(frozen=True)
class Signs:
    """What is seen of one language before a run.

    Attributes:
        n_texts: texts that were read.
        separability: share of the language's prompts whose nearest language mean, in the
            language-specific subspace, is their own (each left out of its mean).
        distance: of the language's mean from the central one in that subspace, in spreads: the
            root mean square distance of the two languages' prompts from their means. 0 for the
            central language.
        tokens_per_word: of its texts, without template; in Chinese, Japanese and Thai, tokens per
            character.
        tokens_per_byte: the same for UTF-8 bytes.
        relative_tokens: tokens of its texts over those of the same rows in the central language.
        bits_per_byte: of its texts, without template. Bytes of some scripts are cheap, since each
            letter has three: compare languages by `relative_bits`.
        relative_bits: bits of its texts over those of the same rows in the central language.
        reply_bits_per_byte: of its texts as replies to its prompts; see
            `polylens.evaluation.replies`.
        n_answers: prompts that were answered.
        fidelity: share of the answers that are in the language.
        repeating: share of the answers that repeat themselves.
    """

    n_texts: int
    separability: float
    distance: float
    tokens_per_word: float
    tokens_per_byte: float
    relative_tokens: float
    bits_per_byte: float
    relative_bits: float
    reply_bits_per_byte: float
    n_answers: int
    fidelity: float
    repeating: float


@dataclass(frozen=True)
class Forecast:
    """What a run is likely to bring a language: in a few words, and in a sentence."""

    outlook: Outlook
    sentence: str


def forecast_gain(signs: Signs, central: str) -> Forecast:
    """Say what a run is likely to bring a language.

    Args:
        signs: of a target language.
        central: the central language.

    Note:
        1. `ANSWERED` of the answers or more are in the language: nothing to gain in fidelity.
        2. Else its texts cost `HARDLY_KNOWN` times the bits of the central ones or more: the model
           hardly knows it.
        3. Else it is worth a run.
    """
    answered = f"{round(signs.fidelity * signs.n_answers)} of {signs.n_answers} answers"
    relative = f"{signs.relative_bits:.1f} times the bits of the same in {language_name(central)}"
    if signs.fidelity >= ANSWERED:
        return Forecast(
            "nothing to gain",
            f"{answered} are in the language already: nothing to gain in fidelity",
        )
    if signs.relative_bits >= HARDLY_KNOWN:
        return Forecast(
            "hardly known",
            f"the model hardly knows it ({signs.bits_per_byte:.2f} bits per byte, {relative}, "
            f"{signs.tokens_per_word:.1f} tokens a word): pushing it brings answers in the "
            "language that repeat themselves",
        )
    return Forecast(
        "worth a run",
        f"{answered} are in the language, and the model knows it ({relative}): worth a run",
    )


def measure_signs(
    model: LanguageModel,
    corpus: ParallelCorpus,
    *,
    central: str,
    languages: Sequence[str],
    layer: int | None = None,
    template: str = "auto",
    max_tokens: int = 128,
    token_budget: int | None = None,
    scratch: Scratch | None = None,
    progress: Progress = silent,
) -> dict[str, Signs]:
    """Measure the signs of each language, the central one first.

    Args:
        model: the untouched model.
        corpus: rows to train on; the first `N_ROWS` of each language are read, and the first
            `N_ANSWERS` are answered.
        central: the central language.
        languages: target languages.
        layer: the highest whose states training reads, in the package's layer convention; None
            takes those after the final norm.
        template: "auto", "chat", "plain" or a Jinja file.
        max_tokens: longest prompt.
        token_budget: padded tokens of a batch; None takes what is fastest on this machine.
        scratch: room for the states; None takes memory without limit.
        progress: told how far each piece of work is.

    Raises:
        CorpusError: a language has fewer than two usable rows.
        LanguageError: the detector does not know a language.
    """
    heldout = _prompted(model, corpus, (central, *languages), N_ROWS, template, max_tokens)
    asked = _prompted(model, corpus, (central, *languages), N_ANSWERS, template, max_tokens)
    untouched = [Candidate()]
    pooled = fresh_hidden_states(
        model,
        heldout.prompts.ids,
        Keep(pooling="last"),
        token_budget=token_budget,
        scratch=scratch,
        progress=progress,
    ).pooled
    assert pooled is not None
    states = {k: pooled[indices] for k, indices in heldout.prompts_of.items()}
    apart = _states_apart(states, central, model.structure.n_layers if layer is None else layer)
    bits = _bits_per_byte(
        measure_texts(model, untouched, heldout, token_budget, scratch, progress), "text"
    )
    replies = _bits_per_byte(
        measure_replies(
            model,
            untouched,
            heldout,
            token_budget=token_budget,
            scratch=scratch,
            progress=progress,
        ),
        "reply",
    )
    answers = answer(model, asked, MAX_NEW_TOKENS, progress)
    reports = inspect_corpus(heldout.corpus, central=central, tokenizer=model.tokenizer).languages
    counted = {report.language: report for report in reports}
    found = {}
    for language in heldout.all_languages:
        report = counted[language]
        own = [one for one in answers if one.language == language]
        assert report.n_tokens is not None
        assert report.tokens_per_word is not None
        assert report.token_premium is not None
        separability, distance = apart[language]
        found[language] = Signs(
            n_texts=report.n_texts,
            separability=separability,
            distance=distance,
            tokens_per_word=report.tokens_per_word,
            tokens_per_byte=report.n_tokens / _n_bytes(heldout.texts[language]),
            relative_tokens=report.token_premium,
            bits_per_byte=bits[language],
            relative_bits=bits[language] / bits[central] * _relative_bytes(heldout, language),
            reply_bits_per_byte=replies[language],
            n_answers=len(own),
            fidelity=sum(one.passed for one in own) / len(own),
            repeating=sum(is_repeating(one.answer) for one in own) / len(own),
        )
    return found


def _prompted(
    model: LanguageModel,
    corpus: ParallelCorpus,
    languages: Sequence[str],
    n_rows: int,
    template: str,
    max_tokens: int,
) -> Heldout:
    """Turn the first rows that hold `n_rows` texts of each target language into prompts."""
    central, *targets = languages
    left = dict.fromkeys(targets, n_rows)
    rows: list[Mapping[str, str]] = []
    for row in corpus.rows:
        wanted = [k for k in targets if central in row and k in row and left[k]]
        if wanted:
            rows.append({k: row[k] for k in (central, *wanted)})
            left.update({k: left[k] - 1 for k in wanted})
    chosen = ParallelCorpus(corpus.name, tuple(rows))
    prompts = encode_parallel(
        chosen, languages, choose_format(model.tokenizer, template), model.tokenizer, max_tokens
    )
    heldout = Heldout(chosen, prompts, chosen.to_corpus().texts, central, tuple(targets))
    for language, own in heldout.prompts_of.items():
        if len(own) < 2:
            raise CorpusError(
                f"a forecast must read at least two rows of each language, but {corpus.name} has "
                f"{len(own)} that hold {language} with {central} and fit in {max_tokens} tokens; "
                "add rows or leave the language out"
            )
    return heldout


def _states_apart(
    states: Mapping[str, Tensor], central: str, layer: int
) -> dict[str, tuple[float, float]]:
    """Return each language's separability and its distance from the central one, in spreads.

    Args:
        states: language → (n_texts, n_layers + 1, hidden_size).
        central: the central language.
        layer: the layer to look at.
    """
    subspaces = probe_subspaces(states, central=central, layers=[layer])
    basis = subspaces.specific_basis[0]
    own = {k: part[:, layer].double() for k, part in states.items()}
    told = told_apart(own, basis)
    variance = {
        k: float(((part - part.mean(0)) @ basis.T).square().sum(1).mean())
        for k, part in own.items()
    }
    found = {}
    for language in states:
        spread = ((variance[language] + variance[central]) / 2) ** 0.5
        distance = float(subspaces.direction(language, layer).norm())
        # Prompts without any spread are all the same text; their distance is in no unit then.
        spread = max(spread, torch.finfo(torch.float32).tiny)
        found[language] = (float(told[language].double().mean()), distance / spread)
    return found


def _bits_per_byte(runs: Sequence[TaskRun], what: str) -> dict[str, float]:
    """Return, for each language, all bits over all bytes."""
    found = {}
    for run in runs:
        assert run.task.language is not None
        (examples,) = run.examples
        n_bytes = sum(one.responses["bytes"] for one in examples)
        if not n_bytes:
            raise CorpusError(
                f"at least one {what} in {run.task.language} must be longer than a token to have "
                "a likelihood, but none is; give longer texts"
            )
        bits = sum(one.value * one.responses["bytes"] for one in examples)
        found[run.task.language] = bits / n_bytes
    return found


def _relative_bytes(heldout: Heldout, language: str) -> float:
    """Bytes of a language's texts over those of the same rows in the central language."""
    rows = [row for row in heldout.corpus.rows if language in row]
    own, centre = ([row[k] for row in rows] for k in (language, heldout.central))
    return _n_bytes(own) / _n_bytes(centre)


def _n_bytes(texts: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in texts)
