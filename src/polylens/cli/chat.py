"""`polylens chat`: talk to a model as it was and as it became, side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import RenderableType
from rich.live import Live

from polylens.artefacts import load_tensors
from polylens.cli import options
from polylens.cli.console import ProgressBars, err, out, print_error, print_json
from polylens.cli.side_by_side import Cell, Tail, draw
from polylens.cli.slash_commands import (
    Session,
    check_strength,
    describe,
    languages_to_detect,
    push_towards,
    require_subspaces,
)
from polylens.conversation import Conversation, Reply, SideName
from polylens.crown import CrownDelta
from polylens.detection import LanguageDetector, supported_languages
from polylens.errors import PolyLensError, UsageError
from polylens.evaluation.scoring import Candidate
from polylens.evaluation.sides import (
    AFTER,
    Side,
    candidate_of,
    choose_sides,
    model_of_subspaces,
    template_of,
)
from polylens.execution import open_model
from polylens.languages import language_name
from polylens.subspaces import Subspaces

_FRAMES_PER_SECOND = 8


def chat(
    target: Annotated[
        Path,
        typer.Argument(
            help="Folder of a run or a probe, a delta.safetensors, or a subspaces.safetensors."
        ),
    ],
    towards: Annotated[
        str | None,
        typer.Option(
            help="Push towards this language, by the subspaces, instead of a delta.",
            show_default=False,
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="How far, of the delta or of the push; default: the run's own, or 1.",
            show_default=False,
        ),
    ] = None,
    languages: Annotated[
        str | None,
        typer.Option(
            "--languages",
            "-l",
            help="Languages told apart in answers; default: those of the delta or the subspaces.",
            show_default=False,
        ),
    ] = None,
    separate: Annotated[
        bool, typer.Option("--separate", help="A new conversation for every message.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    model: options.Model = None,
    revision: options.Revision = None,
    template: options.TemplateOfRun = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    memory: options.Memory = None,
    offline: options.Offline = False,
    trust_remote_code: options.TrustRemoteCode = False,
    quiet: options.Quiet = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each turn as a line of JSON.")
    ] = False,
) -> None:
    """Chat with a model before and after, side by side.

    Each side answers after its own answers. Lines with a slash switch things while you talk: /help
    lists them. Ctrl-C stops an answer, Ctrl-D ends. From a pipe, each line is a turn.

    **Examples**

        polylens chat runs/first

        polylens chat runs/probe --towards sw --strength 1.5

        polylens chat runs/first --separate --json < questions.txt
    """
    runtime = options.make_runtime(
        device=device,
        dtype=dtype,
        memory=memory,
        offline=offline,
        trust_remote_code=trust_remote_code,
    )
    side, file = _find(target, model)
    subspaces = None if file is None else Subspaces.load(file)
    detector, central = _detector(languages, subspaces, side)
    pushed = None
    if towards is not None:
        far = 1.0 if strength is None else strength
        pushed = push_towards(require_subspaces(subspaces), towards, far)
    elif side.delta is None:
        raise UsageError(
            f"--towards must name a language where there is no delta, as in {target}; for example "
            f"--towards {detector.languages[-1]}"
        )
    elif strength is not None:
        check_strength(Candidate(), strength)
        side = dataclasses.replace(side, strength=strength)
    with ProgressBars(shown=not quiet) as progress:
        loaded, execution = open_model(
            side.model,
            runtime,
            revision=revision or side.revision,
            with_head=True,
            progress=progress,
        )
    if file is not None:
        Subspaces.load(file, fingerprint=loaded.fingerprint)
    trained = None if side.delta is None else candidate_of(side, loaded)
    after = pushed or trained
    assert after is not None
    conversation = Conversation(
        loaded,
        after,
        detector=detector,
        template=template or template_of(target),
        max_new_tokens=max_new_tokens,
    )
    session = Session(conversation, trained, subspaces, central)
    is_interactive = sys.stdin.isatty()
    if not quiet:
        err.print(execution.sentence(), highlight=False, markup=False)
        if not conversation.has_template:
            err.print(
                "The model has no chat template: it reads the texts so far, parted by empty lines, "
                "and goes on from there."
            )
        if is_interactive:
            err.print("/help lists what can be switched; Ctrl-D ends.", highlight=False)
    _talk(session, is_interactive=is_interactive, separate=separate, as_json=as_json)


def _find(target: Path, model: str | None) -> tuple[Side, Path | None]:
    """Return the changed side, which may have no delta, and the file of its subspaces."""
    delta, subspaces = target / "delta.safetensors", target / "subspaces.safetensors"
    if target.is_file():
        _, metadata = load_tensors(target, verify=False)
        is_subspaces = metadata.get("kind") == "polylens.subspaces"
        delta, subspaces = (delta, target) if is_subspaces else (target, subspaces)
    found = subspaces if subspaces.is_file() else None
    if delta.is_file():
        named = target if (target / "resolved.yaml").is_file() else delta
        return choose_sides(str(named), model, None)[-1], found
    if found is None:
        raise UsageError(
            "chat must be given the folder of a run or a probe, a delta.safetensors or a "
            f"subspaces.safetensors, but {target} is none of them; make one with `polylens "
            "enhance` or `polylens probe`"
        )
    spec, revision = model_of_subspaces(target, found, Subspaces.load(found), model)
    return Side(AFTER, spec, revision), found


def _detector(
    named: str | None, subspaces: Subspaces | None, side: Side
) -> tuple[LanguageDetector, str]:
    """Return what tells languages apart, and the central one of them."""
    if subspaces is not None:
        central, known = subspaces.central, subspaces.languages
    else:
        assert side.delta is not None
        metadata = CrownDelta.load(side.delta).metadata
        central = metadata.get("central", "en")
        known = tuple(dict.fromkeys((central, *metadata.get("languages", ()))))
        if len(known) == 1:  # a baseline may train on one language, and nothing tells one apart
            known = tuple(sorted(supported_languages()))
    return LanguageDetector(languages_to_detect(named, central) if named else known), central


def _talk(session: Session, *, is_interactive: bool, separate: bool, as_json: bool) -> None:
    """Obey and answer line by line, until there are no more.

    Raises:
        PolyLensError: a line is at fault and nobody is there to give another.
        UsageError: there is no line.
    """
    is_idle = True
    for line in _typed() if is_interactive else _piped():
        is_idle = False
        try:
            if line.startswith("/"):
                told = session.obey(line)
                if told:
                    err.print(told, highlight=False, markup=False)
                if session.is_over:
                    return
                continue
            if separate:
                session.conversation.reset()
            if as_json:
                turn = session.conversation.reply(line.strip(), sides=session.shown)
                print_json(turn.to_dict(), indent=None)
            else:
                if not is_interactive:
                    out.print(f"> {line.strip()}", style="bold", highlight=False, markup=False)
                _show_answers(session, line.strip())
        except PolyLensError as error:
            if not is_interactive:
                raise
            print_error(error)
        except KeyboardInterrupt:
            if not is_interactive:
                raise
            err.print("Stopped; both sides forget this turn.")
    if is_idle and not is_interactive:
        raise UsageError(
            "there must be something to ask, but nothing came through the pipe; give one prompt a "
            "line, or start chat on a terminal"
        )


def _typed() -> Iterator[str]:
    """Yield what is typed on a terminal; Ctrl-C drops a line, Ctrl-D ends."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - input() then edits lines and remembers them
    while True:
        try:
            line = _checked(lambda: input("> " if out.is_terminal else ""))
        except EOFError:
            err.print()
            return
        except UsageError as error:  # no text of any language
            print_error(error)
            continue
        except KeyboardInterrupt:
            err.print()
            continue
        if line.strip():
            yield line


