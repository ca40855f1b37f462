"""A conversation with a model as it was and with what a delta or a steering makes of it.

Each side answers every message after its own answers, so that both stay consistent with themselves
and may drift apart. Nothing is printed here: `polylens chat` draws it, and so may anything else.
`Conversation.reply` is where to start.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from polylens.detection import LanguageDetector
from polylens.errors import UsageError
from polylens.evaluation.fidelity import detect_answers
from polylens.evaluation.generation import stream_answer
from polylens.evaluation.scoring import Candidate
from polylens.models.loading import LanguageModel
from polylens.prompts import choose_format

SideName = Literal["before", "after"]
SIDES: tuple[SideName, SideName] = ("before", "after")


@dataclass(frozen=True)
class Reply:
    """What one side answered.

    Attributes:
        answer: without special tokens or surrounding white space.
        language: as detected; "unknown" if too short to judge, "empty" without any text.
        n_tokens: of the answer.
        is_cut: it was ended by the limit of its length.
        seconds: from the prompt to the last token; replies that differ in it alone are equal.
        n_forgotten: earliest turns that the model was not given, since its context is too short.
    """

    answer: str
    language: str
    n_tokens: int
    is_cut: bool
    seconds: float = field(compare=False)
    n_forgotten: int = 0


def answer_prompt(
    model: LanguageModel,
    ids: Sequence[int],
    detector: LanguageDetector,
    *,
    max_new_tokens: int,
    on_text: Callable[[str], None] = lambda text: None,
) -> Reply:
    """Let a model, changed as it may be at the time, answer a prompt greedily.

    Args:
        model: the model.
        ids: the prompt's tokens.
        detector: tells the answer's language.
        max_new_tokens: longest answer.
        on_text: told the answer while it grows.
    """
    start = time.perf_counter()
    answer, n_tokens = stream_answer(
        model, tuple(ids), max_new_tokens=max_new_tokens, on_text=on_text
    )
    seconds = time.perf_counter() - start
    (language,) = detect_answers([answer], detector)
    return Reply(answer, language, n_tokens, n_tokens == max_new_tokens, seconds)


@dataclass(frozen=True)
class Turn:
    """A message and its answers.

    Attributes:
        message: what both sides were told.
        strength: of the change on the side "after".
        replies: of the sides that were asked.
    """

    message: str
    strength: float
    replies: Mapping[SideName, Reply]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; how long it took, which differs every time, is left out."""
        said: dict[str, Any] = {
            side: {
                "answer": reply.answer,
                "language": reply.language,
                "n_tokens": reply.n_tokens,
                "is_cut": reply.is_cut,
            }
            for side, reply in self.replies.items()
        }
        return {"prompt": self.message, **said, "strength": self.strength}


class Listener(Protocol):
    """Told an answer while it grows."""

    def __call__(self, side: SideName, text: str) -> None:
        """Take note of all that a side has said so far in this turn."""


def _ignore(side: SideName, text: str) -> None:
    """Say nothing."""


class Conversation:
    """Two sides of one model that are told the same.

    Args:
        model: the model.
        after: a delta or a steering, with its strength.
        detector: tells the languages of answers.
        template: "auto", "chat", "plain" or a Jinja file.
        max_new_tokens: longest answer, in tokens.

    Attributes:
        model: the untouched model; between turns it is bit for bit what it was.
        after: the change of the other side; may be replaced between turns.
        detector: tells the languages of answers; may be replaced too.
        turns: so far, oldest first.
        has_template: False for a base model, which is given the texts parted by empty lines.

    Raises:
        ConfigError: no such template.
    """

    def __init__(
        self,
        model: LanguageModel,
        after: Candidate,
        *,
        detector: LanguageDetector,
        template: str = "auto",
        max_new_tokens: int = 256,
    ) -> None:
        self.model = model
        self.after = after
        self.detector = detector
        self.turns: list[Turn] = []
        self._format = choose_format(model.tokenizer, template)
        self._max_new_tokens = max_new_tokens
        self.has_template = self._format.template is not None

    def reply(
        self, message: str, *, sides: Sequence[SideName] = SIDES, on_text: Listener = _ignore
    ) -> Turn:
        """Let sides answer a message, one after the other, greedily.

        A side that is not asked does not learn of the message. Where a callback raises, or the
        user interrupts, the conversation is what it was before the message.

        Args:
            message: some text.
            sides: that are asked.
            on_text: told each answer while it grows.

        Returns:
            The turn, which is now the last of `turns`.

        Raises:
            UsageError: the message is empty, or does not fit in the model's context; or the change
                is one of another model.
        """
        if not message.strip():
            raise UsageError("a message must hold some text, got none; write one")
        # Before any answer, so that a faulty message costs none.
        prompts = {side: self._prompt(side, message) for side in sides}
        # One batch cannot hold both sides: `generate` runs all rows through the same weights, and
        # they differ in the crown. With the trunk's layers run for both rows and the crown's for
        # each, a step would read the trunk's weights once (SmolLM2-135M, 48 tokens, one core: 5.1 s
        # for two rows at once, 3.2 to 4.3 s for one). It would take a decoder of our own with its
        # caches, for each way in which layers use their weights; and after the first turn the
        # histories differ, so rows would be padded, and a strength of 0 would no longer give the
        # same bits on both sides.
        replies = {
            side: self._answer(side, ids, n_forgotten, on_text)
            for side, (ids, n_forgotten) in prompts.items()
        }
        turn = Turn(message, self.after.strength, replies)
        self.turns.append(turn)
        return turn

    def reset(self) -> None:
        """Begin anew."""
        self.turns.clear()

    def _prompt(self, side: SideName, message: str) -> tuple[tuple[int, ...], int]:
        """Return a side's history and the message as token ids, and the turns that did not fit."""
        own = [(turn.message, turn.replies[side]) for turn in self.turns if side in turn.replies]
        texts = [text for asked, reply in own for text in (asked, reply.answer)]
        context = self.model.context_length
        for n_forgotten in range(len(own) + 1):
            given = [*texts[2 * n_forgotten :], message]
            ids = self._format.encode_conversation(self.model.tokenizer, given)
            if context is None or len(ids) + self._max_new_tokens <= context:
                return ids, n_forgotten
        raise UsageError(
            f"a message and its answer must fit in the model's context of {context} tokens, but "
            f"take {len(ids)} and up to {self._max_new_tokens}; shorten the message, or allow only "
            "a shorter answer"
        )

    def _answer(
        self, side: SideName, ids: tuple[int, ...], n_forgotten: int, on_text: Listener
    ) -> Reply:
        candidate = self.after if side == "after" else Candidate()
        with candidate.applied(self.model.structure):
            reply = answer_prompt(
                self.model,
                ids,
                self.detector,
                max_new_tokens=self._max_new_tokens,
                on_text=lambda text: on_text(side, text),
            )
        return dataclasses.replace(reply, n_forgotten=n_forgotten)
