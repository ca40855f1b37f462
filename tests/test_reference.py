"""The engine against the plain reference of the benchmark, which shares no code with it."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from polylens.config import PRESETS, TrainSettings
from polylens.hidden_states import Keep, collect_hidden_states
from polylens.models.loading import LanguageModel, wrap_model
from polylens.objective import ParallelStates
from polylens.subspaces import Subspaces, probe_subspaces
from polylens.training import train_crown
from tiny import N_LAYERS, build, tiny_tokenizer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LANGUAGES = ("en", "sw", "zh")
PREFIX = [3, 50, 51, 52, 53]


@pytest.fixture(params=["llama", "qwen2", "gemma3"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return wrap_model(build(request.param), tiny_tokenizer(), request.param)


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import reference

    monkeypatch.delitem(sys.modules, "reference")
    return reference


def prompts(n: int, seed: int) -> dict[str, list[list[int]]]:
    """Language → prompts that begin alike and go on differently."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[list[int]]] = {}
    for offset, language in enumerate(LANGUAGES):
        low = 20 + 60 * offset
        lengths = torch.randint(3, 12, (n,), generator=generator).tolist()
        found[language] = [
            [*PREFIX, *torch.randint(low, low + 60, (length,), generator=generator).tolist()]
            for length in lengths
        ]
    return found


def probed(model: LanguageModel, texts: dict[str, list[list[int]]]) -> Subspaces:
    ids = [one for part in texts.values() for one in part]
    states = collect_hidden_states(model.structure, ids, Keep(pooling="last"))
    assert states.pooled is not None
    parts = states.pooled.split([len(part) for part in texts.values()])
    return probe_subspaces(dict(zip(texts, parts, strict=True)), central="en")


def test_subspaces_and_losses_are_those_of_the_reference(
    model: LanguageModel, reference: ModuleType
) -> None:
    texts = prompts(7, seed=1)
    subspaces = probed(model, texts)
    found = reference.probe(model.causal_lm, texts)
    means, agnostic, basis = found
    # transformers lacks the last layer's output before the norm: its last entry is after it.
    for entry, layer in enumerate([*range(N_LAYERS - 1), N_LAYERS]):
        own = subspaces.specific_basis[layer]
        difference = own.T @ own - basis[entry].T @ basis[entry]
        assert torch.linalg.matrix_norm(difference, ord=2) <= 1e-5
        torch.testing.assert_close(
            subspaces.agnostic_vector[layer], agnostic[entry], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(
            subspaces.language_means[layer], means[entry], rtol=1e-4, atol=1e-4
        )

    parallel = prompts(19, seed=2)
    ids = [one for part in parallel.values() for one in part]
    rows = tuple({k: 19 * i + row for i, k in enumerate(LANGUAGES)} for row in range(19))
    keep = Keep(boundary_layers=(N_LAYERS - 2,), final=True)
    states = collect_hidden_states(model.structure, ids, keep)
    settings = TrainSettings(**PRESETS["paper"]["train"])
    log = train_crown(
        model.structure, subspaces, ParallelStates(states, rows, "en"), settings, seed=0
    ).log
    trainee = copy.deepcopy(model.causal_lm)
    expected = reference.train(trainee, model.causal_lm, ids, rows, found, LANGUAGES)
    assert len(log) == len(expected) == 3
    for mine, theirs in zip(log, expected, strict=True):
        for part, value in theirs.items():
            assert mine[part] == pytest.approx(value, rel=1e-4, abs=1e-7 * theirs["loss"]), part
