"""Deciding, apart from doing: what a run will read, train and cost, before any weight is loaded.

`make_plan` finds the model, reads the corpora, chooses rows and tokenises them; everything cheap
that can be wrong with a run is found here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polylens.config import EvaluateSettings, RunConfig, Runtime, TrainSettings
from polylens.corpora import ParallelCorpus, read_parallel, read_texts, starter_corpus
from polylens.corpora.readers import STARTER
from polylens.detection import LanguageDetector
from polylens.errors import ConfigError, CorpusError
from polylens.evaluation import Heldout
from polylens.evaluation.choices import encode_choices
from polylens.evaluation.tasks import TaskSpec, choose_tasks
from polylens.execution import Execution, plan_execution
from polylens.hidden_states import n_tokens_run
from polylens.models.loading import choose_device, load_tokenizer
from polylens.models.source import ModelFacts, ModelSource, describe, resolve
from polylens.progress import Progress, silent
from polylens.prompts import (
    ParallelPrompts,
    PromptFormat,
    Prompts,
    choose_format,
    encode_parallel,
    encode_texts,
)
from polylens.steps import encode_shared
from polylens.subspaces import check_layers, check_rank
from polylens.training import boundary_layers, state_layers, trained_layers


@dataclass(frozen=True)
class Cost:
    """What a run will take, from counted operations and bytes.

    Attributes:
        trunk_flops: floating-point operations of the trunk passes: 2 · layer parameters · tokens,
            what prompts share counted once.
        crown_flops: of training: three times the crown's forward, each epoch, and as much of the
            head at the tokens of the answers that are learned.
        memory_bytes: peak, states included, as the run is carried out.
        states_bytes: states kept, in the cache.
        output_bytes: the merged model, in its stored dtype.
    """

    trunk_flops: float
    crown_flops: float
    memory_bytes: int
    states_bytes: int
    output_bytes: int

    @property
    def disk_bytes(self) -> int:
        """Disk for the run: the merged model, once more while it is written, and the states."""
        return 2 * self.output_bytes + self.states_bytes


@dataclass(frozen=True)
class Plan:
    """Everything a run needs but the weights.

    Attributes:
        config: the run's configuration.
        source: where the model is.
        facts: its sizes.
        prompt_format: how texts become prompts.
        probing: language → prompts.
        training: parallel prompts.
        heldout: what the model is evaluated on.
        benchmarks: tasks that the gate reads.
        corpora: role → name, fingerprint and counts, for the record.
        execution: how the model is run here.
        cost: see `Cost`.
    """

    config: RunConfig
    source: ModelSource
    facts: ModelFacts
    prompt_format: PromptFormat
    probing: Mapping[str, Prompts]
    training: ParallelPrompts
    heldout: Heldout
    benchmarks: tuple[TaskSpec, ...]
    corpora: Mapping[str, Mapping[str, Any]]
    execution: Execution
    cost: Cost


def make_plan(config: RunConfig, runtime: Runtime, progress: Progress = silent) -> Plan:
    """Plan a run.

    Args:
        config: what to do.
        runtime: how.
        progress: told about downloads.

    Raises:
        PolyLensError: whatever is wrong with model, languages, corpora, ranks and layers.
    """
    languages = config.all_languages
    choose_device(runtime.device)
    LanguageDetector((*languages, *config.evaluate.extra_languages))
    # Corpora before the model: a missing file should not wait for a download.
    probing_corpus = read_texts(config.probe.corpus, languages, offline=runtime.offline).select(
        languages, config.probe.texts_per_language, config.seed
    )
    if config.probe.rank is not None:
        check_rank(config.probe.rank, len(languages))
    training_corpus, heldout_corpus = choose_rows(config, offline=runtime.offline)
    texts = _scored_texts(config.evaluate, languages, heldout_corpus, runtime.offline)

    source = resolve(
        config.model, revision=config.revision, offline=runtime.offline, progress=progress
    )
    facts = describe(source.folder, trust_remote_code=runtime.trust_remote_code)
    layers = trained_layers(config.train, facts.n_layers)
    probed = check_layers(config.probe.layers, facts.n_layers + 1)
    for needed in state_layers(config.train, facts.n_layers):
        if needed not in probed:
            raise ConfigError(
                f"probe.layers must hold layer {needed}, whose states training reads, got "
                f"{list(probed)}; add it or leave probe.layers out"
            )
    tokenizer = load_tokenizer(source, trust_remote_code=runtime.trust_remote_code)
    prompt_format = choose_format(tokenizer, config.template)
    probing = encode_texts(
        probing_corpus, languages, prompt_format, tokenizer, config.probe.max_tokens
    )
    training = encode_shared(
        tokenizer, prompt_format, training_corpus, languages, [config.train], apart=heldout_corpus
    )
    heldout = Heldout(
        heldout_corpus,
        encode_parallel(
            heldout_corpus,
            (*languages, *config.evaluate.extra_languages),
            prompt_format,
            tokenizer,
            config.train.max_tokens,
        ),
        texts,
        config.central,
        config.languages,
        config.evaluate.extra_languages,
        encode_choices(config.central, prompt_format, tokenizer),
    )
    evaluate = config.evaluate
    benchmarks = choose_tasks(
        evaluate.tasks,
        (*languages, *evaluate.extra_languages),
        Path(evaluate.data_dir) if evaluate.data_dir else None,
    )
    n_crown_layers = facts.n_layers - min(layers)
    execution = plan_execution(facts, runtime, n_crown_layers=n_crown_layers).agreed()
    return Plan(
        config=config,
        source=source,
        facts=facts,
        prompt_format=prompt_format,
        probing=probing,
        training=training,
        heldout=heldout,
        benchmarks=tuple(benchmarks),
        corpora={
            "probing": {
                "name": probing_corpus.name,
                "fingerprint": probing_corpus.fingerprint,
                "texts": {k: len(prompts.ids) for k, prompts in probing.items()},
                "truncated": {k: prompts.n_truncated for k, prompts in probing.items()},
            },
            "training": {
                "name": training_corpus.name,
                "fingerprint": training_corpus.fingerprint,
                "rows": len(training.rows),
                "missing": training_corpus.n_missing,
                "truncated": training.n_truncated,
                "retained_choices": len(training.choices),
                **({"answers": training_corpus.n_answers} if training.n_answer else {}),
            },
            "heldout": {
                "name": heldout_corpus.name,
                "fingerprint": heldout_corpus.fingerprint,
                "rows": len(heldout.prompts.rows),
            },
        },
        execution=execution,
        cost=_cost(facts, execution, probing, training, heldout, n_crown_layers, config.train),
    )


def _cost(
    facts: ModelFacts,
    execution: Execution,
    probing: Mapping[str, Prompts],
    training: ParallelPrompts,
    heldout: Heldout,
    n_crown_layers: int,
    settings: TrainSettings,
) -> Cost:
    texts = [ids for prompts in probing.values() for ids in prompts.ids]
    own = n_tokens_run(training.ids)
    learned = sum(map(len, training.answers or ())) if settings.answer_weight > 0 else 0
    n_head = facts.vocab_size * facts.hidden_size
    tokens = n_tokens_run(texts, once=True) + own + n_tokens_run(heldout.prompts.ids)
    n_layer = facts.n_layer_parameters / facts.n_layers
    n_kept = len(boundary_layers(settings, facts.n_layers)) + 1  # and the last layer's output
    states = execution.dtype.itemsize * facts.hidden_size * n_kept * own + 4 * facts.hidden_size * (
        facts.n_layers + 1
    ) * len(texts)
    # Weights in training, their gradients, and two moments of the optimizer, float32.
    room = states + int(16 * n_layer * n_crown_layers)
    if execution.streamed:
        memory = execution.memory_bytes - execution.scratch_bytes
    else:
        memory = execution.needed_bytes
    return Cost(
        trunk_flops=2.0 * facts.n_layer_parameters * tokens,
        crown_flops=6.0 * (n_layer * n_crown_layers * own + n_head * learned) * settings.epochs,
        memory_bytes=memory + min(room, execution.scratch_bytes),
        states_bytes=states,
        output_bytes=facts.n_bytes,
    )


def choose_rows(
    config: RunConfig, *, offline: bool = False
) -> tuple[ParallelCorpus, ParallelCorpus]:
    """Return the rows to train on and those to evaluate on (with watched languages).

    Raises:
        CorpusError: a corpus cannot be read, lacks a language, or has too few rows.
    """
    evaluate = config.evaluate
    languages = config.all_languages
    everything = (*languages, *evaluate.extra_languages)
    corpus = read_parallel(config.train.corpus, offline=offline)
    if evaluate.corpus is None:
        train, heldout = corpus.select(everything).split(evaluate.rows, config.seed)
    else:
        train = corpus.split(0)[0] if corpus.n_heldout else corpus
        _, heldout = _heldout_of(evaluate, everything, config.seed, offline)
    train = train.select(languages).limit(config.train.rows, config.seed)
    seen = {row[config.central] for row in train.rows}
    unseen = tuple(row for row in heldout.rows if row.get(config.central) not in seen)
    if not unseen:
        raise CorpusError(
            f"evaluation must use rows that training does not, but every row of {heldout.name} is "
            "also a training row; give evaluate.corpus other rows"
        )
    heldout = ParallelCorpus(heldout.name, unseen)
    for part, what, needed in (
        (train, "training", languages),
        (heldout, "held-out", everything),
    ):
        for language in needed:
            if not any(language in row for row in part.rows):
                raise CorpusError(
                    f"the {what} rows must hold each language, but none of the {len(part.rows)} "
                    f"rows of {part.name} has {language}; give more rows, or another seed"
                )
    return train, heldout


def _heldout_of(
    evaluate: EvaluateSettings, languages: Sequence[str], seed: int, offline: bool
) -> tuple[ParallelCorpus, ParallelCorpus]:
    assert evaluate.corpus is not None
    if evaluate.corpus == STARTER:
        return starter_corpus().select(languages).split(evaluate.rows, seed)
    corpus = read_parallel(evaluate.corpus, languages, offline=offline)
    return corpus, corpus.limit(evaluate.rows, seed)


def _scored_texts(
    evaluate: EvaluateSettings,
    languages: Sequence[str],
    heldout: ParallelCorpus,
    offline: bool,
) -> dict[str, tuple[str, ...]]:
    everything = (*languages, *evaluate.extra_languages)
    if evaluate.texts is None:
        return {k: tuple(row[k] for row in heldout.rows if k in row) for k in everything}
    corpus = read_texts(evaluate.texts, everything, offline=offline)
    return dict(corpus.select(everything, evaluate.max_texts).texts)
