"""Figures of a run, as plotly draws them: one colour a language, the central one grey."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from polylens.evaluation.measures import Example, Measure
from polylens.languages import language_name
from polylens.report.projection import Plane, agnostic_plane, specific_plane
from polylens.subspaces import Subspaces

# Okabe and Ito's palette, safe for colour-blind readers; grey is the central language's.
_CENTRAL = "#767676"
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7A5195")
_LINE = "rgba(128,128,128,0.25)"

_HOVER_WIDTH = 48
_HOVER_LINES = 6


def language_colours(languages: Sequence[str], central: str) -> dict[str, str]:
    """Return a colour for each language; the same languages always get the same colours."""
    targets = [language for language in languages if language != central]
    colours = {k: _PALETTE[i % len(_PALETTE)] for i, k in enumerate(targets)}
    return {central: _CENTRAL, **colours}


def loss_curves(log: Sequence[Mapping[str, float]]) -> go.Figure:
    """Draw each loss by step, those that were used side by side.

    Args:
        log: of `TrainingResult`, one entry a step.
    """
    titles = {
        "separate": "separate: distance to the goal",
        "align": "align: distance to the centre",
        "answer": "answer: nats a token",
        "retain": "retain: drift of the centre",
    }
    names = {"": "central language", "choices": "questions with two answers"}
    groups = [group for group in titles if any(_of(entry, group) for entry in log)]
    figure = make_subplots(rows=1, cols=len(groups), subplot_titles=[titles[g] for g in groups])
    languages = dict.fromkeys(name.partition(".")[2] for entry in log for name in entry)
    colours = language_colours([one for one in languages if one not in names], "")
    shown: set[str] = set()
    for column, group in enumerate(groups, start=1):
        for name in dict.fromkeys(name for entry in log for name in _of(entry, group)):
            language = name.partition(".")[2]
            label = names.get(language) or language_name(language)
            points = [(entry["step"], entry[name]) for entry in log if name in entry]
            figure.add_scatter(
                x=[x for x, _ in points],
                y=[y for _, y in points],
                name=label,
                legendgroup=label,
                showlegend=label not in shown,
                mode="lines",
                line={
                    "color": colours.get(language, _CENTRAL),
                    "width": 2,
                    "dash": "dot" if language == "choices" else "solid",
                },
                row=1,
                col=column,
            )
            shown.add(label)
        figure.update_xaxes(title_text="step", row=1, col=column)
    return _styled(figure, height=340)


def probe_figure(subspaces: Subspaces) -> go.Figure:
    """Draw, by layer: distances to the central language, separability, singular values."""
    figure = make_subplots(
        rows=2,
        cols=2,
        subplot_titles=[
            "distance to the central language, specific subspace",
            "distance to the central language, agnostic subspace",
            "texts nearest to their own language's mean",
            "singular values of the language means",
        ],
        vertical_spacing=0.17,
    )
    layers = list(subspaces.layers)
    colours = language_colours(subspaces.languages, subspaces.central)
    for language in subspaces.languages:
        if language == subspaces.central:
            continue
        distances = [subspaces.distances(language, layer) for layer in layers]
        for column, which in ((1, 1), (2, 0)):
            figure.add_scatter(
                x=layers,
                y=[round(pair[which], 9) for pair in distances],  # 0, not its rounding
                name=language_name(language),
                legendgroup=language,
                showlegend=column == 1,
                mode="lines",
                line={"color": colours[language], "width": 2},
                row=1,
                col=column,
            )
    figure.add_scatter(
        x=layers,
        y=subspaces.separability.tolist(),
        name="separability",
        showlegend=False,
        mode="lines",
        line={"color": _CENTRAL, "width": 2},
        row=2,
        col=1,
    )
    for index in range(subspaces.rank):
        figure.add_scatter(
            x=layers,
            y=subspaces.singular_values[:, index].tolist(),
            name=f"singular value {index + 1}",
            showlegend=False,
            mode="lines",
            line={"color": _CENTRAL, "width": 2},
            opacity=1 - 0.75 * index / max(1, subspaces.rank),
            row=2,
            col=2,
        )
    figure.update_yaxes(rangemode="tozero", row=1)
    figure.update_yaxes(type="log", dtick=1, row=2, col=2)
    figure.update_yaxes(tickformat=".0%", row=2, col=1)
    figure.update_xaxes(title_text="decoder layer (the last entry is after the final norm)", row=2)
    return _styled(figure, height=640)


def subspace_map(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor] | None,
    subspaces: Subspaces,
    layer: int,
    texts: Mapping[str, Sequence[str]] | None = None,
) -> go.Figure:
    """Draw held-out prompts in both subspaces; arrows lead from each mean before to after.

    Args:
        before: language → (n, hidden_size), states of the untouched model.
        after: of the enhanced model, same prompts; None draws the untouched model's alone.
        subspaces: of the model.
        layer: whose states these are; it must have been probed.
        texts: language → the n prompts, shown under the pointer; None shows the language.
    """
    figure = make_subplots(
        rows=1,
        cols=2,
        subplot_titles=["language-specific subspace", "language-agnostic axis"],
        horizontal_spacing=0.1,
    )
    planes = (
        specific_plane(before, subspaces, layer),
        agnostic_plane(before, subspaces, layer),
    )
    # Files sort their tensors: the order that colours go by is that of the subspaces.
    languages = list(dict.fromkeys((*subspaces.languages, *before)))
    colours = language_colours(languages, subspaces.central)
    for column, plane in enumerate(planes, start=1):
        for language, colour in colours.items():
            if language in before:
                own = (before[language], None if after is None else after[language])
                shown = None if texts is None else texts[language]
                _draw_language(figure, plane, language, own, shown, colour, column)
    figure.update_xaxes(title_text="first principal axis", row=1, col=1)
    figure.update_yaxes(title_text="second principal axis", row=1, col=1)
    figure.update_xaxes(title_text="along mu_a", row=1, col=2)
    figure.update_yaxes(title_text="strongest axis outside", row=1, col=2)
    return _styled(figure, height=480)


_METRICS = {
    "acc": "accuracy",
    "in_language": "answers in the language",
    "bits_per_byte": "bits per byte saved",
    "right_letters": "right letters",
}


def difference_figure(measures: Sequence[Measure], central: str) -> go.Figure:
    """Draw each difference with its interval, right is better; one panel a metric.

    Args:
        measures: before and after.
        central: the language drawn in grey.
    """
    by_metric: dict[str, list[Measure]] = {}
    for one in measures:
        by_metric.setdefault(one.task.metric, []).append(one)
    figure = make_subplots(
        rows=len(by_metric),
        cols=1,
        subplot_titles=[f"change of {_METRICS.get(metric, metric)}" for metric in by_metric],
        row_heights=[2 + len(found) for found in by_metric.values()],
        vertical_spacing=min(0.3, 90 / (140 * len(by_metric) + 24 * len(measures))),
    )
    languages = list(dict.fromkeys(one.task.language or "" for one in measures))
    colours = language_colours(languages, central)
    for row, found in enumerate(by_metric.values(), start=1):
        for one in found:
            low, middle, high = _signed(one)
            colour = colours[one.task.language or ""]
            figure.add_scatter(
                x=[middle],
                y=[one.task.name],
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": [high - middle],
                    "arrayminus": [middle - low],
                    "color": colour,
                },
                mode="markers",
                marker={
                    "color": colour,
                    "size": 9,
                    "symbol": "circle" if one.p_corrected < 0.05 else "circle-open",
                },
                name=one.task.name,
                showlegend=False,
                hovertemplate=f"%{{y}}: {middle:+.3f} ({low:+.3f} to {high:+.3f})<extra></extra>",
                row=row,
                col=1,
            )
        figure.add_vline(x=0, line={"color": _CENTRAL, "width": 1, "dash": "dot"}, row=row, col=1)
    figure.update_yaxes(autorange="reversed")
    _styled(figure, height=66 + 70 * len(by_metric) + 24 * len(measures))
    return figure.update_layout(margin_t=36)  # no legend


def strength_figure(
    points: Mapping[float, Sequence[Measure]], central: str, *, chosen: float | None = None
) -> go.Figure:
    """Draw by strength what each language gains or loses; one panel a family of tasks.

    Args:
        points: strength → measures; the untouched model, at 0, is added.
        central: the language to protect, grey.
        chosen: strength to mark.
    """
    panels = _panels(points)
    n_columns = min(2, len(panels))
    n_rows = -(-len(panels) // n_columns)
    figure = make_subplots(
        rows=n_rows,
        cols=n_columns,
        subplot_titles=list(panels),
        vertical_spacing=0.35 / n_rows,
    )
    languages = list(dict.fromkeys(k for lines in panels.values() for k in lines))
    colours = language_colours(languages, central)
    shown: set[str] = set()
    for index, lines in enumerate(panels.values()):
        where = {"row": index // n_columns + 1, "col": index % n_columns + 1}
        for language, line in lines.items():
            strengths = [0.0, *sorted(line)]
            found = [(0.0, 0.0, 0.0), *(_signed(line[s]) for s in strengths[1:])]
            low, middle, high = zip(*found, strict=True)
            figure.add_scatter(
                x=[*strengths, *reversed(strengths)],
                y=[*high, *reversed(low)],
                fill="toself",
                fillcolor=colours[language],
                opacity=0.13,
                mode="lines",
                line={"width": 0},
                hoverinfo="skip",
                legendgroup=language,
                showlegend=False,
                **where,
            )
            figure.add_scatter(
                x=strengths,
                y=middle,
                mode="lines+markers",
                marker={"size": 6},
                line={"color": colours[language], "width": 2},
                name=language_name(language) if language else "all",
                legendgroup=language,
                showlegend=language not in shown,
                hovertemplate="strength %{x:g}: %{y:+.4f}<extra>%{fullData.name}</extra>",
                **where,
            )
            shown.add(language)
        thin = {"color": _CENTRAL, "width": 1}
        figure.add_hline(y=0, line={**thin, "dash": "dot"}, **where)
        if chosen is not None:
            figure.add_vline(x=chosen, line={**thin, "dash": "dash"}, **where)
        figure.update_xaxes(title_text="strength", **where)
    return _styled(figure, height=120 + 260 * n_rows)


def retrieval_figure(
    retrieval: Mapping[str, Mapping[str, Sequence[Example]]], colours: Mapping[str, str]
) -> go.Figure:
    """Draw by layer how many translations are nearest neighbours, before and after.

    Args:
        retrieval: "before" and "after" → language → examples of `measure_retrieval`.
        colours: by language.
    """
    kinds = {"raw": "states as they are", "centred": "language means taken off"}
    figure = make_subplots(rows=1, cols=2, subplot_titles=list(kinds.values()), shared_yaxes=True)
    for when, dash in (("before", "dot"), ("after", "solid")):
        for language, examples in retrieval[when].items():
            for column, kind in enumerate(kinds, start=1):
                found = [one.responses[kind] for one in examples]  # (n, n_layers + 1)
                rates = [sum(at) / len(at) for at in zip(*found, strict=True)]
                figure.add_scatter(
                    x=list(range(len(rates))),
                    y=rates,
                    name=language_name(language),
                    legendgroup=language,
                    showlegend=column == 1 and when == "after",
                    mode="lines",
                    line={"color": colours.get(language, _CENTRAL), "width": 2, "dash": dash},
                    row=1,
                    col=column,
                )
    figure.update_yaxes(tickformat=".0%", range=[0, 1.02])
    figure.update_xaxes(title_text="decoder layer")
    return _styled(figure, height=380)


def _panels(
    points: Mapping[float, Sequence[Measure]],
) -> dict[str, dict[str, dict[float, Measure]]]:
    """Title → language → strength → measure."""
    panels: dict[str, dict[str, dict[float, Measure]]] = {}
    for strength, measures in points.items():
        for one in measures:
            # Tasks of one family and protocol belong together: xcopa_sw_letters, xcopa_en_letters.
            language = one.task.language or ""
            family = " ".join(p for p in one.task.name.split("_") if p != language)
            title = family if one.task.higher_is_better else f"{family} saved"
            panels.setdefault(title, {}).setdefault(language, {})[strength] = one
    return panels


def _signed(one: Measure) -> tuple[float, float, float]:
    """Lower end, difference and upper end, signed so that more is better."""
    change = one.change
    if one.task.higher_is_better:
        return change.low, change.difference, change.high
    return -change.high, -change.difference, -change.low


def _draw_language(
    figure: go.Figure,
    plane: Plane,
    language: str,
    states: tuple[Tensor, Tensor | None],
    texts: Sequence[str] | None,
    colour: str,
    column: int,
) -> None:
    drawn = [plane.coordinates(one) for one in states if one is not None]
    symbols = ("circle-open", "circle") if len(drawn) == 2 else ("circle",)
    for points, symbol in zip(drawn, symbols, strict=True):
        figure.add_scatter(
            x=_rounded(points[:, 0]),
            y=_rounded(points[:, 1]),
            mode="markers",
            name=language_name(language),
            legendgroup=language,
            showlegend=column == 1 and symbol == "circle",
            marker={"color": colour, "size": 6, "symbol": symbol},
            opacity=0.45,
            row=1,
            col=column,
            **_hover(texts),
        )
    if len(drawn) == 1:
        return
    start, end = (points.mean(0).tolist() for points in drawn)
    figure.add_annotation(
        x=end[0],
        y=end[1],
        ax=start[0],
        ay=start[1],
        axref=f"x{column}" if column > 1 else "x",
        ayref=f"y{column}" if column > 1 else "y",
        text="",
        arrowhead=2,
        arrowsize=1.2,
        arrowwidth=3,
        arrowcolor=colour,
        row=1,
        col=column,
    )


def _hover(texts: Sequence[str] | None) -> dict[str, Any]:
    """What a point shows under the pointer: its text, in short lines, or its language alone."""
    if texts is None:
        return {"hoverinfo": "name"}
    # plotly reads tags in a text; what looks like one is the prompt's own.
    lines = [
        "<br>".join(map(html.escape, textwrap.wrap(text, _HOVER_WIDTH, max_lines=_HOVER_LINES)))
        for text in texts
    ]
    return {"text": lines, "hoverinfo": "text+name"}


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def _of(entry: Mapping[str, float], group: str) -> list[str]:
    return [name for name in entry if name == group or name.startswith(f"{group}.")]


def _styled(figure: go.Figure, height: int) -> go.Figure:
    """One look for all figures; colours work on a light and on a dark page."""
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 60, "r": 20, "t": 70, "b": 50},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 12, "color": "#808080"},
        legend={"orientation": "h", "y": 1.08, "yanchor": "bottom", "x": 0},
        hoverlabel={"font": {"family": "system-ui, sans-serif"}},
    )
    figure.update_annotations(font_size=12.5)
    for update in (figure.update_xaxes, figure.update_yaxes):  # 1e-5, not 10µ
        update(
            exponentformat="e", gridcolor=_LINE, zeroline=False, linecolor=_LINE, automargin=True
        )
    return figure
