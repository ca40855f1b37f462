"""`polylens steer`: answers of a model whose states are pushed, beside its own."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from polylens import distributed
from polylens.artefacts import read_text
from polylens.cli import options
from polylens.cli.console import ProgressBars, err, out, print_json, table
from polylens.corpora import read_parallel
from polylens.detection import LanguageDetector
from polylens.errors import UsageError
from polylens.evaluation.fidelity import detect_answers
from polylens.evaluation.generation import generate_answers
from polylens.evaluation.sides import Protocol, make_heldout, model_of_subspaces, template_of
from polylens.evaluation.statistics import rate_interval
from polylens.evaluation.steering import (
    UNTOUCHED,
    SteeringResult,
    describe_actions,
    measure_steerings,
    write_results,
)
from polylens.evaluation.suite import BITS_PER_BYTE
from polylens.execution import Execution, open_model
from polylens.journal import versions
from polylens.languages import normalize_languages
from polylens.models.loading import LanguageModel
from polylens.prompts import choose_format
from polylens.steering import Action, Removal, Steering, Towards
from polylens.subspaces import Subspaces


def steer(
    subspaces: Annotated[
        Path, typer.Argument(help="Folder of a run or a probe, or its subspaces.safetensors.")
    ],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="What to ask; else one a line from a pipe.", show_default=False),
    ] = None,
    prompts_file: Annotated[
        Path | None,
        typer.Option("--prompts", help="File of prompts, one a line.", show_default=False),
    ] = None,
    towards: Annotated[
        str | None,
        typer.Option(
            help="Language to push towards; several by commas are tried in turn.",
            show_default=False,
        ),
    ] = None,
    strength: Annotated[
        str,
        typer.Option(
            help="How far: 1 is the distance between the means of the language and the central "
            "one, negative pushes away. One or more by commas.",
        ),
    ] = "1",
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers to push, e.g. 19-28 or 20,24; default: where languages lie far apart.",
            show_default=False,
        ),
    ] = None,
    remove: Annotated[
        str | None,
        typer.Option(
            help="Share of the language-specific part that each middle layer takes, e.g. 0.3. One "
            "or more by commas.",
            show_default=False,
        ),
    ] = None,
    remove_layers: Annotated[
        str | None,
        typer.Option(
            help="Layers that take it; default: those that tell languages apart, below the layers "
            "to push.",
            show_default=False,
        ),
    ] = None,
    reinsert: Annotated[
        str,
        typer.Option(help="Share of what was taken that is put back. One or more by commas."),
    ] = "0",
    reinsert_layer: Annotated[
        int | None,
        typer.Option(help="Where; default: the first of the layers to push.", show_default=False),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure", help="Ask held-out rows instead, and count languages and repetitions."
        ),
    ] = False,
    languages: Annotated[
        str | None,
        typer.Option(
            "--languages",
            "-l",
            help="Languages to ask in and to tell apart; default: all that were probed.",
            show_default=False,
        ),
    ] = None,
    corpus: Annotated[
        str, typer.Option(help="Held-out parallel prompts; 'starter' takes its held-out rows.")
    ] = "starter",
    rows: Annotated[int, typer.Option(min=1, help="Use at most so many of those.")] = 32,
    out_folder: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for what was measured.")
    ] = Path("runs/steering"),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 48,
    model: options.Model = None,
    revision: options.Revision = None,
    template: options.TemplateOfRun = None,
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
    """Steer a model's answers without training, by language subspaces found before.

    Answers are shown beside the untouched model's, with the language detected in each. Where
    options hold several values, every combination is tried.

    **Examples**

        polylens steer runs/probe "What is rain?" --towards es --strength 1,2

        polylens steer runs/first --prompts questions.txt --remove 0.3 --reinsert 1

        polylens steer runs/probe --towards sw --strength 0.5,1,2 --measure --rows 20
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
    path = subspaces / "subspaces.safetensors" if subspaces.is_dir() else subspaces
    template = template or template_of(subspaces)
    found = Subspaces.load(path)
    pushes = _pushes(towards, strength, layers)
    removals = _removals(remove, remove_layers, reinsert, reinsert_layer)
    steerings = _combined(found, pushes, removals)
    told_apart = _languages(found, languages, pushes)
    if measure:
        if prompts or prompts_file:
            raise UsageError("--measure asks held-out rows, so prompts must be left out")
        protocol = _protocol(told_apart, corpus, rows, template, max_new_tokens, offline)
    else:
        asked = _read_prompts(prompts, prompts_file)
        detector = LanguageDetector(told_apart)
    spec, own_revision = model_of_subspaces(subspaces, path, found, model)
    with ProgressBars(shown=not quiet) as progress:
        loaded, execution = open_model(
            spec,
            runtime,
            revision=revision or own_revision,
            with_head=True,
            progress=progress,
        )
        if not quiet:
            err.print(execution.sentence(), highlight=False, markup=False)
        Subspaces.load(path, fingerprint=loaded.fingerprint)
        if measure:
            results = measure_steerings(
                loaded,
                steerings,
                make_heldout(loaded, protocol),
                max_new_tokens=max_new_tokens,
                token_budget=runtime.token_budget,
                scratch=execution.scratch(),
                progress=progress,
            )
        else:
            answers = _answer(loaded, asked, steerings, template, max_new_tokens, progress)
    if not measure:
        _show_answers(asked, answers, steerings, detector, as_json)
        return
    about = _about(loaded, execution, spec, path, found, protocol)
    if distributed.is_first():
        written = write_results(out_folder, results, about)
        _show_results(results, written, as_json, about)


