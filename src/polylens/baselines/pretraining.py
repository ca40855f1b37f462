"""Continual pre-training: every token of plain texts in the target languages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polylens.baselines.language_modelling import Sequences, choose_rows, train_on_tokens
from polylens.baselines.settings import PretrainingSettings
from polylens.corpora import Corpus, require_languages
from polylens.crown import Crown, CrownDelta
from polylens.errors import CorpusError
from polylens.models.loading import LanguageModel
from polylens.progress import Progress, silent
from polylens.scratch import Scratch
from polylens.training import trained_layers


def encode_texts(texts: Mapping[str, Sequence[str]], tokenizer: Any, max_tokens: int) -> Sequences:
    """Tokenise texts with the tokenizer's own end of text; every token but the first is predicted.

    A long text becomes several rows, each of which begins with the last token of the one before, so
    that no token is predicted twice or left out. A row never sees another.
    """
    rows = []
    for language, own in texts.items():
        for text in own:
            ids = list(tokenizer(text, add_special_tokens=True)["input_ids"])
            if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
                ids.append(tokenizer.eos_token_id)
            for start in range(0, len(ids) - 1, max_tokens - 1):
                piece = ids[start : start + max_tokens]
                rows.append((piece, len(piece) - 1, language))
    return Sequences.make(rows)


def pretrain(
    model: LanguageModel,
    corpus: Corpus,
    *,
    languages: Sequence[str] | None = None,
    central: str = "en",
    settings: PretrainingSettings | None = None,
    seed: int = 0,
    token_budget: int | None = None,
    scratch: Scratch | None = None,
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> CrownDelta:
    """Train the top layers on plain texts.

    Args:
        model: the untouched model; it is not changed.
        corpus: texts per language.
        languages: target languages; None takes all of the corpus but the central one.
        central: the language whose texts are replayed, if any are.
        settings: see `PretrainingSettings`.
        seed: choice and order of the rows.
        token_budget: padded tokens of a batch; None takes what is fastest on this machine.
        scratch: room for states and the optimizer's moments; None takes memory without limit.
        checkpoint: a file to continue from after a kill, removed by the caller.
        progress: told the steps done.

    Raises:
        CorpusError: a language is missing, or no text has two tokens.
        TrainingError: the loss is not finite or runs away.
    """
    settings = settings or PretrainingSettings()
    targets = languages or [k for k in corpus.languages if k != central]
    require_languages(corpus, [*targets, *([central] if settings.replay_ratio else [])])
    texts = choose_rows(corpus.texts, targets, central, settings, seed)
    sequences = encode_texts(texts, model.tokenizer, settings.max_tokens)
    if not sequences.ids:
        raise CorpusError(
            f"at least one text of {corpus.name} must have two tokens, but none has; check it"
        )
    layers = trained_layers(settings, model.structure.n_layers)
    return train_on_tokens(
        model,
        Crown(model.structure, layers),
        sequences.within_budget(settings, seed),
        settings,
        method="pretraining",
        central=central,
        seed=seed,
        token_budget=token_budget,
        scratch=scratch,
        checkpoint=checkpoint,
        progress=progress,
    )
