"""Every command and every snippet of README.md and docs/ works, on a tiny model and few texts."""

from __future__ import annotations

import ast
import io
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

import polylens
from polylens.baselines import FewShotSettings
from polylens.cli import app, main, options
from polylens.cli.baseline import _SETTINGS, Kind
from polylens.config import PRESETS, TrainSettings, check, load_config
from polylens.corpora import ParallelCorpus, starter_corpus
from polylens.errors import GateError
from snippets import PAGES, ROOT, Block, Command, blocks, inline_commands, paths
from tiny import save_tiny

PROGRAM: Any = get_command(app)
BLOCKS = [block for page in PAGES for block in blocks(page)]
COMMANDS = [
    (str(block), command)
    for block in BLOCKS
    if block.kind == "bash"
    for command in block.commands()
]
ELSEWHERE = ("cd", "llama-cli", "make", "pip", "python3", "source", ".")

# Names that pages give to what a reader has.
MODELS = ("M", "MODEL", "my/model", "their/model", "path/or/hub-id")
RUNS = ("runs/demo", "runs/first", "runs/mine")
N_TRAIN, N_HELDOUT, N_CHARACTERS = 9, 3, 24

# What changes sizes only, so that a tiny model has little to do.
SMALL_PRESET = {
    "train": {"epochs": 1, "batch_size": 4},
    "evaluate": {"rows": N_HELDOUT, "max_new_tokens": 2},
    "gate": {"steps": 1, "text_margin": 9.0, "choice_margin": 9.0},  # so few rows show nothing
}
SMALL_ARGUMENTS = {  # the last of an option given twice wins
    "evaluate": ["--max-new-tokens", "2"],
    "mt-bench": ["--max-new-tokens", "2"],
    "search": ["--trials", "2", "--development-rows", "3"],
    "steer": ["--max-new-tokens", "2"],
}
SMALL_CODE = {"n_trials=20": "n_trials=2, n_development=3", "n_heldout=32": "n_heldout=3"}


def parse(words: tuple[str, ...], *, is_whole: bool) -> Any:
    """Parse a command line with the program's own parser, without running it."""
    group, (_, name, *arguments) = PROGRAM, words
    while True:
        known = group.commands
        assert name in known, f"there is no command {name!r}, only {', '.join(known)}"
        group = known[name]
        if not hasattr(group, "commands") or not arguments or arguments[0].startswith("-"):
            break
        name, *arguments = arguments
    if arguments == ["--help"]:
        return None
    try:
        return group.make_context(name, list(arguments))
    except Exception as error:
        if type(error).__name__ == "MissingParameter" and not is_whole:
            return None
        raise AssertionError(f"{' '.join(words)}: {error}") from error


def check_settings(context: Any) -> None:
    """Check the settings that a command line holds against their models."""
    given, name = context.params, context.info_name
    if name in ("enhance", "search"):
        path, overrides = options.split_arguments(given["arguments"])
        is_ours = path is not None and (ROOT / path).is_file()
        languages = given["languages"] or ("sw" if not is_ours else None)
        if languages:
            overrides["languages"] = languages
        load_config(ROOT / path if is_ours else None, overrides)  # type: ignore[operator]
    elif name == "train":
        check(TrainSettings, options.split_arguments(given["settings"])[1])
    elif name == "baseline":
        model = _SETTINGS.get(Kind(given["kind"]), FewShotSettings)
        check(model, options.split_arguments(given["settings"])[1])


@pytest.mark.parametrize(("where", "command"), COMMANDS, ids=[where for where, _ in COMMANDS])
def test_command_lines_parse(where: str, command: Command) -> None:
    program, *rest = command.words
    if command.is_ours:
        check_settings(parse(command.words, is_whole=True))
    elif program == "make":
        targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert rest[0] in targets
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for extras in re.findall(r"\[([\w,-]+)\]", " ".join(rest)):
            assert set(extras.split(",")) <= set(project["optional-dependencies"])
    else:
        assert program in ELSEWHERE, f"{where}: {program} is not known here"


@pytest.mark.parametrize("page", PAGES)
def test_what_running_text_names_is_there(page: str) -> None:
    for words in inline_commands(page):
        context = parse(words, is_whole=False)
        if context is not None:
            check_settings(context)
    for path in paths(page):
        assert (ROOT / path).exists(), f"{page} names {path}, which is not there"


