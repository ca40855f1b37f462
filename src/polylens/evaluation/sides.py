"""Which models are evaluated against each other, and where their answers are kept.

A side is a model with a candidate crown. Sides of one model share its trunk passes; sides of
different models are loaded one after the other. Each side leaves a `Scorecard`; a finished part is
not done again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polylens.artefacts import read_object, readable_storage_errors
from polylens.config import Runtime, load_config
from polylens.corpora import ParallelCorpus
from polylens.crown import CrownDelta
from polylens.errors import UsageError
from polylens.evaluation.choices import encode_choices
from polylens.evaluation.comparison import Heldout
from polylens.evaluation.measures import Scorecard, check_tokenizers
from polylens.evaluation.scoring import Candidate
from polylens.evaluation.suite import Suite, run_suite
from polylens.evaluation.tasks import TaskSpec
from polylens.execution import Execution, open_model
from polylens.journal import Journal, versions
from polylens.locks import alone_in
from polylens.models.loading import LanguageModel
from polylens.models.registry import REGISTRY
from polylens.progress import Progress, silent
from polylens.prompts import choose_format, encode_parallel
from polylens.subspaces import Subspaces

BEFORE, AFTER = "before", "after"


@dataclass(frozen=True)
class Side:
    """One of the models that are compared.

    Attributes:
        label: name of its folder.
        model: folder, `.gguf` file, registry name or Hub id.
        revision: of a Hub model.
        delta: file of what training changed; None is the model as it is.
        strength: the dial.
    """

    label: str
    model: str
    revision: str | None = None
    delta: Path | None = None
    strength: float = 1.0


@dataclass(frozen=True)
class Protocol:
    """What all sides are asked.

    Attributes:
        rows: held-out parallel rows.
        central: the language to protect.
        languages: the others.
        built_in: some of `polylens.evaluation.suite.BUILT_IN`.
        benchmarks: from `choose_tasks`.
        limit: examples of a benchmark.
        data_dir: folder with local copies of benchmarks.
        template: "auto", "chat", "plain" or a Jinja file.
        max_new_tokens: longest answer.
        with_samples: keep prompts and responses, not the values alone.
        repetition_penalty: of answers; 1 is none.
    """

    rows: ParallelCorpus
    central: str
    languages: tuple[str, ...]
    built_in: tuple[str, ...]
    benchmarks: tuple[TaskSpec, ...]
    limit: int | None
    data_dir: Path | None
    template: str
    max_new_tokens: int
    with_samples: bool
    repetition_penalty: float = 1.0


def choose_sides(target: str, against: str | None, strengths: Sequence[float] | None) -> list[Side]:
    """Turn what the user names into sides, the base first where there is one.

    Args:
        target: a run folder, a delta, or a model.
        against: the base; for a delta or a run None takes the model that it belongs to.
        strengths: of a delta or a run; None takes the run's own, or 1.

    Raises:
        UsageError: strengths are given for a model that has no dial, or a delta's model cannot
            be told.
    """
    path = Path(target)
    delta, base, revision, own_strength = None, against, None, 1.0
    if path.is_file() and path.suffix == ".safetensors":
        delta = path
        base = against or _base_of(path)
    elif (path / "resolved.yaml").is_file():
        config = load_config(path / "resolved.yaml")
        delta, base, revision = path / "delta.safetensors", config.model, config.revision
        own_strength = run_strength(path, config.output.strength)
        if against is not None and against != base:
            base, revision = against, None
    if delta is None:
        if strengths is not None:
            raise UsageError(
                f"--strength must go with a run or a delta, but {target} is a model; leave it out"
            )
        after = Side(AFTER, target)
        return [after] if against is None else [Side(BEFORE, against), after]
    assert base is not None
    chosen = sorted(set(strengths or (own_strength,)))
    after_label = {s: AFTER if len(chosen) == 1 else f"{AFTER}-{s:g}" for s in chosen}
    return [
        Side(BEFORE, base, revision),
        *(Side(after_label[s], base, revision, delta, s) for s in chosen),
    ]


def _base_of(delta: Path) -> str:
    """Return the model that a delta belongs to."""
    name = str(CrownDelta.load(delta).metadata.get("model"))
    return model_called(name, delta, "--against, or by --model to export or chat")


def model_called(name: str, file: Path, option: str) -> str:
    """Return the model that a file of ours belongs to, which knows it by its name alone.

    Args:
        name: as the file has it.
        file: named in the error.
        option: which names the model instead.

    Raises:
        UsageError: it was a folder.
    """
    if name in REGISTRY or "/" in name:
        return name
    raise UsageError(
        f"the model must be named, since {file} belongs to one in a folder called {name!r}; "
        f"give its path by {option}"
    )


def model_of_subspaces(
    given: Path, file: Path, subspaces: Subspaces, model: str | None
) -> tuple[str, str | None]:
    """Return the model that subspaces belong to, and its revision.

    Args:
        given: the folder of a run or a probe, or the file itself.
        file: in which the subspaces are.
        subspaces: of `file`.
        model: as named by the user, which wins.

    Raises:
        UsageError: it cannot be told.
    """
    if model is not None:
        return model, None
    resolved = given / "resolved.yaml"
    if resolved.is_file():
        config = load_config(resolved)
        return config.model, config.revision
    return model_called(str(subspaces.metadata.get("model")), file, "--model"), None


def template_of(target: str | Path) -> str:
    """Return the template that a run was trained and evaluated with; of anything else, "auto"."""
    resolved = Path(target) / "resolved.yaml"
    return load_config(resolved).template if resolved.is_file() else "auto"


def run_strength(run: Path, configured: float) -> float:
    """Return the strength of a run's model: the one its gate chose, else the configured one."""
    gate = run / "gate.json"
    if not gate.exists():
        return configured
    Journal(run / "journal.jsonl").check([gate])
    return read_object(gate, lambda values: float(values["strength"]))


