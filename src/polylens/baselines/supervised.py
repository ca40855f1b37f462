"""Supervised fine-tuning: the answer's tokens, given the prompt in the model's chat template.

Answers come from the corpus, or, where it has none and is parallel, from translation: "Translate
into Swahili: …" with the English text is answered by the Swahili one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polylens.baselines.language_modelling import Sequences, choose_rows, train_on_tokens
from polylens.baselines.settings import LowRankSettings, SupervisedSettings
from polylens.corpora import (
    AnsweredCorpus,
    ParallelCorpus,
    read_answered,
    read_parallel,
    require_languages,
)
from polylens.crown import Crown, CrownDelta
from polylens.errors import CorpusError
from polylens.languages import language_name
from polylens.low_rank import LowRankCrown
from polylens.models.loading import LanguageModel
from polylens.progress import Progress, silent
from polylens.prompts import PromptFormat, choose_format
from polylens.scratch import Scratch
from polylens.training import trained_layers


def read_examples(
    spec: str | Path, languages: Sequence[str], central: str = "en", *, offline: bool = False
) -> AnsweredCorpus:
    """Read prompts with answers; of parallel texts without answers, make translations.

    Args:
        spec: a file, a folder, a Hub data set id, or "starter".
        languages: those needed.
        central: the language that parallel texts are translated from, and into for itself.
        offline: never use the network.

    Raises:
        CorpusError: neither answers nor parallel texts, or a language is missing.
    """
    answered = read_answered(spec, offline=offline)
    if answered.pairs:
        require_languages(answered, languages)
        return answered
    try:
        parallel = read_parallel(spec, offline=offline)
    except CorpusError as error:
        raise _no_examples(answered.name) from error
    if len(parallel.languages) < 2:
        raise _no_examples(answered.name)
    parallel = parallel.select((central, *(k for k in languages if k != central)))
    return translations(parallel, central)


def _no_examples(name: str) -> CorpusError:
    return CorpusError(
        f"examples must be prompts with answers in languages that can be told, or parallel texts, "
        f"but {name} holds neither; name the columns as docs/data.md says, or use polylens "
        "baseline pretraining for plain texts"
    )


def translations(parallel: ParallelCorpus, central: str) -> AnsweredCorpus:
    """Make instructions to translate out of parallel texts.

    Into each language from the central one; into the central one from each.

    Example:
        >>> rows = ParallelCorpus.make("two words", [{"en": "Water", "sw": "Maji"}])
        >>> translations(rows, "en").pairs["sw"]
        (('Translate into Swahili: Water', 'Maji'),)
    """
    pairs: dict[str, list[tuple[str, str]]] = {}
    for row in parallel.rows:
        for language, text in row.items():
            if language != central and central in row:
                pairs.setdefault(language, []).append(_translation(row[central], text, language))
                pairs.setdefault(central, []).append(_translation(text, row[central], central))
    return AnsweredCorpus.make(parallel.name, pairs)


def _translation(text: str, answer: str, language: str) -> tuple[str, str]:
    return f"Translate into {language_name(language)}: {text}", answer


def encode_pairs(
    pairs: dict[str, list[tuple[str, str]]],
    prompt_format: PromptFormat,
    tokenizer: Any,
    settings: SupervisedSettings,
) -> Sequences:
    """Tokenise prompts and answers; the answer's tokens, end of turn included, are predicted.

    Prompt and answer are tokenised apart, so that a prompt has the tokens that it has in use.
    """
    rows = []
    for language, own in pairs.items():
        prompts = prompt_format.encode(
            tokenizer, [prompt for prompt, _ in own], settings.max_tokens
        )
        for ids, index in zip(prompts.ids, prompts.kept, strict=True):
            answer = prompt_format.encode_answer(tokenizer, *own[index], settings.max_answer_tokens)
            rows.append(((*ids, *answer), len(answer), language))
    return Sequences.make(rows)


def fine_tune(
    model: LanguageModel,
    corpus: AnsweredCorpus,
    *,
    languages: Sequence[str] | None = None,
    central: str = "en",
    settings: SupervisedSettings | None = None,
    template: str = "auto",
    seed: int = 0,
    token_budget: int | None = None,
    scratch: Scratch | None = None,
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> CrownDelta:
    """Fine-tune the top layers on answers, by full updates, or low-rank ones (LoRA).

    Args:
        model: the untouched model; it is not changed.
        corpus: prompts with answers.
        languages: target languages; None takes all of the corpus but the central one.
        central: the language whose rows are replayed, if any are.
        settings: `LowRankSettings` for low-rank updates.
        template: "auto", "chat", "plain" or a Jinja file.
        seed: choice and order of the rows, and of LoRA's first values.
        token_budget: padded tokens of a batch; None takes what is fastest on this machine.
        scratch: room for states and the optimizer's moments; None takes memory without limit.
        checkpoint: a file to continue from after a kill, removed by the caller.
        progress: told the steps done.

    Raises:
        CorpusError: a language is missing, or no prompt fits.
        MissingExtraError: low-rank updates without peft.
        TrainingError: the loss is not finite or runs away.
    """
    settings = settings or SupervisedSettings()
    targets = languages or [k for k in corpus.languages if k != central]
    require_languages(corpus, [*targets, *([central] if settings.replay_ratio else [])])
    pairs = choose_rows(corpus.pairs, targets, central, settings, seed)
    prompt_format = choose_format(model.tokenizer, template)
    sequences = encode_pairs(pairs, prompt_format, model.tokenizer, settings)
    if not sequences.ids:
        raise CorpusError(
            f"at least one prompt of {corpus.name} must fit in max_tokens with its template, but "
            f"none does in {settings.max_tokens} tokens; raise max_tokens"
        )
    layers = trained_layers(settings, model.structure.n_layers)
    if isinstance(settings, LowRankSettings):
        method = "sft-lora"
        crown: Crown = LowRankCrown(
            model.structure, layers, rank=settings.rank, alpha=settings.alpha, seed=seed
        )
    else:
        method, crown = "sft", Crown(model.structure, layers)
    return train_on_tokens(
        model,
        crown,
        sequences.within_budget(settings, seed),
        settings,
        method=method,
        central=central,
        seed=seed,
        token_budget=token_budget,
        scratch=scratch,
        checkpoint=checkpoint,
        progress=progress,
    )
