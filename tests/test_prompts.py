"""Prompts keep their template's end whatever is cut."""

from __future__ import annotations

from pathlib import Path

import pytest

from polylens.corpora import ParallelCorpus
from polylens.errors import ConfigError, CorpusError
from polylens.prompts import ParallelPrompts, choose_format, encode_parallel, require_usable
from tiny import BOS_ID, tiny_tokenizer

END = "<|im_start|>assistant\n"


def test_the_chat_template_is_applied_once() -> None:
    tokenizer = tiny_tokenizer(bos=True)
    prompts = choose_format(tokenizer).encode(tokenizer, ["Habari?"], 100)
    text = tokenizer.decode(prompts.ids[0])
    assert text == "<|im_start|>user\nHabari?<|im_end|>\n" + END
    assert BOS_ID not in prompts.ids[0]  # a template holds its own special tokens


def test_without_a_template_the_text_stays_as_it_is() -> None:
    tokenizer = tiny_tokenizer(chat_template=False, bos=True)
    prompts = choose_format(tokenizer).encode(tokenizer, ["Habari?"], 100)
    assert prompts.ids[0][0] == BOS_ID
    assert tokenizer.decode(prompts.ids[0][1:]) == "Habari?"


@pytest.mark.parametrize("max_tokens", [45, 60, 100])
def test_truncation_keeps_the_generation_prompt(max_tokens: int) -> None:
    tokenizer = tiny_tokenizer()
    text = "中文 " * 100
    prompts = choose_format(tokenizer).encode(tokenizer, [text, "short"], max_tokens)
    assert prompts.n_truncated == 1
    assert max_tokens - 4 < len(prompts.ids[0]) <= max_tokens  # as long as fits, by characters
    decoded = tokenizer.decode(prompts.ids[0])
    assert decoded.endswith("<|im_end|>\n" + END)
    assert decoded.startswith("<|im_start|>user\n中文")


def test_texts_of_which_nothing_fits_are_left_out_and_none_at_all_is_an_error() -> None:
    tokenizer = tiny_tokenizer()
    chat = choose_format(tokenizer)
    prompts = chat.encode(tokenizer, ["a text"], 5)
    assert prompts.ids == ()
    with pytest.raises(CorpusError, match=r"must fit in max_tokens.*none does in 5 tokens"):
        require_usable(prompts, "x.jsonl", 5)
    assert chat.encode(tokenizer, ["", "x"], 200).kept == (0, 1)


def test_a_template_can_be_a_file(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    file = tmp_path / "llama3.jinja"
    file.write_text("[{{ messages[0]['content'] }}]{{ '\\n\\n' }}", encoding="utf-8")
    prompts = choose_format(tokenizer, str(file)).encode(tokenizer, ["hi"], 100)
    assert tokenizer.decode(prompts.ids[0]) == "[hi]\n\n"


ROWS = [{"en": "one", "sw": "moja"}, {"en": "two", "sw": "mbili"}, {"en": "three"}]
ANSWERS = {"sw": {"moja": "ndiyo kabisa"}}


def answered(
    corpus: ParallelCorpus, max_answer_tokens: int | None, *, stand_in: bool = True
) -> ParallelPrompts:
    tokenizer = tiny_tokenizer()
    return encode_parallel(
        corpus,
        ("en", "sw"),
        choose_format(tokenizer),
        tokenizer,
        100,
        max_answer_tokens,
        stand_in=stand_in,
    )


def test_answers_follow_prompts_and_their_states_predict_them() -> None:
    tokenizer = tiny_tokenizer()
    corpus = ParallelCorpus("x", tuple(ROWS), answers=ANSWERS)
    prompts = answered(corpus, 6)
    alone = answered(corpus, None)
    assert prompts.n_answer is not None
    assert prompts.rows == alone.rows == ({"en": 0, "sw": 1}, {"en": 2, "sw": 3})
    # Its own answer where there is one, the next row's text elsewhere, at most 6 tokens of it.
    expected = ["two", "ndiyo ", "one", "moja"]
    for ids, n_answer, prompt, answer in zip(
        prompts.ids, prompts.n_answer, alone.ids, expected, strict=True
    ):
        assert n_answer == len(answer)  # a token a byte
        assert ids[: len(prompt)] == prompt
        assert len(ids) - n_answer == len(prompt) - 1  # from the prompt's last token on
        assert tokenizer.decode(ids[len(prompt) :]) == answer[:-1]
    assert prompts.without_answers() == alone


def test_answers_that_are_learned_are_the_targets_own() -> None:
    tokenizer = tiny_tokenizer()
    both = {"en": {"one": "yes"}, "sw": {"moja": "ndiyo"}}
    corpus = ParallelCorpus("x", tuple(ROWS), answers=both)
    prompts = answered(corpus, 9, stand_in=False)
    assert prompts.answers is not None
    assert [tokenizer.decode(one) for one in prompts.answers] == ["", "ndiyo<|im_end|>", "", ""]
    assert prompts.n_answer == (1, len(prompts.answers[1]), 1, 1)
    assert prompts.ids[1][-5:] == prompts.answers[1][:-1]
    assert prompts.without_answers() == answered(corpus, None)
    assert answered(ParallelCorpus("x", tuple(ROWS)), 9, stand_in=False).answers is None


def test_without_a_template_an_empty_line_parts_prompt_and_answer() -> None:
    tokenizer = tiny_tokenizer(chat_template=False, bos=True)
    prompts = encode_parallel(
        ParallelCorpus("x", tuple(ROWS)),
        ("en", "sw"),
        choose_format(tokenizer),
        tokenizer,
        100,
        4,
        stand_in=True,
    )
    assert tokenizer.decode(prompts.ids[0][1:]) == "one\n\nt"


def test_a_lone_row_without_an_answer_is_an_error() -> None:
    with pytest.raises(CorpusError, match="en has one row and no answer; add rows or answers"):
        answered(ParallelCorpus("x", (ROWS[0],)), 6)
    both = {"en": {"one": "yes"}, "sw": {"moja": "ndiyo"}}
    # The end of turn is a token of the answer.
    assert answered(ParallelCorpus("x", (ROWS[0],), answers=both), 6).n_answer == (4, 6)


@pytest.mark.parametrize(
    ("template", "message"), [("chat", "has none"), ("missing.jinja", "which is no file")]
)
def test_bad_templates(template: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_format(tiny_tokenizer(chat_template=False), template)
