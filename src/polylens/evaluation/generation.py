"""Answers to prompts: greedy decoding with transformers' own `generate`, in batches of similar length.

Decoding needs left padding and a mask, unlike everything else here. A model with a delta applied is just another model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GenerationConfig

from polylens.hidden_states import token_batches
from polylens.models.loading import LanguageModel
from polylens.progress import Progress, silent

# Decoding reads every weight once a step whatever the number of rows, so more rows are nearly free
# until the products become the cost; 4,096 prompt tokens are some 40 rows of the starter corpus.
_TOKEN_BUDGET = 4096


@torch.no_grad()
def generate_answers(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    progress: Progress = silent,
) -> list[str]:
    """Answer each prompt greedily.

    Args:
        model: the model, as it is now.
        prompts: token ids, at least one each.
        max_new_tokens: longest answer.
        progress: told the answers done.

    Returns:
        The answers without special tokens or surrounding white space, in the order of the prompts.
    """
    tokenizer, causal_lm = model.tokenizer, model.causal_lm
    stops = _stop_ids(model)
    pad = tokenizer.pad_token_id
    pad = pad if pad is not None else (stops[0] if stops else 0)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=stops or None,
        pad_token_id=pad,
    )
    answers = [""] * len(prompts)
    done = 0
    progress(0, len(prompts), "answers")
    for batch in token_batches([len(ids) for ids in prompts], _TOKEN_BUDGET):
        longest = max(len(prompts[index]) for index in batch)
        input_ids = torch.full((len(batch), longest), pad, dtype=torch.int64)
        mask = torch.zeros_like(input_ids)
        for row, index in enumerate(batch):
            input_ids[row, longest - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, longest - len(prompts[index]) :] = 1
        output = causal_lm.generate(
            input_ids=input_ids.to(causal_lm.device),
            attention_mask=mask.to(causal_lm.device),
            generation_config=config,
        )
        for row, index in enumerate(batch):
            new = output[row, longest:].tolist()
            answers[index] = tokenizer.decode(new, skip_special_tokens=True).strip()
        done += len(batch)
        progress(done, len(prompts), "answers")
    return answers


def _stop_ids(model: LanguageModel) -> list[int]:
    """Tokens that end an answer: those of the model's generation config, and the tokenizer's."""
    stated = getattr(model.causal_lm.generation_config, "eos_token_id", None)
    stated = stated if isinstance(stated, list) else [stated]
    found = [*stated, model.tokenizer.eos_token_id]
    return list(dict.fromkeys(token for token in found if token is not None))