def evaluate_sides(
    sides: Sequence[Side],
    protocol: Protocol,
    out: Path,
    runtime: Runtime,
    *,
    progress: Progress = silent,
    on_execution: Callable[[Execution], None] = lambda execution: None,
    on_part: Callable[[str], None] = lambda name: None,
) -> list[Scorecard]:
    """Evaluate each side, and keep its answers in a folder of its own.

    Args:
        sides: base first.
        protocol: what they are asked.
        out: folder; what is finished in it is kept.
        runtime: how it is carried out.
        progress: told how far each piece of work is.
        on_execution: told how each model is run.
        on_part: told what is measured next.

    Returns:
        One scorecard a side.

    Raises:
        UsageError: tokenizers differ, data are missing, or the folder holds something else.
        RunError: another command is at work in the folder.
    """
    with alone_in(out):
        return _evaluate_sides(sides, protocol, out, runtime, progress, on_execution, on_part)


def _evaluate_sides(
    sides: Sequence[Side],
    protocol: Protocol,
    out: Path,
    runtime: Runtime,
    progress: Progress,
    on_execution: Callable[[Execution], None],
    on_part: Callable[[str], None],
) -> list[Scorecard]:
    cards = [Scorecard(out / side.label) for side in sides]
    by_model: dict[tuple[str, str | None], list[int]] = {}
    for number, side in enumerate(sides):
        by_model.setdefault((side.model, side.revision), []).append(number)
    for (spec, revision), numbers in by_model.items():
        model, execution = open_model(
            spec, runtime, revision=revision, with_head=True, progress=progress
        )
        on_execution(execution)
        candidates = []
        for number in numbers:
            candidates.append(candidate_of(sides[number], model))
            identity = _identity(sides[number], model, execution, protocol)
            check_tokenizers(cards[0].identity if number else identity, identity)
            cards[number].open(identity)
        finished = frozenset.intersection(*(cards[number].finished for number in numbers))
        suite = Suite(
            protocol.built_in,
            protocol.benchmarks,
            make_heldout(model, protocol) if protocol.built_in else None,
            protocol.max_new_tokens,
            protocol.limit,
            protocol.data_dir,
            repetition_penalty=protocol.repetition_penalty,
        )
        for part, runs in run_suite(
            model,
            candidates,
            suite,
            skip=finished,
            token_budget=runtime.token_budget,
            scratch=execution.scratch(),
            progress=progress,
            on_part=on_part,
        ):
            for place, number in enumerate(numbers):
                cards[number].add(
                    part,
                    [(run.task, run.examples[place]) for run in runs],
                    with_samples=protocol.with_samples,
                )
        del model
    return cards


def make_heldout(model: LanguageModel, protocol: Protocol) -> Heldout:
    """Tokenise the held-out rows for a model."""
    everything = (protocol.central, *protocol.languages)
    prompt_format = choose_format(model.tokenizer, protocol.template)
    prompts = encode_parallel(
        protocol.rows,
        everything,
        prompt_format,
        model.tokenizer,
        _MAX_PROMPT_TOKENS,
    )
    texts = protocol.rows.to_corpus().texts
    return Heldout(
        protocol.rows,
        prompts,
        texts,
        protocol.central,
        protocol.languages,
        choices=encode_choices(protocol.central, prompt_format, model.tokenizer),
    )


# Longer held-out prompts lose their end, as in training.
_MAX_PROMPT_TOKENS = 512


def candidate_of(side: Side, model: LanguageModel) -> Candidate:
    """Return a side's crown.

    Raises:
        UsageError: its delta is not one of this model.
    """
    if side.delta is None:
        return Candidate()
    return Candidate(CrownDelta.load(side.delta, fingerprint=model.fingerprint), side.strength)


def identity_of(side: Side, model: LanguageModel, execution: Execution) -> dict[str, Any]:
    """Return who answers: answers of other weights, dtypes or versions are not mixed in."""
    delta = None
    if side.delta is not None:
        with readable_storage_errors(side.delta):
            delta = hashlib.sha256(side.delta.read_bytes()).hexdigest()
    return {
        "model": side.model,
        "revision": side.revision,
        "fingerprint": model.fingerprint,
        "delta": delta,
        "strength": side.strength if delta else None,
        "dtype": execution.computing_name,
        "versions": versions(),
    }


def _identity(
    side: Side, model: LanguageModel, execution: Execution, protocol: Protocol
) -> Mapping[str, Any]:
    """What figures belong to: figures of other weights, data or settings are not mixed in."""
    return {
        **identity_of(side, model, execution),
        "tokenizer": tokenizer_fingerprint(model.tokenizer),
        "corpus": protocol.rows.fingerprint,
        "languages": [protocol.central, *protocol.languages],
        "limit": protocol.limit,
        "template": protocol.template,
        "max_new_tokens": protocol.max_new_tokens,
        "repetition_penalty": protocol.repetition_penalty,
    }


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a hash of a tokenizer's vocabulary."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    return hashlib.sha256(repr(vocabulary).encode()).hexdigest()[:16]
