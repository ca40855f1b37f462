"""From texts to token ids: chat template, special tokens, truncation.

A prompt is what the model reads before it answers: the text as one user turn in the chat template,
generation prompt included. A text that is too long loses its own end, never the template's: the
last token, which the method reads, stays that of the generation prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polylens.artefacts import read_text, user_path
from polylens.chat_templates import check_template, render_conversation
from polylens.config import TrainSettings
from polylens.corpora import Corpus, ParallelCorpus
from polylens.errors import ConfigError, CorpusError

PLAIN = "plain"
CHAT = "chat"

# Longest prompt that is to stay whole, where the tokenizer sets no limit of its own.
_LONGEST = 4096


@dataclass(frozen=True)
class Prompts:
    """Tokenised prompts, in the order of the texts.

    Attributes:
        ids: token ids of each prompt.
        kept: for each prompt, the index of its text; texts of which nothing fits are left out.
        n_truncated: how many texts lost their end.
    """

    ids: tuple[tuple[int, ...], ...]
    kept: tuple[int, ...]
    n_truncated: int

    @property
    def n_tokens(self) -> int:
        """All tokens."""
        return sum(map(len, self.ids))


@dataclass(frozen=True)
class PromptFormat:
    """How a text becomes a prompt.

    Attributes:
        template: a Jinja chat template, or None for the text as it is.
        name: "chat" (the model's own template), "plain", or the file the template came from.
    """

    template: str | None
    name: str

    def render(self, tokenizer: Any, text: str) -> str:
        """Return the prompt for `text` as one user turn, generation prompt included."""
        if self.template is None:
            return text
        turns = [{"role": "user", "content": text}]
        return render_conversation(tokenizer, self.template, turns, add_generation_prompt=True)

    def render_answer(self, tokenizer: Any, text: str, answer: str) -> str:
        """Return what follows the prompt for `text` when it is answered, end of turn included.

        Without a template an empty line parts the two, and the tokenizer's end of text follows.
        """
        end: str = tokenizer.eos_token or ""
        if self.template is None:
            return f"\n\n{answer}{end}"
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        whole = render_conversation(tokenizer, self.template, turns)
        prompt = self.render(tokenizer, text)
        # White space after the end of turn is the next turn's, which no answer reaches.
        return whole[len(prompt) :].rstrip() if whole.startswith(prompt) else answer + end

    def encode_answer(
        self, tokenizer: Any, text: str, answer: str, max_tokens: int
    ) -> tuple[int, ...]:
        """Tokenise what follows the prompt for `text` when it is answered, end of turn included.

        It is tokenised apart from the prompt, which keeps the tokens that it has in use.
        """
        rendered = self.render_answer(tokenizer, text, answer)
        return tuple(tokenizer(rendered, add_special_tokens=False)["input_ids"][:max_tokens])

    def encode_beginning(self, tokenizer: Any, answer: str, max_tokens: int) -> tuple[int, ...]:
        """Tokenise the beginning of an answer, apart from its prompt, without an end of turn.

        Without a template an empty line parts the two.
        """
        text = f"\n\n{answer}" if self.template is None else answer
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"][:max_tokens])

    def encode_conversation(self, tokenizer: Any, texts: Sequence[str]) -> tuple[int, ...]:
        """Tokenise a conversation so far as the prompt of its next answer.

        Args:
            tokenizer: the model's tokenizer.
            texts: the user's and the assistant's in turn, the user's last; without a template they
                are parted by an empty line.
        """
        if self.template is None:
            return tuple(tokenizer("\n\n".join(texts))["input_ids"])
        messages = [
            {"role": "assistant" if number % 2 else "user", "content": text}
            for number, text in enumerate(texts)
        ]
        rendered = render_conversation(
            tokenizer, self.template, messages, add_generation_prompt=True
        )
        return tuple(tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def encode(self, tokenizer: Any, texts: Sequence[str], max_tokens: int) -> Prompts:
        """Tokenise `texts` as prompts of at most `max_tokens` tokens.

        Args:
            tokenizer: the model's tokenizer.
            texts: one user turn each.
            max_tokens: upper limit of a prompt's length, template included.

        Returns:
            The prompts; a template already holds its special tokens, so none are added to it.
        """
        add_special = self.template is None
        ids: list[tuple[int, ...]] = []
        kept: list[int] = []
        n_truncated = 0
        for index, text in enumerate(texts):
            encoded = self._tokenise(tokenizer, text, add_special)
            if len(encoded) > max_tokens:
                n_truncated += 1
                encoded = self._truncate(tokenizer, text, max_tokens, add_special)
            if encoded:
                ids.append(tuple(encoded))
                kept.append(index)
        return Prompts(tuple(ids), tuple(kept), n_truncated)

    def encode_whole(self, tokenizer: Any, texts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Tokenise texts as prompts; none at all where the tokenizer's longest input cuts one."""
        prompts = self.encode(tokenizer, texts, min(_LONGEST, tokenizer.model_max_length))
        return () if prompts.n_truncated else prompts.ids

    def _tokenise(self, tokenizer: Any, text: str, add_special: bool) -> list[int]:
        return list(
            tokenizer(self.render(tokenizer, text), add_special_tokens=add_special)["input_ids"]
        )

    def _truncate(self, tokenizer: Any, text: str, max_tokens: int, add_special: bool) -> list[int]:
        """Find the longest start of `text` whose prompt fits; empty when none does."""
        fits, too_long = 0, len(text)  # in characters; prompts grow with their text
        best: list[int] = []
        while too_long - fits > 1:
            middle = (fits + too_long) // 2
            encoded = self._tokenise(tokenizer, text[:middle], add_special)
            if len(encoded) <= max_tokens:
                fits, best = middle, encoded
            else:
                too_long = middle
        return best


def choose_format(tokenizer: Any, template: str = "auto") -> PromptFormat:
    """Choose the prompt format.

    Args:
        tokenizer: the model's tokenizer.
        template: "auto" (the model's chat template if it has one, else plain), "chat", "plain", or
            the path of a Jinja file with a chat template.

    Raises:
        ConfigError: "chat" for a model without a chat template, no such file, or a template that
            takes too much time or memory.
    """
    if template == "auto":
        template = CHAT if tokenizer.chat_template else PLAIN
    if template == PLAIN:
        return PromptFormat(None, PLAIN)
    if template == CHAT:
        if not tokenizer.chat_template:
            raise ConfigError(
                "template 'chat' needs a model with a chat template, but this one has none; "
                "use template 'plain' or give a Jinja file"
            )
        own = tokenizer.chat_template
        chosen = own.get("default") if isinstance(own, dict) else own
        if not isinstance(chosen, str):
            raise ConfigError(
                "a chat template must be one text, but the model has several or something else; "
                "use template 'plain' or give a Jinja file"
            )
        check_template(chosen, "the model's")
        return PromptFormat(chosen, CHAT)
    path = user_path(template)
    if not path.is_file():
        raise ConfigError(
            "template must be 'auto', 'chat', 'plain' or a Jinja file with a chat template, "
            f"got {template!r}, which is no file; check the path"
        )
    text = read_text(path)
    check_template(text, path.name)
    return PromptFormat(text, path.name)


def require_usable(prompts: Prompts, what: str, max_tokens: int) -> Prompts:
    """Return `prompts` if any text left one.

    Raises:
        CorpusError: no text fits in `max_tokens`.
    """
    if not prompts.ids:
        raise CorpusError(
            f"at least one text of {what} must fit in max_tokens with its template, but none does "
            f"in {max_tokens} tokens; raise max_tokens or use shorter texts"
        )
    return prompts


@dataclass(frozen=True)
class ParallelPrompts:
    """Tokenised parallel rows.

    Attributes:
        ids: token ids of every prompt, row by row; with `n_answer`, of its answer too, but for the
            last token, which predicts nothing of it. At the end, prompts of no row.
        rows: for each usable row, language → index into `ids`.
        sources: for each usable row, its index in the corpus.
        n_truncated: prompts that lost their end.
        n_answer: for each prompt, the tokens of its answer: so many of the last states predict
            them, from the prompt's last one on. None where no answers follow.
        answers: for each prompt, token ids of its own answer; empty where it has none, though
            another text may stand in its place. None where no answers follow.
        choices: indices into `ids` of prompts of no row, questions of which the last token is to be
            retained.
    """

    ids: tuple[tuple[int, ...], ...]
    rows: tuple[Mapping[str, int], ...]
    sources: tuple[int, ...]
    n_truncated: int
    n_answer: tuple[int, ...] | None = None
    answers: tuple[tuple[int, ...], ...] | None = None
    choices: tuple[int, ...] = ()

    @property
    def n_tokens(self) -> int:
        """All tokens."""
        return sum(map(len, self.ids))

    def with_choices(self, ids: Sequence[tuple[int, ...]]) -> ParallelPrompts:
        """Return the rows, and questions that are to be retained beside them."""
        n_own, n_choices = len(self.ids), len(ids)
        return dataclasses.replace(
            self,
            ids=(*self.ids, *ids),
            n_answer=self.n_answer and (*self.n_answer, *[1] * n_choices),
            answers=self.answers and (*self.answers, *[()] * n_choices),
            choices=tuple(range(n_own, n_own + n_choices)),
        )

    def choices_of(self, settings: TrainSettings) -> tuple[int, ...]:
        """Return as many of the questions, the first ones, as some settings ask for."""
        return self.choices[: settings.n_choices(len(self.rows))]

    def first(self, share: float) -> ParallelPrompts:
        """Return the first rows, at least one."""
        n_rows = max(1, int(share * len(self.rows)))
        return dataclasses.replace(self, rows=self.rows[:n_rows], sources=self.sources[:n_rows])

    def without_answers(self) -> ParallelPrompts:
        """Return the prompts alone."""
        if self.n_answer is None:
            return self
        pairs = zip(self.ids, self.n_answer, strict=True)
        ids = tuple(one[: len(one) - n_answer + 1] for one, n_answer in pairs)
        return dataclasses.replace(self, ids=ids, n_answer=None, answers=None)


def encode_texts(
    corpus: Corpus,
    languages: Sequence[str],
    prompt_format: PromptFormat,
    tokenizer: Any,
    max_tokens: int,
) -> dict[str, Prompts]:
    """Tokenise a corpus of texts, language by language.

    Raises:
        CorpusError: a language has no text that fits.
    """
    return {
        language: require_usable(
            prompt_format.encode(tokenizer, corpus.texts[language], max_tokens),
            f"{corpus.name} in {language}",
            max_tokens,
        )
        for language in languages
    }


def encode_parallel(
    corpus: ParallelCorpus,
    languages: Sequence[str],
    prompt_format: PromptFormat,
    tokenizer: Any,
    max_tokens: int,
    max_answer_tokens: int | None = None,
    *,
    stand_in: bool = False,
) -> ParallelPrompts:
    """Tokenise parallel rows; a row without the first language, or with no other, is left out.

    Args:
        corpus: the rows.
        languages: central language first, then the targets.
        prompt_format: how a text becomes a prompt.
        tokenizer: the model's.
        max_tokens: longest prompt.
        max_answer_tokens: let an answer of at most so many tokens, end of turn included, follow
            each prompt of a target language that has one. None lets none follow.
        stand_in: let the next row's text of the language stand in for an answer that is missing,
            and answers follow the central language's prompts, too, to be compared with.

    Raises:
        CorpusError: no row is left, or nothing can stand for an answer.
    """
    central = languages[0]
    ids: list[tuple[int, ...]] = []
    rows: list[Mapping[str, int]] = []
    sources: list[int] = []
    n_truncated = 0
    for source, row in enumerate(corpus.rows):
        present = [language for language in languages if row.get(language)]
        prompts = prompt_format.encode(tokenizer, [row[k] for k in present], max_tokens)
        kept = [present[index] for index in prompts.kept]
        if central not in kept or len(kept) < 2:
            continue
        rows.append({language: len(ids) + i for i, language in enumerate(kept)})
        ids.extend(prompts.ids)
        sources.append(source)
        n_truncated += prompts.n_truncated
    if not rows:
        raise CorpusError(
            f"at least one row of {corpus.name} must hold a text in {central} and in a target "
            f"language that fits in max_tokens with its template, but none does in {max_tokens} "
            "tokens; raise max_tokens or check the rows with `polylens data`"
        )
    parallel = ParallelPrompts(tuple(ids), tuple(rows), tuple(sources), n_truncated)
    if max_answer_tokens is None or not (stand_in or corpus.answers):
        return parallel
    return _with_answers(
        parallel,
        corpus,
        prompt_format,
        tokenizer,
        max_answer_tokens,
        central=central,
        stand_in=stand_in,
    )


def _with_answers(
    prompts: ParallelPrompts,
    corpus: ParallelCorpus,
    prompt_format: PromptFormat,
    tokenizer: Any,
    max_tokens: int,
    *,
    central: str,
    stand_in: bool,
) -> ParallelPrompts:
    """Let answers follow the prompts; see `encode_parallel`."""
    ids, n_answer = list(prompts.ids), [1] * len(prompts.ids)
    answers: list[tuple[int, ...]] = [()] * len(prompts.ids)
    everything = dict.fromkeys(k for row in prompts.rows for k in row)
    for language in everything if stand_in else [k for k in everything if k != central]:
        numbers = [number for number, row in enumerate(prompts.rows) if language in row]
        texts = [corpus.rows[prompts.sources[number]][language] for number in numbers]
        following = (*texts[1:], texts[0] if len(texts) > 1 else None)
        for number, text, other in zip(numbers, texts, following, strict=True):
            index = prompts.rows[number][language]
            if answer := corpus.answer(language, text):
                tokens = prompt_format.encode_answer(tokenizer, text, answer, max_tokens)
                answers[index] = tokens
            elif not stand_in:
                continue
            elif other is not None:
                # Where the other text ends, no answer does: there is no end of turn.
                tokens = prompt_format.encode_beginning(tokenizer, other, max_tokens)
            else:
                raise CorpusError(
                    f"prompts of {corpus.name} must have answers, or other rows whose texts stand "
                    f"for them, but {language} has one row and no answer; add rows or answers"
                )
            ids[index] = (*ids[index], *tokens[:-1])
            n_answer[index] = max(1, len(tokens))
    return dataclasses.replace(
        prompts, ids=tuple(ids), n_answer=tuple(n_answer), answers=tuple(answers)
    )
