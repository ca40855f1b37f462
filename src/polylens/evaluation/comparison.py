"""A model before and after, on prompts that training never saw.

`evaluate` does all of it; its three parts, `answer`, `compare` and `summarise`, are what a run does
one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from polylens import distributed
from polylens.corpora import ParallelCorpus
from polylens.crown import Change, run_crown
from polylens.detection import LanguageDetector
from polylens.evaluation.choices import Choice
from polylens.evaluation.drift import PromptStates, StateChange, measure_change, summarise_states
from polylens.evaluation.fidelity import detect_answers, measure_fidelity
from polylens.evaluation.generation import generate_answers
from polylens.evaluation.likelihood import StateBatch, encode_plain, score_bits
from polylens.evaluation.results import Answer, BeforeAfter, BitsPerByte, Evaluation
from polylens.hidden_states import HiddenStates, Keep
from polylens.machine import keeping_freed_memory
from polylens.models.loading import LanguageModel
from polylens.progress import Progress, silent
from polylens.prompts import ParallelPrompts, choose_format, encode_parallel
from polylens.scratch import Scratch
from polylens.states_cache import cached_hidden_states
from polylens.token_budget import best_token_budget

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
        choices: questions of the central language with two answers each; none where the starter
            corpus lacks it, or nothing asks for them.
    """

    corpus: ParallelCorpus
    prompts: ParallelPrompts
    texts: Mapping[str, tuple[str, ...]]
    central: str
    languages: tuple[str, ...]
    watched: tuple[str, ...] = ()
    choices: tuple[Choice, ...] = ()

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
    model: LanguageModel,
    heldout: Heldout,
    max_new_tokens: int,
    progress: Progress = silent,
    *,
    repetition_penalty: float = 1.0,
) -> list[Answer]:
    """Let a model, as it is now, answer every held-out prompt.

    Args:
        model: with a delta applied or without.
        heldout: the prompts.
        max_new_tokens: longest answer.
        progress: told the answers done.
        repetition_penalty: as for `generate_answers`.
    """
    asked = [
        (language, number, row[language])
        for language in heldout.all_languages
        for number, row in enumerate(heldout.prompts.rows)
        if language in row
    ]
    prompts = [heldout.prompts.ids[index] for _, _, index in asked]
    own = generate_answers(
        model,
        distributed.own(prompts),
        max_new_tokens=max_new_tokens,
        repetition_penalty=repetition_penalty,
        progress=progress,
    )
    texts = distributed.collect_all(own)
    detected = detect_answers(texts, LanguageDetector(heldout.all_languages))
    answers = []
    for (language, number, _), text, found in zip(asked, texts, detected, strict=True):
        source = heldout.prompts.sources[number]
        prompt = heldout.corpus.rows[source][language]
        answers.append(Answer(language, source, prompt, text, found, found == language))
    return answers


def compare(
    model: LanguageModel,
    deltas: Sequence[Change],
    heldout: Heldout,
    *,
    strength: float = 1.0,
    dtype: torch.dtype | None = None,
    token_budget: int | None = None,
    scratch: Scratch | None = None,
    collect: Callable[..., HiddenStates] = cached_hidden_states,
    progress: Progress = silent,
) -> list[Comparison]:
    """Compare bits per byte and states before and after, from one trunk pass for all candidates.

    Args:
        model: the untouched model.
        deltas: what training changed, or steerings; each costs one run of its crown.
        heldout: prompts and texts.
        strength: the dial.
        dtype: round the changed weights to it first, as a model saved in it would be.
        token_budget: padded tokens of a batch; None takes what is fastest on this machine.
        scratch: room for the states; None takes memory without limit.
        collect: how hidden states are had.
        progress: told the tokens done.

    Returns:
        One comparison a delta, in their order.
    """
    structure = model.structure
    scratch = scratch or Scratch()
    boundaries = tuple(sorted({min(delta.layers) for delta in deltas}))
    languages = heldout.all_languages
    texts = [
        (k, *encode_plain(model.tokenizer, text, MAX_SCORED_TOKENS))
        for k in languages
        for text in heldout.texts[k]
    ]
    texts = [(language, ids, n_bytes) for language, ids, n_bytes in texts if n_bytes > 0]
    scored = [ids for _, ids, _ in texts]
    n_tokens = sum(map(len, (*scored, *heldout.prompts.ids)))
    token_budget = token_budget or best_token_budget(structure, n_tokens, scratch.batch_bytes)
    text_states, prompt_states = (
        collect(
            model,
            ids,
            Keep(boundary_layers=boundaries),
            token_budget=token_budget,
            scratch=scratch,
            progress=progress,
        )
        for ids in (scored, heldout.prompts.ids)
    )

    def measure(first: int) -> tuple[list[float], PromptStates]:
        def run(states: HiddenStates) -> Iterator[StateBatch]:
            return run_crown(structure, states, token_budget=token_budget, boundary_layer=first)

        bits = score_bits(structure, run(text_states), scored)
        crown = run(prompt_states)
        return bits, summarise_states(structure, crown, len(heldout.prompts.ids))

    comparisons = []
    with keeping_freed_memory(), structure.loaded_head():
        untouched = {first: measure(first) for first in boundaries}
        for number, delta in enumerate(deltas):
            if len(deltas) > 1:
                progress(number, len(deltas), "candidates")
            first = min(delta.layers)
            with delta.applied(structure, strength, dtype):
                changed = measure(first)
            comparisons.append(_comparison(heldout, texts, untouched[first], changed))
    return comparisons


