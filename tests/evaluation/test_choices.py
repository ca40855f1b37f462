"""Choices: the log odds are the whole model's own, in both orders."""

from __future__ import annotations

import pytest
import torch

from polylens.corpora import starter_corpus
from polylens.evaluation.choices import Choice, encode_choices, measure_choices
from polylens.evaluation.comparison import Heldout
from polylens.evaluation.letters import right_shares
from polylens.evaluation.scoring import Candidate
from polylens.evaluation.suite import BUILT_IN, CHOICES, Suite, run_suite
from polylens.models.loading import LanguageModel
from polylens.prompts import choose_format, encode_parallel
from test_crown import random_delta


def choices_of(model: LanguageModel, language: str = "en") -> tuple[Choice, ...]:
    return encode_choices(language, choose_format(model.tokenizer, "auto"), model.tokenizer)


def test_a_question_stands_with_its_own_answer_first_and_second(llama: LanguageModel) -> None:
    found = choices_of(llama, "sw")
    corpus = starter_corpus()
    rows = corpus.split(corpus.n_heldout)[1].rows
    assert [one.row for one in found] == list(range(len(rows)))
    asked = [[llama.tokenizer.decode(ids) for ids in one.prompts] for one in found]
    for number, (as_a, as_b) in enumerate(asked):
        right = corpus.answer("sw", rows[number]["sw"])
        wrong = corpus.answer("sw", rows[(number + 1) % len(rows)]["sw"])
        assert rows[number]["sw"] in as_a
        assert f"A. {right}\nB. {wrong}\n" in as_a
        assert f"A. {wrong}\nB. {right}\n" in as_b


def test_log_odds_are_those_of_the_whole_model(llama: LanguageModel) -> None:
    delta, chosen = random_delta(llama, 0.1), choices_of(llama)[:3]
    run = measure_choices(llama, [Candidate(), Candidate(delta, 0.5)], "en", chosen)
    assert (run.task.name, run.task.higher_is_better) == ("choices_en", True)
    for number, strength in enumerate((0.0, 0.5)):
        expected = []
        with torch.no_grad(), delta.applied(llama.structure, strength):
            for one in chosen:
                (a,), (b,) = one.letters
                odds = []
                for ids, sign in zip(one.prompts, (1, -1), strict=True):
                    logits = llama.causal_lm(torch.tensor([ids])).logits[0, -1].double()
                    odds.append(sign * float(logits[a] - logits[b]))
                expected.append(odds)
        found = [e.log_odds or () for e in run.examples[number]]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))
        assert [e.value for e in run.examples[number]] == right_shares(found)
    assert run.examples[0] != run.examples[1]


def test_without_a_template_an_empty_line_parts_letter_and_question(llama: LanguageModel) -> None:
    """Letters may then be several tokens; those that they share cancel out."""
    style, tokenizer = choose_format(llama.tokenizer, "plain"), llama.tokenizer
    one, *_ = encode_choices("en", style, tokenizer)
    assert [tokenizer.decode(ids) for ids in one.letters] == ["\n\nA", "\n\nB"]
    shared = [a for a, b in zip(*one.letters, strict=True) if a == b]
    assert len(shared) == len(one.letters[0]) - 1 > 0
    run = measure_choices(llama, [Candidate()], "en", [one])
    odds = []
    with torch.no_grad():
        for ids, sign in zip(one.prompts, (1, -1), strict=True):
            logits = llama.causal_lm(torch.tensor([[*ids, *shared]])).logits[0, -1].double()
            odds.append(sign * float(logits[one.letters[0][-1]] - logits[one.letters[1][-1]]))
    (example,) = run.examples[0]
    assert example.log_odds == pytest.approx(odds, rel=1e-4)


def test_questions_that_the_model_cannot_hold_are_left_out(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = sorted(max(map(len, one.prompts)) for one in choices_of(llama))
    monkeypatch.setattr(llama.tokenizer, "model_max_length", lengths[20])
    left = choices_of(llama)
    assert len(left) == sum(length <= lengths[20] for length in lengths) < len(lengths)
    assert all(len(ids) <= lengths[20] for one in left for ids in one.prompts)


def test_a_language_without_answers_has_none(llama: LanguageModel) -> None:
    assert choices_of(llama, "hi") == ()
    rows = starter_corpus().select(("en", "sw")).split(2)[1]
    style = choose_format(llama.tokenizer, "auto")
    prompts = encode_parallel(rows, ("en", "sw"), style, llama.tokenizer, 128)
    heldout = Heldout(rows, prompts, rows.to_corpus().texts, "en", ("sw",))
    told: list[str] = []
    suite = Suite(BUILT_IN, (), heldout, max_new_tokens=2)
    assert CHOICES not in dict(run_suite(llama, [Candidate()], suite, on_part=told.append))
    assert CHOICES not in told
