"""A model before and after, on prompts that training never saw.

`evaluate` does all of it; its three parts, `answer`, `compare` and `summarise`, are what a run does
one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from polylens.corpora import ParallelCorpus
from polylens.crown import CrownDelta, run_crown
from polylens.detection import LanguageDetector
from polylens.evaluation.drift import PromptStates, StateChange, measure_change, summarise_states
from polylens.evaluation.fidelity import detect_answers, measure_fidelity
from polylens.evaluation.generation import generate_answers
from polylens.evaluation.likelihood import encode_plain, score_bits
from polylens.evaluation.results import Answer, BeforeAfter, BitsPerByte, Evaluation
from polylens.hidden_states import HiddenStates, Keep
from polylens.models.loading import LanguageModel
from polylens.progress import Progress, silent
from polylens.prompts import choose_format
from polylens.states_cache import cached_hidden_states
from polylens.steps import ParallelPrompts, encode_parallel

# Longer texts are cut for bits per byte: attention grows with the square of the length, while the
# figure hardly depends on it.
MAX_SCORED_TOKENS = 512


@dataclass(frozen=True)
class Heldout:
    """What a model is evaluated on.

    Attributes:
        corpus: the held-out rows.
        prompts: their prompts, for answers and for states.
        texts: language → texts for bits per byte.
        central: the language to protect.
        languages: the targets.
        watched: languages neither trained nor central.
    """

    corpus: ParallelCorpus
    prompts: ParallelPrompts
    texts: Mapping[str, tuple[str, ...]]
    central: str
    languages: tuple[str, ...]
    watched: tuple[str, ...] = ()

    @property
    def all_languages(self) -> tuple[str, ...]:
        """Central language, targets, watched."""
        return (self.central, *self.languages, *self.watched)

    @property
    def prompts_of(self) -> dict[str, list[int]]:
        """Language → indices of its prompts."""
        return {
            language: [row[language] for row in self.prompts.rows if language in row]
            for language in self.all_languages
        }


@dataclass(frozen=True)
class Comparison:
    """Likelihood and states before and after.

    Attributes:
        bits_per_byte: by language.
        state_change: by language.
        last_states: "before" and "after" → language → (n, hidden_size), last token after the final
            norm.
    """

    bits_per_byte: Mapping[str, BitsPerByte]
    state_change: Mapping[str, StateChange]
    last_states: Mapping[str, Mapping[str, Tensor]]


def answer(
    model: LanguageModel, heldout: Heldout, max_new_tokens: int, progress: Progress = silent
) -> list[Answer]:
    """Let a model, as it is now, answer every held-out prompt.

    Args:
        model: with a delta applied or without.
        heldout: the prompts.
        max_new_tokens: longest answer.
        progress: told the answers done.
    """
    asked = [
        (language, number, row[language])
        for language in heldout.all_languages
        for number, row in enumerate(heldout.prompts.rows)
        if language in row
    ]
    texts = generate_answers(
        model,
        [heldout.prompts.ids[index] for _, _, index in asked],
        max_new_tokens=max_new_tokens,
        progress=progress,
    )
    detected = detect_answers(texts, LanguageDetector(heldout.all_languages))
    answers = []
    for (language, number, _), text, found in zip(asked, texts, detected, strict=True):
        source = heldout.prompts.sources[number]
        prompt = heldout.corpus.rows[source][language]
        answers.append(Answer(language, source, prompt, text, found, found == language))
    return answers


def compare(
    model: LanguageModel,
    delta: CrownDelta,
    heldout: Heldout,
    *,
    strength: float = 1.0,
    dtype: torch.dtype | None = None,
    token_budget: int | None = None,
    collect: Callable[..., HiddenStates] = cached_hidden_states,
    progress: Progress = silent,
) -> Comparison:
    """Compare bits per byte and states, from one trunk pass for both.

    Args:
        model: the untouched model.
        delta: what training changed.
        heldout: prompts and texts.
        strength: the dial.
        dtype: round the changed weights to it first, as a model saved in it would be.
        token_budget: padded tokens of a batch; None takes what is fastest on this machine.
        collect: how hidden states are had.
        progress: told the tokens done.
    """
    structure = model.structure
    keep = Keep(boundary_layers=(min(delta.layers),))
    languages = heldout.all_languages
    texts = [
        (k, *encode_plain(model.tokenizer, text, MAX_SCORED_TOKENS))
        for k in languages
        for text in heldout.texts[k]
    ]
    texts = [(language, ids, n_bytes) for language, ids, n_bytes in texts if n_bytes > 0]
    scored = [ids for _, ids, _ in texts]
    text_states, prompt_states = (
        collect(model, ids, keep, token_budget=token_budget, progress=progress)
        for ids in (scored, heldout.prompts.ids)
    )

    def measure() -> tuple[list[float], PromptStates]:
        crown = run_crown(structure, text_states, token_budget=token_budget)
        bits = score_bits(structure, crown, scored)
        crown = run_crown(structure, prompt_states, token_budget=token_budget)
        return bits, summarise_states(structure, crown, len(heldout.prompts.ids))

    bits_before, before = measure()
    with delta.applied(structure, strength, dtype):
        bits_after, after = measure()
    found = {}
    for language in languages:
        own = [index for index, text in enumerate(texts) if text[0] == language]
        n_bytes = sum(texts[index][2] for index in own)
        found[language] = BitsPerByte(
            before=sum(bits_before[index] for index in own) / n_bytes,
            after=sum(bits_after[index] for index in own) / n_bytes,
            n_texts=len(own),
            n_bytes=n_bytes,
        )
    rows = heldout.prompts_of
    return Comparison(
        bits_per_byte=found,
        state_change={k: measure_change(before, after, index) for k, index in rows.items()},
        last_states={
            when: {k: states.last[index] for k, index in rows.items()}
            for when, states in (("before", before), ("after", after))
        },
    )


def summarise(
    heldout: Heldout,
    before: Sequence[Answer],
    after: Sequence[Answer],
    comparison: Comparison,
    max_new_tokens: int,
) -> Evaluation:
    """Put answers and comparison together."""
    fidelity = {}
    for language in heldout.all_languages:
        measured = []
        for answers in (before, after):
            own = [one for one in answers if one.language == language]
            texts, detected = [one.answer for one in own], [one.detected for one in own]
            measured.append(measure_fidelity(language, texts, detected))
        fidelity[language] = BeforeAfter(*measured)
    return Evaluation(
        central=heldout.central,
        languages=heldout.languages,
        watched=heldout.watched,
        max_new_tokens=max_new_tokens,
        fidelity=fidelity,
        bits_per_byte=comparison.bits_per_byte,
        state_change=comparison.state_change,
    )


def evaluate(
    model: LanguageModel,
    delta: CrownDelta,
    corpus: ParallelCorpus,
    *,
    languages: Sequence[str],
    central: str = "en",
    strength: float = 1.0,
    max_new_tokens: int = 48,
    max_tokens: int = 128,
    template: str = "auto",
    token_budget: int | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Compare a model before and after on held-out parallel prompts.

    Args:
        model: the untouched model; it is not changed.
        delta: from `polylens.train`.
        corpus: rows that training did not see.
        languages: target languages.
        central: the language to protect.
        strength: the dial: 0 is the untouched model, 1 the trained one.
        max_new_tokens: longest answer.
        max_tokens: longest prompt.
        template: "auto", "chat", "plain" or a Jinja file.
        token_budget: padded tokens of a batch; None takes what is fastest on this machine.
        progress: told how far each piece of work is.

    Raises:
        CorpusError: a language is missing.
        LanguageError: the detector does not know a language.
    """
    rows = corpus.select((central, *languages))
    heldout = Heldout(
        corpus=rows,
        prompts=encode_parallel(
            rows,
            (central, *languages),
            choose_format(model.tokenizer, template),
            model.tokenizer,
            max_tokens,
        ),
        texts=rows.to_corpus().texts,
        central=central,
        languages=tuple(languages),
    )
    before = answer(model, heldout, max_new_tokens, progress)
    with delta.applied(model.structure, strength):
        after = answer(model, heldout, max_new_tokens, progress)
    comparison = compare(
        model, delta, heldout, strength=strength, token_budget=token_budget, progress=progress
    )
    return summarise(heldout, before, after, comparison, max_new_tokens)
