"""Commands and Python of README.md and docs/, found in their text.

A block that is not run says why in a comment just above it, `<!-- not run: reason -->`;
`<!-- not run, "some text": reason -->` leaves out the commands that hold that text, and runs the
others.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))

_BLOCK = re.compile(
    r"(?:^<!-- not run(?P<some>(?:, \"[^\"]+\")*): (?P<reason>.+?) -->\n)?"
    r"^```(?P<kind>bash|python)\n(?P<text>.*?)^```$",
    flags=re.DOTALL | re.MULTILINE,
)
_ASSIGNMENT = re.compile(r"[A-Z_]+=")
_LAUNCHERS = ("torchrun", "accelerate", "python")


@dataclass(frozen=True)
class Command:
    """One command of a shell.

    Attributes:
        words: program and arguments, without assignments of variables and launchers.
        standard_input: a file that is piped into it.
        reason: why it is not run; None if it is.
    """

    words: tuple[str, ...]
    standard_input: str | None = None
    reason: str | None = None

    @property
    def is_ours(self) -> bool:
        """Whether the program is polylens."""
        return self.words[0] == "polylens"


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: that holds it, relative to the repository.
        line: of the page, from 1.
        kind: "bash" or "python".
        text: between the fences.
        reason: why it is not run, or not all of it; None if it is.
        left_out: texts of the commands that are not run; empty for all.
    """

    page: str
    line: int
    kind: str
    text: str
    reason: str | None
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        """Say where it is."""
        return f"{self.page}:{self.line}"

    def commands(self) -> list[Command]:
        """Return the commands of a shell block."""
        found = []
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if not words:
                continue
            is_left_out = not self.left_out or any(text in line for text in self.left_out)
            source = None
            if "|" in words:
                bar = words.index("|")
                (program, source), words = words[:bar], words[bar + 1 :]
                assert program == "cat", f"{self}: only `cat FILE | …` is understood"
            elif words[-2:-1] == ["<"]:
                words, source = words[:-2], words[-1]
            found.append(
                Command(_without_launcher(words), source, self.reason if is_left_out else None)
            )
        return found


def blocks(page: str) -> list[Block]:
    """Return the shell and Python blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(
            page=page,
            line=text.count("\n", 0, match.start("text")),
            kind=match["kind"],
            text=match["text"],
            reason=match["reason"],
            left_out=tuple(re.findall(r'"([^"]+)"', match["some"] or "")),
        )
        for match in _BLOCK.finditer(text)
    ]


def inline_commands(page: str) -> list[tuple[str, ...]]:
    """Return the `polylens …` of running text, and of outputs that show one."""
    text = (ROOT / page).read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return [
        tuple(shlex.split(" ".join(found.split())))
        for found in re.findall(r"`(polylens [^`]+)`", prose)
        if "…" not in found
    ]


def paths(page: str) -> list[str]:
    """Return the files of this repository that a page names or links to."""
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(
        r"(?<![\w/.])((?:docs|examples|src|tests|benchmarks|experiments)/[\w./-]*\w)", text
    )
    linked = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    folder = Path(page).parent
    return [*named, *(str(folder / link) for link in linked)]


def _without_launcher(words: list[str]) -> tuple[str, ...]:
    while _ASSIGNMENT.match(words[0]):
        words = words[1:]
    if words[0] in _LAUNCHERS and "polylens" in words:
        words = words[words.index("polylens") :]
    return tuple(words)
