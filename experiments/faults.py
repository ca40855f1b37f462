"""Faults of the published code, put back, to see what they cost.

Pads: probing pads texts on the right, a language's 50 at a time, and reads position -1, so that all
but the longest of them give a pad's state. Cuts: training prompts lose what exceeds `max_tokens`,
which is the end of their template.

Source: the scripts of Zhao et al. 2024, Lens (github.com/circle-hit/Lens).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from polylens.config import ProbeSettings
from polylens.corpora import ParallelCorpus
from polylens.hidden_states import pad_right
from polylens.models.loading import LanguageModel
from polylens.prompts import ParallelPrompts, PromptFormat, Prompts, encode_parallel
from polylens.subspaces import Subspaces, probe_subspaces

FAULTY = ("pads", "cuts")

_PROBE_BATCH_SIZE = 50
_LONG = 4096


@torch.no_grad()
def probe_with_pads(
    model: LanguageModel,
    prompts: Mapping[str, Prompts],
    central: str,
    settings: ProbeSettings,
) -> Subspaces:
    """Find the last layer's subspaces from states at position -1 of padded batches."""
    n_layers = model.structure.n_layers
    pooled = {
        language: _last_positions(model, own.ids)[:, None].expand(-1, n_layers + 1, -1)
        for language, own in prompts.items()
    }
    return probe_subspaces(
        pooled,
        central=central,
        rank=settings.rank,
        agnostic=settings.agnostic,
        layers=(n_layers,),
        metadata={"fingerprint": model.fingerprint, "model": model.name},
    )


def _last_positions(model: LanguageModel, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Return states after the final norm, (n_prompts, hidden_size)."""
    decoder = model.causal_lm.get_decoder()
    pad = model.tokenizer.pad_token_id or model.tokenizer.eos_token_id
    states = []
    for start in range(0, len(prompts), _PROBE_BATCH_SIZE):
        batch = prompts[start : start + _PROBE_BATCH_SIZE]
        mask = pad_right([[1] * len(ids) for ids in batch])
        ids = pad_right(batch).masked_fill(mask == 0, pad)
        output = decoder(input_ids=ids, attention_mask=mask, use_cache=False)
        states.append(output.last_hidden_state[:, -1])
    return torch.cat(states)


def cut(
    rows: ParallelCorpus,
    languages: Sequence[str],
    style: PromptFormat,
    model: LanguageModel,
    max_tokens: int,
) -> ParallelPrompts:
    """Tokenise prompts, and cut them off wherever `max_tokens` is."""
    whole = encode_parallel(rows, languages, style, model.tokenizer, _LONG)
    return dataclasses.replace(whole, ids=tuple(ids[:max_tokens] for ids in whole.ids))
