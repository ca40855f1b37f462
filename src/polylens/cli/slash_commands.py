"""What can be switched while chatting, by lines that begin with a slash."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from polylens.conversation import SIDES, Conversation, SideName
from polylens.detection import LanguageDetector
from polylens.errors import UsageError, nearest
from polylens.evaluation.scoring import Candidate
from polylens.languages import language_name, normalize_language, normalize_languages
from polylens.steering import Steering, Towards
from polylens.subspaces import Subspaces


@dataclass
class Session:
    """A conversation, and what can be switched about it.

    Attributes:
        conversation: of both sides.
        trained: the delta at its first strength, to which `/towards` goes back; None where there is
            none.
        subspaces: for `/towards`; None where there are none.
        central: the language that is always told apart.
        shown: the sides that answer.
        is_over: after `/quit`.
    """

    conversation: Conversation
    trained: Candidate | None
    subspaces: Subspaces | None
    central: str
    shown: Sequence[SideName] = field(default=SIDES)
    is_over: bool = False

    def obey(self, line: str) -> str:
        """Carry out a command, and return what it came to.

        Args:
            line: with its slash.

        Raises:
            UsageError: no such command, or not what it takes; nothing was changed.
        """
        name, _, argument = line.removeprefix("/").strip().partition(" ")
        if name not in _COMMANDS:
            raise UsageError(
                f"a line with a slash must be a command, got {'/' + name!r}"
                f"{nearest('/' + name, ['/' + known for known in _COMMANDS])}; /help lists them, "
                "and a message may begin with a space"
            )
        return _COMMANDS[name].obey(self, argument.strip())


@dataclass(frozen=True)
class _Command:
    takes: str
    does: str
    obey: Callable[[Session, str], str]


def describe(candidate: Candidate) -> str:
    """Say what a side is, e.g. "W + 0.5 · delta"."""
    if isinstance(candidate.delta, Steering):
        pushed = [one.language for one in candidate.delta.actions if isinstance(one, Towards)]
        return f"towards {', '.join(pushed)}, {candidate.strength:g}"
    return f"W + {candidate.strength:g} · delta"


def check_strength(candidate: Candidate, strength: float) -> Candidate:
    """Return the candidate at another strength.

    Raises:
        UsageError: no such strength.
    """
    is_steering = isinstance(candidate.delta, Steering)
    if not math.isfinite(strength) or (strength < 0 and not is_steering):
        least = "finite" if is_steering else "at least 0 and finite"
        raise UsageError(f"the strength must be {least}, got {strength:g}; 1 is the usual one")
    return dataclasses.replace(candidate, strength=strength)


def push_towards(subspaces: Subspaces, language: str, strength: float) -> Candidate:
    """Return the steering towards a language.

    Raises:
        LanguageError: no such language, or it was not probed.
        UsageError: no such strength.
    """
    steering = Steering(subspaces, [Towards(normalize_language(language))])
    return check_strength(Candidate(steering), strength)


def require_subspaces(subspaces: Subspaces | None) -> Subspaces:
    """Return subspaces to push by.

    Raises:
        UsageError: there are none.
    """
    if subspaces is None:
        raise UsageError(
            "a push towards a language must have subspaces, but there are none; give the folder "
            "of a run or of a probe"
        )
    return subspaces


def languages_to_detect(languages: str, central: str) -> tuple[str, ...]:
    """Return the central language and those named, by commas.

    Raises:
        LanguageError: one is unknown.
        UsageError: there is none besides the central one.
    """
    found = tuple(dict.fromkeys((central, *normalize_languages(languages.split(",")))))
    if len(found) == 1:
        raise UsageError(
            f"the languages to tell apart must be more than {central}, got {languages!r}; name "
            "another"
        )
    return found


def _strength(session: Session, argument: str) -> str:
    try:
        strength = float(argument)
    except ValueError:
        raise UsageError(
            f"/strength must have a number, got {argument!r}; for example /strength 0.5"
        ) from None
    session.conversation.after = check_strength(session.conversation.after, strength)
    return describe(session.conversation.after)


def _towards(session: Session, argument: str) -> str:
    subspaces = require_subspaces(session.subspaces)
    conversation = session.conversation
    if argument:
        steers = isinstance(conversation.after.delta, Steering)
        strength = conversation.after.strength if steers else 1.0
        conversation.after = push_towards(subspaces, argument, strength)
    elif session.trained is None:
        others = [k for k in subspaces.languages if k != subspaces.central]
        raise UsageError(
            f"/towards must name a language where there is no delta to go back to; one of "
            f"{', '.join(others)}"
        )
    else:
        conversation.after = session.trained
    return describe(conversation.after)


def _languages(session: Session, argument: str) -> str:
    if argument:
        languages = languages_to_detect(argument, session.central)
        session.conversation.detector = LanguageDetector(languages)
    known = session.conversation.detector.languages
    return "told apart: " + ", ".join(f"{language_name(k)} ({k})" for k in known)


def _show(sides: Sequence[SideName]) -> Callable[[Session, str], str]:
    def show(session: Session, argument: str) -> str:
        session.shown = sides
        return " and ".join(sides)

    return show


def _reset(session: Session, argument: str) -> str:
    session.conversation.reset()
    return "a new conversation"


def _help(session: Session, argument: str) -> str:
    rows = [(f"/{name} {one.takes}".strip(), one.does) for name, one in _COMMANDS.items()]
    width = max(len(left) for left, _ in rows)
    return "\n".join(f"{left:{width}}  {right}" for left, right in rows)


def _quit(session: Session, argument: str) -> str:
    session.is_over = True
    return ""


_COMMANDS = {
    "strength": _Command("NUMBER", "how far: of the delta, or of the push", _strength),
    "towards": _Command("[LANGUAGE]", "push towards it instead; alone: the delta again", _towards),
    "languages": _Command("[CODES]", "which languages are told apart, by commas", _languages),
    "before": _Command("", "only the untouched model answers", _show(("before",))),
    "after": _Command("", "only the changed model answers", _show(("after",))),
    "both": _Command("", "both answer", _show(SIDES)),
    "reset": _Command("", "forget the conversation", _reset),
    "help": _Command("", "this list", _help),
    "quit": _Command("", "end; Ctrl-D does too, and Ctrl-C stops an answer", _quit),
}
