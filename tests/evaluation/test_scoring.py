"""Log-likelihoods of continuations equal those of the whole model, for every candidate."""

from __future__ import annotations

import pytest
import torch

from polylens.evaluation.scoring import Candidate, Score, score_continuations
from polylens.models.loading import LanguageModel
from polylens.steering import Removal
from test_crown import random_delta
from test_steering import EITHER, steered
from tiny import N_LAYERS

REQUESTS = [
    ([5, 6, 7], [8]),
    ([5, 6, 7], [9]),  # a choice of one token: the same text
    ([5, 6, 7], [9, 10, 11, 12]),
    ([5, 6, 7, 8], [12]),
    ([5, 6, 7, 9, 10], [11, 12]),  # the text of the third, cut elsewhere
    ([30], [31, 32]),
    ([30, 31], [32, 33, 34]),
]


def by_the_whole_model(model: LanguageModel) -> list[Score]:
    scores = []
    for context, continuation in REQUESTS:
        with torch.no_grad():
            logits = model.causal_lm(torch.tensor([[*context, *continuation]])).logits[0].double()
        log_p = logits.log_softmax(-1)[len(context) - 1 : -1]
        picked = log_p.gather(1, torch.tensor(continuation)[:, None])
        greedy = log_p.argmax(-1).tolist() == continuation
        scores.append(Score(float(picked.sum()), greedy))
    return scores


@pytest.mark.parametrize("token_budget", [1, 12, 1000])
def test_scores_are_those_of_the_whole_model(
    tiny_model: LanguageModel, token_budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polylens.evaluation.likelihood.LOGIT_ROWS", 3)
    delta = random_delta(tiny_model)
    candidates = [Candidate(), Candidate(delta), Candidate(delta, strength=0.5)]
    found = score_continuations(tiny_model, REQUESTS, candidates, token_budget=token_budget)
    for candidate, scores in zip(candidates, found, strict=True):
        with candidate.applied(tiny_model.structure):
            expected = by_the_whole_model(tiny_model)
        for score, other in zip(scores, expected, strict=True):
            assert score.log_likelihood == pytest.approx(other.log_likelihood, abs=1e-4)
            assert score.is_greedy == other.is_greedy


def test_a_greedy_continuation_is_told(llama: LanguageModel) -> None:
    context, continuation = [5, 6, 7], []
    for _ in range(3):
        with torch.no_grad():
            logits = llama.causal_lm(torch.tensor([[*context, *continuation]])).logits
        continuation.append(int(logits[0, -1].argmax()))
    ((score, other),) = score_continuations(
        llama, [(context, continuation), (context, [*continuation[:-1], 0])]
    )
    assert score.is_greedy
    assert not other.is_greedy


def test_strength_0_scores_as_the_untouched_model_to_the_bit(tiny_model: LanguageModel) -> None:
    delta = random_delta(tiny_model)
    untouched, zero = score_continuations(
        tiny_model, REQUESTS, [Candidate(), Candidate(delta, strength=0.0)]
    )
    assert untouched == zero


def test_scores_of_steered_candidates_are_those_of_the_whole_model(
    tiny_model: LanguageModel,
) -> None:
    carried, other = (steered(tiny_model, actions) for actions in EITHER)
    upper = steered(tiny_model, [Removal(1.0, (2,), reinsert=0.5, reinsert_at=N_LAYERS - 1)])
    candidates = [Candidate(), Candidate(carried, 0.5), Candidate(other), Candidate(upper)]
    assert [one.delta.layers[0] for one in candidates if one.delta] == [0, 1, 2]
    found = score_continuations(tiny_model, REQUESTS, candidates, token_budget=12)
    for candidate, scores in zip(candidates, found, strict=True):
        with candidate.applied(tiny_model.structure):
            expected = by_the_whole_model(tiny_model)
        for score, whole in zip(scores, expected, strict=True):
            assert score.log_likelihood == pytest.approx(whole.log_likelihood, rel=1e-3, abs=1e-3)
    untouched, zero = score_continuations(
        tiny_model, REQUESTS, [Candidate(), Candidate(carried, 0.0)]
    )
    assert untouched == zero
