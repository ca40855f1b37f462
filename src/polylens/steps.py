"""The steps of the method as functions that take and return plain objects.

`probe` finds the subspaces, `train` the change of the top layers. Each turns texts into prompts,
runs the trunk once and hands over to the mathematics. `polylens.run` strings the same functions
together, with prompts it has made already.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from polylens.config import PRESETS, ProbeSettings, TrainSettings
from polylens.corpora import Corpus, ParallelCorpus
from polylens.corpora.choices import training_choices
from polylens.crown import CrownDelta
from polylens.errors import ConfigError, CorpusError
from polylens.hidden_states import HiddenStates, Keep
from polylens.journal import versions
from polylens.models.loading import LanguageModel
from polylens.objective import ParallelStates
from polylens.progress import Progress, silent
from polylens.prompts import (
    ParallelPrompts,
    PromptFormat,
    Prompts,
    choose_format,
    encode_parallel,
    encode_texts,
)
from polylens.scratch import Scratch
from polylens.shortfall import measure_shortfall, strengths_of
from polylens.states_cache import Collect, cached_hidden_states, fresh_hidden_states
from polylens.subspaces import Subspaces, check_probe, probe_subspaces
from polylens.training import boundary_layers, train_crown, trained_layers


def probe(
    model: LanguageModel,
    corpus: Corpus,
    *,
    languages: Sequence[str] | None = None,
    central: str = "en",
    settings: ProbeSettings | None = None,
    template: str = "auto",
    token_budget: int | None = None,
    scratch: Scratch | None = None,
    progress: Progress = silent,
) -> Subspaces:
    """Find the language subspaces of every layer (LSP).

    Args:
        model: from `polylens.load_model`.
        corpus: texts per language.
        languages: languages to probe, the central one included; None takes all of the corpus.
        central: the language that the others are compared with.
        settings: limits and forms; its `corpus` and `texts_per_language` are not read here.
        template: "auto", "chat", "plain" or a Jinja file.
        token_budget: padded tokens of a batch; None takes what is fastest on this machine.
        scratch: room for the states; None takes memory without limit.
        progress: told the tokens done.

    Raises:
        CorpusError: a language has no usable text.
        SubspaceError: rank or layer out of range, or fewer than two languages.
    """
    settings = settings or ProbeSettings()
    prompt_format = choose_format(model.tokenizer, template)
    chosen = tuple(languages or corpus.languages)
    prompts = encode_texts(corpus, chosen, prompt_format, model.tokenizer, settings.max_tokens)
    return probe_prompts(
        model,
        prompts,
        central=central,
        settings=settings,
        template=prompt_format.name,
        token_budget=token_budget,
        scratch=scratch,
        collect=fresh_hidden_states,
        progress=progress,
    )


def probe_prompts(
    model: LanguageModel,
    prompts: Mapping[str, Prompts],
    *,
    central: str,
    settings: ProbeSettings,
    template: str,
    token_budget: int | None = None,
    scratch: Scratch | None = None,
    collect: Collect = cached_hidden_states,
    progress: Progress = silent,
) -> Subspaces:
    """Find the subspaces from prompts; see `probe`."""
    n_entries = model.structure.n_layers + 1
    check_probe(tuple(prompts), central, settings.rank, settings.layers, n_entries)
    ids = [one for part in prompts.values() for one in part.ids]
    states = collect(
        model,
        ids,
        Keep(pooling=settings.pooling),
        token_budget=token_budget,
        scratch=scratch,
        progress=progress,
    )
    assert states.pooled is not None
    counts = [len(part.ids) for part in prompts.values()]
    pooled = dict(zip(prompts, states.pooled.split(counts), strict=True))
    return probe_subspaces(
        pooled,
        central=central,
        rank=settings.rank,
        agnostic=settings.agnostic,
        layers=settings.layers,
        metadata={
            "fingerprint": model.fingerprint,
            "model": model.name,
            "pooling": settings.pooling,
            "template": template,
            "max_tokens": settings.max_tokens,
            "n_layers": model.structure.n_layers,
            "dtype": str(model.structure.dtype),
            "versions": versions(),
        },
    )


@overload
def train(
    model: LanguageModel,
    subspaces: Subspaces,
    corpus: ParallelCorpus,
    *,
    languages: Sequence[str] | None = ...,
    settings: TrainSettings | None = ...,
    template: str = ...,
    seed: int = ...,
    token_budget: int | None = ...,
    scratch: Scratch | None = ...,
    checkpoint: Path | None = ...,
    progress: Progress = ...,
) -> CrownDelta: ...


@overload
def train(
    model: LanguageModel,
    subspaces: Subspaces,
    corpus: ParallelCorpus,
    *,
    languages: Sequence[str] | None = ...,
    settings: Sequence[TrainSettings],
    template: str = ...,
    seed: int = ...,
    token_budget: int | None = ...,
    scratch: Scratch | None = ...,
    checkpoint: Path | None = ...,
    progress: Progress = ...,
) -> list[CrownDelta]: ...


def train(
    model: LanguageModel,
    subspaces: Subspaces,
    corpus: ParallelCorpus,
    *,
    languages: Sequence[str] | None = None,
    settings: TrainSettings | Sequence[TrainSettings] | None = None,
    template: str = "auto",
    seed: int = 0,
    token_budget: int | None = None,
    scratch: Scratch | None = None,
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> CrownDelta | list[CrownDelta]:
    """Train the top layers on parallel prompts (LSM).

    Args:
        model: the untouched model; it is not changed.
        subspaces: of this model.
        corpus: parallel rows.
        languages: target languages; None takes those of the subspaces.
        settings: see `TrainSettings`; `corpus` and `rows` are not read here. None takes those of
            the default preset. A list trains one crown for each, from one trunk pass, or two where
            some read answers and some do not; all must have the same `max_tokens` and
            `max_answer_tokens`.
        template: "auto", "chat", "plain" or a Jinja file.
        seed: order of the rows.
        token_budget: padded tokens of a batch; None takes what is fastest on this machine.
        scratch: room for states and the optimizer's moments; None takes memory without limit.
        checkpoint: a file to continue from after a kill; not with a list.
        progress: told the steps done.

    Returns:
        The change of the weights; for a list of settings, a list.

    Raises:
        ConfigError: the settings of a list differ in `max_tokens` or `max_answer_tokens`.
        CorpusError: no usable row, or no answer where nothing else is learned.
        TrainingError: the loss is not finite or runs away.
    """
    several = settings if isinstance(settings, Sequence) else [settings or default_train_settings()]
    targets = languages or [k for k in subspaces.languages if k != subspaces.central]
    prompts = encode_shared(
        model.tokenizer,
        choose_format(model.tokenizer, template),
        corpus,
        (subspaces.central, *targets),
        several,
    )
    deltas = list(
        train_prompts(
            model,
            subspaces,
            prompts,
            settings=several,
            seed=seed,
            token_budget=token_budget,
            scratch=scratch,
            collect=fresh_hidden_states,
            checkpoint=checkpoint,
            progress=progress,
        )
    )
    return deltas if isinstance(settings, Sequence) else deltas[0]


def default_train_settings() -> TrainSettings:
    """Return the training settings of the default preset."""
    return TrainSettings(**PRESETS["default"]["train"])


def encode_shared(
    tokenizer: Any,
    prompt_format: PromptFormat,
    corpus: ParallelCorpus,
    languages: Sequence[str],
    settings: Sequence[TrainSettings],
    apart: ParallelCorpus | None = None,
) -> ParallelPrompts:
    """Tokenise parallel rows for all of some settings; answers follow where one reads them.

    The questions with two answers that any of the settings retains come after them.

    Args:
        tokenizer: of the model.
        prompt_format: what stands around each text.
        corpus: the rows that train.
        languages: the central one first.
        settings: how many questions are retained, and whether answers are read.
        apart: rows that are measured on, whose questions are not to be retained.

    Raises:
        ConfigError: the settings differ in `max_tokens` or `max_answer_tokens`.
        CorpusError: no usable row, or no answer where nothing else is learned.
    """
    for name in ("max_tokens", "max_answer_tokens"):
        given = [getattr(one, name) for one in settings]
        if len(set(given)) != 1:
            raise ConfigError(
                f"settings that share a trunk pass must have one {name}, got "
                f"{', '.join(map(str, given)) or 'no settings'}; train the others apart"
            )
    answers = (one.answer_tokens for one in settings if one.answer_tokens is not None)
    prompts = encode_parallel(
        corpus,
        languages,
        prompt_format,
        tokenizer,
        settings[0].max_tokens,
        next(answers, None),
        stand_in=any(one.position == "answer" for one in settings),
    )
    for one in settings:
        _require_answers(one, prompts, corpus.name)
    n_choices = max(one.n_choices(len(prompts.rows)) for one in settings)
    # The right answer is A of one, B of the next.
    choices = [pair[n % 2] for n, pair in enumerate(training_choices(languages[0], corpus, apart))]
    fitting = (ids for text in choices for ids in prompt_format.encode_whole(tokenizer, [text]))
    return prompts.with_choices([*itertools.islice(fitting, n_choices)])


def _require_answers(settings: TrainSettings, prompts: ParallelPrompts, name: str) -> None:
    """Check that target languages have something to learn from.

    Raises:
        CorpusError: answers alone are to be learned, and no row has one.
    """
    learns = settings.align_weight or settings.separate_weight
    if settings.answer_weight and not learns and not any(prompts.answers or ()):
        raise CorpusError(
            "training on answers alone must have answers in the target languages, but "
            f"{name} has none; add them as docs/data.md says, or raise train.separate_weight"
        )


def train_prompts(
    model: LanguageModel,
    subspaces: Subspaces,
    prompts: ParallelPrompts,
    *,
    settings: Sequence[TrainSettings],
    seed: int,
    boundaries: tuple[int, ...] | None = None,
    token_budget: int | None = None,
    scratch: Scratch | None = None,
    collect: Collect = cached_hidden_states,
    checkpoint: Path | None = None,
    progress: Progress = silent,
) -> Iterator[CrownDelta]:
    """Train from prompts, one crown for each of `settings`; see `train`.

    `boundaries` are the layers whose input is kept; None takes those that `settings` need.

    Yields:
        The deltas, in the order of `settings`, each as soon as it is there.
    """
    assert len(settings) == 1 or checkpoint is None
    structure = model.structure
    layers = [trained_layers(one, structure.n_layers) for one in settings]
    kept: dict[bool, ParallelStates] = {}
    trained = {language for row in prompts.rows for language in row}
    languages = [k for k in subspaces.languages if k != subspaces.central and k in trained]
    strengths: dict[str, float] = {}
    if any(one.pushes_by_shortfall for one in settings):
        shortfall = measure_shortfall(
            model, prompts.without_answers(), subspaces.central, languages, progress=progress
        )
        strengths = strengths_of(shortfall)
    for one, own_layers in zip(settings, layers, strict=True):
        if one.strength == "auto":
            one = one.model_copy(update={"strength": strengths})
        own = read_by(one, prompts)
        answered = own.n_answer is not None
        if answered not in kept:
            states = states_of_prompts(
                model,
                own,
                boundaries or boundaries_of(settings, structure.n_layers),
                token_budget=token_budget,
                scratch=scratch,
                collect=collect,
                progress=progress,
            )
            kept[answered] = ParallelStates(
                states, own.rows, subspaces.central, own.n_answer, own.answers
            )
        result = train_crown(
            structure,
            subspaces,
            dataclasses.replace(kept[answered], choices=own.choices_of(one)),
            one,
            seed=seed,
            token_budget=token_budget,
            scratch=scratch,
            checkpoint=checkpoint,
            progress=progress,
        )
        metadata = {
            "fingerprint": model.fingerprint,
            "model": model.name,
            "central": subspaces.central,
            "languages": languages,
            "layers": own_layers,
            "n_rows": len(prompts.rows),
            "seed": seed,
            "settings": one.model_dump(mode="json"),
            "log": result.log,
            "versions": versions(),
        }
        yield CrownDelta(result.changes, metadata)


def read_by(settings: TrainSettings, prompts: ParallelPrompts) -> ParallelPrompts:
    """Return prompts as some settings read them, with the answers that follow or without."""
    return prompts.without_answers() if settings.answer_tokens is None else prompts


def boundaries_of(settings: Sequence[TrainSettings], n_layers: int) -> tuple[int, ...]:
    """Return the layers whose input some trainings need, ascending, each once."""
    return tuple(sorted({layer for one in settings for layer in boundary_layers(one, n_layers)}))


def states_of_prompts(
    model: LanguageModel,
    prompts: ParallelPrompts,
    boundaries: tuple[int, ...],
    *,
    token_budget: int | None = None,
    scratch: Scratch | None = None,
    collect: Collect = cached_hidden_states,
    progress: Progress = silent,
) -> HiddenStates:
    """Make the trunk pass that any number of crowns are trained from."""
    return collect(
        model,
        prompts.ids,
        Keep(boundary_layers=boundaries, final=True),
        token_budget=token_budget,
        scratch=scratch,
        progress=progress,
    )
