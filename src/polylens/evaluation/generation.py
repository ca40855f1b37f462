"""Answers to prompts: greedy decoding with transformers' own `generate`.

Prompts of similar length share a batch. Decoding needs left padding and a mask, unlike everything
else here. A model with a delta applied is just another model. Sampling, penalties and bans that the
model's own generation settings ask for are left out: before and after must differ by the weights
alone. A repetition penalty that the caller names is the same for both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from polylens.hidden_states import token_batches
from polylens.models.loading import LanguageModel
from polylens.progress import Progress, silent

# Padded tokens of the prompts of a batch. 64 prompts of 74 tokens, 16 new ones, SmolLM2-135M in
# float32 on one busy core: 26 s with 45 rows, 34 to 37 s with fewer or more; the products alone
# take some 24 s.
TOKEN_BUDGET = 4096

# With its answers, a batch may grow this many times as long. A step of decoding reads all weights,
# however many rows there are: Qwen2.5-Coder-1.5B in float32 on two cores takes 0.9 s for 7 rows and
# 1.7 s for 50.
_GROWTH = 8

# What a step costs beside its rows, in tokens of a prompt.
_STEP_COST = 10

# Last tokens of an answer in which a stop string is looked for; one is a few tokens long.
_STOP_TOKENS = 32


def generate_answers(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    repetition_penalty: float = 1.0,
    stop_strings: Sequence[str] = (),
    token_budget: int = TOKEN_BUDGET,
    progress: Progress = silent,
) -> list[str]:
    """Answer each prompt greedily.

    Args:
        model: the model, as it is now; it is not changed, nor are its generation settings.
        prompts: token ids, at least one each.
        max_new_tokens: longest answer, in tokens.
        repetition_penalty: logits of tokens that the prompt or the answer has are divided by it
            where positive, multiplied where negative (Keskar et al. 2019, CTRL, §4.1); 1 is none.
        stop_strings: an answer ends before the first of them.
        token_budget: most tokens of a batch's prompts, with padding; with the answers, eight times
            as many.
        progress: told the answers done.

    Returns:
        The answers without special tokens or surrounding white space, in the order of the prompts.
    """
    generator, stops = _make_generator(model, max_new_tokens, repetition_penalty)
    answers = [""] * len(prompts)
    done = 0
    progress(0, len(prompts), "answers")
    lengths = [max(len(ids), (len(ids) + max_new_tokens) // _GROWTH) for ids in prompts]
    for batch in token_batches(lengths, token_budget, _STEP_COST * max_new_tokens):
        input_ids, mask = _pad_left([prompts[index] for index in batch])
        where = model.structure.device
        stopping = _StopAt(stop_strings, model.tokenizer, input_ids.shape[1])
        with model.structure.runnable():
            output = generator.generate(
                input_ids=input_ids.to(where),
                attention_mask=mask.to(where),
                generation_config=generator.generation_config,
                stopping_criteria=StoppingCriteriaList([stopping] if stop_strings else []),
            )
        new = output[:, input_ids.shape[1] :].tolist()  # what follows the first stop is padding
        for index, ids in zip(batch, new, strict=True):
            end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
            text = model.tokenizer.decode(ids[:end], skip_special_tokens=True)
            for stop in stop_strings:
                text = text.partition(stop)[0]
            answers[index] = text.strip()
        done += len(batch)
        progress(done, len(prompts), "answers")
    return answers


def stream_answer(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    on_text: Callable[[str], None],
) -> tuple[str, int]:
    """Answer one prompt greedily, and tell the answer while it grows.

    Args:
        model: the model, as it is now; it is not changed, nor are its generation settings.
        prompt: token ids, at least one.
        max_new_tokens: longest answer, in tokens.
        on_text: told all of the answer so far after each token; whatever it raises stops the
            answer.

    Returns:
        The answer, as `generate_answers` gives it, and its number of tokens; what ends it is none.
    """
    generator, stops = _make_generator(model, max_new_tokens)
    streamer = _Streamer(model.tokenizer, stops, on_text)
    input_ids = torch.tensor([list(prompt)], device=model.structure.device)
    with model.structure.runnable():
        generator.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=generator.generation_config,
            streamer=streamer,
        )
    return streamer.text().strip(), len(streamer.ids)


class _Streamer(BaseStreamer):  # type: ignore[misc]
    """Receives the tokens of one answer as they come; those of its prompt come first, at once."""

    def __init__(
        self, tokenizer: Any, stops: Sequence[int], on_text: Callable[[str], None]
    ) -> None:
        self.ids: list[int] = []
        self._tokenizer = tokenizer
        self._stops = stops
        self._on_text = on_text
        self._is_answer = False

    def put(self, value: Tensor) -> None:
        if self._is_answer and value.item() not in self._stops:
            self.ids.append(int(value.item()))
            # Characters of which some bytes are still to come are decoded as U+FFFD.
            self._on_text(self.text().rstrip("\ufffd").strip())
        self._is_answer = True

    def end(self) -> None:
        pass

    def text(self) -> str:
        # All of it each time: what a token stands for may depend on those before it.
        return str(self._tokenizer.decode(self.ids, skip_special_tokens=True))


def _make_generator(
    model: LanguageModel, max_new_tokens: int, repetition_penalty: float = 1.0
) -> tuple[Any, list[int]]:
    """Return what generates, and its stop tokens.

    `generate` fills what a call leaves open from the model's own settings (a repetition penalty,
    banned tokens, …); this copy shares the weights, and has no settings but ours.
    """
    stops = _stop_ids(model)
    pad = model.tokenizer.pad_token_id
    pad = pad if pad is not None else (stops[0] if stops else 0)
    generator: Any = copy.copy(model.causal_lm)
    generator.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=stops or None,
        pad_token_id=pad,
        repetition_penalty=repetition_penalty,
    )
    return generator, stops


class _StopAt(StoppingCriteria):  # type: ignore[misc]
    """Ends an answer that holds one of some strings."""

    def __init__(self, strings: Sequence[str], tokenizer: Any, n_prompt: int) -> None:
        self._strings = strings
        self._tokenizer = tokenizer
        self._n_prompt = n_prompt

    def __call__(self, input_ids: Tensor, scores: Any, **keywords: Any) -> Tensor:
        new = input_ids[:, max(self._n_prompt, input_ids.shape[1] - _STOP_TOKENS) :]
        texts = self._tokenizer.batch_decode(new, skip_special_tokens=True)
        found = [any(string in text for string in self._strings) for text in texts]
        return torch.tensor(found, device=input_ids.device)


def _pad_left(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return (batch, longest) int64 ids, padded on the left, and their mask of real tokens.

    A row is padded with its own first token, so that a repetition penalty, which looks at ids
    without their mask, does not depend on what else is in the batch.
    """
    longest = max(map(len, prompts))
    input_ids = torch.empty((len(prompts), longest), dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row] = ids[0]
        input_ids[row, longest - len(ids) :] = torch.tensor(ids)
        mask[row, longest - len(ids) :] = 1
    return input_ids, mask


def _stop_ids(model: LanguageModel) -> list[int]:
    """Tokens that end an answer: those of the model's generation settings, and the tokenizer's."""
    stated = getattr(model.causal_lm.generation_config, "eos_token_id", None)
    stated = stated if isinstance(stated, list) else [stated]
    found = [*stated, model.tokenizer.eos_token_id]
    return list(dict.fromkeys(token for token in found if token is not None))
