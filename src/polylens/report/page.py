"""The report: one HTML page that needs nothing else, made from a run's saved files alone.

It holds no time and no path, so the same run gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs
from torch import Tensor

from polylens.config import TrainSettings
from polylens.evaluation import Answer, Evaluation
from polylens.evaluation.fidelity import is_echo, is_repeating
from polylens.evaluation.gate import Dial, Verdict
from polylens.evaluation.measures import Example, Measure
from polylens.languages import is_right_to_left, language_name
from polylens.model_card import CITATION
from polylens.report.plots import (
    difference_figure,
    language_colours,
    loss_curves,
    probe_figure,
    retrieval_figure,
    strength_figure,
    subspace_map,
)
from polylens.shortfall import push_sentence
from polylens.subspaces import Subspaces

_SAMPLES = 6
_ALPHA = 0.05  # of corrected p-values
_STRENGTHS = (
    "Change against the untouched model by strength of the dial, signed so that more is better, "
    "with bands of 95 % intervals. The dashed line is the strength of this model."
)


@dataclass(frozen=True)
class ReportData:
    """What a report shows.

    Attributes:
        evaluation: before and after.
        answers_before: of the untouched model.
        answers_after: of the enhanced model, same questions in the same order.
        trained_with: the settings, with the strengths that were taken.
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
    trained_with: TrainSettings
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
    evaluation, colours = (
        data.evaluation,
        language_colours(data.subspaces.languages, data.subspaces.central),
    )
    measures = {"after": evaluation.measures}
    figures |= comparison_figures(measures, {}, evaluation.central)
    if len(data.dial.measures) > 1:
        strengths = strength_figure(
            data.dial.measures, evaluation.central, chosen=data.dial.strength
        )
        figures["strengths"] = _figure(strengths, "strengths")
    if data.retrieval["before"]:
        figures["retrieval"] = _figure(retrieval_figure(data.retrieval, colours), "retrieval")
    return _render(
        "template.html",
        title=f"{data.plan['model']['name']}: {_listed(map(language_name, evaluation.languages))}",
        evaluation=evaluation,
        decision=decision(data.dial, evaluation.central),
        pushed=push_sentence(data.trained_with, evaluation.languages),
        summary=summary(evaluation),
        caution=caution(evaluation),
        by_name={one.task.name: one for one in evaluation.measures},
        samples=_samples(data),
        figures=figures,
        data=data,
        citation=CITATION,
        measures=measures,
        colours=colours,
        strengths_caption=_STRENGTHS,
    )


def render_probe_page(subspaces: Subspaces) -> str:
    """Return the pictures of `polylens probe` as one HTML page."""
    return _render(
        "template.html",
        title=f"{subspaces.metadata['model']}: language subspaces",
        evaluation=None,
        samples={},
        figures={"probe": _figure(probe_figure(subspaces), "probe")},
        data=None,
        citation=CITATION,
        measures={},
        colours=language_colours(subspaces.languages, subspaces.central),
    )


def decision(dial: Dial, central: str) -> str:
    """Say in one sentence whether the gate lets the model pass, and at which strength."""
    verdict = dial.verdicts[dial.strength]
    if verdict is None:
        return f"Nothing told whether {language_name(central)} was harmed: the gate had no figures."
    protected = _listed(language_name(k) for k in dict.fromkeys(c.language for c in verdict.checks))
    if not dial.holds:
        return (
            f"The gate fails: harm to {protected} beyond the margin cannot be ruled out at any "
            "strength that was tried, and no model was saved."
        )
    down = "" if dial.strength == dial.wanted else f", turned down from {dial.wanted:g}"
    return (
        f"The gate holds at strength {dial.strength:g}{down}: harm to {protected} beyond the "
        "margin is ruled out."
    )


def summary(evaluation: Evaluation) -> str:
    """Say what chance does not explain, gains first; no more than that."""
    certain = [one for one in evaluation.measures if one.p_corrected < _ALPHA]
    n = len(evaluation.measures)
    if not certain:
        return f"None of {n} figures changed beyond chance."
    parts = []
    for which, found in (
        ("Better", [one for one in certain if one.gain > 0]),
        ("Worse", [one for one in certain if one.gain <= 0]),
    ):
        if found:
            parts.append(f"{which} beyond chance: {_listed(map(_told, found))}.")
    if len(certain) < n:
        parts.append(f"Chance may explain the changes of the other {n - len(certain)} figures.")
    return " ".join(parts)


def caution(evaluation: Evaluation) -> str:
    """Say where more answers repeat themselves, or their question, than before; "" if nowhere."""
    sentences = []
    for what, count in (
        ("themselves", attrgetter("repeating")),
        ("the question", attrgetter("echoing")),
    ):
        found = []
        for language in evaluation.all_languages:
            own = evaluation.fidelity[language]
            before, after = count(own.before), count(own.after)
            if after > before:
                found.append(f"{language_name(language)} ({before} → {after} of {own.after.n})")
        if found:
            sentences.append(f"More answers repeat {what} than before in {_listed(found)}.")
    if not sentences:
        return ""
    return " ".join([*sentences, "Read them below, and turn the dial down where they say so."])


def _told(one: Measure) -> str:
    """Name a figure, and how it changed."""
    change, language = one.change, one.task.language
    name = one.task.name if language is None else one.task.name.removesuffix(f"_{language}")
    name = "answers in the language" if name == "fidelity" else name
    where = f"{language_name(language)}, " if language else ""
    return (
        f"{where}{name.replace('_', ' ')} {change.before:.3f} → {change.after:.3f} "
        f"({change.low:+.3f} to {change.high:+.3f})"
    )


def _listed(parts: Iterable[str]) -> str:
    """Join with commas, and "and" before the last."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


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
        strengths_caption=_STRENGTHS.partition(" The dashed")[0],
    )


def render_measures(
    measures: Mapping[str, Sequence[Measure]], verdicts: Mapping[str, Verdict | None]
) -> Markup:
    """Return the table of differences as HTML, without figures; see `render_comparison`."""
    return Markup(_render("measures.html", measures=measures, verdicts=verdicts, figures={}))


def comparison_figures(
    measures: Mapping[str, Sequence[Measure]], strengths: Mapping[str, float], central: str
) -> dict[str, Markup]:
    """Return the differences of each candidate, and all by strength where there are several."""
    figures = {
        f"differences-{label}": _figure(difference_figure(found, central), f"differences-{number}")
        for number, (label, found) in enumerate(measures.items())
        if found
    }
    if len(strengths) > 1:
        points = {strengths[label]: found for label, found in measures.items()}
        figures["strengths"] = _figure(strength_figure(points, central), "strengths")
    return figures


def _render(name: str, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("polylens.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["language"] = language_name
    environment.tests["repeating"] = is_repeating
    environment.tests["echo_of"] = lambda answer, prompt: is_echo(prompt, answer)
    # `dir="auto"` goes by the first letter, which may be that of a foreign name.
    environment.tests["right_to_left"] = is_right_to_left
    return environment.get_template(name).render(plotly=Markup(get_plotlyjs()), **values)
