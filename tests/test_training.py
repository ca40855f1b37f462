"""Crown training: it does what it says, resumes exactly, and stops when it runs away."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from polylens.config import TrainSettings
from polylens.crown import CrownDelta
from polylens.errors import ConfigError, TrainingError
from polylens.hidden_states import Keep, collect_hidden_states
from polylens.models.loading import LanguageModel, wrap_model
from polylens.objective import ParallelStates
from polylens.subspaces import Subspaces, probe_subspaces
from polylens.training import (
    TrainingResult,
    boundary_layers,
    state_layers,
    train_crown,
    trained_layers,
)
from tiny import N_LAYERS, build, tiny_tokenizer

LANGUAGES = ("en", "sw", "zh")
N_ROWS = 6
SETTINGS: dict[str, Any] = {
    "batch_size": 2,
    "epochs": 2,
    "learning_rate": 1e-3,
    "warmup_ratio": 0.0,
}


def prompts() -> tuple[list[list[int]], tuple[dict[str, int], ...]]:
    generator = torch.Generator().manual_seed(7)
    ids, rows = [], []
    for row in range(N_ROWS):
        rows.append({})
        for offset, language in enumerate(LANGUAGES):
            if row == 3 and language == "zh":
                continue  # a row may lack a target
            rows[-1][language] = len(ids)
            length = int(torch.randint(3, 9, (1,), generator=generator))
            low = 20 + 60 * offset
            ids.append(torch.randint(low, low + 60, (length,), generator=generator).tolist())
    return ids, tuple(rows)


def setting(
    model: LanguageModel, layers: int = 2, prefix: Sequence[int] = (), *, answered: bool = False
) -> tuple[Subspaces, ParallelStates]:
    ids, rows = prompts()
    ids = [[*prefix, *one] for one in ids]
    crown = tuple(range(N_LAYERS - layers, N_LAYERS))
    keep = Keep(pooling="last", boundary_layers=crown, final=True)
    states = collect_hidden_states(model.structure, ids, keep)
    assert states.pooled is not None
    by_language = {
        language: states.pooled[[row[language] for row in rows if language in row]]
        for language in LANGUAGES
    }
    n_answer = tuple(1 + index % 3 for index in range(len(ids))) if answered else None
    parallel = ParallelStates(states, rows, "en", n_answer)
    return probe_subspaces(by_language, central="en"), parallel


def with_answers(parallel: ParallelStates) -> ParallelStates:
    """Give two prompts in three an answer: their own last tokens, and one more."""
    ids, _ = prompts()
    assert parallel.n_answer is not None
    answers = tuple(
        (*one[len(one) - n + 1 :], 9) if index % 3 else ()
        for index, (one, n) in enumerate(zip(ids, parallel.n_answer, strict=True))
    )
    return dataclasses.replace(parallel, answers=answers)


def with_choices(parallel: ParallelStates) -> ParallelStates:
    """Retain the last row's prompts beside the other rows."""
    *rows, last = parallel.rows
    return dataclasses.replace(parallel, rows=tuple(rows), choices=tuple(last.values()))


def train(model: LanguageModel, **settings: Any) -> TrainingResult:
    chosen = TrainSettings(**{**SETTINGS, **settings})
    subspaces, parallel = setting(model, answered=chosen.position == "answer")
    return train_crown(model.structure, subspaces, parallel, chosen, token_budget=24)


