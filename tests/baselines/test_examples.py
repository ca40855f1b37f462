"""What the baselines train on, and what stands before a question."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from polylens.baselines import FewShotSettings, SupervisedSettings, few_shot_template, read_examples
from polylens.baselines.pretraining import encode_texts
from polylens.baselines.supervised import encode_pairs
from polylens.corpora import AnsweredCorpus
from polylens.errors import ConfigError, CorpusError
from polylens.prompts import PromptFormat, choose_format
from tiny import EOS_ID, tiny_tokenizer

PAIRS = [("Habari?", "Nzuri."), ("Maji ni nini?", "Kinywaji.")]


def jsonl(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


ANSWERED: dict[str, Callable[[Path], object]] = {
    "long.jsonl": lambda p: p.write_text(
        jsonl([{"language": "swh", "prompt": a, "answer": f" {b}\n"} for a, b in PAIRS])
    ),
    "sw.json": lambda p: p.write_text(
        json.dumps([{"instruction": a, "input": "", "output": b} for a, b in PAIRS])
    ),
    "columns.jsonl": lambda p: p.write_text(
        jsonl([{"id": 1, "input_sw": a, "output_sw": b, "input_bn": "x"} for a, b in PAIRS])
    ),
    "sharegpt.jsonl": lambda p: p.write_text(
        jsonl(
            [
                {
                    "lang": "Swahili",
                    "conversations": [
                        {"from": "system", "value": "Be kind."},
                        {"from": "human", "value": a},
                        {"from": "gpt", "value": b},
                        {"from": "human", "value": "more"},
                    ],
                }
                for a, b in PAIRS
            ]
        )
    ),
    "messages.sw.jsonl": lambda p: p.write_text(
        jsonl(
            [
                {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
                for a, b in PAIRS
            ]
        )
    ),
}


@pytest.mark.parametrize("name", ANSWERED)
def test_every_layout_of_answers_gives_the_same_pairs(name: str, tmp_path: Path) -> None:
    ANSWERED[name](tmp_path / name)
    corpus = read_examples(tmp_path / name, ["sw"])
    assert corpus.pairs == {"sw": tuple(PAIRS)}


def test_parallel_texts_become_translations(tmp_path: Path) -> None:
    (tmp_path / "en.txt").write_text("Water\nBread\n")
    (tmp_path / "sw.txt").write_text("Maji\nMkate\n")
    corpus = read_examples(tmp_path, ["sw"])
    assert corpus.pairs["sw"][1] == ("Translate into Swahili: Bread", "Mkate")
    assert corpus.pairs["en"][1] == ("Translate into English: Mkate", "Bread")
    with pytest.raises(CorpusError, match="has none in bn"):
        read_examples(tmp_path, ["sw", "bn"])


def test_of_the_starter_corpus_no_held_out_row_is_trained_on() -> None:
    assert len(read_examples("starter", ["sw"]).pairs["sw"]) == 128 - 32


def test_the_answer_is_predicted_after_the_prompt_of_the_evaluation() -> None:
    tokenizer = tiny_tokenizer()
    chat = choose_format(tokenizer)
    settings = SupervisedSettings(max_tokens=100, max_answer_tokens=9)
    rows = encode_pairs({"sw": PAIRS}, chat, tokenizer, settings)
    for ids, n_scored, prompt, answer in zip(
        rows.ids,
        rows.n_scored,
        chat.encode(tokenizer, [prompt for prompt, _ in PAIRS], 100).ids,
        ["Nzuri.<|im_end|>", "Kinywaji."],  # the second loses its end
        strict=True,
    ):
        assert ids[:-n_scored] == prompt
        assert tokenizer.decode(ids[-n_scored:]) == answer
    plain = encode_pairs({"sw": PAIRS}, PromptFormat(None, "plain"), tokenizer, settings)
    assert tokenizer.decode(plain.ids[0]) == "Habari?\n\nNzuri.</s>"
    assert plain.n_scored[0] == len("\n\nNzuri.") + 1


def test_a_template_that_does_not_go_on_from_its_prompt_still_ends_the_answer() -> None:
    tokenizer = tiny_tokenizer()
    odd = PromptFormat("{{ messages | length }}{% if add_generation_prompt %}?{% endif %}", "odd")
    assert odd.render_answer(tokenizer, "Habari?", "Nzuri.") == "Nzuri.</s>"


@pytest.mark.parametrize("bos", [False, True])
def test_every_token_of_a_text_but_the_first_is_predicted_once(bos: bool) -> None:
    tokenizer = tiny_tokenizer(bos=bos)
    text = "Habari ya asubuhi, bwana?"
    rows = encode_texts({"sw": [text]}, tokenizer, max_tokens=7)
    scored = [
        token
        for ids, n_scored in zip(rows.ids, rows.n_scored, strict=True)
        for token in ids[-n_scored:]
    ]
    assert scored == [*tokenizer(text)["input_ids"], EOS_ID][1:]
    for ids, n_scored in zip(rows.ids, rows.n_scored, strict=True):
        assert n_scored == len(ids) - 1 <= 6
    for one, following in itertools.pairwise(rows.ids):
        assert one[-1] == following[0]
    assert encode_texts({"sw": [text, text]}, tokenizer, 7).ids == rows.ids * 2


def test_shots_are_what_the_model_itself_would_have_said() -> None:
    tokenizer = tiny_tokenizer()
    tricky = [('Say "{{ x }}"\n', "It's %} 👍\\n"), ("Maji?", "{% raw %}")]
    corpus = AnsweredCorpus.make("tricky", {"sw": tricky})
    template = few_shot_template(tokenizer, corpus, "sw", settings=FewShotSettings(shots=2))
    rendered = PromptFormat(template, "file").render(tokenizer, "Swali langu")
    turns = []
    for index in (0, 1) if rendered.index("{{ x }}") < rendered.index("Maji?") else (1, 0):
        prompt, answer = tricky[index]
        turns.append({"role": "user", "content": prompt})
        turns.append({"role": "assistant", "content": answer})
    turns.append({"role": "user", "content": "Swali langu"})
    assert rendered == tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True
    )


def test_shots_that_cannot_be() -> None:
    corpus = AnsweredCorpus.make("two", {"sw": PAIRS})
    with pytest.raises(ConfigError, match="needs a model with a chat template"):
        few_shot_template(tiny_tokenizer(chat_template=False), corpus, "sw")
    with pytest.raises(CorpusError, match="3 examples of two in sw must fit in 384 tokens, but on"):
        few_shot_template(tiny_tokenizer(), corpus, "sw")
    with pytest.raises(CorpusError, match="but only 0 do"):
        few_shot_template(
            tiny_tokenizer(), corpus, "sw", settings=FewShotSettings(shots=1, max_tokens=5)
        )
