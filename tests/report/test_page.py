"""The report is one page that needs nothing else and escapes what models say."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from polylens.config import TrainSettings
from polylens.evaluation import Answer, Evaluation
from polylens.evaluation.drift import StateChange
from polylens.evaluation.fidelity import Fidelity
from polylens.evaluation.gate import Check, Dial, Verdict
from polylens.evaluation.measures import Example, Task, compare_runs
from polylens.evaluation.results import BeforeAfter, BitsPerByte
from polylens.evaluation.statistics import NonInferiority
from polylens.report import ReportData, render_probe_page, render_report
from polylens.report.page import caution, decision, summary
from polylens.report.plots import (
    language_colours,
    loss_curves,
    strength_figure,
    subspace_map,
)
from polylens.report.projection import agnostic_plane, specific_plane
from polylens.subspaces import probe_subspaces

LANGUAGES = ("en", "sw", "ar")


def examples(values: list[float]) -> list[Example]:
    return [Example(str(i), value) for i, value in enumerate(values)]


MEASURES = tuple(
    compare_runs(
        [
            (
                Task(f"xcopa_{k}", k, "continuation", "acc"),
                examples([0.0] * 9),
                examples([float(i % 2) for i in range(9)]),
            )
            for k in LANGUAGES
        ]
        + [
            (  # nobody doubts this one
                Task("fidelity_sw", "sw", "answers", "in_language"),
                examples([0.0] * 40),
                examples([1.0] * 40),
            )
        ]
    )
)


def fidelity(passed: int) -> Fidelity:
    return Fidelity(4, passed, passed / 4, 0.1, {"en": 4 - passed, "sw": passed}, 0, 0)


@pytest.fixture
def data() -> ReportData:
    generator = torch.Generator().manual_seed(0)
    states = {
        k: 3.0 * index + torch.randn(5, 3, 16, generator=generator)
        for index, k in enumerate(LANGUAGES)
    }
    subspaces = probe_subspaces(states, central="en", metadata={"model": "tiny", "n_layers": 2})
    evaluation = Evaluation(
        central="en",
        languages=("sw", "ar"),
        watched=(),
        max_new_tokens=8,
        fidelity={k: BeforeAfter(fidelity(1), fidelity(3)) for k in LANGUAGES},
        bits_per_byte={k: BitsPerByte(1.5, 1.25, 4, 100) for k in LANGUAGES},
        state_change={k: StateChange(0.0123, 0.001, 0.02, 4) for k in LANGUAGES},
        measures=MEASURES,
    )
    answers = [
        Answer(k, i, f"question {i}", "<script>alert('x')</script>", "unknown", False)
        for k in LANGUAGES
        for i in range(8)
    ]
    log = [
        {"step": i, "loss": 2.0, "retain": 0.1, "align.sw": 0.2, "separate.sw": 1.0}
        for i in range(3)
    ]
    return ReportData(
        evaluation=evaluation,
        answers_before=answers,
        answers_after=answers,
        trained_with=TrainSettings(strength={"sw": 0.5, "ar": 0.0}),
        training_log=log,
        subspaces=subspaces,
        map_layer=2,
        map_states={
            when: {k: states[k][:, 2].float() + shift for k in LANGUAGES}
            for when, shift in (("before", 0.0), ("after", 0.5))
        },
        resolved_yaml="languages: [sw, ar]\n",
        plan={
            "model": {"name": "tiny"},
            "template": "chat",
            "corpora": {
                "probing": {"name": "starter", "texts": {"en": 5}},
                "training": {"name": "starter", "rows": 5},
                "heldout": {"name": "starter", "rows": 4},
            },
            "versions": {"polylens": "0.1.0"},
        },
        dial=Dial(0.5, True, {0.5: None, 1.0: None}, {0.5: MEASURES, 1.0: MEASURES}),
        retrieval={
            when: {"sw": [Example("0", 1.0, responses={"raw": [0, 1], "centred": [1, 1]})]}
            for when in ("before", "after")
        },
    )


def test_the_page_needs_nothing_else_and_is_the_same_every_time(data: ReportData) -> None:
    page = render_report(data)
    assert page == render_report(data)
    loaded = re.findall(r"""<(?:script|link|img|iframe)[^>]*(?:src|href)=["']([^"']+)""", page)
    assert loaded == []
    for name in ("map", "losses", "probe"):
        assert f'id="figure-{name}"' in page


def test_what_models_say_is_escaped(data: ReportData) -> None:
    page = render_report(data)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_the_table_and_the_verdict_hold_the_counts(data: ReportData) -> None:
    page = render_report(data)
    certain = MEASURES[-1].change
    assert summary(data.evaluation) == (
        "Better beyond chance: Swahili, answers in the language 0.000 → 1.000 "
        f"({certain.low:+.3f} to +1.000). Chance may explain the changes of the other 3 figures."
    )
    for text in (
        "1 → 3 of 4",
        "1.500 → 1.250",
        "Pushed along their own direction: Swahili by 0.5; not Arabic.",
        "1.2 %",
        f"+100 ({100 * certain.low:+.0f} to +100)",
    ):
        assert text in page
    assert page.count('class="sample"') == 3 * 6  # six a language


def test_the_decision_comes_first_and_is_the_gates(data: ReportData) -> None:
    good = NonInferiority(9, 0.0, -0.001, 0.01, True, 2)
    bad = dataclasses.replace(good, bound=-0.5, holds=False)
    verdicts = [Verdict((Check("en", "text", ("bits_per_byte_en",), r),)) for r in (good, bad)]
    measures = {0.5: MEASURES, 1.0: MEASURES}
    for strength, holds, at, text in (
        (0.5, True, (0, 1), "The gate holds at strength 0.5, turned down from 1: harm to English"),
        (1.0, True, (0, 0), "The gate holds at strength 1: harm to English"),
        (1.0, False, (1, 1), "The gate fails: harm to English"),
    ):
        dial = Dial(
            strength, holds, dict(zip((0.5, 1.0), (verdicts[i] for i in at), strict=True)), measures
        )
        assert decision(dial, "en").startswith(text)
    page = render_report(dataclasses.replace(data, dial=dial))
    assert page.index(text) < page.index("<table>")
    assert 'class="decision fails"' in page


def test_more_repetitions_are_told(data: ReportData) -> None:
    assert caution(data.evaluation) == ""
    more = dataclasses.replace(fidelity(3), repeating=2, echoing=1)
    watched = {**data.evaluation.fidelity, "sw": BeforeAfter(fidelity(1), more)}
    told = caution(dataclasses.replace(data.evaluation, fidelity=watched))
    assert "repeat themselves than before in Swahili (0 → 2 of 4)." in told
    assert "repeat the question than before in Swahili (0 → 1 of 4)." in told
    assert "Arabic" not in told


def test_arabic_stands_right_whatever_letter_it_begins_with(data: ReportData) -> None:
    answers = [
        dataclasses.replace(one, answer="HTML هو", detected="ar")
        if one.language == "ar"
        else dataclasses.replace(one, detected="en")
        for one in data.answers_before
    ]
    page = render_report(dataclasses.replace(data, answers_before=answers, answers_after=answers))
    assert page.count('dir="rtl" lang="ar"') == 6
    assert page.count('lang="ar" dir="rtl">HTML') == 2 * 6
    assert page.count('lang="en" dir="ltr"') == 2 * 2 * 6


def test_a_language_has_one_colour_throughout(data: ReportData) -> None:
    sorted_as_in_a_file = {k: data.map_states["before"][k] for k in sorted(LANGUAGES)}
    figure = subspace_map(sorted_as_in_a_file, sorted_as_in_a_file, data.subspaces, 2)
    colours = language_colours(data.subspaces.languages, "en")
    for language, name in (("sw", "Swahili"), ("ar", "Arabic")):
        assert {t.marker.color for t in figure.data if t.name == name} == {colours[language]}
    log = [{"step": 0, "retain": 0.1, "retain.choices": 0.1, "retain.sw": 0.2, "align.ar": 0.3}]
    losses = {t.name: t.line for t in loss_curves(log).data}
    assert losses["Swahili"].color == colours["sw"]
    assert losses["Arabic"].color == colours["ar"]
    assert losses["questions with two answers"].dash == "dot" != losses["central language"].dash


def test_every_strength_is_drawn_from_the_untouched_model_on() -> None:
    figure = strength_figure({0.5: MEASURES, 1.0: MEASURES}, "en", chosen=0.5)
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert len(lines) == len(MEASURES)
    for line, one in zip(lines, MEASURES, strict=True):
        assert line.x == (0.0, 0.5, 1.0)
        assert line.y == (0.0, one.gain, one.gain)


def test_a_run_without_the_last_layer_has_no_map(data: ReportData) -> None:
    page = render_report(dataclasses.replace(data, map_layer=7))
    assert 'id="figure-map"' not in page


def test_the_probe_page(data: ReportData) -> None:
    page = render_probe_page(data.subspaces)
    assert 'id="figure-probe"' in page
    assert "Gain and loss" not in page


def test_the_planes_are_the_subspaces(data: ReportData) -> None:
    before = data.map_states["before"]
    plane = specific_plane(before, data.subspaces, 2)
    torch.testing.assert_close(plane.axes @ plane.axes.T, torch.eye(2, dtype=torch.float64))
    inside = data.subspaces.project_specific(plane.axes, 2)
    torch.testing.assert_close(inside, plane.axes)
    plane = agnostic_plane(before, data.subspaces, 2)
    vector = data.subspaces.agnostic_vector[2]
    torch.testing.assert_close(plane.axes[0], vector / vector.norm())
    assert data.subspaces.project_specific(plane.axes, 2).abs().max() < 1e-9


def test_a_subspace_of_one_dimension_still_has_a_plane() -> None:
    states = {"en": torch.randn(4, 1, 8), "sw": torch.randn(4, 1, 8) + 2}
    subspaces = probe_subspaces(states, central="en")
    plane = specific_plane({k: v[:, 0] for k, v in states.items()}, subspaces, 0)
    torch.testing.assert_close(plane.axes @ plane.axes.T, torch.eye(2, dtype=torch.float64))
