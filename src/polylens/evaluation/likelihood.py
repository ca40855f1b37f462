"""How likely a model finds a text: log-likelihoods of continuations, bits per byte of whole texts.

Scores are read off the last layer's states, so one trunk pass serves the model before and after:
give `score_bits` or `score_tokens` what `run_crown` yields, with or without a delta applied. Logits
are made for so many tokens at a time, never for all: at 150,000 tokens of vocabulary they would be
the largest thing in memory. Bits per byte compare between tokenizers and languages.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polylens.models.structure import DecoderStructure

# States that go through the head at a time: at 150,000 tokens of vocabulary, 0.3 GB of logits.
# Fewer reach less of the machine's rate: 256 rows 90 %, 96 rows 70 %.
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


@dataclass(frozen=True)
class Target:
    """Tokens to predict.

    Attributes:
        text: the text whose states predict them.
        start: the first of its states that does; each next one predicts the next token.
        tokens: what is to be predicted, at least one.
    """

    text: int
    start: int
    tokens: Sequence[int]


@torch.no_grad()
def score_tokens(
    structure: DecoderStructure, batches: Iterable[StateBatch], targets: Sequence[Target]
) -> tuple[list[float], list[bool]]:
    """Return how likely each target is, and whether greedy decoding would give it.

    Args:
        structure: the model whose final norm and head are used.
        batches: indices of texts, (batch, n_states, hidden_size) output of the last layer before
            the final norm, padded on the right, and (batch,) numbers of states; as `run_crown`
            yields them.
        targets: several may share a text; each state goes through the head once.

    Returns:
        Sums of log-probabilities, in nats, and whether each token is the likeliest of all.
    """
    sums = torch.zeros(len(targets), dtype=torch.float64)
    greedy = torch.ones(len(targets), dtype=torch.bool)
    for states, rows, tokens, owners in _chunks(batches, targets):
        logits = structure.logits(structure.final_norm(states)[None])[0].float()
        rows, tokens = rows.to(logits.device), tokens.to(logits.device)
        found, most = logits[rows, tokens], logits.amax(-1)
        # In place: `logsumexp` copies the logits; with an argmax it takes half as long as the head.
        log_sums = logits.sub_(most[:, None]).exp_().sum(-1).log_().add_(most)
        nats = found - log_sums[rows]  # (n_pairs,)
        sums.index_add_(0, owners, nats.cpu().double())
        greedy[owners[(found < most[rows]).cpu()]] = False
    return sums.tolist(), greedy.tolist()


def score_bits(
    structure: DecoderStructure, batches: Iterable[StateBatch], prompts: Sequence[Sequence[int]]
) -> list[float]:
    """Return each text's negative log-likelihood in bits, all tokens but the first.

    Args:
        structure: the model whose final norm and head are used.
        batches: as for `score_tokens`, the states of all tokens.
        prompts: token ids of every text.
    """
    targets = [Target(index, 0, ids[1:]) for index, ids in enumerate(prompts)]
    sums, _ = score_tokens(structure, batches, targets)
    return [-nats / math.log(2) for nats in sums]


def _chunks(
    batches: Iterable[StateBatch], targets: Sequence[Target]
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield (n_rows, hidden_size) states that predict something, and what they do.

    That is (n_pairs,) rows of the chunk, (n_pairs,) tokens, (n_pairs,) the targets that they are
    of. Every chunk has `LOGIT_ROWS` rows, whatever the batches; the last one may have fewer.
    """
    of_text: dict[int, list[int]] = {}
    for index, target in enumerate(targets):
        of_text.setdefault(target.text, []).append(index)
    states: Tensor | None = None
    pairs = torch.zeros(3, 0, dtype=torch.int64)  # rows of `states`, tokens, targets
    for texts, output, _ in batches:
        read = torch.zeros(output.shape[:2], dtype=torch.bool)
        found: list[tuple[int, int, int, int]] = []  # text within the batch, state, token, target
        for row, text in enumerate(texts):
            for index in of_text.get(text, ()):
                start = targets[index].start
                read[row, start : start + len(targets[index].tokens)] = True
                found += [
                    (row, start + i, token, index) for i, token in enumerate(targets[index].tokens)
                ]
        if not found:
            continue
        n_waiting = 0 if states is None else len(states)
        rows, positions, tokens, owners = torch.tensor(found).T
        numbers = read.flatten().cumsum(0).view_as(read) - 1 + n_waiting
        pairs = torch.cat([pairs, torch.stack([numbers[rows, positions], tokens, owners])], dim=1)
        new = output[read.to(output.device)]
        states = new if states is None else torch.cat([states, new])
        while len(states) >= LOGIT_ROWS:
            now = pairs[0] < LOGIT_ROWS
            yield states[:LOGIT_ROWS], *pairs[:, now]
            states, pairs = states[LOGIT_ROWS:], pairs[:, ~now]
            pairs[0] -= LOGIT_ROWS
    if states is not None and len(states):
        yield states, *pairs


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
