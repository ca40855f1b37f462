"""Bits per byte: how well a model predicts a text, comparable between tokenizers and languages.

Texts are scored raw, without a chat template. Scores are read off the last layer's states, so one
trunk pass serves the model before and after: give `score_bits` what `run_crown` yields, with or
without a delta applied. Logits are made for a fixed number of tokens at a time, never for all: at
150,000 tokens of vocabulary they would be the largest thing in memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from polylens.hidden_states import pad_right
from polylens.models.structure import DecoderStructure

# One shape for all calls of the head: new shapes made it five times slower (docs/performance.md).
LOGIT_ROWS = 512

StateBatch = tuple[Sequence[int], Tensor, Tensor]

_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def encode_plain(tokenizer: Any, text: str, max_tokens: int) -> tuple[list[int], int]:
    """Tokenise a text for scoring.

    The first token has no context and is not scored: the tokenizer's own beginning-of-text token
    where it adds one, else the first token of the text, whose bytes then do not count.

    Args:
        tokenizer: the model's; special tokens that it appends to a text are left out.
        text: the text, not empty.
        max_tokens: longer texts lose their end, back to the last whole character.

    Returns:
        The token ids, and the UTF-8 bytes of the text that the scored tokens stand for.

    Note:
        Bytes are exact where the tokenizer tells offsets. With one of the few that do not ("slow"
        tokenizers), those of a cut text and of a first token are the bytes of the decoded tokens.
    """
    encoded = tokenizer(
        text,
        add_special_tokens=True,
        return_special_tokens_mask=True,
        return_offsets_mapping=tokenizer.is_fast,
    )
    ids, special = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
    while special and special[-1]:
        ids.pop()
        special.pop()
    if not ids:
        return [], 0
    offsets = encoded["offset_mapping"] if tokenizer.is_fast else None  # characters: (start, end)
    n_kept = min(len(ids), max_tokens)
    if n_kept < len(ids):
        while offsets and n_kept and offsets[n_kept][0] < offsets[n_kept - 1][1]:
            n_kept -= 1  # the next token continues this one's character
        if not n_kept:
            return [], 0
        text = text[: offsets[n_kept - 1][1]] if offsets else _decode(tokenizer, ids[:n_kept])
    n_bytes = len(text.encode())
    if not special[0]:
        n_bytes -= _first_token_bytes(tokenizer, text, ids, offsets)
    return ids[:n_kept], n_bytes


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
    bits = torch.zeros(len(prompts), dtype=torch.float64)
    for states, tokens, texts in _chunks(batches, prompts):
        padded = functional.pad(states, (0, 0, 0, LOGIT_ROWS - len(states)))
        logits = structure.logits(structure.final_norm(padded)[None])[0, : len(states)]
        wanted = tokens.to(logits.device)
        nats = functional.cross_entropy(logits.float(), wanted, reduction="none")  # (rows,)
        bits.index_add_(0, texts, nats.cpu().double() / math.log(2))
    return [float(value) for value in bits]


def _chunks(
    batches: Iterable[StateBatch], prompts: Sequence[Sequence[int]]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (rows, hidden_size) states, (rows,) tokens that follow them, (rows,) their texts.

    Every chunk has `LOGIT_ROWS` rows, whatever the batches; the last one may have fewer.
    """
    waiting: list[Tensor] = []
    for indices, output, lengths in batches:
        following = pad_right([prompts[index] for index in indices]).roll(-1, dims=1)
        # (batch, seq_len); what follows the last token is not known
        scored = torch.arange(output.shape[1]) < lengths.cpu()[:, None] - 1
        texts = torch.tensor(list(indices))[:, None].expand_as(scored)
        parts = [output[scored.to(output.device)], following[scored], texts[scored]]
        waiting = [torch.cat(p) for p in zip(waiting, parts, strict=True)] if waiting else parts
        while len(waiting[0]) >= LOGIT_ROWS:
            states, tokens, owners = (part[:LOGIT_ROWS] for part in waiting)
            yield states, tokens, owners
            waiting = [part[LOGIT_ROWS:] for part in waiting]
    if waiting and len(waiting[0]):
        states, tokens, owners = waiting
        yield states, tokens, owners


def _first_token_bytes(
    tokenizer: Any, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]] | None
) -> int:
    """UTF-8 bytes of the first token of a text."""
    if offsets is None:
        return len(_decode(tokenizer, ids[:1]).encode())
    end = offsets[0][1]
    if len(ids) == 1 or offsets[1][0] >= end:
        return len(text[:end].encode())
    # It is less than a character: "<0xE6>", a space that the tokenizer put before the text ("▁"),
    # or a piece of a byte-level vocabulary, in which one letter stands for one byte.
    piece: str = tokenizer.convert_ids_to_tokens(ids[0])
    return 1 if _BYTE_PIECE.fullmatch(piece) else len(piece.replace("▁", ""))


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
