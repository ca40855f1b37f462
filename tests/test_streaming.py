"""A model that stays in its files computes what the same model in memory does, bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from polylens.config import Runtime, TrainSettings
from polylens.corpora import starter_corpus
from polylens.crown import run_crown
from polylens.errors import ConfigError
from polylens.evaluation import evaluate
from polylens.evaluation.generation import generate_answers
from polylens.execution import Execution, open_model, plan_execution
from polylens.hidden_states import Keep, collect_hidden_states
from polylens.merging import save_model
from polylens.models.loading import LanguageModel, load_model
from polylens.models.source import ModelFacts, describe
from polylens.scratch import Scratch
from polylens.steps import probe, train
from tiny import save_tiny

LANGUAGES = ("en", "sw")
PROMPTS = [[5, 9, 30, 12, 7, 80, 41, 6], [5, 9, 30, 12, 8], [5, 9, 30, 12, 20, 19, 33]]


@pytest.fixture
def folder(family: str, tmp_path: Path) -> Path:
    """A folder of a tiny model of each family in turn, in bfloat16 and in many shards."""
    folder = save_tiny(tmp_path / family, family)
    model = load_model(folder).causal_lm.bfloat16()
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def both(folder: Path) -> tuple[LanguageModel, LanguageModel]:
    """The same model, streamed and in memory."""
    streamed = load_model(folder, dtype="float32", streamed=True)
    assert streamed.structure.streaming is not None
    assert {p.dtype for p in streamed.structure.layers.parameters()} <= {torch.bfloat16}
    return streamed, load_model(folder, dtype="float32")


def test_states_logits_and_answers_are_the_same(folder: Path) -> None:
    streamed, resident = both(folder)
    assert streamed.fingerprint == resident.fingerprint
    keep = Keep(pooling="mean", boundary_layers=(2,), final=True)
    a, b = (
        collect_hidden_states(model.structure, PROMPTS, keep, scratch=scratch)
        for model, scratch in ((streamed, Scratch(0)), (resident, None))
    )
    assert torch.equal(a.pooled, b.pooled)
    assert torch.equal(a.boundary[2], b.boundary[2])
    assert torch.equal(a.final, b.final)
    pairs = zip(run_crown(streamed.structure, a), run_crown(resident.structure, b), strict=True)
    for (_, mine, _), (_, theirs, _) in pairs:
        assert torch.equal(mine, theirs)
        head = streamed.structure.logits, resident.structure.logits
        assert torch.equal(head[0](mine), head[1](theirs))
    answers = []
    for model in (streamed, resident):
        answers.append(generate_answers(model, PROMPTS, max_new_tokens=4))
    assert answers[0] == answers[1]


def test_training_evaluation_and_the_saved_model_are_the_same(folder: Path, tmp_path: Path) -> None:
    results = []
    for name, model in zip(("a", "b"), both(folder), strict=True):
        stored = {k: v.clone() for k, v in model.causal_lm.state_dict().items()}
        corpus = starter_corpus().limit(3)
        subspaces = probe(model, corpus.to_corpus(), languages=LANGUAGES)
        settings = TrainSettings(epochs=2, max_tokens=512, answer_weight=1.0)  # reads the head
        delta = train(model, subspaces, corpus, settings=settings)
        found = evaluate(model, delta, corpus, languages=("sw",), max_new_tokens=2, max_tokens=512)
        save_model(model, delta, tmp_path / name)
        saved = load_model(tmp_path / name, dtype="float32").causal_lm.state_dict()
        results.append((subspaces, delta, found, saved))
        for key, tensor in model.causal_lm.state_dict().items():
            assert torch.equal(tensor, stored[key]), key
    (s1, d1, f1, m1), (s2, d2, f2, m2) = results
    assert torch.equal(s1.specific_basis, s2.specific_basis)
    assert d1.changes.keys() == d2.changes.keys()
    assert all(torch.equal(change, d2.changes[name]) for name, change in d1.changes.items())
    assert f1 == f2
    assert all(torch.equal(tensor, m2[name]) for name, tensor in m1.items())


FACTS = ModelFacts("llama", 32, 4096, 128_256, 8_030_000_000, 6_980_000_000, 16 * 10**9, "float32")


def planned(memory: str, n_crown_layers: int = 2) -> Execution:
    runtime = Runtime.model_validate({"memory": memory, "device": "cpu", "dtype": "float32"})
    return plan_execution(FACTS, runtime, n_crown_layers=n_crown_layers)


def test_a_model_that_does_not_fit_is_streamed() -> None:
    assert not planned("60GB").streamed
    small = planned("6GB")
    assert small.streamed
    assert 0 < small.scratch_bytes < 6e9
    assert "streamed layer by layer: in memory it would take 3" in small.sentence()


def test_memory_for_not_even_one_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"at least .* GB for this model, even streamed"):
        planned("1GB")


def test_a_memory_limit_streams_and_spills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "tiny")
    facts = describe(folder)
    assert dataclasses.replace(facts, dtype="float32") == facts
    monkeypatch.setattr("polylens.execution.LIBRARIES_BYTES", 0)
    needed = plan_execution(facts, Runtime(device="cpu"), with_head=False).needed_bytes
    model, execution = open_model(str(folder), Runtime.model_validate({"memory": needed}))
    assert execution.streamed
    assert model.structure.streaming is not None
    batch_bytes = execution.scratch().batch_bytes  # a power of two
    assert needed // 16 < batch_bytes <= needed // 8
