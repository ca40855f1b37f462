"""lm-eval's tasks through our engine give what its own Hugging Face backend gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from polylens.errors import UsageError
from polylens.evaluation.harness import CrownsLM, run_task
from polylens.evaluation.scoring import Candidate
from polylens.evaluation.tasks import TaskSpec, task_config
from polylens.models.loading import LanguageModel
from test_crown import random_delta

ROWS = [
    {"text": f"the {animal} sat on the {place}", "choices": ["mat", "high hill", "b"], "gold": gold}
    for gold, (animal, place) in enumerate([("cat", "old"), ("dog", "grey"), ("hen", "b")])
]

LIKELIHOOD = task_config(
    "choice",
    ROWS,
    output_type="multiple_choice",
    doc_to_text="text",
    doc_to_choice="choices",
    doc_to_target="gold",
    metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
)
ROLLING = task_config(
    "rolling",
    ROWS,
    output_type="loglikelihood_rolling",
    doc_to_text="",
    doc_to_target="text",
    metric_list=[{"metric": "bits_per_byte"}],
)
REPLY = task_config(
    "reply",
    ROWS,
    output_type="generate_until",
    doc_to_text="text",
    doc_to_target="text",
    generation_kwargs={"until": ["x"], "do_sample": False, "max_gen_toks": 12},
    metric_list=[{"metric": "exact_match"}],
)


def by_lm_eval(model: LanguageModel, config: dict[str, Any], chat: bool) -> list[Any]:
    lm = HFLM(pretrained=model.causal_lm, tokenizer=model.tokenizer, batch_size=2)
    tasks = TaskManager(include_defaults=False).load([config])
    results = lm_eval.evaluate(lm, tasks, bootstrap_iters=0, apply_chat_template=chat)
    return list(results["samples"][config["task"]])


@pytest.mark.parametrize("chat", [False, True])
def test_likelihoods_and_accuracy_agree(llama: LanguageModel, chat: bool) -> None:
    delta = random_delta(llama)
    lm = CrownsLM(llama, [Candidate(), Candidate(delta)])
    (run,) = run_task(lm, TaskSpec("choice", "en", chat, LIKELIHOOD))
    assert run.task.metric == "acc"
    for candidate, examples in zip(lm.candidates, run.examples, strict=True):
        with candidate.applied(llama.structure):
            expected = by_lm_eval(llama, LIKELIHOOD, chat)
        for ours, theirs in zip(examples, expected, strict=True):
            assert ours.value == theirs["acc"]
            assert ours.prompt == theirs["arguments"][0][0]
            for (ours_ll, ours_greedy), (ll, greedy) in zip(
                ours.responses, theirs["filtered_resps"], strict=True
            ):
                assert ours_ll == pytest.approx(ll, abs=1e-3)
                assert ours_greedy == greedy


def test_one_trunk_pass_serves_all_candidates(
    llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = random_delta(llama)
    passes: list[int] = []
    from polylens import states_cache

    whole = states_cache.collect_hidden_states
    monkeypatch.setattr(
        states_cache, "collect_hidden_states", lambda *a, **k: passes.append(1) or whole(*a, **k)
    )
    strengths = [Candidate(delta, strength=k / 4) for k in range(5)]
    run_task(CrownsLM(llama, strengths), TaskSpec("choice", "en", False, LIKELIHOOD))
    assert len(passes) == 1


def test_rolling_likelihoods_agree(llama: LanguageModel) -> None:
    lm = CrownsLM(llama)
    requests = [lm_eval.api.instance.Instance("loglikelihood_rolling", {}, (t,), 0) for t in TEXTS]
    ours = lm.loglikelihood_rolling(requests, disable_tqdm=True)
    theirs = HFLM(
        pretrained=llama.causal_lm, tokenizer=llama.tokenizer, batch_size=1
    ).loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours == pytest.approx(theirs, abs=1e-3)


TEXTS = [ROWS[0]["text"], "x", "longer than the window of the model " * 20]


def test_replies_agree(llama: LanguageModel) -> None:
    lm = CrownsLM(llama, [Candidate(), Candidate(random_delta(llama))])
    (run,) = run_task(lm, TaskSpec("reply", None, False, REPLY))
    for candidate, examples in zip(lm.candidates, run.examples, strict=True):
        with candidate.applied(llama.structure):
            expected = by_lm_eval(llama, REPLY, False)
        for ours, theirs in zip(examples, expected, strict=True):
            assert ours.responses[0] == theirs["filtered_resps"][0].strip()
            assert ours.value == theirs["exact_match"]


def test_sampling_is_refused(llama: LanguageModel) -> None:
    config = {**REPLY, "generation_kwargs": {"do_sample": True, "temperature": 0.7}}
    with pytest.raises(UsageError, match="must be greedy"):
        run_task(CrownsLM(llama), TaskSpec("reply", None, False, config))


def test_data_that_cannot_be_had_are_told(llama: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"hf download --repo-type dataset"):
        run_task(CrownsLM(llama), TaskSpec("belebele_swh_Latn", "sw", False, "belebele_swh_Latn"))


def test_a_copy_of_a_hub_data_set_is_read_from_the_data_folder(
    llama: LanguageModel, tmp_path: Path
) -> None:
    folder = tmp_path / "facebook" / "belebele"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: swh_Latn\n  data_files:\n  - split: test\n"
        "    path: data/swh_Latn.jsonl\n---\n"
    )
    (folder / "data" / "swh_Latn.jsonl").write_text(
        '{"flores_passage": "Habari.", "question": "Nini?", "mc_answer1": "a", "mc_answer2": "b", '
        '"mc_answer3": "c", "mc_answer4": "d", "correct_answer_num": "2"}\n' * 3
    )
    spec = TaskSpec("belebele_swh_Latn", "sw", False, "belebele_swh_Latn")
    (run,) = run_task(CrownsLM(llama), spec, data_dir=tmp_path, limit=2)
    assert len(run.examples[0]) == 2
    assert "Habari." in run.examples[0][0].prompt


def test_examples_are_divided_without_loss(llama: LanguageModel) -> None:
    lm = CrownsLM(llama)
    spec = TaskSpec("choice", "en", False, LIKELIHOOD)
    (whole,) = run_task(lm, spec)
    for first in (0, 1):
        (half,) = run_task(lm, spec, every=(first, 2))
        expected = whole.examples[0][first::2]
        assert [one.key for one in half.examples[0]] == [one.key for one in expected]
        assert [one.value for one in half.examples[0]] == [one.value for one in expected]
    (limited,) = run_task(lm, spec, every=(0, 2), limit=1)
    assert [one.key for one in limited.examples[0]] == [whole.examples[0][0].key]
