"""`polylens export`: what a run leaves, for other tools."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from polylens.artefacts import read_object
from polylens.cli import options
from polylens.cli.console import ProgressBars, err, out, print_json, size, table
from polylens.crown import CrownDelta
from polylens.errors import UsageError, nearest
from polylens.evaluation.gate import Dial
from polylens.evaluation.sides import Side, choose_sides
from polylens.execution import open_model
from polylens.export import save_control_vector, save_gguf, save_lora
from polylens.merging import choose_dtype, save_model
from polylens.models.loading import LanguageModel
from polylens.progress import Progress
from polylens.subspaces import Subspaces

# The options that each format takes beside --strength.
FORMATS: Mapping[str, tuple[str, ...]] = {
    "merged": ("save_dtype", "model"),
    "delta": (),
    "lora": ("rank", "keep", "matrices_only", "model"),
    "gguf": ("save_dtype", "model"),
    "control-vector": ("language", "layers"),
}
_DTYPES = ("float32", "bfloat16", "float16")


def export(
    run: Annotated[
        Path,
        typer.Argument(help="A run's folder, a delta, or subspaces for a control vector."),
    ],
    format_: Annotated[
        str,
        typer.Option("--format", "-f", help=f"One of {', '.join(FORMATS)}.", show_default=False),
    ],
    target: Annotated[
        Path, typer.Option("--out", "-o", help="The file or folder to write.", show_default=False)
    ],
    strength: Annotated[
        float | None,
        typer.Option(help="The dial; default: that of the run, else 1.", show_default=False),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="lora: rank of every matrix.", show_default=False)
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(
            help="lora: take the smallest rank that keeps this share of the change; default 0.9.",
            show_default=False,
        ),
    ] = None,
    matrices_only: Annotated[
        bool,
        typer.Option(
            "--matrices-only",
            help="lora: leave out norms and biases, which vLLM and llama.cpp do not take.",
        ),
    ] = False,
    save_dtype: Annotated[
        str | None,
        typer.Option(
            help=f"merged, gguf: {', '.join(_DTYPES)}; gguf: q8_0 too; default: the smallest that "
            "keeps nine tenths of the change.",
            show_default=False,
        ),
    ] = None,
    language: Annotated[
        str | None,
        typer.Option("--language", "-l", help="control-vector: towards it.", show_default=False),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="control-vector: layers whose output changes, e.g. 20 or 18-20,25.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Of a delta that does not say.", show_default=False),
    ] = None,
    memory: options.Memory = None,
    offline: options.Offline = False,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Write what a run changed in a format that other tools read.

    **Examples**

        polylens export runs/first --format lora --out adapter

        polylens export runs/first --format gguf --out model.gguf --strength 0.5

        polylens export runs/probe --format control-vector -l sw --layers 20 --out sw.gguf
    """
    given = {
        "rank": rank,
        "keep": keep,
        "matrices_only": matrices_only or None,
        "save_dtype": save_dtype,
        "language": language,
        "layers": layers,
        "model": model,
    }
    _check(run, format_, {name for name, value in given.items() if value is not None}, target)
    if rank is not None and keep is not None:
        raise UsageError("--rank and --keep both choose the rank, got both; leave one out")
    if format_ == "control-vector":
        facts, sentence = _control_vector(run, target, language, layers, strength)
    else:
        side = _side(run, model, strength)
        assert side.delta is not None
        if format_ == "delta":
            facts, sentence = _delta(side.delta, target, side.strength)
        else:
            runtime = options.make_runtime(memory=memory, offline=offline)
            with ProgressBars(shown=not quiet) as progress:
                loaded, execution = open_model(
                    side.model, runtime, revision=side.revision, progress=progress
                )
                if not quiet:
                    err.print(execution.sentence(), highlight=False, markup=False)
                delta = CrownDelta.load(side.delta, fingerprint=loaded.fingerprint)
                write = {"merged": _merged, "lora": _lora, "gguf": _gguf}[format_]
                facts, sentence = write(loaded, delta, target, side.strength, given, progress)
        facts = {"strength": side.strength, **facts}
    n_bytes = sum(file.stat().st_size for file in _files(target))
    if as_json:
        print_json({"format": format_, "out": str(target), "bytes": n_bytes, **facts})
        return
    if format_ == "lora":
        _print_errors(facts["errors"], facts["rank"])
    out.print(sentence, highlight=False, markup=False, soft_wrap=True)
    out.print(f"\n  {format_} {target}  {size(n_bytes)}", highlight=False, soft_wrap=True)


def _check(run: Path, format_: str, given: set[str], target: Path) -> None:
    if format_ not in FORMATS:
        raise UsageError(
            f"--format must be one of {', '.join(FORMATS)}, got {format_!r}"
            f"{nearest(format_, FORMATS)}"
        )
    for name in sorted(given - set(FORMATS[format_])):
        owners = [other for other, own in FORMATS.items() if name in own]
        raise UsageError(
            f"--{name.replace('_', '-')} must go with --format {' or '.join(owners)}, got "
            f"{format_}; leave it out"
        )
    if target.is_dir() and any(target.iterdir()):
        raise UsageError(
            f"--out must be a new file or a new or empty folder, but {target} holds files; choose "
            "another or delete it"
        )
    inputs = (run, run / "delta.safetensors", run / "subspaces.safetensors")
    if target.is_file() and any(path.is_file() and path.samefile(target) for path in inputs):
        raise UsageError(f"--out must not be what is exported, got {target}; choose another file")