def _pushes(towards: str | None, strength: str, layers: str | None) -> list[Towards]:
    if towards is None:
        if layers is not None:
            raise UsageError("--layers must go with --towards; name a language")
        return []
    numbers, chosen = options.numbers("--strength", strength), options.layers("--layers", layers)
    return [
        Towards(language, number, chosen)
        for language in normalize_languages(towards.split(","))
        for number in numbers
    ]


def _removals(
    remove: str | None, layers: str | None, reinsert: str, reinsert_at: int | None
) -> list[Removal]:
    shares = options.numbers("--reinsert", reinsert)
    if remove is None:
        if layers is not None or reinsert_at is not None or any(shares):
            raise UsageError(
                "--remove-layers, --reinsert and --reinsert-layer must go with --remove; give a "
                "share to remove, e.g. --remove 0.3"
            )
        return []
    chosen = options.layers("--remove-layers", layers)
    return [
        Removal(number, chosen, share, reinsert_at)
        for number in options.numbers("--remove", remove)
        for share in shares
    ]


def _combined(
    subspaces: Subspaces, pushes: Sequence[Action], removals: Sequence[Action]
) -> dict[str, Steering]:
    """Every push with every removal, by label."""
    if not pushes and not removals:
        raise UsageError("what to do must be said, by --towards, --remove or both")
    found = {}
    given = [kind for kind in (pushes, removals) if kind]
    for actions in itertools.product(*given):
        label = ", ".join(map(_label, actions))
        found[label] = Steering(subspaces, actions)
    return found


def _label(action: Action) -> str:
    if isinstance(action, Towards):
        return f"towards {action.language} {action.strength:g}"
    back = f", reinsert {action.reinsert:g}" if action.reinsert else ""
    return f"remove {action.strength:g}{back}"


def _read_prompts(given: Sequence[str] | None, file: Path | None) -> list[str]:
    """Prompts from the command line, a file, or a pipe."""
    if given and file:
        raise UsageError("prompts must come from the command line or from --prompts, not both")
    if given:
        lines = list(given)
    elif file is not None:
        lines = read_text(file).splitlines()
    else:
        lines = [] if sys.stdin.isatty() else sys.stdin.read().splitlines()
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UsageError(
            "there must be something to ask, but there is none; give prompts as arguments, by "
            "--prompts FILE, through a pipe, or --measure"
        )
    return found


def _languages(
    subspaces: Subspaces, named: str | None, pushes: Sequence[Towards]
) -> tuple[str, ...]:
    """The central language, then those named, or all, and those that are pushed towards."""
    chosen = normalize_languages(named.split(",")) if named else subspaces.languages
    found = dict.fromkeys((subspaces.central, *chosen, *(push.language for push in pushes)))
    if len(found) == 1:
        raise UsageError(f"--languages must name one besides {subspaces.central}, got {named!r}")
    return tuple(found)


def _protocol(
    languages: tuple[str, ...],
    corpus: str,
    rows: int,
    template: str,
    max_new_tokens: int,
    offline: bool,
) -> Protocol:
    parallel = read_parallel(corpus, languages, offline=offline)
    return Protocol(
        rows=parallel.split(rows)[1] if parallel.n_heldout else parallel.limit(rows),
        central=languages[0],
        languages=languages[1:],
        built_in=(),
        benchmarks=(),
        limit=None,
        data_dir=None,
        template=template,
        max_new_tokens=max_new_tokens,
        with_samples=True,
    )


