"""The report: one HTML page that needs nothing else, made from a run's saved files alone.

It holds no time and no path, so the same run gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from torch import Tensor

from polylens.evaluation import Answer, Evaluation
from polylens.evaluation.gate import Dial, Verdict
from polylens.evaluation.measures import Example, Measure
from polylens.languages import language_name
from polylens.model_card import CITATION
from polylens.report.plots import (
    difference_figure,
    language_colours,
    loss_curves,
    probe_figure,
    retrieval_figure,
    subspace_map,
    tradeoff_figure,
)
from polylens.subspaces import Subspaces

_SAMPLES = 6


@dataclass(frozen=True)
class ReportData:
    """What a report shows.

    Attributes:
        evaluation: before and after.
        answers_before: of the untouched model.
        answers_after: of the enhanced model, same questions in the same order.
        training_log: one entry a step.
        subspaces: of the model.
        map_layer: whose states `map_states` holds.
        map_states: "before" and "after" → language → (n, hidden_size).
        resolved_yaml: every setting as used.
        plan: what plan.json holds.
        dial: what each strength costs and brings.
        retrieval: "before" and "after" → language → examples of `measure_retrieval`.
    """

    evaluation: Evaluation
    answers_before: Sequence[Answer]
    answers_after: Sequence[Answer]
    training_log: Sequence[Mapping[str, float]]
    subspaces: Subspaces
    map_layer: int
    map_states: Mapping[str, Mapping[str, Tensor]]
    resolved_yaml: str
    plan: Mapping[str, Any]
    dial: Dial
    retrieval: Mapping[str, Mapping[str, Sequence[Example]]]


def render_report(data: ReportData) -> str:
    """Return the report of a run as one HTML page."""
    figures: dict[str, Markup] = {}
    if data.map_layer in data.subspaces.layers:
        before, after = data.map_states["before"], data.map_states["after"]
        figures["map"] = _figure(subspace_map(before, after, data.subspaces, data.map_layer), "map")
    figures["losses"] = _figure(loss_curves(data.training_log), "losses")
    figures["probe"] = _figure(probe_figure(data.subspaces), "probe")
    if data.retrieval["before"]:
        colours = language_colours(data.subspaces.languages, data.subspaces.central)
        figures["retrieval"] = _figure(retrieval_figure(data.retrieval, colours), "retrieval")
    chosen = data.dial.strength
    measures = {"after": data.evaluation.measures}
    figures |= comparison_figures(measures, {}, data.evaluation.central)
    tradeoff = tradeoff_figure(data.dial.measures, data.evaluation.central)
    if tradeoff is not None:
        figures["tradeoff"] = _figure(tradeoff, "tradeoff")
    return _render(
        "template.html",
        title=f"{data.plan['model']['name']}: before and after",
        evaluation=data.evaluation,
        verdict=verdict(data.evaluation),
        samples=_samples(data),
        figures=figures,
        data=data,
        citation=CITATION,
        measures=measures,
        verdicts={"after": data.dial.verdicts[chosen]},
        colours=language_colours(data.subspaces.languages, data.subspaces.central),
    )


def render_probe_page(subspaces: Subspaces) -> str:
    """Return the pictures of `polylens probe` as one HTML page."""
    return _render(
        "template.html",
        title=f"{subspaces.metadata['model']}: language subspaces",
        evaluation=None,
        verdict="",
        samples={},
        figures={"probe": _figure(probe_figure(subspaces), "probe")},
        data=None,
        citation=CITATION,
        measures={},
        verdicts={},
        colours=language_colours(subspaces.languages, subspaces.central),
    )


def verdict(evaluation: Evaluation) -> str:
    """Say in one sentence what was counted; no more than that.

    What is beyond chance, the table of differences tells.
    """
    parts = []
    for language in evaluation.all_languages:
        fidelity = evaluation.fidelity[language]
        name = language_name(language)
        parts.append(
            f"{name} questions answered in {name}: {fidelity.before.passed} → "
            f"{fidelity.after.passed} of {fidelity.after.n}"
        )
    return "; ".join(parts) + "."


def _samples(data: ReportData) -> dict[str, list[tuple[Answer, Answer]]]:
    """The first few questions of each language, with both answers."""
    found: dict[str, list[tuple[Answer, Answer]]] = {}
    for before, after in zip(data.answers_before, data.answers_after, strict=True):
        pairs = found.setdefault(before.language, [])
        if len(pairs) < _SAMPLES:
            pairs.append((before, after))
    return found


def _figure(figure: go.Figure, name: str) -> Markup:
    html = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"figure-{name}",
        config={"displaylogo": False, "responsive": True, "displayModeBar": False},
    )
    return Markup(html)


def render_comparison(
    title: str,
    measures: Mapping[str, Sequence[Measure]],
    verdicts: Mapping[str, Verdict | None],
    strengths: Mapping[str, float],
    central: str,
) -> str:
    """Return a page that compares a model with candidates.

    Args:
        title: of the page.
        measures: by candidate.
        verdicts: of the gate, by candidate; None where it had nothing to tell by.
        strengths: of the dial, by candidate; empty where there is no dial.
        central: the language to protect.
    """
    return _render(
        "comparison.html",
        title=title,
        measures=measures,
        verdicts=verdicts,
        central=central,
        figures=comparison_figures(measures, strengths, central),
    )


def render_measures(
    measures: Mapping[str, Sequence[Measure]], verdicts: Mapping[str, Verdict | None]
) -> Markup:
    """Return the table of differences as HTML, without figures; see `render_comparison`."""
    return Markup(_render("measures.html", measures=measures, verdicts=verdicts, figures={}))


def comparison_figures(
    measures: Mapping[str, Sequence[Measure]], strengths: Mapping[str, float], central: str
) -> dict[str, Markup]:
    """Return the differences of each candidate, and the trade-off where there are strengths."""
    figures = {
        f"differences-{label}": _figure(difference_figure(found, central), f"differences-{number}")
        for number, (label, found) in enumerate(measures.items())
        if found
    }
    if len(strengths) > 1:
        points = {strengths[label]: found for label, found in measures.items()}
        figure = tradeoff_figure(points, central)
        if figure is not None:
            figures["tradeoff"] = _figure(figure, "tradeoff")
    return figures


def _render(name: str, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("polylens.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["language"] = language_name
    return environment.get_template(name).render(plotly=Markup(get_plotlyjs()), **values)
