"""The report: one HTML page that needs nothing else, made from a run's saved files alone.

It holds no time and no path, so the same run gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from torch import Tensor

from polylens.evaluation import Answer, Evaluation
from polylens.languages import language_name
from polylens.model_card import CITATION
from polylens.report.plots import language_colours, loss_curves, probe_figure, subspace_map
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


def render_report(data: ReportData) -> str:
    """Return the report of a run as one HTML page."""
    figures: dict[str, Markup] = {}
    if data.map_layer in data.subspaces.layers:
        before, after = data.map_states["before"], data.map_states["after"]
        figures["map"] = _figure(subspace_map(before, after, data.subspaces, data.map_layer), "map")
    figures["losses"] = _figure(loss_curves(data.training_log), "losses")
    figures["probe"] = _figure(probe_figure(data.subspaces), "probe")
    return _render(
        title=f"{data.plan['model']['name']}: before and after",
        evaluation=data.evaluation,
        verdict=verdict(data.evaluation),
        samples=_samples(data),
        figures=figures,
        data=data,
        citation=CITATION,
        subspaces=data.subspaces,
    )


def render_probe_page(subspaces: Subspaces) -> str:
    """Return the pictures of `polylens probe` as one HTML page."""
    return _render(
        title=f"{subspaces.metadata['model']}: language subspaces",
        evaluation=None,
        verdict="",
        samples={},
        figures={"probe": _figure(probe_figure(subspaces), "probe")},
        data=None,
        citation=CITATION,
        subspaces=subspaces,
    )


def verdict(evaluation: Evaluation) -> str:
    """Say in one sentence what was counted; no more than that.

    The counts come without a test of significance, so the sentence claims none.
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


def _render(**values: Any) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["language"] = language_name
    template = resources.files("polylens.report").joinpath("template.html")
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        plotly=Markup(get_plotlyjs()),
        colours=language_colours(values["subspaces"].languages, values["subspaces"].central),
        **values,
    )