def _answer(
    model: LanguageModel,
    prompts: Sequence[str],
    steerings: Mapping[str, Steering],
    template: str,
    max_new_tokens: int,
    progress: ProgressBars,
) -> dict[str, list[str]]:
    """Answers to each prompt by label, the untouched model's first."""
    prompt_format = choose_format(model.tokenizer, template)
    ids = prompt_format.encode(model.tokenizer, prompts, sys.maxsize).ids
    found = {}
    for label, steering in {UNTOUCHED: None, **steerings}.items():
        with steering.applied(model.structure) if steering else contextlib.nullcontext():
            found[label] = generate_answers(
                model, ids, max_new_tokens=max_new_tokens, progress=progress
            )
    return found


def _show_answers(
    prompts: Sequence[str],
    answers: Mapping[str, Sequence[str]],
    steerings: Mapping[str, Steering],
    detector: LanguageDetector,
    as_json: bool,
) -> None:
    detected = {label: detect_answers(texts, detector) for label, texts in answers.items()}
    if as_json:
        print_json(
            {
                "steerings": {label: describe_actions(one) for label, one in steerings.items()},
                "prompts": [
                    {
                        "prompt": prompt,
                        "answers": {
                            label: {"answer": texts[number], "detected": detected[label][number]}
                            for label, texts in answers.items()
                        },
                    }
                    for number, prompt in enumerate(prompts)
                ],
            }
        )
        return
    drawn = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 1, 0))
    for column in ("prompt", *answers):
        drawn.add_column(column, overflow="fold", ratio=1)
    for number, prompt in enumerate(prompts):
        cells = [
            Text(f"[{detected[label][number]}] {texts[number]}") for label, texts in answers.items()
        ]
        drawn.add_row(Text(prompt), *cells)
    out.print(drawn)


def _about(
    model: LanguageModel,
    execution: Execution,
    spec: str,
    path: Path,
    subspaces: Subspaces,
    protocol: Protocol,
) -> dict[str, Any]:
    """What was measured and how."""
    return {
        "model": spec,
        "fingerprint": model.fingerprint,
        "dtype": execution.computing_name,
        "subspaces": str(path),
        "central": subspaces.central,
        "languages": [protocol.central, *protocol.languages],
        "corpus": protocol.rows.name,
        "corpus_fingerprint": protocol.rows.fingerprint,
        "n_rows": len(protocol.rows.rows),
        "max_new_tokens": protocol.max_new_tokens,
        "template": protocol.template,
        "versions": versions(),
    }


def _show_results(
    results: Sequence[SteeringResult], path: Path, as_json: bool, about: Mapping[str, Any]
) -> None:
    if as_json:
        print_json({**about, "results": [result.to_dict() for result in results]})
        return
    central = str(about["central"])
    bits: dict[tuple[str, str], float] = {}
    for result in results:
        for one in result.measures:
            if one.task.metric == BITS_PER_BYTE and one.task.language is not None:
                bits[result.label, one.task.language] = one.change.after
                bits[UNTOUCHED, one.task.language] = one.change.before
    lines = []
    for result in results:
        for language, fidelity in result.fidelity.items():
            low, high = rate_interval(fidelity.passed, fidelity.n)
            elsewhere = {k: v for k, v in fidelity.answered.items() if k not in (language, central)}
            lines.append(
                [
                    result.label,
                    language,
                    f"{fidelity.passed} of {fidelity.n} ({low:.0%} to {high:.0%})",
                    "" if language == central else str(fidelity.answered.get(central, 0)),
                    ", ".join(f"{k} {v}" for k, v in elsewhere.items()),
                    str(fidelity.repeating),
                    f"{bits[result.label, language]:.3f}",
                ]
            )
    columns = [
        "steering", "asked in", "answered in it ↑", f"in {central} ↓", "in others", "repeating ↓",
        "bits per byte ↓",
    ]  # fmt: skip
    table(None, columns, lines)
    out.print(f"\n  figures {path}", highlight=False, soft_wrap=True)
    out.print(f"  answers {path.parent / 'answers.jsonl'}", highlight=False, soft_wrap=True)