def _comparison(
    heldout: Heldout,
    texts: Sequence[tuple[str, Sequence[int], int]],
    untouched: tuple[list[float], PromptStates],
    changed: tuple[list[float], PromptStates],
) -> Comparison:
    """Put two measurements together, language by language."""
    (bits_before, before), (bits_after, after) = untouched, changed
    found = {}
    for language in heldout.all_languages:
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
    repetition_penalty: float = 1.0,
) -> Evaluation:
    """Put answers and comparison together."""
    fidelity = {}
    for language in heldout.all_languages:
        measured = []
        for answers in (before, after):
            own = [one for one in answers if one.language == language]
            prompts, texts = [one.prompt for one in own], [one.answer for one in own]
            detected = [one.detected for one in own]
            measured.append(measure_fidelity(language, prompts, texts, detected))
        fidelity[language] = BeforeAfter(*measured)
    return Evaluation(
        central=heldout.central,
        languages=heldout.languages,
        watched=heldout.watched,
        max_new_tokens=max_new_tokens,
        fidelity=fidelity,
        bits_per_byte=comparison.bits_per_byte,
        state_change=comparison.state_change,
        repetition_penalty=repetition_penalty,
    )


@overload
def evaluate(
    model: LanguageModel,
    delta: Change,
    corpus: ParallelCorpus,
    *,
    languages: Sequence[str],
    central: str = ...,
    strength: float = ...,
    max_new_tokens: int = ...,
    max_tokens: int = ...,
    template: str = ...,
    token_budget: int | None = ...,
    scratch: Scratch | None = ...,
    progress: Progress = ...,
) -> Evaluation: ...


@overload
def evaluate(
    model: LanguageModel,
    delta: Sequence[Change],
    corpus: ParallelCorpus,
    *,
    languages: Sequence[str],
    central: str = ...,
    strength: float = ...,
    max_new_tokens: int = ...,
    max_tokens: int = ...,
    template: str = ...,
    token_budget: int | None = ...,
    scratch: Scratch | None = ...,
    progress: Progress = ...,
) -> list[Evaluation]: ...


def evaluate(
    model: LanguageModel,
    delta: Change | Sequence[Change],
    corpus: ParallelCorpus,
    *,
    languages: Sequence[str],
    central: str = "en",
    strength: float = 1.0,
    max_new_tokens: int = 48,
    max_tokens: int = 128,
    template: str = "auto",
    token_budget: int | None = None,
    scratch: Scratch | None = None,
    progress: Progress = silent,
) -> Evaluation | list[Evaluation]:
    """Compare a model before and after on held-out parallel prompts.

    Args:
        model: the untouched model; it is not changed.
        delta: from `polylens.train`, or a `Steering`; with a list, all of them from one trunk pass.
        corpus: rows that training did not see.
        languages: target languages.
        central: the language to protect.
        strength: the dial: 0 is the untouched model, 1 the trained one.
        max_new_tokens: longest answer.
        max_tokens: longest prompt.
        template: "auto", "chat", "plain" or a Jinja file.
        token_budget: padded tokens of a batch; None takes what is fastest on this machine.
        scratch: room for the states; None takes memory without limit.
        progress: told how far each piece of work is.

    Returns:
        An evaluation, or for a list of deltas a list.

    Raises:
        CorpusError: a language is missing.
        LanguageError: the detector does not know a language.
    """
    deltas = list(delta) if isinstance(delta, Sequence) else [delta]
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
    comparisons = compare(
        model,
        deltas,
        heldout,
        strength=strength,
        token_budget=token_budget,
        scratch=scratch,
        progress=progress,
    )
    found = []
    for one, comparison in zip(deltas, comparisons, strict=True):
        with one.applied(model.structure, strength):
            after = answer(model, heldout, max_new_tokens, progress)
        found.append(summarise(heldout, before, after, comparison, max_new_tokens))
    return found if isinstance(delta, Sequence) else found[0]
