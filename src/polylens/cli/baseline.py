"""`polylens baseline`: what one would do instead of Lens, to be measured like Lens."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from polylens import distributed
from polylens.artefacts import write_json, write_text
from polylens.baselines import (
    BaselineSettings,
    FewShotSettings,
    LowRankSettings,
    PretrainingSettings,
    SupervisedSettings,
    few_shot_template,
    fine_tune,
    pretrain,
    read_examples,
)
from polylens.cli import options
from polylens.cli.console import ProgressBars, duration, err, out, print_json, size
from polylens.config import DEFAULT_MODEL, Runtime, check
from polylens.corpora import read_texts
from polylens.crown import CrownDelta
from polylens.errors import UsageError
from polylens.execution import open_model
from polylens.journal import versions
from polylens.languages import normalize_language, normalize_languages
from polylens.locks import alone_in
from polylens.memory import PeakMemory
from polylens.models.loading import load_tokenizer
from polylens.models.registry import REGISTRY
from polylens.models.source import describe, resolve
from polylens.progress import Progress
from polylens.prompts import CHAT, PromptFormat, choose_format


class Kind(StrEnum):
    """The baselines."""

    SFT = "sft"
    SFT_LORA = "sft-lora"
    PRETRAINING = "pretraining"
    FEW_SHOT = "few-shot"


_SETTINGS: dict[Kind, type[BaselineSettings]] = {
    Kind.SFT: SupervisedSettings,
    Kind.SFT_LORA: LowRankSettings,
    Kind.PRETRAINING: PretrainingSettings,
}


def baseline(
    kind: Annotated[
        Kind,
        typer.Argument(
            help="sft: answers, full updates. sft-lora: the same, low-rank. pretraining: plain "
            "texts. few-shot: no training, examples in the prompt.",
        ),
    ],
    corpus: Annotated[
        str,
        typer.Argument(
            help="Answers, parallel texts or plain texts: a file, a folder, a Hub id, or 'starter'."
        ),
    ] = "starter",
    languages: options.Languages = None,
    central: options.Central = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            "-s",
            help="Setting, e.g. -s epochs=3, -s replay_ratio=0.5, -s tokens=50000, -s rank=8, "
            "-s shots=3.",
            show_default=False,
        ),
    ] = None,
    out_folder: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder to write; default: runs/KIND.", show_default=False
        ),
    ] = None,
    model: options.Model = None,
    revision: options.Revision = None,
    template: options.Template = None,
    seed: options.Seed = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    memory: options.Memory = None,
    token_budget: options.TokenBudget = None,
    deterministic: options.Deterministic = False,
    offline: options.Offline = False,
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Train, or prompt, as one would without Lens: the same layers, rows and evaluation.

    Writes delta.safetensors (few-shot: template.jinja), and baseline.json with what it cost. Run
    the same command again to go on after an interruption.

    **Examples**

        polylens baseline sft answers.jsonl --languages sw,bn -s replay_ratio=0.5

        polylens baseline sft-lora starter -l sw -s rank=8 --out runs/lora

        polylens baseline few-shot answers.jsonl -l sw -s shots=3
    """
    runtime = options.make_runtime(
        device=device,
        dtype=dtype,
        memory=memory,
        token_budget=token_budget,
        deterministic=deterministic,
        offline=offline,
        trust_remote_code=trust_remote_code,
    )
    chosen = normalize_languages(languages.split(",")) if languages else ()
    centre = normalize_language(central or "en")
    if not chosen or centre in chosen:
        raise UsageError(
            f"target languages must be named and differ from the central one ({centre}), got "
            f"{languages or 'none'}; for example --languages sw"
        )
    job = _Job(
        kind,
        corpus,
        chosen,
        centre,
        options.split_arguments(settings)[1],
        out_folder or Path("runs") / kind.value,
        model or DEFAULT_MODEL,
        revision,
        template or "auto",
        seed or 0,
        runtime,
    )

    def tell(line: str) -> None:
        if not quiet:
            err.print(line, highlight=False, markup=False)

    with ProgressBars(shown=not quiet) as progress:
        if kind is Kind.FEW_SHOT:
            record = _write_template(job, progress)
        else:
            record = _train(job, progress, tell)
    if not distributed.is_first():
        return
    write_json(job.folder / "baseline.json", record)
    if as_json:
        print_json(record)
        return
    _show(job, record)


@dataclass(frozen=True)
class _Job:
    """What the user asked for."""

    kind: Kind
    corpus: str
    languages: tuple[str, ...]
    central: str
    given: dict[str, Any]
    folder: Path
    model: str
    revision: str | None
    template: str
    seed: int
    runtime: Runtime

    @property
    def delta(self) -> Path:
        return self.folder / "delta.safetensors"

    @property
    def few_shot(self) -> Path:
        return self.folder / "template.jinja"


def _train(job: _Job, progress: Progress, tell: Callable[[str], None]) -> dict[str, Any]:
    """Train, write the delta, and return what it cost."""
    settings: Any = check(_SETTINGS[job.kind], job.given)
    needed = [*job.languages, *([job.central] if settings.replay_ratio else [])]
    corpus: Any
    method: Callable[..., CrownDelta]
    how: dict[str, Any] = {}
    offline = job.runtime.offline
    if job.kind is Kind.PRETRAINING:
        corpus, method = read_texts(job.corpus, needed, offline=offline), pretrain
    else:
        corpus, method = read_examples(job.corpus, needed, job.central, offline=offline), fine_tune
        how["template"] = job.template
    with alone_in(job.folder):
        bound = partial(method, corpus=corpus, **how)
        return {"corpus": corpus.name, **_train_on(job, settings, bound, progress, tell)}


