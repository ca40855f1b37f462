"""The report is one page that needs nothing else and escapes what models say."""

from __future__ import annotations

import re

import pytest
import torch

from polylens.evaluation import Answer, Evaluation
from polylens.evaluation.drift import StateChange
from polylens.evaluation.fidelity import Fidelity
from polylens.evaluation.gate import Dial
from polylens.evaluation.measures import Example, Task, compare_runs
from polylens.evaluation.results import BeforeAfter, BitsPerByte
from polylens.report import ReportData, render_probe_page, render_report
from polylens.report.page import verdict
from polylens.report.projection import agnostic_plane, specific_plane
from polylens.subspaces import probe_subspaces

LANGUAGES = ("en", "sw", "ar")

MEASURES = tuple(
    compare_runs(
        [
            (
                Task(f"xcopa_{k}", k, "continuation", "acc"),
                [Example(str(i), 0.0) for i in range(9)],
                [Example(str(i), float(i % 2)) for i in range(9)],
            )
            for k in LANGUAGES
        ]
    )
)


def fidelity(passed: int) -> Fidelity:
    return Fidelity(4, passed, passed / 4, 0.1, {"en": 4 - passed, "sw": passed}, 0)


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
    assert "Swahili questions answered in Swahili: 1 → 3 of 4" in verdict(data.evaluation)
    for text in ("1 of 4", "3 of 4", "1.5000", "1.2500", "1.23 %"):
        assert text in page
    assert page.count('class="sample"') == 3 * 6  # six a language


def test_a_run_without_the_last_layer_has_no_map(data: ReportData) -> None:
    import dataclasses

    page = render_report(dataclasses.replace(data, map_layer=7))
    assert 'id="figure-map"' not in page


def test_the_probe_page(data: ReportData) -> None:
    page = render_probe_page(data.subspaces)
    assert 'id="figure-probe"' in page
    assert "Before and after" not in page


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
