"""Next-token training: the whole model's loss and gradients, at the cost that is stated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from polylens.baselines import LowRankSettings, PretrainingSettings, SupervisedSettings, fine_tune
from polylens.baselines.cost import count_operations
from polylens.baselines.language_modelling import NextTokenObjective, Sequences, train_on_tokens
from polylens.corpora import AnsweredCorpus
from polylens.crown import Crown, CrownDelta
from polylens.hidden_states import Keep, collect_hidden_states
from polylens.models.loading import LanguageModel, load_model, wrap_model
from tiny import N_LAYERS, build, tiny_tokenizer

PREFIX = [7, 8, 9, 10, 11, 12]
LAYERS = (N_LAYERS - 2, N_LAYERS - 1)
ANSWERED = AnsweredCorpus.make(
    "answered",
    {
        "sw": [(f"Swali {n}?", f"Jibu la {n}.") for n in range(6)],
        "en": [(f"Question {n}?", f"Answer {n}.") for n in range(6)],
    },
)
QUICK: dict[str, Any] = {"batch_size": 2, "epochs": 2, "learning_rate": 1e-3, "warmup_ratio": 0.0}


def sequences(n_tokens: int | None = None) -> Sequences:
    """Rows that begin alike; of some, tokens of what they share are predicted too."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for row in range(6):
        length = n_tokens or int(torch.randint(4, 10, (1,), generator=generator))
        own = torch.randint(20, 250, (length,), generator=generator).tolist()
        n_scored = len(PREFIX) + length - 1 if row in (2, 4) else 3
        rows.append(([*PREFIX, *own], n_scored, ("sw", "bn", "en")[row % 3]))
    return Sequences.make(rows)


def objective(
    model: LanguageModel, rows: Sequences, token_budget: int = 1000, graph_tokens: int = 1000
) -> tuple[NextTokenObjective, Crown]:
    crown = Crown(model.structure, LAYERS)
    states = collect_hidden_states(
        model.structure, [ids[:-1] for ids in rows.ids], Keep(boundary_layers=(LAYERS[0],))
    )
    assert states.prefix_length in (0, len(PREFIX))
    return NextTokenObjective(crown, states, rows, token_budget, graph_tokens), crown


def tune(model: LanguageModel, **changes: Any) -> CrownDelta:
    kind = LowRankSettings if "rank" in changes else SupervisedSettings
    return fine_tune(
        model,
        ANSWERED,
        languages=["sw"],
        settings=kind(**{**QUICK, **changes}),
        token_budget=64,
    )


def test_loss_and_gradient_are_those_of_the_whole_model(
    tiny_model: LanguageModel, family: str
) -> None:
    rows = sequences()
    mine, crown = objective(tiny_model, rows)
    loss, parts = mine.backward(range(6))
    model = build(family)
    nats = dict.fromkeys(rows.counts, 0.0)
    total = torch.zeros(())
    for ids, n_scored, language in zip(rows.ids, rows.n_scored, rows.languages, strict=True):
        labels = torch.tensor([[-100] * (len(ids) - n_scored) + list(ids[-n_scored:])])
        own = model(input_ids=torch.tensor([ids]), labels=labels).loss * n_scored
        total = total + own
        nats[language] += own.item()
    (total / sum(rows.n_scored)).backward()
    assert loss == pytest.approx(total.item() / sum(rows.n_scored), rel=1e-5)
    for language, value in nats.items():
        own_scored = [
            n for n, k in zip(rows.n_scored, rows.languages, strict=True) if k == language
        ]
        assert parts[f"nats.{language}"] == pytest.approx(value / sum(own_scored), rel=1e-5)
    whole = dict(model.named_parameters())
    for name, parameter in crown.named_trainable():
        expected = whole[name].grad
        if expected is not None:  # an expert that no token chose has none
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-6)
    assert all(weight.grad is None for weight in tiny_model.causal_lm.parameters())
    assert crown.final_norm.weight.grad is None


def test_batches_groups_and_logits_in_pieces_change_nothing(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sequences()

    def gradients(**how: int) -> list[torch.Tensor]:
        mine, crown = objective(llama, rows, **how)
        losses.append(mine.backward([0, 2, 3, 5])[0])
        return [p.grad for _, p in crown.named_trainable() if p.grad is not None]

    losses: list[float] = []
    at_once = gradients()
    monkeypatch.setattr("polylens.baselines.language_modelling.LOGIT_ROWS", 5)
    in_pieces = gradients(token_budget=9, graph_tokens=12)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for one, other in zip(at_once, in_pieces, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"rank": 2}], ids=["full", "low rank"])
def test_training_lowers_the_loss_of_the_chosen_layers_alone(
    llama: LanguageModel, changes: dict[str, int]
) -> None:
    if changes:
        pytest.importorskip("peft")
    fingerprint = llama.fingerprint
    delta = tune(llama, epochs=4, layers=(1, 3), **changes)
    log = delta.metadata["log"]
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    assert delta.layers == (1, 3)
    assert {name.split(".")[2] for name in delta.changes} == {"1", "3"}
    assert all(change.any() for change in delta.changes.values())
    assert wrap_model(llama.causal_lm, None).fingerprint == fingerprint
    shapes = {name: p.shape for name, p in llama.causal_lm.named_parameters()}
    assert all(change.shape == shapes[name] for name, change in delta.changes.items())


