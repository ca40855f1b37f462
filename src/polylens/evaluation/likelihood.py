"""Bits per byte: how well a model predicts a text, comparable between tokenizers and languages.

Works on the last layer's states, so one trunk pass serves the model before and after. Logits are made for a fixed number
of tokens at a time, never for all: at 150,000 tokens of vocabulary they would be the largest thing in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from polylens.models.structure import DecoderStructure

# One shape for all calls of the head; new shapes made it several times slower (docs/performance.md).
_ROWS = 512

StateBatch = tuple[Sequence[int], Tensor, Tensor]


def encode_plain(tokenizer: Any, text: str, max_tokens: int) -> tuple[list[int], int]:
    """Tokenise a text for scoring.

    Args:
        tokenizer: the model's; its own beginning-of-text token is added if it has that habit.
        text: the text.
        max_tokens: longer texts lose their end.

    Returns:
        The token ids, and the UTF-8 bytes of the tokens that are scored: all but the first, which has
        no context.
    """
    ids = list(tokenizer(text, add_special_tokens=True)["input_ids"])[:max_tokens]
    scored = tokenizer.decode(ids[1:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return ids, len(scored.encode())


@torch.no_grad()
def score_bits(
    structure: DecoderStructure, batches: Iterable[StateBatch], prompts: Sequence[Sequence[int]]
) -> list[float]:
    """Return each text's negative log-likelihood in bits, all tokens but the first.

    Args:
        structure: the model whose final norm and head are used.
        batches: indices of texts, (batch, seq_len, hidden_size) output of the last layer before the
            final norm, padded on the right, and (batch,) lengths; as `run_crown` yields them.
        prompts: token ids of every text.
    """
    bits = [0.0] * len(prompts)
    pending: list[tuple[Tensor, list[int], list[int]]] = []  # states, next tokens, texts
    n_pending = 0

    def flush(*, all_of_it: bool) -> None:
        nonlocal n_pending
        if not pending:
            return
        states = torch.cat([item[0] for item in pending])
        tokens = torch.tensor([token for item in pending for token in item[1]])
        texts = [text for item in pending for text in item[2]]
        pending.clear()
        stop = len(states) if all_of_it else len(states) // _ROWS * _ROWS
        for start in range(0, stop, _ROWS):
            chunk = states[start : min(start + _ROWS, stop)]
            wanted = tokens[start : start + len(chunk)]
            for text, value in zip(texts[start:stop], _nll(structure, chunk, wanted), strict=False):
                bits[text] += value
        if stop < len(states):
            pending.append((states[stop:], tokens[stop:].tolist(), texts[stop:]))
        n_pending = len(states) - stop

    for rows, output, lengths in batches:
        for row, (text, length) in enumerate(zip(rows, lengths.tolist(), strict=True)):
            pending.append(
                (output[row, : length - 1], list(prompts[text][1:]), [text] * (length - 1))
            )
            n_pending += length - 1
        if n_pending >= _ROWS:
            flush(all_of_it=False)
    flush(all_of_it=True)
    return bits


def _nll(structure: DecoderStructure, states: Tensor, tokens: Tensor) -> list[float]:
    """Bits of each token given the state before it; the head always sees `_ROWS` rows."""
    padded = functional.pad(states, (0, 0, 0, _ROWS - len(states)))
    logits = structure.logits(structure.final_norm(padded)[None])[0, : len(states)]
    nats = functional.cross_entropy(logits.float(), tokens.to(logits.device), reduction="none")
    return [float(value) for value in nats.double().cpu() / math.log(2)]
