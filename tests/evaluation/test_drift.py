import math

import pytest
import torch

from polylens.crown import CrownDelta, run_crown
from polylens.evaluation.drift import PromptStates, StateChange, measure_change, summarise_states
from polylens.hidden_states import Keep, collect_hidden_states
from tiny import VOCAB_SIZE

BOUNDARY = 3
LENGTHS = (7, 1, 23, 12)


def _prompts():
    generator = torch.Generator().manual_seed(6)
    return [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in LENGTHS]


def _delta(model, scale):
    generator = torch.Generator().manual_seed(8)
    structure = model.structure
    names = dict(structure.layers[BOUNDARY].named_parameters())
    return CrownDelta(
        {
            structure.parameter_name(BOUNDARY, name): scale
            * torch.randn(parameter.shape, generator=generator)
            for name, parameter in names.items()
        },
        {},
    )


def _before_and_after(model, delta):
    structure, prompts = model.structure, _prompts()
    states = collect_hidden_states(structure, prompts, Keep(boundary_layers=(BOUNDARY,)))

    def summarise():
        return summarise_states(
            structure, run_crown(structure, states, token_budget=24), len(prompts)
        )

    before = summarise()
    with delta.applied(structure):
        after = summarise()
    return before, after


@torch.no_grad()
def _reference(model):
    """Mean normed state and next-token log-probabilities, one prompt at a time, by transformers."""
    means, log_probabilities = [], []
    for ids in _prompts():
        output = model.causal_lm(torch.tensor([ids]), output_hidden_states=True)
        means.append(output.hidden_states[-1][0].mean(0))
        log_probabilities.append(output.logits[0, -1].log_softmax(-1))
    return torch.stack(means), torch.stack(log_probabilities)


def test_no_change_is_exactly_zero(tiny_model):
    before, after = _before_and_after(tiny_model, _delta(tiny_model, 0.0))
    assert measure_change(before, after, range(4)) == StateChange(0.0, 0.0, 0.0, 4)


def test_change_equals_that_of_the_whole_model(tiny_model):
    delta = _delta(tiny_model, 0.05)
    before, after = _before_and_after(tiny_model, delta)
    mean, log_p = _reference(tiny_model)
    with delta.applied(tiny_model.structure):
        changed_mean, log_q = _reference(tiny_model)
    rows = [0, 2, 3]
    relative = ((changed_mean - mean).norm(dim=1) / mean.norm(dim=1))[rows]
    kl = (log_p.exp() * (log_p - log_q)).sum(1)[rows].mean() / math.log(2)
    change = measure_change(before, after, rows)
    assert change.relative == pytest.approx(float(relative.mean()), rel=1e-4)
    assert change.standard_error == pytest.approx(float(relative.std()) / 3**0.5, rel=1e-3)
    assert change.kl_bits == pytest.approx(float(kl), rel=1e-3)
    assert change.n == 3
    assert change.relative > 0.01


def test_values_worked_out_by_hand(llama):
    """Norms 5 and 10, moved by 1 and 4: 0.2 and 0.4, so 0.3 ± 0.1."""
    nothing = torch.zeros(2, 32)
    mean = torch.zeros(2, 32)
    mean[0, 0], mean[0, 1], mean[1, 0] = 3, 4, 10
    moved = mean.clone()
    moved[0, 2] += 1
    moved[1, 0] -= 4
    before = PromptStates(llama.structure, mean, nothing)
    after = PromptStates(llama.structure, moved, nothing)
    change = measure_change(before, after, [0, 1])
    assert change.relative == pytest.approx(0.3)
    assert change.standard_error == pytest.approx(0.1)
    assert change.kl_bits == 0.0
    assert measure_change(before, after, [1]).standard_error == 0.0


def test_padding_does_not_reach_the_means(llama):
    before, _ = _before_and_after(llama, _delta(llama, 0.0))
    mean, log_p = _reference(llama)
    torch.testing.assert_close(before.mean, mean, rtol=1e-4, atol=1e-5)
    logits = llama.structure.logits(before.last[None])[0].detach()
    torch.testing.assert_close(logits.log_softmax(-1), log_p, rtol=1e-4, atol=1e-4)
