"""lm-eval's tasks, run by our engine: base and any number of crowns with one trunk pass a task.

`CrownsLM` is a model as lm-eval wants it. Tokenisation, chat templates, windows and metrics are
lm-eval's own, so figures agree with its Hugging Face backend; what computes is ours. All crowns are
scored the first time that lm-eval asks for a task's likelihoods, and it is given one crown's answer
after the other. Replies are generated greedily, crown by crown.

Needs the extra `eval`; import this module where it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from polylens.errors import MissingExtraError, UsageError
from polylens.evaluation.generation import generate_answers
from polylens.evaluation.measures import Example, Protocol, Task, TaskRun
from polylens.evaluation.scoring import Candidate, Score, score_continuations
from polylens.evaluation.tasks import TaskSpec, task_manager
from polylens.models.loading import LanguageModel
from polylens.progress import Progress, silent
from polylens.scratch import Scratch
from polylens.states_cache import Collect, fresh_hidden_states

try:
    import lm_eval
    from lm_eval.api import task as lm_eval_task
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise MissingExtraError("lm-eval", "eval", "evaluation on benchmarks") from error

# The metric of a task that is reported, the first of these that it has.
_METRICS = ("acc", "exact_match", "acc_norm", "f1", "bleu", "chrf")

_ALL_AT_ONCE = 2**31


class CrownsLM(HFLM):  # type: ignore[misc, no-any-unimported]
    """A model with some of its crowns, as lm-eval sees it.

    Attributes:
        candidates: the crowns.
        current: which of them lm-eval is evaluating now.
    """

    def __init__(
        self,
        model: LanguageModel,
        candidates: Sequence[Candidate] = (Candidate(),),
        *,
        token_budget: int | None = None,
        scratch: Scratch | None = None,
        collect: Collect = fresh_hidden_states,
        progress: Progress = silent,
    ) -> None:
        with _quiet_harness():
            super().__init__(
                pretrained=model.causal_lm, tokenizer=model.tokenizer, batch_size=_ALL_AT_ONCE
            )
        self.candidates = tuple(candidates)
        self.current = 0
        self._language_model = model
        self._token_budget = token_budget
        self._scratch = scratch
        self._collect = collect
        self._progress = progress
        self._scores: dict[str, list[list[Score]]] = {}

    def forget(self) -> None:
        """Drop the scores of a task that all candidates have been given."""
        self._scores.clear()

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Score lm-eval's requests; the progress shown is ours."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for _text, context, continuation in requests:
            kept = (context + continuation)[-(self.max_length + 1) :]  # as lm-eval: the end counts
            n_context = len(kept) - len(continuation)
            pairs.append((kept[:n_context], kept[n_context:]))
        key = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()
        if key not in self._scores:
            self._scores[key] = score_continuations(
                self._language_model,
                pairs,
                self.candidates,
                token_budget=self._token_budget,
                scratch=self._scratch,
                collect=self._collect,
                progress=self._progress,
            )
        scores = self._scores[key][self.current]
        return [(score.log_likelihood, score.is_greedy) for score in scores]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Reply greedily to lm-eval's requests."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        replies = [""] * len(requests)
        for settings, indices in groups.items():
            wanted = normalize_gen_kwargs(json.loads(settings), self.max_gen_toks)
            if wanted.get("do_sample"):
                raise UsageError(
                    "replies must be greedy, so that before and after differ by the weights alone, "
                    "but the task asks for sampling; choose another task"
                )
            n_new = int(wanted["max_gen_toks"])
            room = max(1, self.max_length - n_new)
            candidate = self.candidates[self.current]
            with candidate.applied(self._language_model.structure):
                texts = generate_answers(
                    self._language_model,
                    [self.tok_encode(requests[index].args[0])[-room:] for index in indices],
                    max_new_tokens=n_new,
                    stop_strings=[stop for stop in wanted.get("until") or [] if stop],
                    progress=self._progress,
                )
            for index, text in zip(indices, texts, strict=True):
                replies[index] = text
        return replies


def run_task(
    lm: CrownsLM,
    spec: TaskSpec,
    *,
    limit: int | None = None,
    every: tuple[int, int] | None = None,
    data_dir: Path | None = None,
) -> list[TaskRun]:
    """Evaluate every candidate on a task, or on each task of a group.

    Args:
        lm: the model and its candidates.
        spec: the task.
        limit: use only the first so many examples.
        every: (first, step): use every step-th example alone, beginning with the first; None all.
        data_dir: folder with copies of Hub data sets under their full names (owner/name).

    Raises:
        UsageError: the task's data cannot be read.
    """
    found: dict[str, list[tuple[Task, tuple[Example, ...]]]] = {}
    with _quiet_harness():
        tasks = _load(spec, data_dir)
        chosen = _chosen(tasks, limit, every)
        for number in range(len(lm.candidates)):
            lm.current = number
            results = lm_eval.evaluate(
                lm, tasks, bootstrap_iters=0, apply_chat_template=spec.chat, **chosen
            )
            for name, samples in results["samples"].items():
                metric, higher_is_better = _metric_of(results, name, samples)
                protocol: Protocol = "chat" if spec.chat else "continuation"
                one = Task(name, spec.language, protocol, metric, higher_is_better)
                found.setdefault(name, []).append((one, _examples(samples, metric)))
            for task in tasks["tasks"].values():  # answers of one candidate are not the next one's
                for instance in task.instances:
                    instance.resps, instance.filtered_resps = [], {}
    lm.current = 0
    lm.forget()
    return [TaskRun(runs[0][0], tuple(examples for _, examples in runs)) for runs in found.values()]


def _load(spec: TaskSpec, data_dir: Path | None) -> Any:
    """Make lm-eval's task, with its data."""
    # datasets takes a folder of the data set's full name before the Hub.
    where = contextlib.chdir(data_dir) if data_dir is not None else contextlib.nullcontext()
    config = spec.config if isinstance(spec.config, str) else dict(spec.config)
    try:
        with where:
            return task_manager().load([config])
    except UsageError:
        raise
    except Exception as error:  # whatever datasets and the task's own code raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UsageError(
            f"the data of {spec.name} must be on the Hub or in --data-dir, but cannot be read "
            f"({reason}); fetch them with `hf download --repo-type dataset OWNER/NAME --local-dir "
            "DATA/OWNER/NAME` and give --data-dir DATA"
        ) from error


