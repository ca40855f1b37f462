"""The page of a search: what each trial gains and costs, and how each setting matters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from polylens.config import RunConfig
from polylens.languages import language_name
from polylens.report.page import _figure, _render
from polylens.report.plots import _CENTRAL, _PALETTE, _styled

if TYPE_CHECKING:
    from polylens.search.conclusion import SearchResult
    from polylens.search.trials import Point, Trial

_BEST, _FRONT, _DEFAULT = _PALETTE[1], _PALETTE[0], _PALETTE[2]
_COLUMNS = 3


def render_search(result: SearchResult, config: RunConfig) -> str:
    """Return the page of a finished search.

    Args:
        result: of the search.
        config: of its runs.
    """
    figures = {"front": _figure(front_figure(result), "front")}
    matter = settings_figure(result)
    if matter is not None:
        figures["settings"] = _figure(matter, "settings")
    languages = ", ".join(language_name(k) for k in config.languages)
    return _render(
        "search.html",
        title=f"Search for settings: {languages}",
        central=config.central,
        result=result,
        front=[("On the front", one) for one in result.front if one != result.best],
        figures=figures,
        text=lambda value: json.dumps(value, ensure_ascii=False),
    )


def front_figure(result: SearchResult) -> go.Figure:
    """Draw the points of trainings on all rows: gain of the targets against loss of the centre."""
    figure = go.Figure()
    whole = [trial for trial in result.trials if trial.outcome != "previewed"]
    points = [(trial, p) for trial in whole for p in trial.points]
    for holds, name, symbol in ((True, "gate holds", "circle"), (False, "fails", "circle-open")):
        own = [(trial, p) for trial, p in points if p.holds == holds]
        figure.add_scatter(
            x=[p.loss for _, p in own],
            y=[p.gain.value for _, p in own],
            text=[_label(trial, p) for trial, p in own],
            mode="markers",
            name=name,
            marker={"color": _CENTRAL, "size": 7, "symbol": symbol},
            opacity=0.7,
            hovertemplate="%{text}<br>gain %{y:+.2f} %, loss %{x:.2f}<extra></extra>",
        )
    front = [one.development for one in result.front]
    _add(figure, front, "front", _FRONT, "lines+markers", "circle")
    _add(figure, [one.report for one in result.front], "front, report rows", _FRONT, "markers",
         "square-open")  # fmt: skip
    for chosen, name, colour in ((result.default, "default settings", _DEFAULT),
                                 (result.best, "best settings", _BEST)):  # fmt: skip
        if chosen is not None:
            _add(figure, [chosen.development], name, colour, "markers", "star")
            _add(figure, [chosen.report], f"{name}, report rows", colour, "markers", "star-open")
    line = {"color": _CENTRAL, "width": 1, "dash": "dot"}
    figure.add_vline(x=1, line=line)
    figure.add_hline(y=0, line=line)
    figure.update_xaxes(title_text="loss of the central language, 1 is what the gate allows")
    figure.update_yaxes(title_text="gain of the targets, percent")
    return _styled(figure, height=520)


def settings_figure(result: SearchResult) -> go.Figure | None:
    """Draw each trial's best gain by each of its settings; the settings that matter most first.

    Returns:
        The figure; None if no trial was measured.
    """
    measured = [trial for trial in result.trials if trial.outcome == "measured"]
    if not measured:
        return None
    keys = sorted(measured[0].settings, key=lambda key: -result.importances.get(key, 0.0))
    titles = [
        f"{key} ({result.importances[key]:.0%})" if key in result.importances else key
        for key in keys
    ]
    n_rows = -(-len(keys) // _COLUMNS)
    figure = make_subplots(
        rows=n_rows,
        cols=min(_COLUMNS, len(keys)),
        subplot_titles=titles,
        shared_yaxes=True,
        vertical_spacing=0.3 / n_rows,
    )
    for index, key in enumerate(keys):
        values = [trial.settings[key] for trial in measured]
        are_numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        where = {"row": index // _COLUMNS + 1, "col": index % _COLUMNS + 1}
        best = [trial.best or trial.points[0] for trial in measured]
        figure.add_scatter(
            x=values if are_numbers else [json.dumps(value) for value in values],
            y=[point.gain.value for point in best],
            text=[_label(*pair) for pair in zip(measured, best, strict=True)],
            mode="markers",
            marker={
                "color": [_FRONT if point.holds else _CENTRAL for point in best],
                "symbol": ["circle" if point.holds else "circle-open" for point in best],
                "size": 8,
            },
            showlegend=False,
            hovertemplate="%{text}<br>%{x}: %{y:+.2f} %<extra></extra>",
            **where,
        )
        positive = are_numbers and min(values) > 0
        if positive and max(values) > 10 * min(values):
            figure.update_xaxes(type="log", **where)
    return _styled(figure, height=120 + 200 * n_rows)


def _add(
    figure: go.Figure, points: Sequence[Point], name: str, colour: str, mode: str, symbol: str
) -> None:
    figure.add_scatter(
        x=[p.loss for p in points],
        y=[p.gain.value for p in points],
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [max(0.0, p.loss_bound - p.loss) for p in points],
            "arrayminus": [0.0 for _ in points],
            "thickness": 1,
        },
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [p.gain.high - p.gain.value for p in points],
            "arrayminus": [p.gain.value - p.gain.low for p in points],
            "thickness": 1,
        },
        mode=mode,
        name=name,
        marker={"color": colour, "size": 12 if "star" in symbol else 8, "symbol": symbol},
        line={"color": colour, "width": 2},
        hovertemplate="gain %{y:+.2f} %, loss %{x:.2f}<extra>" + name + "</extra>",
    )


def _label(trial: Trial, point: Point) -> str:
    return f"trial {trial.number} at strength {point.strength:g}"
