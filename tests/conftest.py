"""Fixtures for the whole suite: tiny models, and a home of its own for every test."""

from __future__ import annotations

import os
import signal
import sys

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

from pathlib import Path
from typing import Any

import pytest
import torch

from polylens.cli import main
from polylens.models.loading import LanguageModel, wrap_model
from tiny import FAMILIES, build, save_taught, save_tiny, tiny_tokenizer

# Shells start what goes on in the background deaf to Ctrl-C, and it would pass that on.
signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # tiny models run faster on one, and the tests share the cores


@pytest.fixture(autouse=True)
def cache(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Keep tests away from the Hub and, except slow ones, which need weights, the user's cache."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setenv("POLYLENS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def one_dtype_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in float32 wherever the dtype is left open, on processors with bfloat16 too."""
    monkeypatch.setattr("polylens.machine.matmul_flops", lambda *_, **__: 1.0)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Name of each family of models in turn."""
    return str(request.param)


@pytest.fixture
def tiny_model(family: str) -> LanguageModel:
    """A tiny model of each family in turn; each test gets its own, so it may change it."""
    return wrap_model(build(family), tiny_tokenizer(), family)


@pytest.fixture
def llama() -> LanguageModel:
    """A tiny Llama, for what does not depend on the family."""
    return wrap_model(build("llama"), tiny_tokenizer(), "llama")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete folder of a tiny Llama with a chat template; do not write to it."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def taught_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete folder of a tiny Llama that knows some English; do not write to it."""
    return save_taught(tmp_path_factory.mktemp("models") / "taught")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Run the program in an empty folder; return exit code, stdout and stderr."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["polylens", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
