"""The settings that help the target languages most without harming the central one, by measurement.

The trunk runs once, so a trial costs a crown: it is trained and scored from states that are kept.
`run` does it; `space` says what may vary, `workbench` trains and measures one trial, `trials` holds
what was found, `study` asks Optuna what to try next, `split` keeps the rows that are reported apart
from those that are searched on, and `conclusion` measures what was chosen on them.
"""

from polylens.search.conclusion import Chosen, SearchResult
from polylens.search.folder import SearchFolder
from polylens.search.run import STRENGTHS, search
from polylens.search.space import Choice, Range, Space, read_space
from polylens.search.trials import Figure, Point, Trial

__all__ = [
    "STRENGTHS",
    "Choice",
    "Chosen",
    "Figure",
    "Point",
    "Range",
    "SearchFolder",
    "SearchResult",
    "Space",
    "Trial",
    "read_space",
    "search",
]