def test_what_is_not_run_is_little() -> None:
    not_run = [b for b in BLOCKS if b.reason is not None and not b.left_out]
    assert len(not_run) <= len(BLOCKS) / 3, "\n".join(f"{b}: {b.reason}" for b in not_run)
    for block in BLOCKS:
        for text in block.left_out:
            assert text in block.text, f"{block} leaves out {text!r}, but does not hold it"
    print(*(f"{b} not run: {b.reason}" for b in BLOCKS if b.reason is not None), sep="\n")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a reader who has models, texts, and runs that are done."""
    folder = tmp_path_factory.mktemp("reader")
    corpus = _small_starter()
    tiny = save_tiny(folder / "tiny")
    for name in MODELS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(tiny)
    _write_texts(folder, corpus)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POLYLENS_CACHE", str(folder / "cache"))
        _make_small(patch, tiny, corpus)
        config = {"model": str(tiny), "languages": "sw,bn,es,zh"}
        polylens.enhance(load_config(None, config), folder / RUNS[0])
        for name in RUNS[1:]:
            shutil.copytree(folder / RUNS[0], folder / name)
        shutil.copytree(folder / RUNS[0], folder / "runs/probe")
        shutil.copy(folder / RUNS[0] / "delta.safetensors", folder / "runs")
        for name in ("runs/sft", "runs/a", "runs/b"):
            (folder / name).mkdir()
        shutil.copy(folder / RUNS[0] / "delta.safetensors", folder / "runs/sft")
        for when in ("before", "after"):
            target = folder / f"runs/{'a' if when == 'before' else 'b'}/{when}"
            shutil.copytree(folder / RUNS[0] / "evaluation" / when, target)
    return folder


@pytest.fixture
def desk(reader: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same for each page, as if it were the first one that the reader opens."""
    folder = tmp_path / "desk"
    shutil.copytree(reader, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("POLYLENS_CACHE", str(folder / "cache"))
    _make_small(monkeypatch, reader / "tiny", _small_starter())
    return folder


@pytest.mark.parametrize("page", [p for p in PAGES if any(b.page == p for b in BLOCKS)])
def test_blocks_run(page: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {}
    for block in blocks(page):
        if block.kind == "python":
            _run_python(block, names)
            continue
        for command in block.commands():
            if command.is_ours and command.reason is None:
                _run_command(block, command, monkeypatch)


def _run_python(block: Block, names: dict[str, Any]) -> None:
    """Run a block with the names of the page's earlier ones, or those of docs/python.md."""
    text = block.text
    for usual, small in SMALL_CODE.items():
        text = text.replace(usual, small)
    tree = ast.parse(text, str(block))
    if block.reason is not None:  # its imports are right all the same
        kinds = ast.Import | ast.ImportFrom
        tree.body = [node for node in tree.body if isinstance(node, kinds)]
    loaded = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    if not names and {"model", "subspaces"} & loaded and "load_model" not in text:
        first = blocks("docs/python.md")[0]
        exec(compile(first.text, str(first), "exec"), names)
    exec(compile(tree, str(block), "exec"), names)


def _run_command(block: Block, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command of the program in this process."""
    context = parse(command.words, is_whole=True)
    words = [*command.words, *SMALL_ARGUMENTS.get(context.info_name, ())]
    target = context.params.get("out_folder")
    if context.info_name in ("enhance", "probe") and target is not None and target.exists():
        shutil.rmtree(target)  # what stood in for the result of this very command
    monkeypatch.setattr(sys, "argv", words)
    text = "What is rain?\n"  # whoever sits before the terminal
    if command.standard_input is not None:
        text = Path(command.standard_input).read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    code = 0
    try:
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    # A tiny model on three rows cannot show that it was not harmed.
    assert code in (0, GateError.exit_code), f"{block}: {' '.join(command.words)}"


def _small_starter() -> ParallelCorpus:
    rows = starter_corpus().rows
    cut = len(rows) - starter_corpus().n_heldout
    chosen = (*rows[:N_TRAIN], *rows[cut : cut + N_HELDOUT])
    return ParallelCorpus.make(
        "starter", [{k: v[:N_CHARACTERS] for k, v in row.items()} for row in chosen], N_HELDOUT
    )


def _make_small(patch: pytest.MonkeyPatch, tiny: Path, corpus: ParallelCorpus) -> None:
    """Let names of the registry mean a tiny model, 'starter' few rows, and defaults little work."""
    patch.setattr("polylens.models.source.fetch", lambda *_, **__: tiny)
    patch.setattr("polylens.cli.models.fetch_model", lambda *_, **__: tiny)
    for module in ("polylens", "polylens.plan", "polylens.corpora.readers"):
        patch.setattr(f"{module}.starter_corpus", lambda: corpus)
    patch.setitem(PRESETS, "default", SMALL_PRESET)  # type: ignore[arg-type]
    # A random model of four layers has no layers in the middle that tell languages apart.
    patch.setattr("polylens.steering.upper_layers", lambda _: (2,))
    patch.setattr("polylens.steering._SEPARABLE_RATIO", 0.0)


def _write_texts(folder: Path, corpus: ParallelCorpus) -> None:
    """Write the corpora that pages name."""
    rows = [dict(row) for row in corpus.rows]
    _write_rows(folder / "prompts.jsonl", rows)
    answers = [
        {"language": k, "prompt": row[k], "answer": row[k][:9]}
        for row in rows
        for k in ("en", "sw", "bn")
    ]
    _write_rows(folder / "answers.jsonl", answers)
    (folder / "texts").mkdir()
    for language in ("en", "sw", "bn"):
        text = "".join(f"{row[language]}\n" for row in rows)
        (folder / f"texts/{language}.txt").write_text(text, encoding="utf-8")
    (folder / "questions.txt").write_text("What is rain?\nHow do plants eat?\n", encoding="utf-8")
    questions = [
        {"question_id": i, "category": "writing", "turns": [row["zh"], row["zh"]]}
        for i, row in enumerate(rows[:2])
    ]
    _write_rows(folder / "mt_bench_zh.jsonl", questions)
    (folder / "run.yaml").write_text("model: M\nlanguages: [sw]\n", encoding="utf-8")
    shutil.copytree(ROOT / "examples", folder / "examples")


def _write_rows(path: Path, rows: list[Any]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
