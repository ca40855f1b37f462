"""Answers before and after, at any strength: the model and its delta are loaded once and kept.

The newest run alone is kept: two models would rarely fit.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from polylens.config import RunConfig, Runtime
from polylens.conversation import Reply, answer_prompt
from polylens.crown import CrownDelta
from polylens.detection import LanguageDetector
from polylens.errors import UsageError
from polylens.execution import open_model
from polylens.models.loading import LanguageModel
from polylens.progress import Progress, silent
from polylens.prompts import PromptFormat, choose_format
from polylens.run_folder import RunFolder
from polylens.steering import Steering, Towards
from polylens.subspaces import Subspaces


@dataclass(frozen=True)
class Opened:
    """A run's model and what it learnt, in memory.

    Attributes:
        model: the untouched model.
        delta: what training changed.
        subspaces: of the model, to steer by.
        prompt_format: how a text becomes a prompt.
        languages: told apart in answers, central language first.
    """

    model: LanguageModel
    delta: CrownDelta
    subspaces: Subspaces
    prompt_format: PromptFormat
    languages: tuple[str, ...]

    def reply(
        self,
        prompt: str,
        *,
        strength: float,
        max_new_tokens: int,
        towards: str | None = None,
        push: float = 0.0,
    ) -> Reply:
        """Answer greedily.

        Args:
            prompt: one user turn.
            strength: of the delta; 0 is the untouched model, to the bit.
            max_new_tokens: longest answer.
            towards: a language that states are pushed towards as well; None for none.
            push: how far; see `polylens.Towards`.

        Raises:
            UsageError: there is nothing to answer, or a number is out of range.
        """
        if not prompt.strip():
            raise UsageError("there must be a prompt to answer, but it is empty; write one")
        if max_new_tokens < 1:
            raise UsageError(f"the longest answer must have a token, got {max_new_tokens}")
        (ids,) = self.prompt_format.encode(self.model.tokenizer, [prompt], sys.maxsize).ids
        with self._changed(strength, towards, push):
            return answer_prompt(
                self.model,
                ids,
                LanguageDetector(self.languages),
                max_new_tokens=max_new_tokens,
            )

    @contextlib.contextmanager
    def _changed(self, strength: float, towards: str | None, push: float) -> Iterator[None]:
        with contextlib.ExitStack() as changes:
            if strength:
                changes.enter_context(self.delta.applied(self.model.structure, strength))
            if towards is not None and push:
                steering = Steering(self.subspaces, [Towards(towards, push)])
                changes.enter_context(steering.applied(self.model.structure))
            yield


@dataclass
class Dial:
    """Opens runs, and keeps the last one open."""

    _key: object = None
    _opened: Opened | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextlib.contextmanager
    def open(
        self, folder: RunFolder, config: RunConfig, progress: Progress = silent
    ) -> Iterator[Opened]:
        """Give a run's model and delta to one user at a time.

        Args:
            folder: of the run.
            config: of the run.
            progress: told about what takes long.

        Raises:
            UsageError: the run has not been trained.
            PolyLensError: its model cannot be loaded, or is another one by now.
        """
        if not folder.delta.exists():
            raise UsageError(
                f"answers can be compared once a run has been trained, but {folder.path.name} has "
                "not; let it go on"
            )
        with self._lock:
            key = (folder.path, folder.delta.stat().st_mtime_ns)
            if self._opened is None or key != self._key:
                self._opened = None  # frees the last one before another is loaded
                self._opened, self._key = _load(folder, config, progress), key
            yield self._opened

    def close(self) -> None:
        """Free the model's memory, for another one."""
        with self._lock:
            self._opened = None


def _load(folder: RunFolder, config: RunConfig, progress: Progress) -> Opened:
    model, _ = open_model(
        config.model, Runtime(), revision=config.revision, with_head=True, progress=progress
    )
    return Opened(
        model=model,
        delta=CrownDelta.load(folder.delta, fingerprint=model.fingerprint),
        subspaces=Subspaces.load(folder.subspaces, fingerprint=model.fingerprint),
        prompt_format=choose_format(model.tokenizer, config.template),
        languages=(*config.all_languages, *config.evaluate.extra_languages),
    )
