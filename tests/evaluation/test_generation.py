import copy

import pytest
import torch
from transformers import GenerationConfig

from polylens.evaluation.generation import generate_answers
from polylens.models.loading import LanguageModel
from tiny import BOS_ID, EOS_ID, PAD_ID, SPECIAL_TOKENS

N_NEW = 12


def _prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    first = len(SPECIAL_TOKENS)
    return [
        torch.randint(first, 261, (n,), generator=generator).tolist() for n in (5, 1, 19, 8, 8, 2)
    ]


def _one_by_one(model: LanguageModel, prompts: list[list[int]], penalty: float = 1.0) -> list[str]:
    """What transformers answers to each prompt alone, without padding."""
    settings = GenerationConfig(
        max_new_tokens=N_NEW,
        do_sample=False,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        repetition_penalty=penalty,
    )
    answers = []
    for ids in prompts:
        input_ids = torch.tensor([ids])
        output = model.causal_lm.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=settings,
        )
        new = output[0, len(ids) :]
        answers.append(model.tokenizer.decode(new, skip_special_tokens=True).strip())
    return answers


@pytest.mark.parametrize("token_budget", [1, 4096])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_batches_and_padding_do_not_change_answers(tiny_model, token_budget, penalty):
    prompts = _prompts()
    answers = generate_answers(
        tiny_model,
        prompts,
        max_new_tokens=N_NEW,
        repetition_penalty=penalty,
        token_budget=token_budget,
    )
    assert answers == _one_by_one(tiny_model, prompts, penalty)
    assert len(set(answers)) > 1


def test_pads_are_not_penalised_and_a_penalty_matters(llama):
    prompts = _prompts()
    plain, penalised = (
        generate_answers(llama, prompts, max_new_tokens=N_NEW, repetition_penalty=penalty)
        for penalty in (1.0, 3.0)
    )
    assert penalised == _one_by_one(llama, prompts, 3.0) != plain


def test_the_models_own_generation_settings_are_left_out_and_left_alone(llama):
    expected = generate_answers(llama, _prompts(), max_new_tokens=N_NEW)
    settings = llama.causal_lm.generation_config
    settings.do_sample, settings.temperature, settings.top_k = True, 5.0, 3
    settings.repetition_penalty, settings.no_repeat_ngram_size = 9.0, 1
    settings.suppress_tokens = list(range(5, 200))
    settings.min_new_tokens, settings.max_length = 2, 3
    kept = copy.deepcopy(settings)
    assert generate_answers(llama, _prompts(), max_new_tokens=N_NEW) == expected
    assert llama.causal_lm.generation_config is settings
    assert settings.to_dict() == kept.to_dict()


def test_an_answer_ends_at_any_stop_token(llama):
    prompt = _prompts()[0]
    llama.causal_lm.generation_config.eos_token_id = None
    input_ids = torch.tensor([prompt])
    new = llama.causal_lm.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=N_NEW,
        do_sample=False,
        pad_token_id=PAD_ID,
    )[0, len(prompt) :].tolist()
    stop = new[4]
    llama.causal_lm.generation_config.eos_token_id = [BOS_ID, stop]
    (answer,) = generate_answers(llama, [prompt], max_new_tokens=N_NEW)
    before_stop = new[: new.index(stop)]
    assert answer == llama.tokenizer.decode(before_stop, skip_special_tokens=True).strip()


def test_it_works_without_a_pad_token(llama):
    expected = generate_answers(llama, _prompts(), max_new_tokens=N_NEW)
    llama.tokenizer.pad_token = None
    assert generate_answers(llama, _prompts(), max_new_tokens=N_NEW) == expected


def test_it_prints_nothing(llama, capfd, caplog, recwarn):
    llama.causal_lm.generation_config.temperature = 0.7  # greedy decoding warns of it
    generate_answers(llama, _prompts(), max_new_tokens=2)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert not recwarn.list


def test_progress_counts_answers(llama):
    told = []
    generate_answers(
        llama,
        _prompts(),
        max_new_tokens=1,
        token_budget=20,
        progress=lambda done, total, what: told.append((done, total, what)),
    )
    assert told[0] == (0, 6, "answers")
    assert told[-1] == (6, 6, "answers")
    assert len(told) > 2
    assert generate_answers(llama, [], max_new_tokens=1) == []
