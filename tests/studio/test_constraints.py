"""The studio's versions go with those that everything else is tested with."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {library.lower().replace("_", "-"): version for library, version in pairs}


def test_only_what_gradio_refuses_differs() -> None:
    ours, theirs = pins("constraints-studio.txt"), pins("constraints.txt")
    assert {k for k in ours.keys() & theirs.keys() if ours[k] != theirs[k]} == {"pillow", "tomlkit"}
