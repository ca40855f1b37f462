"""A trial from kept states is the one from scratch; what cannot change its outcome is not done."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from polylens.config import RunConfig, Runtime, changed, load_config
from polylens.crown import CrownDelta
from polylens.errors import ConfigError, TrainingError
from polylens.evaluation.likelihood import encode_plain
from polylens.evaluation.measures import TaskRun
from polylens.evaluation.replies import measure_replies
from polylens.evaluation.scoring import Candidate
from polylens.evaluation.suite import BITS_PER_BYTE, Suite, run_suite
from polylens.hidden_states import HiddenStates, Keep
from polylens.models import load_model
from polylens.models.loading import LanguageModel
from polylens.plan import make_plan
from polylens.prompts import ParallelPrompts
from polylens.search import workbench
from polylens.search.split import development_config, split_rows, write_split
from polylens.search.trials import Figure, Point
from polylens.search.workbench import Workbench, run_trial
from polylens.shortfall import measure_shortfall
from polylens.states_cache import KeptStates, fresh_hidden_states
from polylens.steps import probe_prompts, train_prompts
from test_crown import random_delta

RUNTIME = Runtime.model_validate({"memory": "4GB", "token_budget": 512})

SETTINGS: dict[str, Any] = {
    "languages": "sw",
    "probe.texts_per_language": 4,
    "train.rows": 4,
    "train.batch_size": 2,
    "train.epochs": 1,
    "train.retain_choices": 1.0,
    "evaluate.rows": 4,
}


class Counting:
    """Makes states anew, and counts how often."""

    def __init__(self) -> None:
        self.calls: list[Keep] = []

    def __call__(
        self, model: LanguageModel, prompts: Sequence[Sequence[int]], keep: Keep, **how: Any
    ) -> HiddenStates:
        self.calls.append(keep)
        return fresh_hidden_states(model, prompts, keep, **how)


@pytest.fixture
def config(taught_folder: Path, tmp_path: Path) -> RunConfig:
    config = load_config(None, {**SETTINGS, "model": str(taught_folder)})
    write_split(split_rows(config, 4), tmp_path / "rows")
    return development_config(config, tmp_path / "rows")


def make_bench(config: RunConfig, collect: Any) -> Workbench:
    plan = make_plan(config, RUNTIME)
    model = load_model(config.model)
    return Workbench(model, config, runtime=RUNTIME, execution=plan.execution, collect=collect)


TRIED: tuple[dict[str, Any], ...] = (
    {"train.layers": 1, "train.learning_rate": 1e-3},
    {
        "train.layers": 3,
        "train.position": "mean",
        "train.retain_targets": False,
        "probe.agnostic": "complement",
    },
    {"train.layers": 1, "probe.pooling": "mean"},
    {"train.layers": 1, "train.position": "answer"},
)


def from_scratch(config: RunConfig, settings: dict[str, Any]) -> tuple[CrownDelta, list[TaskRun]]:
    """What a run does, with nothing of the search."""
    own = changed(config, settings)
    plan = make_plan(own, RUNTIME)
    model = load_model(config.model)
    subspaces = probe_prompts(
        model, plan.probing, central="en", settings=own.probe, template=plan.prompt_format.name,
        token_budget=512, collect=fresh_hidden_states,
    )  # fmt: skip
    (delta,) = train_prompts(
        model, subspaces, plan.training, settings=[own.train], seed=own.seed, token_budget=512,
        collect=fresh_hidden_states,
    )  # fmt: skip
    candidates = [Candidate(), *(Candidate(delta, s, torch.float32) for s in (0.5, 1.0))]
    suite = Suite((BITS_PER_BYTE,), (), plan.heldout)
    runs = [
        run for _, part in run_suite(model, candidates, suite, token_budget=512) for run in part
    ]
    return delta, runs


def test_trials_from_kept_states_are_those_from_scratch_to_the_bit(config: RunConfig) -> None:
    collect = Counting()
    bench = make_bench(config, KeptStates((1, 3), collect))
    sample = bench.sample("development", config)
    for settings in TRIED:
        delta = bench.train(settings)
        runs = bench.measure(delta, (0.5, 1.0), sample, "texts")
        expected, expected_runs = from_scratch(config, settings)
        assert delta.changes.keys() == expected.changes.keys()
        for name, change in delta.changes.items():
            assert torch.equal(change, expected.changes[name]), name
            assert change.any()
        by_name = {run.task.name: run for run in runs}
        assert {f"replies_{k}" for k in ("en", "sw")} <= by_name.keys()
        for run in expected_runs:
            assert by_name[run.task.name] == run
    asked = [run for run in runs if run.task.name == "choices_en"]
    assert [len(one.examples[0]) for one in asked] == [16]
    assert {one.key for one in asked[0].examples[0]} == {str(k) for k in range(0, 32, 2)}
    reported = bench.sample("report", config).heldout.choices
    assert [one.row for one in reported] == list(range(1, 32, 2))
    # Training prompts, these with answers, texts, replies and choices once; probing ones once a
    # pooling.
    assert len(collect.calls) == 7
    assert all(keep.boundary_layers in ((), (1, 3)) for keep in collect.calls)


def test_the_untouched_model_answers_once_for_all_trials(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def counted(model: LanguageModel, prompts: ParallelPrompts, *args: Any, **how: Any) -> Any:
        asked.append(len(prompts.rows))
        return measure_shortfall(model, prompts, *args, **how)

    monkeypatch.setattr(workbench, "measure_shortfall", counted)
    bench = make_bench(config, KeptStates((3,), Counting()))
    auto = {"train.layers": 1, "train.strength": "auto"}
    for settings in (auto, {**auto, "train.position": "answer"}, {**auto, "train.strength": 1.0}):
        assert bench.train(settings).changes
    assert len(asked) == 1
    bench.train({**auto, "train.rows": 2})  # other prompts
    bench.train({**auto, "train.separate_weight": 0.0})  # nothing is pushed
    assert asked == [4, 2]


def test_kept_states_are_asked_for_once(llama: LanguageModel) -> None:
    collect = Counting()
    kept = KeptStates((2,), collect)
    prompts = [[5, 6, 7], [8, 9]]
    first = kept(llama, prompts, Keep(boundary_layers=(2,)))
    assert kept(llama, [tuple(one) for one in prompts], Keep(boundary_layers=(2,))) is first
    kept(llama, prompts, Keep(boundary_layers=(1,)))  # not foreseen
    kept(llama, [[5, 6]], Keep(boundary_layers=(2,)))
    kept(llama, prompts, Keep(pooling="last"))
    assert collect.calls == [
        Keep(boundary_layers=(2,)),
        Keep(boundary_layers=(1, 2)),
        Keep(boundary_layers=(2,)),
        Keep(pooling="last"),
    ]


def test_replies_are_scored_as_by_the_whole_model(config: RunConfig, llama: LanguageModel) -> None:
    heldout = make_plan(config, RUNTIME).heldout
    delta = random_delta(llama, 0.1)
    runs = measure_replies(llama, [Candidate(), Candidate(delta, 0.5)], heldout)
    assert [run.task.name for run in runs] == ["replies_en", "replies_sw"]
    rows = heldout.prompts.rows
    for number, strength in enumerate((0.0, 0.5)):
        for run in runs:
            language = run.task.language
            assert language is not None
            values = []
            for index, row in enumerate(rows):
                source = heldout.prompts.sources[(index + 1) % len(rows)]
                reply = heldout.corpus.rows[source][language][:40]
                ids, _ = encode_plain(llama.tokenizer, reply, 999)
                prompt = list(heldout.prompts.ids[row[language]])
                whole = torch.tensor([prompt + ids])
                with torch.no_grad(), delta.applied(llama.structure, strength):
                    log_p = llama.causal_lm(whole).logits[0].log_softmax(-1)
                own = log_p[len(prompt) - 1 : -1].gather(1, torch.tensor(ids)[:, None])
                values.append(-float(own.sum()) / 0.6931472 / len(reply.encode()))
            found = [one.value for one in run.examples[number]]
            assert found == pytest.approx(values, rel=1e-4)


class Staged:
    """A workbench whose gate fails where it is told to; notes what was measured."""

    def __init__(
        self,
        holding: dict[str, tuple[float, ...]],
        error: Exception | None = None,
        peak: float = 9.0,
        previews: bool = False,
    ):
        self.holding = holding
        self.previews = previews
        self.shares: list[float] = []  # of the rows, of each training
        self.error = error
        self.peak = peak  # the strength of the highest gain
        self.measured: list[tuple[str, tuple[float, ...]]] = []

    def stages(self, sample: object) -> tuple[str, ...]:
        return tuple(self.holding)

    def train(self, settings: object, share: float = 1.0) -> CrownDelta:
        self.shares.append(share)
        if self.error is not None:
            raise self.error
        return CrownDelta({}, {"layers": (3,)})

    def measure(
        self, delta: object, strengths: tuple[float, ...], sample: object, stage: str
    ) -> list[Any]:
        self.measured.append((stage, tuple(strengths)))
        return []

    def points(
        self, runs: object, strengths: tuple[float, ...], sample: object
    ) -> tuple[Point, ...]:
        holding = self.holding.get(self.measured[-1][0], ())
        gains = [min(s, 2 * self.peak - s) for s in strengths]
        return tuple(
            Point(s, Figure(gain, gain, gain), s, s, s in holding, "", ())
            for s, gain in zip(strengths, gains, strict=True)
        )


def run(bench: Staged, stop: str = "", number: int = 0) -> Any:
    strengths = (0.5, 1.0, 2.0)
    return run_trial(bench, number, {}, strengths, None, lambda *_: stop)  # type: ignore[arg-type]


def test_a_strength_at_which_the_gate_fails_is_not_measured_further() -> None:
    bench = Staged({"texts": (0.5, 1.0), "chat": (0.5,), "answers": (0.5,)})
    trial = run(bench)
    texts = [("texts", (strength,)) for strength in (0.5, 1.0, 2.0)]
    chat = [("chat", (strength,)) for strength in (0.5, 1.0)]
    assert bench.measured == [*texts, *chat, ("answers", (0.5,))]
    assert trial.outcome == "measured"
    assert [(p.strength, p.holds) for p in trial.points] == [
        (0.5, True),
        (1.0, False),
        (2.0, False),
    ]


def test_a_strength_above_one_at_which_the_gate_fails_is_not_measured() -> None:
    bench = Staged({"texts": (0.5, 2.0), "chat": (0.5,)})
    trial = run(bench)
    texts = [("texts", (strength,)) for strength in (0.5, 1.0)]
    assert bench.measured == [*texts, ("chat", (0.5,))]
    assert [(p.strength, p.holds) for p in trial.points] == [(0.5, True), (1.0, False)]


def test_the_last_stage_stops_where_the_gain_falls() -> None:
    everywhere = (0.5, 1.0, 2.0)
    bench = Staged({"texts": everywhere, "chat": everywhere}, peak=0.7)
    trial = run(bench)
    texts = [("texts", (strength,)) for strength in everywhere]
    assert bench.measured == [*texts, ("chat", (0.5,)), ("chat", (1.0,))]
    assert [p.strength for p in trial.points] == [0.5, 1.0]
    assert trial.best is not None
    assert trial.best.strength == 0.5


def test_a_trial_stops_where_the_gate_fails_at_the_lowest_strength() -> None:
    bench = Staged({"texts": (), "chat": (0.5,)})
    trial = run(bench)
    assert [stage for stage, _ in bench.measured] == ["texts"]
    assert (trial.outcome, trial.best) == ("stopped", None)
    assert "the gate fails at the lowest strength on texts" in trial.reason
    assert [(p.strength, p.holds) for p in trial.points] == [(0.5, False)]
    assert run(Staged({"texts": ()})).outcome == "measured"


def test_a_trial_stops_where_it_is_told_to_but_not_after_the_last_stage() -> None:
    bench = Staged({"texts": (0.5,), "chat": (0.5,)})
    assert run(bench, "worse").reason == "worse"
    assert {stage for stage, _ in bench.measured} == {"texts"}
    assert run(Staged({"texts": (0.5,)}), "worse").outcome == "measured"


def test_a_trial_that_the_preview_stops_is_not_trained_on_all_rows() -> None:
    bench = Staged({"texts": (0.5,), "chat": (0.5,)}, previews=True)
    trial = run(bench, "worse", number=1)
    assert (trial.outcome, trial.reason, trial.best) == ("previewed", "worse", None)
    assert bench.shares == [0.25]
    assert bench.measured == [("preview", (1.0,))]
    assert [(point.strength, point.holds) for point in trial.points] == [(1.0, False)]
    assert trial.seconds.keys() == {"preview"}


def test_what_the_preview_does_not_stop_is_measured_whole_and_so_is_the_first_trial() -> None:
    for number, why in ((1, ""), (0, "worse")):
        bench = Staged({"texts": (0.5,)}, previews=True)
        trial = run(bench, why, number=number)
        assert trial.outcome == "measured"
        assert bench.shares == [0.25, 1.0]
        assert [point.strength for point in trial.points] == [0.5, 1.0]


def test_what_loses_at_the_lowest_strength_is_not_measured_above_it() -> None:
    everywhere = (0.5, 1.0, 2.0)
    trial = run(Staged({"texts": everywhere}, peak=0.2))
    assert [point.strength for point in trial.points] == [0.5]
    assert trial.points[0].gain.value < 0


def test_a_preview_trains_on_the_first_rows_and_pushes_as_the_whole_would(
    config: RunConfig,
) -> None:
    collect = Counting()
    bench = make_bench(config, KeptStates((3,), collect))
    settings = {"train.layers": 1, "train.strength": "auto"}
    whole = bench.train(settings)
    n_passes = len(collect.calls)
    preview = bench.train(settings, 0.5)
    assert len(collect.calls) == n_passes
    strengths = whole.metadata["settings"]["strength"]
    assert preview.metadata["settings"]["strength"] == strengths
    own = changed(config, {**settings, "train.strength": strengths})
    plan = make_plan(own, RUNTIME)
    subspaces = probe_prompts(
        bench.model, plan.probing, central="en", settings=own.probe,
        template=plan.prompt_format.name, token_budget=512, collect=fresh_hidden_states,
    )  # fmt: skip
    assert len(plan.training.choices) == len(plan.training.rows) == 4
    half = dataclasses.replace(plan.training, rows=plan.training.rows[:2])
    (expected,) = train_prompts(
        bench.model, subspaces, half, settings=[own.train], seed=own.seed, token_budget=512,
        collect=fresh_hidden_states,
    )  # fmt: skip
    for name, change in preview.changes.items():
        assert torch.equal(change, expected.changes[name]), name
        assert not torch.equal(change, whole.changes[name])


def test_few_rows_have_no_preview(config: RunConfig) -> None:
    assert not make_bench(config, fresh_hidden_states).previews
    assert make_bench(changed(config, {"train.rows": 32}), fresh_hidden_states).previews


def test_a_training_that_runs_away_is_refused_and_the_search_goes_on() -> None:
    trial = run(Staged({"texts": ()}, TrainingError("the loss must be finite")))
    assert (trial.outcome, trial.points) == ("refused", ())
    assert trial.reason == "the loss must be finite"


def test_a_gate_that_could_never_hold_is_told_at_once(config: RunConfig) -> None:
    config = changed(config, {"gate.text_margin": 1e-9})
    bench = make_bench(config, KeptStates((3,), fresh_hidden_states))
    sample = bench.sample("development", config)
    delta = bench.train({})
    bench.measure(delta, (1.0,), sample, "texts")  # nothing changed: any margin holds
    runs = bench.measure(delta, (1.0,), sample, "texts")
    few = [TaskRun(_right_or_wrong(run.task), _all_right(run)) for run in runs[:1]]
    with pytest.raises(ConfigError, match="must be able to hold on half of the benchmarks"):
        bench._require_a_gate(few, sample)


def _right_or_wrong(task: Any) -> Any:
    return type(task)("copa", "en", "continuation", "acc")


def _all_right(run: TaskRun) -> Any:
    return tuple(tuple(type(one)(one.key, 1.0) for one in side) for side in run.examples)