def test_low_rank_changes_have_the_rank_asked_for(llama: LanguageModel) -> None:
    pytest.importorskip("peft")
    state = torch.random.get_rng_state()
    delta = tune(llama, rank=3, epochs=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(delta.changes) == 2 * 7  # a Llama layer's matrices, and none of its norms
    for change in delta.changes.values():
        values = torch.linalg.svdvals(change)
        assert values[2] > 1e-3 * values[0]
        assert values[3] < 1e-5 * values[0]


@pytest.mark.parametrize("changes", [{}, {"rank": 2}], ids=["full", "low rank"])
def test_a_killed_training_goes_on_to_the_same_bytes(
    llama: LanguageModel, tmp_path: Path, changes: dict[str, int]
) -> None:
    if changes:
        pytest.importorskip("peft")
    settings = (LowRankSettings if changes else SupervisedSettings)(**{**QUICK, **changes})

    def start(name: str, progress: Callable[[int, int, str], None] = lambda *_: None) -> bytes:
        delta = fine_tune(
            llama,
            ANSWERED,
            languages=["sw"],
            settings=settings,
            token_budget=64,
            checkpoint=tmp_path / "checkpoint.safetensors",
            progress=progress,
        )
        delta.save(tmp_path / name)
        (tmp_path / "checkpoint.safetensors").unlink()
        return (tmp_path / name).read_bytes()

    def kill(done: int, total: int, what: str) -> None:
        if what == "training" and done == 3:
            raise KeyboardInterrupt

    whole = start("whole")
    with pytest.raises(KeyboardInterrupt):
        start("never", kill)
    assert (tmp_path / "checkpoint.safetensors").exists()
    assert start("resumed") == whole


def test_rows_of_the_central_language_are_replayed(llama: LanguageModel) -> None:
    plain, replayed = tune(llama), tune(llama, replay_ratio=0.5)
    assert plain.metadata["rows"] == {"sw": 6}
    assert replayed.metadata["rows"] == {"sw": 6, "en": 3}
    assert replayed.metadata["languages"] == ["sw"]
    seen = {key for entry in replayed.metadata["log"] for key in entry if key.startswith("nats.")}
    assert seen == {"nats.sw", "nats.en"}


def test_a_budget_leaves_rows_out(llama: LanguageModel) -> None:
    everything, half = tune(llama), tune(llama, tokens=200)
    assert 100 < half.metadata["cost"]["tokens"] <= 200 < everything.metadata["cost"]["tokens"]
    assert tune(llama, tokens=1).metadata["n_rows"] == 1


@pytest.mark.parametrize("rank", [None, 4], ids=["full", "low rank"])
def test_the_operations_are_those_that_torch_counts(llama: LanguageModel, rank: int | None) -> None:
    rows = sequences(n_tokens=6)  # of one length, so that nothing is padded
    settings = PretrainingSettings(epochs=2, batch_size=3)
    crown = Crown(llama.structure, LAYERS)
    if rank is not None:
        pytest.importorskip("peft")
        from polylens.low_rank import LowRankCrown

        crown = LowRankCrown(llama.structure, LAYERS, rank=rank, alpha=1.0, seed=0)
    assert llama.structure.attention_name == "self_attn"  # found out before the count begins
    with FlopCounterMode(display=False) as counter:
        delta = train_on_tokens(
            llama, crown, rows, settings, method="pretraining", central="en", token_budget=100
        )
    assert delta.metadata["cost"]["operations"] == pytest.approx(
        counter.get_total_flops(), rel=0.08
    )
    assert delta.metadata["cost"]["tokens"] == 2 * 6 * 12


def test_of_a_low_rank_update_only_the_small_matrices_are_trained(llama: LanguageModel) -> None:
    pytest.importorskip("peft")
    full, low = tune(llama, epochs=1), tune(llama, epochs=1, rank=2)
    d, kv, wide = 32, 16, 48
    inputs_and_outputs = [(d, d), (d, kv), (d, kv), (d, d), (d, wide), (d, wide), (wide, d)]
    expected = 2 * sum(2 * (a + b) for a, b in inputs_and_outputs)
    assert low.metadata["cost"]["trained_parameters"] == expected
    assert low.metadata["cost"]["operations"] < full.metadata["cost"]["operations"]


def test_streamed_and_bfloat16_models_train(tiny_folder: Path) -> None:
    resident, streamed = (
        tune(load_model(tiny_folder, dtype="float32", streamed=streamed))
        for streamed in (False, True)
    )
    assert streamed.metadata["log"] == resident.metadata["log"]
    narrow = tune(load_model(tiny_folder, dtype="bfloat16"))
    assert {change.dtype for change in narrow.changes.values()} == {torch.float32}
    first, expected = (one.metadata["log"][0]["loss"] for one in (narrow, resident))
    assert first == pytest.approx(expected, rel=0.02)


def test_operations_of_more_epochs_are_the_crown_alone() -> None:
    model = wrap_model(build(), tiny_tokenizer())
    rows = sequences()
    mine, crown = objective(model, rows)
    one, two, three = (
        count_operations(
            crown, mine._states, rows.n_scored, PretrainingSettings(epochs=epochs, batch_size=2)
        )
        for epochs in (1, 2, 3)
    )
    assert three - two == two - one < one
