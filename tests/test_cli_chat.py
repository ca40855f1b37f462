"""`polylens chat`: piped and typed messages, commands, layout, refusals."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len, split_text
from rich.console import Console

import polylens
from polylens.cli import chat
from polylens.cli.side_by_side import Cell, Tail, draw
from polylens.config import RunConfig, dump_yaml
from polylens.corpora import starter_corpus
from polylens.models.loading import LanguageModel, load_model
from test_cli_steer import make_subspaces
from test_crown import random_delta
from tiny import save_tiny

SHORT = ["--max-new-tokens", "4"]


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> LanguageModel:
    """A model for all tests, whose fingerprint is worked out once."""
    return load_model(tiny_folder, dtype="float32")


@pytest.fixture
def folder(run: Any, tiny: LanguageModel, tiny_folder: Path) -> Path:
    """What a finished run leaves, as far as chat reads it."""
    path = Path("run")
    path.mkdir()
    config = RunConfig(model=str(tiny_folder), languages=("sw", "es"))
    (path / "resolved.yaml").write_text(dump_yaml(config))
    make_subspaces(tiny, "tiny").save(path / "subspaces.safetensors")
    delta = random_delta(tiny, scale=1.0)
    delta.metadata.update(central="en", languages=["sw", "es"])  # type: ignore[attr-defined]
    delta.save(path / "delta.safetensors")
    return path


@pytest.fixture
def pipe(run: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run chat with some lines in a pipe; return the exit code, the turns and stderr."""

    def call(text: str, *arguments: object) -> tuple[int, list[Any], str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        code, out, err = run("chat", *arguments, "--json", *SHORT)
        return code, [json.loads(line) for line in out.splitlines()], " ".join(err.split())

    return call


def test_each_line_of_a_pipe_is_a_turn(pipe: Any, folder: Path) -> None:
    code, turns, err = pipe("Rain?\n\n Rain? \n", folder, "--quiet")
    assert (code, err) == (0, "")
    assert [turn["prompt"] for turn in turns] == ["Rain?", "Rain?"]
    for turn in turns:
        assert list(turn) == ["prompt", "before", "after", "strength"]
        assert turn["strength"] == 1
        for side in ("before", "after"):
            assert list(turn[side]) == ["answer", "language", "n_tokens", "is_cut"]
            assert turn[side]["language"] in ("en", "sw", "es", "unknown", "empty")
            assert turn[side]["n_tokens"] <= 4
    assert turns[0]["before"] != turns[0]["after"]
    assert turns[0] != turns[1]  # the second knows of the first
    code, separate, _ = pipe("Rain?\nRain?\n", folder, "--separate")
    assert code == 0
    assert separate == [turns[0], turns[0]]


def test_the_template_is_the_runs(run: Any, pipe: Any, folder: Path, tiny_folder: Path) -> None:
    """A model trained on bare text is asked by bare text, unless another template is named."""

    def asked(*named: str) -> tuple[Any, Any, Any]:
        _, turns, _ = pipe("Rain?\n", folder, *named)
        *_, steered, _ = run("steer", folder, "Rain?", "--towards", "es", "--json", *named, *SHORT)
        out = Path(f"evaluated-{len(list(Path().iterdir()))}")
        evaluating = ["-t", "fidelity", "-l", "sw", "--rows", "2", "--out", out, "--quiet"]
        code, _, err = run("evaluate", folder, *evaluating, *named, *SHORT, "--no-gate")
        assert (code, err) == (0, "")
        return turns, json.loads(steered)["prompts"], (out / "before/fidelity_sw.jsonl").read_text()

    by_chat = asked()
    config = RunConfig(model=str(tiny_folder), languages=("sw", "es"), template="plain")
    (folder / "resolved.yaml").write_text(dump_yaml(config))
    by_plain = asked()
    assert by_plain == asked("--template", "plain")
    for ours, others in zip(by_plain, by_chat, strict=True):
        assert ours != others


def test_commands_in_a_pipe(pipe: Any, folder: Path) -> None:
    lines = [
        "Rain?", "/reset", "/strength 0", "Rain?", "/reset", "/after", "Rain?", "/before", "Rain?",
        "/reset", "/both", "/towards Swahili", "/strength -8", "Rain?", "/reset", "/towards",
        "Rain?", "/languages fr", " /quit", "/quit", "never",
    ]  # fmt: skip
    code, turns, err = pipe("\n".join(lines), folder, "--strength", "0.5")
    assert code == 0
    half, zero, after, before, pushed, back, slash = turns
    assert half["strength"] == 0.5
    assert (zero["strength"], zero["after"]) == (0, zero["before"])
    assert "before" not in after
    assert "after" not in before
    assert (after["after"], before["before"]) == (zero["after"], zero["before"])
    assert pushed["strength"] == -8
    assert pushed["before"] == half["before"]
    assert pushed["after"] not in (half["after"], half["before"])
    assert back == half
    assert slash["prompt"] == "/quit"
    assert {slash["before"]["language"], slash["after"]["language"]} <= {"en", "fr", "unknown"}
    for told in ("W + 0 · delta", "towards sw, -8", "W + 0.5 · delta", "French (fr)"):
        assert told in err


def test_steering_without_a_delta(pipe: Any, folder: Path, tiny_folder: Path) -> None:
    (folder / "delta.safetensors").unlink()
    for target in (folder, folder / "subspaces.safetensors"):
        given = [target, "--model", tiny_folder, "--towards", "es", "--strength"]
        code, (pushed,), _ = pipe("Rain?\n", *given, 8)
        assert code == 0
        code, (zero,), _ = pipe("Rain?\n", *given, 0)
        assert code == 0
        assert zero["after"] == zero["before"] == pushed["before"] != pushed["after"]


def test_a_delta_alone_and_the_strength_of_its_run(
    pipe: Any, folder: Path, tiny_folder: Path
) -> None:
    code, (whole,), _ = pipe("Rain?", folder / "delta.safetensors", "-m", tiny_folder)
    assert code == 0
    assert whole["strength"] == 1
    random_delta(load_model(tiny_folder, dtype="float32")).save(Path("untold.safetensors"))
    assert pipe("Rain?\n/languages", "untold.safetensors", "-m", tiny_folder)[2].count("(") > 50
    (folder / "gate.json").write_text('{"strength": 0.25}')
    code, (gated,), _ = pipe("Rain?", folder)
    assert code == 0
    assert gated["strength"] == 0.25
    assert gated["before"] == whole["before"]
    (folder / "resolved.yaml").unlink()  # a folder of somebody's own
    assert pipe("Rain?", folder, "--model", tiny_folder)[1] == [whole]


@pytest.mark.parametrize(
    ("lines", "arguments", "message"),
    [
        ("", ["run"], "nothing came through the pipe"),
        ("/rset", ["run"], "got '/rset', did you mean '/reset'?; /help lists them"),
        ("/strength much", ["run"], "/strength must have a number, got 'much'"),
        ("/strength -1", ["run"], "the strength must be at least 0 and finite, got -1"),
        ("/towards fr", ["run"], "one of the probed languages (sw, es), got 'fr'"),
        ("/towards swahilli", ["run"], "did you mean 'swahili'?"),
        ("/languages en", ["run"], "must be more than en, got 'en'"),
        ("Hi", ["none"], "none is none of them"),
        ("Hi", ["run/resolved.yaml"], "run/resolved.yaml must be a safetensors file"),
        ("Hi", ["run", "--strength", "-1"], "the strength must be at least 0"),
        ("Hi", ["run", "--towards", "sw", "--strength", "inf"], "the strength must be finite"),
        ("Hi", ["run", "-l", "qqq"], "the detector must know every language"),
        ("Hi", ["run", "--template", "nope"], "template must be"),
        ("Hi", ["probe", "-m", "x"], "must name a language where there is no delta, as in probe"),
        ("/towards", ["probe", "-m", "{tiny}", "--towards", "sw"], "to go back to; one of sw, es"),
        ("Hi", ["alone", "-m", "x", "--towards", "sw"], "must have subspaces, but there are none"),
        ("Hi", ["alone/delta.safetensors"], "give its path by --against, or by --model to"),
        ("Hi", ["run", "--model", "{other}"], "was probed on another one (tiny)"),
        ("What? " * 100, ["run"], "fit in the model's context of 512 tokens"),
        ("\udcff", ["run"], "prompts must be UTF-8"),
    ],
)  # fmt: skip
def test_faulty_use_ends_in_one_sentence(
    pipe: Any,
    folder: Path,
    tiny_folder: Path,
    tmp_path: Path,
    lines: str,
    arguments: list[str],
    message: str,
) -> None:
    for name, file in (("probe", "subspaces.safetensors"), ("alone", "delta.safetensors")):
        Path(name).mkdir()
        os.link(folder / file, Path(name) / file)
    if "{other}" in arguments:
        save_tiny(tmp_path / "other", "qwen2")
    folders = {"tiny": tiny_folder, "other": tmp_path / "other"}
    arguments = [argument.format(**folders) for argument in arguments]
    code, turns, err = pipe(lines, *arguments)
    assert message in err
    assert (code, turns) == (2, [])
    assert "Traceback" not in err


class Typed(io.StringIO):
    """Lines that somebody types on a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(run: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run chat on a terminal of 100 columns; return the exit code, what it shows, and stderr."""

    def call(lines: str, *arguments: object) -> tuple[int, str, str]:
        shown = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
        monkeypatch.setattr(chat, "out", shown)
        monkeypatch.setattr(sys, "stdin", Typed(lines))
        code, _, err = run("chat", *arguments, *SHORT)
        return code, shown.file.getvalue(), " ".join(err.split())  # type: ignore[attr-defined]

    return call


def test_on_a_terminal_a_faulty_line_is_told_and_the_talk_goes_on(
    terminal: Any, folder: Path
) -> None:
    code, shown, err = terminal("/nonsense\nRain?\n/strength 2\nWhy?\n/help\n", folder)
    assert code == 0
    assert "got '/nonsense'; /help lists them" in err
    for command in ("/strength NUMBER", "/towards", "/languages", "/reset", "/quit"):
        assert command in err
    assert "after: W + 1 · delta" in shown
    assert "after: W + 2 · delta" in shown
    assert " a second" in shown


@pytest.mark.parametrize("stopped", ["before", "after"])
def test_ctrl_c_stops_the_answer_and_not_the_program(
    terminal: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, stopped: str
) -> None:
    kept: list[Any] = []
    reply = chat.Conversation.reply

    def interrupted(self: Any, message: str, *, sides: Any, on_text: Any) -> Any:
        def once(side: str, text: str) -> None:
            if (message, side) == ("Stop.", stopped):
                signal.raise_signal(signal.SIGINT)
            on_text(side, text)

        turn = reply(self, message, sides=sides, on_text=once)
        kept[:] = self.turns
        return turn

    monkeypatch.setattr(chat.Conversation, "reply", interrupted)
    code, _, err = terminal("Rain?\nStop.\nWhy?\n", folder)
    assert code == 0
    assert "Stopped; both sides forget this turn." in err
    assert [turn.message for turn in kept] == ["Rain?", "Why?"]
    assert all(len(turn.replies) == 2 for turn in kept)


def test_ctrl_c_while_typing_drops_the_line(
    terminal: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[Any] = [KeyboardInterrupt, "Rain?", EOFError]

    def typed(prompt: str) -> str:
        line = lines.pop(0)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", typed)
    code, shown, _ = terminal("", folder)
    assert code == 0
    assert lines == []
    assert " a second" in shown


def rendered(cells: list[Cell], width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(draw(cells, width))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined,no-any-return]


CHINESE = "雨是从云中落下的水滴，" * 12
ENGLISH = "Rain is water that falls from clouds. " * 6
ARABIC = "المطر ماء يسقط من السحاب. " * 6


def test_columns_where_there_is_room_and_none_for_right_to_left() -> None:
    wide = rendered([Cell("before", ENGLISH), Cell("after", CHINESE)], 100)
    (titles,) = [line for line in wide if "before" in line]
    start = titles.index("after")
    assert all(cell_len(line) <= 100 for line in wide)
    right = []
    for line in wide:
        left, column = split_text(line, start)
        assert "雨" not in left
        right.append(column.strip())
    assert "".join(right).startswith("after雨是从")
    assert "".join(right) == "after" + CHINESE
    narrow = rendered([Cell("before", ENGLISH), Cell("after", CHINESE)], 60)
    arabic = rendered([Cell("before", ENGLISH), Cell("after", ARABIC)], 100)
    for lines, width in ((narrow, 60), (arabic, 100)):
        assert all(cell_len(line) <= width for line in lines)
        assert any(line.strip() == "before" for line in lines)
        assert any(line.strip() == "after" for line in lines)
    assert " ".join(" ".join(arabic).split()) == f"before {ENGLISH}after {ARABIC}".strip()


def test_control_characters_and_markup_are_shown_and_not_obeyed() -> None:
    shown = "\n".join(rendered([Cell("a", "\x1b[31mred [b]bold[/b]\x07")], 100))
    assert "\x1b" not in shown
    assert "\x07" not in shown
    assert "[31mred [b]bold[/b]" in shown


def test_a_growing_answer_shows_its_end() -> None:
    console = Console(file=io.StringIO(), width=40, height=6, color_system=None)
    console.print(Tail(draw([Cell("a", "\n".join(map(str, range(50))))], 40)))
    lines = console.file.getvalue().split()  # type: ignore[attr-defined]
    assert lines[-1] == "49"
    assert 2 <= len(lines) <= 5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_real_model_is_pushed_into_spanish(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "smollm2-135m-instruct"
    model = load_model(name)
    rows = starter_corpus().limit(16)
    polylens.probe(model, rows.to_corpus(), languages=["en", "es"]).save(Path("found.safetensors"))
    questions = ["What is rain?", "Name three animals that live in the sea.", "Why do we sleep?"]
    lines = [*questions, "/strength 0", questions[0]]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    code, out, err = run(
        "chat", "found.safetensors", "--model", name, "--towards", "es", "--strength", "1.5",
        "--json", "--separate", "--max-new-tokens", 16,
    )  # fmt: skip
    assert code == 0, err
    *pushed, zero = map(json.loads, out.splitlines())
    languages = [(turn["before"]["language"], turn["after"]["language"]) for turn in pushed]
    assert [before for before, _ in languages] == ["en"] * 3
    assert [after for _, after in languages].count("es") >= 2
    assert zero["before"] == zero["after"] == pushed[0]["before"]
