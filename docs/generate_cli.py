"""Write docs/cli.md from the program's own `--help`; with --check, fail if it is stale."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.update({"TERMINAL_WIDTH": "100", "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})

from typer.testing import CliRunner

from polylens.cli import app

PAGE = Path(__file__).parent / "cli.md"
COMMANDS = (
    *((name,) for name in ("enhance", "probe", "train", "steer", "evaluate", "report", "models")),
    ("models", "fetch"),
    ("data",),
    ("doctor",),
)


def render() -> str:
    """Return the page."""
    parts = ["# Command line\n\nGenerated from `--help` by `make docs`.\n"]
    for command in ((), *COMMANDS):
        result = CliRunner().invoke(app, [*command, "--help"], prog_name="polylens")
        assert result.exit_code == 0, result.output
        text = "\n".join(line.rstrip() for line in result.output.strip().splitlines())
        parts.append(f"## polylens {' '.join(command)}".rstrip() + f"\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def main() -> int:
    """Write or check the page."""
    page = render()
    if "--check" not in sys.argv:
        PAGE.write_text(page, encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") == page:
        return 0
    print("docs/cli.md is stale; run: make docs", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
