"""Everything a model and its candidates are evaluated on, task by task.

`bits_per_byte`, `fidelity` and `retrieval` are measured here, on held-out parallel rows, and
`choices` on the starter corpus's; benchmarks are lm-eval's, through `polylens.evaluation.harness`.
One trunk pass serves all candidates wherever a task asks for likelihoods.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from polylens.evaluation.choices import CHOICES, measure_choices
from polylens.evaluation.comparison import MAX_SCORED_TOKENS, Heldout, answer
from polylens.evaluation.likelihood import encode_plain
from polylens.evaluation.measures import Example, Task, TaskRun
from polylens.evaluation.results import Answer
from polylens.evaluation.scoring import Candidate, score_continuations
from polylens.evaluation.tasks import TaskSpec
from polylens.hidden_states import Keep, collect_hidden_states
from polylens.models.loading import LanguageModel
from polylens.progress import Progress, silent
from polylens.scratch import Scratch
from polylens.states_cache import Collect, fresh_hidden_states

BITS_PER_BYTE = "bits_per_byte"
FIDELITY = "fidelity"
RETRIEVAL = "retrieval"
BUILT_IN = (BITS_PER_BYTE, CHOICES, FIDELITY, RETRIEVAL)


@dataclass(frozen=True)
class Suite:
    """What to evaluate on.

    Attributes:
        built_in: some of `BUILT_IN`.
        benchmarks: from `choose_tasks`.
        heldout: prompts and texts of the built-in ones; None where there are none.
        max_new_tokens: longest answer, for fidelity.
        repetition_penalty: of answers, for fidelity; 1 is none.
        limit: examples of a benchmark; None takes all.
        every: (first, step): every step-th example of a benchmark alone; None takes all.
        data_dir: folder with local copies of benchmarks.
    """

    built_in: tuple[str, ...]
    benchmarks: tuple[TaskSpec, ...]
    heldout: Heldout | None
    max_new_tokens: int = 48
    limit: int | None = None
    data_dir: Path | None = None
    every: tuple[int, int] | None = None
    repetition_penalty: float = 1.0

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of what `run_suite` does one by one."""
        return (*self.built_in, *(spec.name for spec in self.benchmarks))


def run_suite(
    model: LanguageModel,
    candidates: Sequence[Candidate],
    suite: Suite,
    *,
    skip: frozenset[str] = frozenset(),
    token_budget: int | None = None,
    scratch: Scratch | None = None,
    collect: Collect = fresh_hidden_states,
    progress: Progress = silent,
    on_part: Callable[[str], None] = lambda name: None,
) -> Iterator[tuple[str, list[TaskRun]]]:
    """Evaluate a model with each of some crowns, and yield each part when it is finished.

    Args:
        model: the untouched model.
        candidates: crowns of this model.
        suite: what to evaluate on.
        skip: parts that are finished already.
        token_budget: padded tokens of a batch; None takes what is fastest on this machine.
        scratch: room for the states; None takes memory without limit.
        collect: how the states that likelihoods are read off are had.
        progress: told how far each piece of work is.
        on_part: told the name of each part that starts.

    Raises:
        UsageError: a benchmark's data cannot be read.
        MissingExtraError: lm-eval is needed and not installed.
    """
    how: dict[str, Any] = {
        "token_budget": token_budget,
        "scratch": scratch,
        "progress": progress,
    }
    for name in suite.built_in:
        heldout = suite.heldout
        assert heldout is not None
        if name in skip or (name == CHOICES and not heldout.choices):
            continue
        on_part(name)
        if name == BITS_PER_BYTE:
            yield name, measure_texts(model, candidates, heldout, collect=collect, **how)
        elif name == CHOICES:
            central, choices = heldout.central, heldout.choices
            run = measure_choices(model, candidates, central, choices, collect=collect, **how)
            yield name, [run]
        elif name == FIDELITY:
            yield name, _measure_answers(model, candidates, heldout, suite, progress)
        else:
            yield name, measure_retrieval(model, candidates, heldout, **how)
    left = [spec for spec in suite.benchmarks if spec.name not in skip]
    if not left:
        return
    from polylens.evaluation.harness import CrownsLM, run_task

    lm = CrownsLM(
        model,
        candidates,
        token_budget=token_budget,
        scratch=scratch,
        collect=collect,
        progress=progress,
    )
    for spec in left:
        on_part(spec.name)
        runs = run_task(lm, spec, limit=suite.limit, every=suite.every, data_dir=suite.data_dir)
        yield spec.name, runs