def _train_on(
    job: _Job,
    settings: Any,
    method: Callable[..., CrownDelta],
    progress: Progress,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    checkpoint = job.folder / "checkpoint.safetensors"
    is_resumed = checkpoint.exists()
    model, execution = open_model(
        job.model,
        job.runtime,
        revision=job.revision,
        train=[settings],
        with_head=True,
        progress=progress,
    )
    tell(execution.sentence())
    started = time.monotonic()
    with PeakMemory() as peak:
        delta = method(
            model,
            languages=job.languages,
            central=job.central,
            settings=settings,
            seed=job.seed,
            token_budget=job.runtime.token_budget,
            scratch=execution.scratch(),
            checkpoint=checkpoint,
            progress=progress,
        )
    seconds = time.monotonic() - started
    if distributed.is_first():
        delta.save(job.delta)
        checkpoint.unlink(missing_ok=True)
    known = delta.metadata
    return {
        **{key: known[key] for key in ("method", "model", "fingerprint", "central", "rows")},
        **known["cost"],
        "seconds": round(seconds, 3),
        "is_resumed": is_resumed,
        "peak_memory_bytes": peak.bytes,
        "result_bytes": job.delta.stat().st_size if distributed.is_first() else None,
        "device": str(execution.device),
        "dtype": execution.computing_name,
        "n_steps": len(known["log"]),
        "first_loss": known["log"][0]["loss"],
        "last_loss": known["log"][-1]["loss"],
        "settings": known["settings"],
        "versions": known["versions"],
    }


def _write_template(job: _Job, progress: Progress) -> dict[str, Any]:
    """Write a few-shot template, and return what it costs a prompt."""
    settings = check(FewShotSettings, job.given)
    if len(job.languages) > 1:
        raise UsageError(
            f"few-shot must have one target language, got {', '.join(job.languages)}; make a "
            "template for each"
        )
    (language,) = job.languages
    corpus = read_examples(job.corpus, [language], job.central, offline=job.runtime.offline)
    source = resolve(
        job.model, revision=job.revision, offline=job.runtime.offline, progress=progress
    )
    remote = job.runtime.trust_remote_code
    tokenizer = load_tokenizer(source, trust_remote_code=remote)
    template = few_shot_template(tokenizer, corpus, language, settings=settings, seed=job.seed)
    if distributed.is_first():
        write_text(job.few_shot, template)
    lengths = [
        PromptFormat(one, CHAT).encode(tokenizer, ["?"], sys.maxsize).n_tokens
        for one in (template, choose_format(tokenizer, CHAT).template)
    ]
    n_tokens = lengths[0] - lengths[1]
    weights = describe(source.folder, trust_remote_code=remote).n_layer_parameters
    return {
        "method": job.kind.value,
        "model": source.name,
        "language": language,
        "corpus": corpus.name,
        "tokens_per_prompt": n_tokens,
        "operations_per_prompt": 2 * weights * n_tokens,
        "result_bytes": len(template.encode()),
        "settings": settings.model_dump(mode="json"),
        "versions": versions(),
    }


def _show(job: _Job, record: Mapping[str, Any]) -> None:
    """Say what was done, what it cost, where it is, and how to measure it."""

    def say(line: str) -> None:
        out.print(line, highlight=False, markup=False, soft_wrap=True)

    languages = ",".join(job.languages)
    if job.kind is Kind.FEW_SHOT:
        say(
            f"{record['settings']['shots']} examples: {record['tokens_per_prompt']} tokens before "
            f"each question, {record['operations_per_prompt']:.2g} operations"
        )
        plain, own = job.folder / "without", job.folder / "with"
        common = f"polylens evaluate {job.model} -l {languages} -t fidelity"
        say(f"\n  template {job.few_shot}\n  record   {job.folder / 'baseline.json'}")
        say(f"  measure  {common} --out {plain}")
        say(f"           {common} --template {job.few_shot} --out {own}")
        say(f"           polylens compare {plain} {own}")
        return
    rows = ", ".join(f"{n} {language}" for language, n in record["rows"].items())
    say(
        f"{record['n_steps']} steps on {rows} rows; loss {record['first_loss']:.4f} → "
        f"{record['last_loss']:.4f}"
    )
    say(
        f"{record['tokens']} tokens, {record['scored_tokens']} of them predicted; "
        f"{record['operations']:.2g} operations; {duration(record['seconds'])}, "
        f"{size(record['peak_memory_bytes'])} of memory, {size(record['result_bytes'])} of delta"
    )
    is_known = job.model in REGISTRY or not Path(job.model).exists()
    against = "" if is_known else f" --against {job.model}"
    say(f"\n  delta   {job.delta}\n  record  {job.folder / 'baseline.json'}")
    say(
        f"  measure polylens evaluate {job.delta} -l {languages}{against} "
        f"--out {job.folder / 'evaluation'}"
    )
