"""Asking a judge behind an OpenAI-compatible endpoint, and keeping what it says.

Every judgement is a line of a file as soon as it arrives, under a hash of the judge's name, what
is asked and the prompt; `ask_all` asks what is not there yet. What is asked is
`polylens.evaluation.verdicts`'s.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from polylens.artefacts import parse_json, readable_storage_errors
from polylens.errors import CorruptFileError, MissingExtraError, UsageError
from polylens.evaluation.verdicts import READERS, JudgeQuestion
from polylens.progress import Progress, silent

if TYPE_CHECKING:
    from openai import APIError, AsyncOpenAI

KEY_VARIABLE = "OPENAI_API_KEY"

_LONGEST_MESSAGE = 200  # characters of a server's own words that an error repeats

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judge:
    """A model that judges, and how it is asked.

    Attributes:
        endpoint: base URL of an OpenAI-compatible server, e.g. "http://localhost:8000/v1".
        model: its name there.
        parallel: requests at a time, at least 1.
        max_retries: times that a request is sent again after 429, 5xx or a timeout, at least 0;
            the client waits longer each time, or as long as the server asks, up to two minutes.
        timeout_seconds: longest wait for an answer.
        input_price: of a million prompt tokens, in any currency; None does not tell.
        output_price: of a million tokens of answers.
        temperature: of sampling; left out for servers that refuse it, as are the next two.
        seed: of sampling.
        max_tokens: longest judgement.

    Raises:
        UsageError: a value is out of range; all faults are in the message.
    """

    endpoint: str
    model: str
    parallel: int = 4
    max_retries: int = 5
    timeout_seconds: float = 600.0
    input_price: float | None = None
    output_price: float | None = None
    temperature: float = 0.0
    seed: int = 0
    max_tokens: int = 2048

    def __post_init__(self) -> None:
        faults = []
        try:
            address = urlsplit(self.endpoint)
            is_address = address.scheme in ("http", "https") and bool(address.hostname)
            _ = address.port
        except ValueError:
            is_address = False
        if not is_address:
            faults.append(
                f"the endpoint must be like http://localhost:8000/v1, got {self.endpoint!r}"
            )
        if not self.model.strip():
            faults.append("the judge's model must be named")
        if self.parallel < 1:
            faults.append(f"parallel must be at least 1, got {self.parallel}")
        if self.max_retries < 0:
            faults.append(f"max_retries must be at least 0, got {self.max_retries}")
        if not 0 < self.timeout_seconds < float("inf"):
            faults.append(f"timeout_seconds must be above 0, got {self.timeout_seconds}")
        prices = (self.input_price, self.output_price)
        if (prices[0] is None) != (prices[1] is None) or any((p or 0) < 0 for p in prices):
            faults.append(f"both prices must be at least 0, or neither given, got {prices}")
        if faults:
            raise UsageError("; ".join(faults) + "; mend this and run again")


class Judgements:
    """The judgements so far: one line of JSON each, appended and synced.

    A line that a kill cut short does not count, and is cut off before the next one is written.

    Raises:
        CorruptFileError: another line is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: dict[str, dict[str, Any]] = {}
        if not path.exists():
            return
        with readable_storage_errors(path):
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                os.truncate(path, len(whole))
        try:
            for line in whole.decode("utf-8").split("\n"):
                if line:
                    judgement = parse_json(line)
                    if not {"reply", "input_tokens", "output_tokens"} <= judgement.keys():
                        raise ValueError("a line lacks the reply or its tokens")
                    if not isinstance(judgement["reply"], str):
                        raise ValueError("a reply is no text")
                    self._lines[judgement["key"]] = judgement
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptFileError(
                f"{path} must hold one judgement a line, but is damaged ({error!r}); mend or "
                "delete it and run again"
            ) from error

    def __len__(self) -> int:
        return len(self._lines)

    def get(self, key: str) -> dict[str, Any] | None:
        """Return a judgement, or None if it is not there."""
        return self._lines.get(key)

    def add(self, judgement: dict[str, Any]) -> None:
        """Keep a judgement; it is on the disk when this returns."""
        with readable_storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(json.dumps(judgement, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        self._lines[judgement["key"]] = judgement

    def newest(self, n: int) -> list[dict[str, Any]]:
        """Return the last `n`."""
        return list(self._lines.values())[len(self) - n :]

    def verdict(self, judge: Judge, question: JudgeQuestion) -> float | str | None:
        """Return a question's verdict; None if its judgements hold none, or are not there."""
        for prompt in question.wordings:
            judgement = self.get(judgement_key(judge, question, prompt))
            verdict = None if judgement is None else READERS[question.mode](judgement["reply"])
            if verdict is not None:
                return verdict
        return None


def judgement_key(judge: Judge, question: JudgeQuestion, prompt: str) -> str:
    """Return what a judgement is kept under.

    Args:
        judge: who is asked.
        question: what.
        prompt: one of the question's wordings.
    """
    plain = json.dumps([judge.model, question.mode, prompt])
    return hashlib.sha256(plain.encode()).hexdigest()


def ask_all(
    judge: Judge,
    questions: Sequence[JudgeQuestion],
    kept: Judgements,
    progress: Progress = silent,
) -> None:
    """Ask the judge everything that is not kept; an answer without a verdict is asked for again.

    Args:
        judge: who is asked.
        questions: what; those with the same prompt are one.
        kept: takes each judgement.
        progress: told the questions done.

    Raises:
        UsageError: the judge cannot be reached, or refuses.
        MissingExtraError: the client is not installed.
    """
    distinct = {judgement_key(judge, one, one.prompt): one for one in questions}
    left = [
        one
        for one in distinct.values()
        if kept.verdict(judge, one) is None
        and any(kept.get(judgement_key(judge, one, prompt)) is None for prompt in one.wordings)
    ]
    n_done = len(distinct) - len(left)

    def count() -> None:
        nonlocal n_done
        progress(n_done, len(distinct), "judgements")
        n_done += 1

    count()
    if left:
        asyncio.run(_ask(judge, left, kept, count))


async def _ask(
    judge: Judge,
    questions: Sequence[JudgeQuestion],
    kept: Judgements,
    on_done: Callable[[], None],
) -> None:
    """Ask some questions, a few at a time; the first error, or Ctrl-C, ends all of them."""
    try:
        from openai import APIError, AsyncOpenAI
    except ImportError as error:
        raise MissingExtraError("openai", "judge", "judging answers") from error
    client = AsyncOpenAI(
        base_url=judge.endpoint,
        api_key=os.environ.get(KEY_VARIABLE) or "none",  # local servers ask for none
        max_retries=judge.max_retries,
        timeout=judge.timeout_seconds,
    )
    connection = _Connection(client, judge, kept)
    waiting = iter(questions)  # shared by the workers

    async def work() -> None:
        for question in waiting:
            await connection.settle(question)
            on_done()

    async with client:
        workers = [asyncio.create_task(work()) for _ in range(judge.parallel)]
        try:
            await asyncio.gather(*workers)
        except APIError as error:
            raise _explain(error, judge, kept) from error
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


class _Connection:
    """A client of a judge's endpoint, which sends failed requests again by itself."""

    def __init__(self, client: AsyncOpenAI, judge: Judge, kept: Judgements) -> None:
        self._client = client
        self._judge = judge
        self._kept = kept
        self._options: dict[str, Any] = {
            "temperature": judge.temperature,
            "seed": judge.seed,
            "max_tokens": judge.max_tokens,
        }

    async def settle(self, question: JudgeQuestion) -> None:
        """Ask a question, and once more in firmer words if the answer holds no verdict."""
        read = READERS[question.mode]
        for prompt in question.wordings:
            key = judgement_key(self._judge, question, prompt)
            judgement = self._kept.get(key)
            if judgement is None:
                said = await self._request(prompt)
                judgement = {
                    "key": key,
                    "judge": self._judge.model,
                    "mode": question.mode,
                    "about": question.label,
                    "verdict": read(said["reply"]),
                    **said,
                }
                self._kept.add(judgement)
            if read(judgement["reply"]) is not None:
                return

    async def _request(self, prompt: str) -> dict[str, Any]:
        from openai import BadRequestError

        while True:
            options = dict(self._options)
            try:
                answer: Any = await self._client.chat.completions.create(
                    model=self._judge.model,
                    messages=[{"role": "user", "content": prompt}],
                    **options,
                )
            except BadRequestError as error:
                if error.param not in options:
                    raise
                if self._options.pop(error.param, None) is not None:  # else another worker did
                    _log.warning(
                        "%s refuses %s; going on without it", self._judge.model, error.param
                    )
                continue
            try:
                reply, usage = answer.choices[0].message.content, answer.usage
            except (AttributeError, IndexError, TypeError):
                raise UsageError(
                    "the judge must answer as OpenAI's chat completions do, but "
                    f"{self._judge.endpoint} answered {str(answer)[:60]!r}; "
                    f"{_how_to_go_on(self._kept)}"
                ) from None
            return {
                # Half a surrogate pair, which JSON allows, could not be written.
                "reply": (reply or "").encode(errors="replace").decode(),
                "input_tokens": getattr(usage, "prompt_tokens", None),
                "output_tokens": getattr(usage, "completion_tokens", None),
            }


def _how_to_go_on(kept: Judgements) -> str:
    where = f"the {len(kept)} judgements so far are kept in {kept.path}" if len(kept) else ""
    return f"{where or 'there are no judgements so far'}; mend this and run the same command again"


def _explain(error: APIError, judge: Judge, kept: Judgements) -> UsageError:
    """Say in one sentence what a judge must do and did instead."""
    from openai import APIConnectionError, APITimeoutError

    status = getattr(error, "status_code", None)
    words = " ".join(str(error.message).split())[:_LONGEST_MESSAGE]
    if isinstance(error, APITimeoutError):
        fault = (
            f"the judge must answer within {judge.timeout_seconds:g} s, but {judge.endpoint} did "
            "not"
        )
    elif isinstance(error, APIConnectionError):
        cause = " ".join(str(error.__cause__ or words).split())[:_LONGEST_MESSAGE]
        fault = f"the judge must be reachable at {judge.endpoint}, but is not ({cause})"
    elif status in (401, 403):  # their words may repeat the key
        fault = (
            f"the key in {KEY_VARIABLE} must be one that {judge.endpoint} accepts, but it answered "
            f"{status}"
        )
    elif status == 404:
        fault = (
            f"{judge.endpoint} must serve chat completions of {judge.model!r}, but answered 404 "
            f"({words})"
        )
    else:
        fault = (
            f"the judge must answer, but {judge.endpoint} refuses after {judge.max_retries} "
            f"retries ({words})"
        )
    return UsageError(f"{fault}; {_how_to_go_on(kept)}")
