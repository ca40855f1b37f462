"""Candidates spread over workers with Ray: on the cores or GPUs of one machine, or on a cluster.

The trunk pass is made once, here; its states lie in the cache, which all workers must share. Each
worker maps the model and the states from their files and trains one candidate after the other. A
finished candidate is a file, so a job that is started again goes on with those that are missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from polylens.artefacts import load_tensors
from polylens.config import Runtime, TrainSettings
from polylens.corpora import ParallelCorpus
from polylens.crown import CrownDelta
from polylens.errors import CorruptFileError, DistributedError, MissingExtraError
from polylens.execution import open_model
from polylens.models.loading import load_model
from polylens.progress import Progress, silent
from polylens.prompts import ParallelPrompts, choose_format
from polylens.steps import (
    boundaries_of,
    encode_shared,
    read_by,
    states_of_prompts,
    train_prompts,
)
from polylens.subspaces import Subspaces
from polylens.token_budget import best_token_budget


def train_on_workers(
    model: str,
    subspaces: Subspaces,
    corpus: ParallelCorpus,
    settings: Sequence[TrainSettings],
    out: str | Path,
    *,
    n_workers: int = 2,
    address: str | None = None,
    runtime: Runtime | None = None,
    template: str = "auto",
    seed: int = 0,
    progress: Progress = silent,
) -> list[CrownDelta]:
    """Train one crown for each of `settings`, several at a time.

    Args:
        model: folder, registry name or Hub id, which every worker can open.
        subspaces: of this model.
        corpus: parallel rows.
        settings: of the candidates; all must have the same `max_tokens` and
            `max_answer_tokens`.
        out: folder for the deltas, candidate-000.safetensors and so on; shared by all workers.
        n_workers: candidates in training at a time.
        address: of a Ray cluster, e.g. "auto"; None starts Ray on this machine.
        runtime: how each worker computes.
        template: "auto", "chat", "plain" or a Jinja file.
        seed: order of the rows.
        progress: told the candidates done.

    Returns:
        The deltas, in the order of `settings`.

    Raises:
        MissingExtraError: Ray is not installed.
        DistributedError: a worker was lost, or failed; finished candidates are kept in `out`.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("Ray", "ray", "training on several workers") from error

    runtime = runtime or Runtime()
    folder = Path(out)
    paths = [folder / f"candidate-{number:03}.safetensors" for number in range(len(settings))]
    missing = [
        number
        for number, (path, one) in enumerate(zip(paths, settings, strict=True))
        if not _is_of(path, one)
    ]
    done = len(settings) - len(missing)
    progress(done, len(settings), "candidates")
    if missing:
        job = _prepare(model, subspaces, corpus, settings, runtime, template, seed)
        folder.mkdir(parents=True, exist_ok=True)
        ray.init(
            address=address,
            ignore_reinit_error=True,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
        n_cpus = max(1, int(ray.cluster_resources().get("CPU", 1)) // n_workers)
        n_gpus = float(ray.cluster_resources().get("GPU", 0)) / n_workers
        remote = ray.remote(num_cpus=n_cpus, num_gpus=min(1.0, n_gpus))(_train_one)
        shared = ray.put(job)
        waiting = {
            remote.remote(shared, settings[number], str(paths[number]), n_cpus): number
            for number in missing
        }
        while waiting:
            (finished,), _ = ray.wait(list(waiting), num_returns=1)
            number = waiting.pop(finished)
            try:
                ray.get(finished)
            except ray.exceptions.RayError as error:
                for other in waiting:
                    ray.cancel(other, force=True)
                reason = str(error).strip().splitlines()[-1]
                raise DistributedError(
                    f"every worker must live until its candidate is trained, but candidate "
                    f"{number} failed ({reason}); mend that and run again: finished candidates are "
                    f"kept in {folder}"
                ) from error
            done += 1
            progress(done, len(settings), "candidates")
    return [CrownDelta.load(path) for path in paths]


def _is_of(path: Path, settings: TrainSettings) -> bool:
    """Whether a candidate's file is there, whole, and of these settings."""
    if not path.exists():
        return False
    try:
        _, metadata = load_tensors(path)
    except CorruptFileError:
        return False
    return bool(metadata.get("settings") == settings.model_dump(mode="json"))


def _prepare(
    model: str,
    subspaces: Subspaces,
    corpus: ParallelCorpus,
    settings: Sequence[TrainSettings],
    runtime: Runtime,
    template: str,
    seed: int,
) -> dict[str, Any]:
    """Make the trunk pass, and return what the workers need to find its states."""
    opened, execution = open_model(
        model, runtime, train=settings, with_head=any(one.reads_logits for one in settings)
    )
    languages = [k for k in subspaces.languages if k != subspaces.central]
    prompts = encode_shared(
        opened.tokenizer,
        choose_format(opened.tokenizer, template),
        corpus,
        (subspaces.central, *languages),
        settings,
    )
    budget = runtime.token_budget or best_token_budget(
        opened.structure, prompts.n_tokens, execution.scratch().batch_bytes
    )
    boundaries = boundaries_of(settings, opened.structure.n_layers)
    # One pass for those that read answers, one for those that do not.
    for one in {one.answer_tokens is None: one for one in settings}.values():
        states_of_prompts(
            opened,
            read_by(one, prompts),
            boundaries,
            token_budget=budget,
            scratch=execution.scratch(),
        )
    return {
        "model": model,
        "dtype": execution.dtype,
        "subspaces": subspaces,
        "prompts": prompts,
        "boundaries": boundaries,
        "token_budget": budget,
        "seed": seed,
        "offline": runtime.offline,
        "trust_remote_code": runtime.trust_remote_code,
    }


def _train_one(job: dict[str, Any], settings: TrainSettings, path: str, n_threads: int) -> None:
    """Train one candidate, in a worker."""
    torch.set_num_threads(n_threads)
    # Only the crown is ever brought into memory.
    model = load_model(
        job["model"],
        dtype=job["dtype"],
        streamed=True,
        offline=job["offline"],
        trust_remote_code=job["trust_remote_code"],
    )
    prompts: ParallelPrompts = job["prompts"]
    (delta,) = train_prompts(
        model,
        job["subspaces"],
        prompts,
        settings=[settings],
        boundaries=job["boundaries"],
        seed=job["seed"],
        token_budget=job["token_budget"],
    )
    delta.save(Path(path))