@pytest.mark.parametrize(
    ("position", "loss_layers"),
    [("last", "last"), ("mean", "last"), ("all", "last"), ("answer", "trained")],
)
def test_sharing_a_prefix_and_cutting_a_step_into_groups_change_nothing(
    tiny_model: LanguageModel, position: str, loss_layers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TrainSettings(**SETTINGS, position=position, loss_layers=loss_layers)
    prefix = [7, 8, 9, 10, 11, 12]

    def result() -> TrainingResult:
        subspaces, parallel = setting(tiny_model, prefix=prefix, answered=position == "answer")
        parallel = with_choices(parallel)
        assert parallel.states.prefix_length in (0, len(prefix))
        return train_crown(tiny_model.structure, subspaces, parallel, settings, token_budget=24)

    shared = result()
    monkeypatch.setattr("polylens.token_budget._MAX_GRAPH_TOKENS", 30)  # one row or two
    in_groups = result()
    monkeypatch.setattr("polylens.hidden_states._MIN_PREFIX", 1000)
    apart = result()
    for other in (in_groups, apart):
        assert shared.log[0] == pytest.approx(other.log[0], rel=1e-4)
        # AdamW makes as much of a gradient that is rounding alone (a key's bias) as of any other.
        assert shared.log[-1] == pytest.approx(other.log[-1], rel=2e-2)
        mine, theirs = (
            torch.cat([change.flatten() for change in one.changes.values()])
            for one in (shared, other)
        )
        assert (mine - theirs).norm() <= 0.05 * mine.norm()


def test_training_lowers_the_loss_and_leaves_the_model_alone(tiny_model: LanguageModel) -> None:
    fingerprint = tiny_model.fingerprint
    result = train(tiny_model, epochs=6)
    assert result.log[-1]["loss"] < 0.9 * result.log[0]["loss"]
    assert all(name.split(".")[-4:] for name in result.changes)
    assert wrap_model(tiny_model.causal_lm, None).fingerprint == fingerprint
    layers = {int(part) for name in result.changes for part in name.split(".") if part.isdigit()}
    assert {N_LAYERS - 2, N_LAYERS - 1} <= layers


def test_first_losses_equal_those_of_two_whole_models(llama: LanguageModel) -> None:
    """An independent reference: transformers' own forward, whole model, no batch, no padding."""
    subspaces, parallel = setting(llama)
    ids, rows = prompts()
    result = train_crown(
        llama.structure,
        subspaces,
        parallel,
        TrainSettings(**{**SETTINGS, "batch_size": N_ROWS, "epochs": 1, "strength": 3.0}),
        token_budget=24,
    )
    with torch.no_grad():
        states = [
            llama.causal_lm(torch.tensor([one]), output_hidden_states=True).hidden_states[-1][0]
            for one in ids
        ]
    unit = subspaces.agnostic_vector[N_LAYERS].float()
    unit = unit / unit.norm()
    for language in ("sw", "zh"):
        pairs = [(row["en"], row[language]) for row in rows if language in row]
        gaps = torch.stack([(states[b][-1] - states[a][-1]) @ unit for a, b in pairs])
        expected = gaps.square().mean() / llama.structure.hidden_size
        assert result.log[0][f"align.{language}"] == pytest.approx(float(expected), rel=1e-4)
        omega = subspaces.direction(language, N_LAYERS)
        expected = (3 * omega).square().mean()
        assert result.log[0][f"separate.{language}"] == pytest.approx(float(expected), rel=1e-4)
    assert result.log[0]["retain"] == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("state", ["normed", "residual"])
def test_the_loss_of_answers_is_transformers_own(llama: LanguageModel, state: str) -> None:
    subspaces, parallel = setting(llama, answered=True)
    parallel = with_answers(parallel)
    assert parallel.answers is not None
    ids, rows = prompts()
    settings = TrainSettings(
        **{**SETTINGS, "batch_size": N_ROWS}, state=state, answer_weight=2.0, retain_weight=0.0
    )
    log = train_crown(llama.structure, subspaces, parallel, settings, token_budget=24).log
    counts = {"align.sw": 6, "separate.sw": 6, "align.zh": 5, "separate.zh": 5}
    for language in ("sw", "zh"):
        expected = []
        for index in (row[language] for row in rows if language in row):
            own = [*ids[index], 9] if parallel.answers[index] else []
            labels = torch.full((1, len(own)), -100)
            labels[:, len(own) - len(parallel.answers[index]) :] = torch.tensor(
                parallel.answers[index]
            )
            if own:
                with torch.no_grad():
                    expected.append(llama.causal_lm(torch.tensor([own]), labels=labels).loss)
        mean = float(torch.stack(expected).mean())
        assert log[0][f"answer.{language}"] == pytest.approx(mean, rel=1e-4)
        assert log[1][f"answer.{language}"] < mean
        counts[f"answer.{language}"] = 2 * len(expected)
    # Each part is a mean over the rows that have it; the loss is one over all rows.
    assert log[0].keys() >= counts.keys()
    loss = sum(log[0][name] * count for name, count in counts.items()) / N_ROWS
    assert log[0]["loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("retain_weight", [0.0, 1.0])
def test_rows_without_answers_are_no_reason_to_stop(
    llama: LanguageModel, retain_weight: float
) -> None:
    """Whatever the order: a first batch without answers loses next to nothing."""
    subspaces, parallel = setting(llama, answered=True)
    parallel = with_answers(parallel)
    assert parallel.answers is not None
    one = parallel.rows[0]["sw"]
    only = tuple(answer if index == one else () for index, answer in enumerate(parallel.answers))
    assert only[one]
    parallel = dataclasses.replace(parallel, answers=only)
    settings = TrainSettings(
        **{**SETTINGS, "batch_size": 1},
        align_weight=0.0,
        separate_weight=0.0,
        retain_weight=retain_weight,
        answer_weight=1.0,
    )
    for seed in range(3):
        log = train_crown(llama.structure, subspaces, parallel, settings, seed=seed).log
        assert sum("answer.sw" in entry for entry in log) == settings.epochs
        losses = [entry["loss"] for entry in log if "answer.sw" not in entry]
        assert max(losses) < 0.1


@pytest.mark.parametrize("position", ["last", "mean", "all"])
def test_answers_that_follow_leave_the_other_losses_as_they_are(
    llama: LanguageModel, position: str
) -> None:
    """What the prompt's own states say does not depend on what follows them."""
    ids, rows = prompts()
    subspaces, _ = setting(llama)
    settings = TrainSettings(**{**SETTINGS, "batch_size": N_ROWS}, position=position)

    def first(following: int) -> dict[str, float]:
        longer = [[*one, *range(5, 5 + following)] for one in ids]
        keep = Keep(boundary_layers=(2,), final=True)
        states = collect_hidden_states(llama.structure, longer, keep)
        n_answer = (following + 1,) * len(ids) if following else None
        parallel = ParallelStates(states, rows, "en", n_answer)
        return train_crown(llama.structure, subspaces, parallel, settings, token_budget=24).log[1]

    alone, followed = first(0), first(3)
    assert followed == pytest.approx(alone, rel=2e-3, abs=1e-6)


def test_first_gradient_equals_that_of_the_whole_model(llama: LanguageModel) -> None:
    """AdamW's first step has the sign of the gradient, so compare those."""
    subspaces, parallel = setting(llama)
    ids, rows = prompts()
    settings = TrainSettings(
        **{**SETTINGS, "batch_size": N_ROWS, "epochs": 1, "weight_decay": 0.0, "max_grad_norm": 1e9}
    )
    result = train_crown(llama.structure, subspaces, parallel, settings, token_budget=1000)
    model = build()
    reference = [
        model(torch.tensor([one]), output_hidden_states=True).hidden_states[-1][0].detach()
        for one in ids
    ]
    now = [
        model(torch.tensor([one]), output_hidden_states=True).hidden_states[-1][0] for one in ids
    ]
    loss = torch.zeros(())
    d = llama.structure.hidden_size
    for row in rows:
        centre, before = now[row["en"]], reference[row["en"]]
        loss = loss + (centre.mean(0) - before.mean(0)).square().sum() / d
        for language in row.keys() - {"en"}:
            target, was = now[row[language]][-1], reference[row[language]][-1]
            pulled = subspaces.project_agnostic(target - centre[-1], N_LAYERS)
            goal = subspaces.direction(language, N_LAYERS).float()
            pushed = subspaces.project_specific(target - was, N_LAYERS) - goal
            loss = loss + (pulled.square().sum() + pushed.square().sum()) / d
    (loss / len(rows)).backward()
    gradient = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, change in result.changes.items():
        expected = gradient[name]
        assert expected is not None
        clear = expected.abs() > 0.05 * expected.abs().max()
        assert torch.equal(change[clear].sign(), -expected[clear].sign())
    norm = torch.stack([gradient[name].norm() for name in result.changes]).norm()  # type: ignore[union-attr]
    assert result.log[0]["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.parametrize("loss_layers", ["last", "trained"])
@pytest.mark.parametrize("position", ["last", "mean", "all", "answer"])
def test_second_losses_equal_those_of_two_whole_models(
    llama: LanguageModel, position: str, loss_layers: str
) -> None:
    """After one step on all rows, by transformers' own forward, one prompt at a time."""
    subspaces, parallel = setting(llama, answered=position == "answer")
    ids, rows = prompts()
    n_answer = parallel.n_answer or [1] * len(ids)

    def trained(epochs: int) -> TrainingResult:
        settings = TrainSettings(
            **{**SETTINGS, "batch_size": N_ROWS, "epochs": epochs},
            position=position,
            loss_layers=loss_layers,
            strength=2.0,
        )
        return train_crown(llama.structure, subspaces, parallel, settings, token_budget=24)

    # Transformers' entry: that of layer 2 comes after the embedding and two layers below.
    entry_of = {N_LAYERS: N_LAYERS} | ({2: 3} if loss_layers == "trained" else {})

    @torch.no_grad()
    def whole() -> dict[int, list[torch.Tensor]]:
        outputs = [
            llama.causal_lm(torch.tensor([one]), output_hidden_states=True).hidden_states
            for one in ids
        ]
        return {k: [one[entry][0] for one in outputs] for k, entry in entry_of.items()}

    def read(states: list[torch.Tensor], index: int) -> torch.Tensor:
        own = states[index]
        if position == "mean":
            return own.mean(0)[None]
        # The prompt's last token is the first that predicts a token of the answer.
        return own if position == "all" else own[len(own) - n_answer[index] :]

    before = whole()
    with CrownDelta(trained(1).changes, {"layers": (2, 3)}).applied(llama.structure):
        now = whole()
    logged = trained(2).log[1]
    n_prompt = [len(one) - n + 1 for one, n in zip(ids, n_answer, strict=True)]
    retain = [
        (now[k][c][: n_prompt[c]].mean(0) - before[k][c][: n_prompt[c]].mean(0)).square().mean()
        for c in (row["en"] for row in rows)
        for k in entry_of
    ]
    assert logged["retain"] == pytest.approx(float(torch.stack(retain).mean()), rel=1e-3)
    for language in ("sw", "zh"):
        align, separate = [], []
        for k, row in itertools.product(entry_of, rows):
            if language not in row:
                continue
            goal = 2 * subspaces.direction(language, k).float()
            target, centre = read(now[k], row[language]), read(now[k], row["en"])
            gap = subspaces.project_agnostic(target.mean(0) - centre.mean(0), k)
            align.append(gap.square().mean())
            moved = subspaces.project_specific(target - read(before[k], row[language]), k)
            separate.append((moved - goal).square().mean(-1).mean())
        for name, values in (("align", align), ("separate", separate)):
            expected = float(torch.stack(values).mean())
            assert logged[f"{name}.{language}"] == pytest.approx(expected, rel=1e-3)


def test_positions_agree_where_there_is_one_token(llama: LanguageModel) -> None:
    ids, rows = prompts()
    keep = Keep(boundary_layers=(2,), final=True)
    states = collect_hidden_states(llama.structure, [one[-1:] for one in ids], keep)
    subspaces, _ = setting(llama)

    def log(position: str) -> list[dict[str, float]]:
        n_answer = (1,) * len(ids) if position == "answer" else None
        parallel = ParallelStates(states, rows, "en", n_answer)
        settings = TrainSettings(**SETTINGS, position=position)
        return train_crown(llama.structure, subspaces, parallel, settings, token_budget=24).log

    last = log("last")
    assert log("answer") == last
    for position in ("mean", "all"):
        for mine, theirs in zip(log(position), last, strict=True):
            assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-6)


def test_batches_do_not_change_the_result(llama: LanguageModel) -> None:
    subspaces, parallel = setting(llama)
    settings = TrainSettings(**SETTINGS)
    a, b = (
        train_crown(llama.structure, subspaces, parallel, settings, token_budget=budget)
        for budget in (1, 1000)
    )
    for name, change in a.changes.items():
        torch.testing.assert_close(change, b.changes[name], rtol=1e-3, atol=2e-5)


def test_two_runs_agree_bit_for_bit_and_seeds_differ(llama: LanguageModel) -> None:
    subspaces, parallel = setting(llama)
    settings = TrainSettings(**SETTINGS)
    a, b, c = (
        train_crown(llama.structure, subspaces, parallel, settings, seed=seed, token_budget=24)
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(change, b.changes[name]) for name, change in a.changes.items())
    assert a.log == b.log != c.log


@pytest.mark.parametrize(("stop_after", "position"), [(1, "last"), (3, "answer"), (5, "last")])
def test_a_killed_training_goes_on_to_the_same_bytes(
    llama: LanguageModel, tmp_path: Path, stop_after: int, position: str
) -> None:
    subspaces, parallel = setting(llama, answered=position == "answer")
    parallel = with_choices(parallel)
    settings = TrainSettings(**SETTINGS, position=position)
    whole = train_crown(llama.structure, subspaces, parallel, settings, token_budget=24)
    checkpoint = tmp_path / "checkpoint.safetensors"

    def kill(done: int, total: int, what: str) -> None:
        if done == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_crown(
            llama.structure,
            subspaces,
            parallel,
            settings,
            token_budget=24,
            checkpoint=checkpoint,
            progress=kill,
        )
    resumed = train_crown(
        llama.structure, subspaces, parallel, settings, token_budget=24, checkpoint=checkpoint
    )
    assert resumed.log == whole.log
    assert all(torch.equal(change, whole.changes[name]) for name, change in resumed.changes.items())


def test_a_damaged_checkpoint_is_ignored(llama: LanguageModel, tmp_path: Path) -> None:
    subspaces, parallel = setting(llama)
    settings = TrainSettings(**SETTINGS)
    whole = train_crown(llama.structure, subspaces, parallel, settings, token_budget=24)
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes(b"not a checkpoint")
    again = train_crown(
        llama.structure, subspaces, parallel, settings, token_budget=24, checkpoint=checkpoint
    )
    assert again.log == whole.log


def test_a_checkpoint_of_another_training_is_refused(llama: LanguageModel, tmp_path: Path) -> None:
    subspaces, parallel = setting(llama)
    path = tmp_path / "checkpoint.safetensors"

    def start(**changes: object) -> None:
        settings = TrainSettings(**{**SETTINGS, **changes})
        train_crown(llama.structure, subspaces, parallel, settings, checkpoint=path)

    start()
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="delete it or give another path"):
        start(learning_rate=0.5)
    parallel = dataclasses.replace(parallel, choices=(0,))
    with pytest.raises(ConfigError, match="delete it or give another path"):
        start()
    assert path.read_bytes() == before


@pytest.mark.parametrize("position", ["last", "answer"])
@pytest.mark.parametrize("off", ["align_weight", "separate_weight", "retain_weight"])
def test_each_weight_can_be_zero(llama: LanguageModel, off: str, position: str) -> None:
    result = train(llama, **{off: 0.0}, position=position)
    name = off.removesuffix("_weight")
    assert not any(key.startswith(name) for entry in result.log for key in entry)
    assert all(torch.isfinite(change).all() for change in result.changes.values())


def test_retain_alone_changes_nothing(llama: LanguageModel) -> None:
    result = train(
        llama, align_weight=0.0, separate_weight=0.0, weight_decay=0.0, learning_rate=1e-5
    )
    assert result.log[-1]["retain"] < 1e-6


@pytest.mark.parametrize("state", ["normed", "residual"])
def test_retained_distributions_are_those_of_the_whole_model(
    tiny_model: LanguageModel, state: str
) -> None:
    """After one step on all rows, against transformers' own logits before and after it."""
    prefix = [7, 8, 9, 10, 11, 12]
    subspaces, parallel = setting(tiny_model, prefix=prefix)
    ids, rows = prompts()

    def trained(epochs: int) -> TrainingResult:
        settings = TrainSettings(
            **{**SETTINGS, "batch_size": N_ROWS, "epochs": epochs},
            retain="distribution",
            state=state,
        )
        return train_crown(tiny_model.structure, subspaces, parallel, settings, token_budget=24)

    # The first step of two is that of one: the schedule starts at its peak.
    logged = trained(2).log
    assert logged[0]["retain"] == pytest.approx(0, abs=1e-7)
    delta = CrownDelta(trained(1).changes, {"layers": (N_LAYERS - 2, N_LAYERS - 1)})

    @torch.no_grad()
    def log_probabilities() -> list[torch.Tensor]:
        whole = [tiny_model.causal_lm(torch.tensor([[*prefix, *ids[row["en"]]]])) for row in rows]
        return [one.logits[0, parallel.states.prefix_length :].log_softmax(-1) for one in whole]

    before = log_probabilities()
    with delta.applied(tiny_model.structure):
        after = log_probabilities()
    divergences = [(b.exp() * (b - a)).sum(-1).mean() for b, a in zip(before, after, strict=True)]
    expected = float(torch.stack(divergences).mean())
    assert expected > 0
    assert logged[1]["retain"] == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("retain", ["states", "tokens", "distribution"])
@pytest.mark.parametrize("with_prefix", [True, False])
def test_what_is_retained_of_each_prompt(
    tiny_model: LanguageModel, retain: str, with_prefix: bool
) -> None:
    """After one step on all rows, against transformers' own states and logits before and after."""
    prefix = [7, 8, 9, 10, 11, 12] if with_prefix else []
    subspaces, parallel = setting(tiny_model, prefix=prefix)
    parallel = with_choices(parallel)
    (ids, _), rows = prompts(), parallel.rows

    def trained(epochs: int) -> TrainingResult:
        settings = TrainSettings(
            **{**SETTINGS, "batch_size": N_ROWS, "epochs": epochs},
            retain=retain,
            retain_targets=True,
        )
        return train_crown(tiny_model.structure, subspaces, parallel, settings, token_budget=24)

    logged = trained(2).log
    delta = CrownDelta(trained(1).changes, {"layers": (N_LAYERS - 2, N_LAYERS - 1)})
    n_shared = parallel.states.prefix_length if retain == "distribution" else 0
    held = {
        "retain": ([row["en"] for row in rows], slice(n_shared, None)),
        "retain.sw": ([row["sw"] for row in rows], slice(n_shared, -1)),
        "retain.zh": ([row["zh"] for row in rows if "zh" in row], slice(n_shared, -1)),
        "retain.choices": (parallel.choices, slice(-1, None)),
    }

    @torch.no_grad()
    def read(chosen: Sequence[int], part: slice) -> list[torch.Tensor]:
        """What is retained of each prompt, (n_tokens, n): states, their mean, or log p."""
        whole = [
            tiny_model.causal_lm(torch.tensor([[*prefix, *ids[one]]]), output_hidden_states=True)
            for one in chosen
        ]
        if retain == "distribution":
            return [one.logits[0, part].log_softmax(-1) for one in whole]
        states = [one.hidden_states[-1][0, part] for one in whole]
        return [one.mean(0, keepdim=True) for one in states] if retain == "states" else states

    before = {name: read(*what) for name, what in held.items()}
    with delta.applied(tiny_model.structure):
        after = {name: read(*what) for name, what in held.items()}
    for name in held:
        losses = [
            (b.exp() * (b - a)).sum(-1).mean()
            if retain == "distribution"
            else (b - a).square().mean()
            for b, a in zip(before[name], after[name], strict=True)
        ]
        expected = float(torch.stack(losses).mean())
        assert expected > 0
        assert logged[0][name] == pytest.approx(0, abs=1e-7)
        assert logged[1][name] == pytest.approx(expected, rel=2e-3, abs=5e-7)  # of float32


def test_an_epoch_has_each_question_once(llama: LanguageModel) -> None:
    _, parallel = setting(llama)
    for n_choices in (0, 1, 4, 6, 13):
        one = dataclasses.replace(parallel, choices=tuple(range(n_choices)))
        shares = [one.choices_beside(row) for row in range(N_ROWS)]
        assert [prompt for share in shares for prompt in share] == [*range(n_choices)]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_loss_that_retained_tokens_start_without_is_no_divergence(llama: LanguageModel) -> None:
    how = {"strength": 0.0, "align_weight": 0.01, "retain": "tokens", "retain_weight": 20.0}
    log = train(llama, **how, retain_targets=True, epochs=8).log
    losses = [entry["loss"] for entry in log]
    assert max(losses) > 10 * losses[0]
    assert losses[-1] < max(losses)


def test_a_prompt_of_one_token_has_nothing_to_retain(llama: LanguageModel) -> None:
    subspaces, _ = setting(llama)
    lone = [[20], [90, 91], [150]]
    keep = Keep(boundary_layers=(N_LAYERS - 2, N_LAYERS - 1), final=True)
    states = collect_hidden_states(llama.structure, lone, keep)
    rows = ({"en": 0, "sw": 1, "zh": 2},)
    settings = TrainSettings(**SETTINGS, retain="distribution", retain_targets=True)
    result = train_crown(
        llama.structure, subspaces, ParallelStates(states, rows, "en"), settings, token_budget=24
    )
    assert all("retain.zh" not in entry for entry in result.log)
    assert result.log[-1]["retain.sw"] > 0


def test_retaining_distributions_holds_them(llama: LanguageModel) -> None:
    held, free = (
        train(llama, retain="distribution", retain_weight=weight, epochs=8).log[-1]["retain"]
        for weight in (50.0, 1e-9)
    )
    assert held < 0.5 * free


@pytest.mark.parametrize("retain", ["states", "tokens", "distribution"])
def test_retaining_questions_holds_them(llama: LanguageModel, retain: str) -> None:
    subspaces, parallel = setting(llama)

    def drift(weight: float) -> float:
        settings = TrainSettings(
            **{**SETTINGS, "epochs": 8}, retain=retain, retain_weight=weight, align_weight=0.0
        )
        log = train_crown(
            llama.structure, subspaces, with_choices(parallel), settings, token_budget=24
        ).log
        return log[-1]["retain.choices"]

    assert drift(50.0) < 0.5 * drift(1e-9)


def test_a_step_loses_what_its_parts_lose(llama: LanguageModel) -> None:
    """Of questions those that are beside the step's rows, each as much as a row's other prompts."""
    subspaces, parallel = setting(llama)
    parallel = with_choices(parallel)
    settings = TrainSettings(
        **{**SETTINGS, "batch_size": N_ROWS, "epochs": 3}, retain="tokens", retain_weight=4.0
    )
    log = train_crown(llama.structure, subspaces, parallel, settings, token_budget=24).log
    n_rows, n_chinese = len(parallel.rows), sum("zh" in row for row in parallel.rows)
    counts = {"retain.choices": len(parallel.choices), "align.zh": n_chinese}
    counts["separate.zh"] = n_chinese
    for entry in log:
        parts = {k: v for k, v in entry.items() if k == "retain" or "." in k}
        assert len(parts) == 6
        expected = sum(
            value * (4.0 if name.startswith("retain") else 1.0) * counts.get(name, n_rows) / n_rows
            for name, value in parts.items()
        )
        assert entry["loss"] == pytest.approx(expected, rel=1e-6)


def test_a_low_rank_update_has_that_rank_and_learns(llama: LanguageModel) -> None:
    pytest.importorskip("peft")
    result = train(llama, update_rank=2, epochs=6, learning_rate=1e-2)
    assert result.log[-1]["loss"] < result.log[0]["loss"]
    for change in result.changes.values():
        assert int(torch.linalg.matrix_rank(change, rtol=1e-4)) in (1, 2)


@pytest.mark.parametrize("position", ["last", "mean", "all", "answer"])
@pytest.mark.parametrize("state", ["normed", "residual"])
def test_every_position_and_state_trains(llama: LanguageModel, position: str, state: str) -> None:
    result = train(llama, position=position, state=state, epochs=4)
    assert result.log[-1]["loss"] < result.log[0]["loss"]


def test_only_the_chosen_layers_change(llama: LanguageModel) -> None:
    subspaces, parallel = setting(llama)
    settings = TrainSettings(**{**SETTINGS, "layers": (2,)})
    result = train_crown(llama.structure, subspaces, parallel, settings, token_budget=24)
    assert result.changes
    assert all(name.startswith("model.layers.2.") for name in result.changes)


def test_weights_in_training_are_float32_whatever_the_dtype_of_the_model() -> None:
    model = wrap_model(build().bfloat16(), tiny_tokenizer())
    # Steps this small round to nothing in bfloat16.
    result = train(model, learning_rate=1e-6)
    changed = [change for change in result.changes.values() if change.any()]
    assert len(changed) == len(result.changes)
    assert all(change.dtype == torch.float32 for change in result.changes.values())


def test_a_training_that_runs_away_stops_and_keeps_the_last_good_state(
    llama: LanguageModel, tmp_path: Path
) -> None:
    subspaces, parallel = setting(llama)
    checkpoint = tmp_path / "checkpoint.safetensors"
    settings = TrainSettings(**{**SETTINGS, "learning_rate": 50.0, "epochs": 20})
    with pytest.raises(TrainingError, match=r"lower train\.learning_rate.*are kept in"):
        train_crown(
            llama.structure, subspaces, parallel, settings, token_budget=24, checkpoint=checkpoint
        )
    assert checkpoint.exists()


def test_a_loss_that_is_not_finite_stops_at_once(llama: LanguageModel) -> None:
    subspaces, parallel = setting(llama)
    parallel.states.boundary[2][:] = torch.inf
    with pytest.raises(TrainingError, match="must be finite, but is nan at step 0"):
        train_crown(llama.structure, subspaces, parallel, TrainSettings(), token_budget=24)


@pytest.mark.parametrize(
    ("layers", "expected"), [(1, (3,)), (4, (0, 1, 2, 3)), ((2,), (2,)), ((3, 1, 3), (1, 3))]
)
def test_layers(layers: Any, expected: tuple[int, ...]) -> None:
    assert trained_layers(TrainSettings(layers=layers), N_LAYERS) == expected


@pytest.mark.parametrize(
    ("settings", "read", "entered"),
    [
        ({}, (4,), (2,)),
        ({"state": "residual"}, (3,), (2,)),
        ({"loss_layers": "trained"}, (2, 4), (2, 3)),
        ({"loss_layers": "trained", "layers": 1}, (4,), (3,)),
        ({"loss_layers": "trained", "layers": (0, 2), "state": "residual"}, (0, 2, 3), (0, 1, 3)),
    ],
)
def test_layers_that_losses_read_and_that_are_kept(
    settings: dict[str, Any], read: tuple[int, ...], entered: tuple[int, ...]
) -> None:
    chosen = TrainSettings(**settings)
    assert state_layers(chosen, N_LAYERS) == read
    assert boundary_layers(chosen, N_LAYERS) == entered


def test_losses_of_several_layers_leave_the_lone_last_one_as_it_was(llama: LanguageModel) -> None:
    last, alone = (
        train(llama, loss_layers=which, layers=1, epochs=1) for which in ("last", "trained")
    )
    assert last.log == alone.log
    several = train(llama, loss_layers="trained", retain="distribution", epochs=6)
    assert several.log[-1]["loss"] < several.log[0]["loss"]


@pytest.mark.parametrize(
    ("layers", "message"), [(5, "between 1 and 4"), ((4,), "between 0 and 3, got 4")]
)
def test_layers_out_of_range(layers: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trained_layers(TrainSettings(layers=layers), N_LAYERS)