def _side(run: Path, model: str | None, strength: float | None) -> Side:
    """Find the delta, its model and its strength."""
    delta = run if run.is_file() else run / "delta.safetensors"
    if not delta.is_file():
        raise UsageError(
            f"export needs a run that has been trained, or a delta.safetensors, but {run} is "
            "neither; finish the run with `polylens enhance` first"
        )
    gate = run / "gate.json"
    if strength is None and gate.is_file() and not read_object(gate, Dial.from_dict).holds:
        raise UsageError(
            f"the gate of {run} holds at no strength, so there is none to export at; give "
            "--strength to export it all the same"
        )
    target = run if (run / "resolved.yaml").is_file() else delta
    side = choose_sides(str(target), model, None if strength is None else [strength])[-1]
    return dataclasses.replace(side, delta=delta)


# What JSON tells of an export, and the sentence that ends it.
_Told = tuple[dict[str, Any], str]


def _delta(source: Path, target: Path, strength: float) -> _Told:
    delta = CrownDelta.load(source)
    scaled = {name: strength * change for name, change in delta.changes.items()}
    CrownDelta(scaled, delta.metadata).save(target)
    return {"n_weights": len(scaled)}, f"{strength:g} · change of {len(scaled)} weights, in float32"


def _control_vector(
    run: Path, target: Path, language: str | None, layers: str | None, strength: float | None
) -> _Told:
    if language is None or layers is None:
        raise UsageError(
            "a control vector needs a language and the layers that it changes; for example "
            "--language sw --layers 20"
        )
    subspaces = Subspaces.load(run if run.is_file() else run / "subspaces.safetensors")
    strength = 1.0 if strength is None else strength
    chosen = save_control_vector(
        subspaces, target, language=language, layers=_parse_layers(layers), strength=strength
    )
    return {"strength": strength, "layers": chosen}, (
        f"{strength:g} · direction of {language} against {subspaces.central}, added after layer "
        f"{', '.join(map(str, chosen))}; try: llama-cli -m MODEL.gguf --control-vector {target}"
    )


def _parse_layers(text: str) -> list[int]:
    try:
        layers: list[int] = []
        for part in text.split(","):
            first, _, last = part.partition("-")
            layers += range(int(first), int(last or first) + 1)
    except ValueError:
        layers = []
    if not layers:
        raise UsageError(f"--layers must be numbers such as 20 or 18-20,25, got {text!r}")
    return layers


def _merged(
    model: LanguageModel,
    delta: CrownDelta,
    target: Path,
    strength: float,
    given: Mapping[str, Any],
    progress: Progress,
) -> _Told:
    dtype = given["save_dtype"] or "auto"
    if dtype not in ("auto", *_DTYPES):
        raise UsageError(
            f"--save-dtype of a merged model must be one of {', '.join(_DTYPES)}, got {dtype!r}"
            f"{nearest(dtype, _DTYPES)}"
        )
    chosen = choose_dtype(model, delta, dtype, strength)
    save_model(model, delta, target, strength=strength, dtype=chosen)
    name = str(chosen).removeprefix("torch.")
    return {"dtype": name}, f"W + {strength:g} · change, in {name}"


def _lora(
    model: LanguageModel,
    delta: CrownDelta,
    target: Path,
    strength: float,
    given: Mapping[str, Any],
    progress: Progress,
) -> _Told:
    done = save_lora(
        model,
        delta,
        target,
        rank=given["rank"],
        keep=0.9 if given["keep"] is None else given["keep"],
        strength=strength,
        matrices_only=bool(given["matrices_only"]),
        progress=progress,
    )
    parts = [f"{done.n_matrices} matrices at rank {done.rank}"]
    if done.carried:
        parts.append(f"{len(done.carried)} other weights ({done.n_carried} numbers) held whole")
    if done.left:
        parts.append(
            f"{len(done.left)} other weights ({done.n_left} numbers) left out, as the error counts"
        )
    return dataclasses.asdict(done), ", ".join(parts)


def _gguf(
    model: LanguageModel,
    delta: CrownDelta,
    target: Path,
    strength: float,
    given: Mapping[str, Any],
    progress: Progress,
) -> _Told:
    done = save_gguf(
        model, delta, target, strength=strength, numbers=given["save_dtype"], progress=progress
    )
    return dataclasses.asdict(done), (
        f"W + {strength:g} · change, {done.n_tensors} tensors in {done.numbers}; rounding moved "
        f"what changed by {done.lost_ratio:.1%} of the change"
    )


def _print_errors(errors: Mapping[int, float], rank: int) -> None:
    rows = [
        [f"{at} ←" if at == rank else str(at), f"{error:.4f}", f"{1 - error**2:.2%}"]
        for at, error in errors.items()
    ]
    table(None, ["rank", "error", "kept"], rows)
    out.print()


def _files(target: Path) -> list[Path]:
    return [target] if target.is_file() else [path for path in target.rglob("*") if path.is_file()]
