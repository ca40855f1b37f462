"""Two sides of one model that are told the same: histories, changes, interruptions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from polylens.conversation import SIDES, Conversation, SideName
from polylens.detection import LanguageDetector
from polylens.errors import UsageError
from polylens.evaluation.generation import generate_answers
from polylens.evaluation.scoring import Candidate
from polylens.models.loading import LanguageModel, load_model, wrap_model
from polylens.prompts import choose_format
from polylens.steering import Steering, Towards
from test_cli_steer import make_subspaces
from test_crown import logits, random_delta
from tiny import build, tiny_tokenizer

N_NEW = 10
MESSAGES = ["Rain?", "Why so?", "  And then\n?"]


def talk(model: LanguageModel, after: Candidate, **settings: Any) -> Conversation:
    detector = LanguageDetector(["en", "sw"])
    settings = {"max_new_tokens": N_NEW, **settings}
    return Conversation(model, after, detector=detector, **settings)


def by_hand(model: LanguageModel, messages: list[str], after: Candidate | None) -> list[str]:
    """What a side answers, by the answers of evaluation and the tokenizer's own template."""
    history: list[dict[str, str]] = []
    answers = []
    for message in messages:
        history.append({"role": "user", "content": message})
        text = model.tokenizer.apply_chat_template(
            history, tokenize=False, add_generation_prompt=True
        )
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        with (after or Candidate()).applied(model.structure):
            (answer,) = generate_answers(model, [ids], max_new_tokens=N_NEW)
        history.append({"role": "assistant", "content": answer})
        answers.append(answer)
    return answers


def said(conversation: Conversation, side: SideName) -> list[str]:
    return [turn.replies[side].answer for turn in conversation.turns if side in turn.replies]


def test_each_side_answers_after_its_own_answers(llama: LanguageModel) -> None:
    after = Candidate(random_delta(llama), 2.0)
    before = logits(llama)
    conversation = talk(llama, after)
    for message in MESSAGES:
        conversation.reply(message)
    assert said(conversation, "before") == by_hand(llama, MESSAGES, None)
    assert said(conversation, "after") == by_hand(llama, MESSAGES, after)
    assert said(conversation, "before") != said(conversation, "after")
    assert torch.equal(logits(llama), before)


@pytest.mark.parametrize("kind", ["delta", "steering"])
def test_at_strength_0_both_sides_say_the_same(llama: LanguageModel, kind: str) -> None:
    change = (
        random_delta(llama)
        if kind == "delta"
        else Steering(make_subspaces(llama, "tiny"), [Towards("sw", 40.0)])
    )
    conversation = talk(llama, Candidate(change, 0.0))
    for message in MESSAGES:
        conversation.reply(message)
    assert said(conversation, "before") == said(conversation, "after")
    conversation.reset()
    conversation.after = Candidate(change, 2.0)
    turn = conversation.reply(MESSAGES[0])
    assert turn.strength == 2.0
    assert turn.replies["before"].answer != turn.replies["after"].answer
    assert conversation.turns == [turn]


def test_a_side_that_is_not_asked_does_not_learn_of_the_turn(llama: LanguageModel) -> None:
    after = Candidate(random_delta(llama))
    conversation = talk(llama, after)
    conversation.reply(MESSAGES[0])
    turn = conversation.reply(MESSAGES[1], sides=["after"])
    assert list(turn.replies) == ["after"]
    conversation.reply(MESSAGES[2])
    assert said(conversation, "before") == by_hand(llama, [MESSAGES[0], MESSAGES[2]], None)
    assert said(conversation, "after") == by_hand(llama, MESSAGES, after)


@pytest.mark.parametrize("stopped", SIDES)
@pytest.mark.parametrize("error", [KeyboardInterrupt, UsageError])
def test_an_interruption_leaves_no_half_turn(
    llama: LanguageModel, stopped: str, error: type[BaseException]
) -> None:
    conversation = talk(llama, Candidate(random_delta(llama)))
    conversation.reply(MESSAGES[0])
    before, turns = logits(llama), list(conversation.turns)

    def interrupt(side: str, text: str) -> None:
        if side == stopped and len(text) > 2:
            raise error

    with pytest.raises(error):
        conversation.reply(MESSAGES[1], on_text=interrupt)
    assert conversation.turns == turns
    assert torch.equal(logits(llama), before)
    conversation.reply(MESSAGES[1])
    assert said(conversation, "before") == by_hand(llama, MESSAGES[:2], None)


def test_answers_grow_and_end_as_they_are_returned(llama: LanguageModel) -> None:
    told: dict[str, list[str]] = {side: [] for side in SIDES}
    conversation = talk(llama, Candidate(random_delta(llama)))
    turn = conversation.reply("Rain?", on_text=lambda side, text: told[side].append(text))
    for side, reply in turn.replies.items():
        assert reply.n_tokens == len(told[side])
        assert reply.is_cut == (reply.n_tokens == N_NEW)
        assert reply.seconds > 0
        for text in told[side]:
            assert reply.answer.startswith(text.removesuffix("\ufffd"))
        assert reply.answer.rstrip("\ufffd").startswith(told[side][-1])


def test_a_conversation_longer_than_the_context_forgets_its_beginning(
    llama: LanguageModel,
) -> None:
    conversation = talk(llama, Candidate(random_delta(llama)))
    message = "What is the rain good for, and who has counted it? " * 2
    first = conversation.reply(message).replies["before"]
    chat = choose_format(llama.tokenizer)
    two = chat.encode_conversation(llama.tokenizer, [message, first.answer, message])
    llama.causal_lm.config.max_position_embeddings = len(two) + N_NEW
    assert conversation.reply(message).replies["before"].n_forgotten == 0
    conversation.turns.pop()
    llama.causal_lm.config.max_position_embeddings -= 1
    second = conversation.reply(message).replies["before"]
    assert second.n_forgotten == 1
    assert second.answer == first.answer
    llama.causal_lm.config.max_position_embeddings = 40
    with pytest.raises(UsageError, match="fit in the model's context of 40 tokens"):
        conversation.reply(message)
    assert len(conversation.turns) == 2


def test_without_a_template_texts_are_parted_by_empty_lines() -> None:
    model = wrap_model(build(), tiny_tokenizer(chat_template=False))
    conversation = talk(model, Candidate())
    assert not conversation.has_template
    first = conversation.reply("Rain?").replies["before"].answer
    second = conversation.reply("Why?").replies["before"].answer
    ids = model.tokenizer(f"Rain?\n\n{first}\n\nWhy?")["input_ids"]
    assert second == generate_answers(model, [ids], max_new_tokens=N_NEW)[0]


def test_faulty_messages_and_changes(llama: LanguageModel, tiny_folder: Path) -> None:
    conversation = talk(llama, Candidate())
    with pytest.raises(UsageError, match="must hold some text"):
        conversation.reply(" \n")
    other = wrap_model(build("gpt2"), tiny_tokenizer())
    conversation.after = Candidate(random_delta(other))
    with pytest.raises(UsageError, match="must have the weight"):
        conversation.reply("Rain?")
    assert conversation.turns == []


def test_a_streamed_model_says_the_same(tiny_folder: Path) -> None:
    answers = []
    for streamed in (False, True):
        model = load_model(tiny_folder, dtype="float32", streamed=streamed)
        conversation = talk(model, Candidate(random_delta(model)))
        conversation.reply("Rain?")
        answers.append([said(conversation, side) for side in SIDES])
    assert answers[0] == answers[1]