def _chosen(tasks: Any, limit: int | None, every: tuple[int, int] | None) -> dict[str, Any]:
    """Which examples are used, as lm-eval wants it."""
    if every is None:
        return {"limit": limit}
    first, step = every
    numbers = {name: range(len(task.eval_docs)) for name, task in tasks["tasks"].items()}
    return {"samples": {name: list(of[first::step])[:limit] for name, of in numbers.items()}}


def _metric_of(results: Any, name: str, samples: Sequence[Any]) -> tuple[str, bool]:
    """The metric that is reported, and whether more of it is better."""
    there = [key for key in samples[0]["metrics"] if isinstance(samples[0].get(key), int | float)]
    metric = next((key for key in _METRICS if key in there), there[0] if there else None)
    if metric is None:
        raise UsageError(
            f"a task must score each example with a number, but {name} does not; choose another"
        )
    return metric, bool(results["higher_is_better"].get(name, {}).get(metric, True))


def _examples(samples: Sequence[Any], metric: str) -> tuple[Example, ...]:
    """Turn lm-eval's log of a task into examples; of several filters, the first is taken."""
    first = samples[0]["filter"]
    return tuple(
        Example(
            # The same text may occur twice, so its number counts too.
            key=f"{sample['doc_id']}-{sample['doc_hash'][:16]}-{sample['prompt_hash'][:16]}",
            value=float(sample[metric]),
            prompt=sample["arguments"][0][0],
            target=sample["target"],
            responses=sample["filtered_resps"],
        )
        for sample in samples
        if sample["filter"] == first
    )


@contextlib.contextmanager
def _quiet_harness() -> Iterator[None]:
    """Keep lm-eval's own log and progress bars from ours."""
    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, lm_eval_task.tqdm
    logger.setLevel(logging.ERROR)
    lm_eval_task.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval_task.tqdm = bar