def measure_texts(
    model: LanguageModel,
    candidates: Sequence[Candidate],
    heldout: Heldout,
    token_budget: int | None = None,
    scratch: Scratch | None = None,
    progress: Progress = silent,
    collect: Collect = fresh_hidden_states,
) -> list[TaskRun]:
    """Bits per byte of every held-out text, by every candidate; one run a language."""
    texts = [
        (language, *encode_plain(model.tokenizer, text, MAX_SCORED_TOKENS))
        for language in heldout.all_languages
        for text in heldout.texts[language]
    ]
    texts = [(language, ids, n_bytes) for language, ids, n_bytes in texts if n_bytes > 0]
    # A whole text is the continuation of its first token, which has no context.
    scores = score_continuations(
        model,
        [(ids[:1], ids[1:]) for _, ids, _ in texts],
        candidates,
        token_budget=token_budget,
        scratch=scratch,
        collect=collect,
        progress=progress,
    )
    runs = []
    for language in heldout.all_languages:
        own = [index for index, text in enumerate(texts) if text[0] == language]
        examples = tuple(
            tuple(
                Example(
                    key=str(number),
                    value=-of_candidate[index].log_likelihood / math.log(2) / texts[index][2],
                    responses={"bytes": texts[index][2]},
                )
                for number, index in enumerate(own)
            )
            for of_candidate in scores
        )
        name = f"{BITS_PER_BYTE}_{language}"
        runs.append(TaskRun(Task(name, language, "text", BITS_PER_BYTE, False), examples))
    return runs


def _measure_answers(
    model: LanguageModel,
    candidates: Sequence[Candidate],
    heldout: Heldout,
    suite: Suite,
    progress: Progress,
) -> list[TaskRun]:
    """Whether held-out prompts are answered in their language; one run a language."""
    answers = []
    for candidate in candidates:
        with candidate.applied(model.structure):
            own = answer(
                model,
                heldout,
                suite.max_new_tokens,
                progress,
                repetition_penalty=suite.repetition_penalty,
            )
            answers.append(own)
    return answer_runs(answers, heldout.all_languages)


def answer_runs(answers: Sequence[Sequence[Answer]], languages: Sequence[str]) -> list[TaskRun]:
    """Turn every candidate's answers into one run a language."""

    def of(language: str) -> tuple[tuple[Example, ...], ...]:
        return tuple(
            tuple(
                Example(
                    key=str(one.id),
                    value=float(one.passed),
                    prompt=one.prompt,
                    target=language,
                    responses={"answer": one.answer, "detected": one.detected},
                )
                for one in side
                if one.language == language
            )
            for side in answers
        )

    return [TaskRun(Task(f"{FIDELITY}_{k}", k, "answers", "in_language"), of(k)) for k in languages]


@torch.no_grad()
def measure_retrieval(
    model: LanguageModel,
    candidates: Sequence[Candidate],
    heldout: Heldout,
    token_budget: int | None = None,
    scratch: Scratch | None = None,
    progress: Progress = silent,
) -> list[TaskRun]:
    """Whether a text's nearest neighbour in the central language is its translation.

    A text's state is the mean over its tokens; neighbours are by cosine. The value is that after
    the final norm; `responses` has 0 or 1 for every layer, with states as they are ("raw") and
    with each language's mean taken off ("centred"), which is what an offset between languages
    does not spoil. One run a language other than the central one.
    """
    rows = [row for row in heldout.corpus.rows if heldout.central in row]
    ids = [
        {k: encode_plain(model.tokenizer, text, MAX_SCORED_TOKENS)[0] for k, text in row.items()}
        for row in rows
    ]
    prompts = [row[k] for row in ids for k in row]
    place = {
        (number, k): i for i, (number, k) in enumerate((n, k) for n, r in enumerate(ids) for k in r)
    }
    found: dict[str, list[tuple[Example, ...]]] = {}
    for candidate in candidates:
        with candidate.applied(model.structure):
            states = collect_hidden_states(
                model.structure,
                prompts,
                Keep(pooling="mean"),
                token_budget=token_budget,
                scratch=scratch,
                progress=progress,
            )
        assert states.pooled is not None
        for language in heldout.all_languages[1:]:
            shared = [number for number, row in enumerate(ids) if language in row]
            ours, theirs = (
                states.pooled[[place[number, k] for number in shared]]
                for k in (language, heldout.central)
            )
            raw = retrieved(ours, theirs)
            centred = retrieved(ours - ours.mean(0), theirs - theirs.mean(0))
            found.setdefault(language, []).append(
                tuple(
                    Example(
                        key=str(number),
                        value=float(raw[i, -1]),
                        responses={"raw": raw[i].tolist(), "centred": centred[i].tolist()},
                    )
                    for i, number in enumerate(shared)
                )
            )
    return [
        TaskRun(Task(f"{RETRIEVAL}_{k}", k, "states", "acc"), tuple(runs))
        for k, runs in found.items()
    ]


def retrieved(queries: Tensor, keys: Tensor) -> Tensor:
    """Whether the key nearest to a query, by cosine, is the one of its own row.

    Args:
        queries: (n, n_layers, hidden_size).
        keys: the same shape.

    Returns:
        (n, n_layers) int64, 1 where it is.
    """
    similarity = torch.einsum(
        "qlh,klh->lqk", functional.normalize(queries, dim=-1), functional.normalize(keys, dim=-1)
    )
    n = queries.shape[0]
    return (similarity.argmax(-1) == torch.arange(n)).long().T