def _piped() -> Iterator[str]:
    while line := _checked(sys.stdin.readline):
        if line.strip():
            yield line


def _checked(read: Callable[[], str]) -> str:
    try:
        line = read()
        line.encode()  # terminals without a locale give bytes as lone surrogates
    except UnicodeError as error:
        raise UsageError(f"prompts must be UTF-8, but are not ({error}); convert them") from None
    return line


def _show_answers(session: Session, message: str) -> None:
    """Answer, and draw the answers while they grow; in a file or a pipe, once they are there."""
    conversation, shown = session.conversation, session.shown
    texts = dict.fromkeys(shown, "")
    titles = {
        "before": "before",
        "after": f"after: {describe(conversation.after)}",
    }

    def draw_growing() -> RenderableType:
        return draw([Cell(titles[side], texts[side] or "…") for side in shown], out.width)

    def grow(side: SideName, text: str) -> None:
        texts[side] = text

    try:
        with (
            Live(
                console=out,
                refresh_per_second=_FRAMES_PER_SECOND,
                transient=True,
                get_renderable=lambda: Tail(draw_growing()),
            )
            if out.is_terminal
            else contextlib.nullcontext()
        ):
            turn = conversation.reply(message, sides=shown, on_text=grow)
    except KeyboardInterrupt:
        out.print(draw_growing())
        raise
    cells = [Cell(titles[side], reply.answer, _note(reply)) for side, reply in turn.replies.items()]
    out.print(draw(cells, out.width))


def _note(reply: Reply) -> str:
    """What stands below an answer."""
    language = (
        reply.language
        if reply.language in ("unknown", "empty")
        else f"{language_name(reply.language)} ({reply.language})"
    )
    speed = f"{reply.n_tokens} tokens, {reply.n_tokens / reply.seconds:.1f} a second"
    cut = ["cut off"] if reply.is_cut else []
    forgotten = [f"first {reply.n_forgotten} turns forgotten"] if reply.n_forgotten else []
    return " · ".join([language, speed, *cut, *forgotten])
