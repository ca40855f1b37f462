"""Answers side by side on a terminal: in columns where there is room, else one below the other."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

# Columns narrower than half of this make answers hard to read.
_WIDE = 80


@dataclass(frozen=True)
class Cell:
    """One of the answers.

    Attributes:
        title: stands above it.
        text: the answer, of any length, in any script.
        note: stands below it.
    """

    title: str
    text: str
    note: str = ""


def draw(cells: Sequence[Cell], width: int) -> RenderableType:
    """Lay answers out.

    Text that is written from right to left gets lines of its own: a terminal turns each line
    round as a whole, and would mix what stands in two columns of it.

    Args:
        cells: from left to right.
        width: of the terminal, in characters.
    """
    parts = [
        (Text(cell.title, style="bold"), Text(_printable(cell.text)), Text(cell.note, style="dim"))
        for cell in cells
    ]
    if len(cells) == 1 or width < _WIDE or any(_is_right_to_left(cell.text) for cell in cells):
        return Group(*(Group(*(part for part in cell if part), Text()) for cell in parts))
    grid = Table.grid(padding=(0, 3, 0, 0), expand=True)
    for _ in cells:
        grid.add_column(ratio=1, overflow="fold")
    for row in zip(*parts, strict=True):
        grid.add_row(*row)
    return Group(grid, Text())


class Tail:
    """The last lines of something that may be higher than the terminal, while it grows."""

    def __init__(self, whole: RenderableType) -> None:
        self._whole = whole

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._whole, options.update(height=None), pad=False)
        for line in lines[-(console.height - 1) :]:
            yield from line
            yield Segment.line()


def _printable(text: str) -> str:
    """Show control characters, which a model may well write, rather than obey them."""
    return "".join(
        "\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )


def _is_right_to_left(text: Iterable[str]) -> bool:
    return any(unicodedata.bidirectional(character) in ("R", "AL") for character in text)
