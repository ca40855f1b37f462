"""What the published scripts do, plainly: the yardstick of the benchmark.

Probing: 50 texts of a language at a time, padded to the longest, through the whole model with an
attention mask and all logits. Training: one prompt at a time through the whole model, and through a
second whole model as the reference, with all logits; gradients add up over 8 rows. Two faults are
mended, because the numbers could not be compared otherwise: states are read at the last real token
rather than at a pad, and prompts keep the end of their template. Nothing here comes from the
package.

Source: Zhao et al. 2024, Lens (arXiv 2410.04407), and its scripts (github.com/circle-hit/Lens).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

PROBE_BATCH_SIZE = 50
LEARNING_RATE, WEIGHT_DECAY, WARMUP_RATIO, BATCH_SIZE, MAX_GRAD_NORM = 1e-5, 0.1, 0.05, 8, 1.0


def probe(
    model: PreTrainedModel, prompts: Mapping[str, Sequence[Sequence[int]]]
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the subspaces of every layer.

    Args:
        model: a causal language model.
        prompts: language → token ids of its texts.

    Returns:
        Language means (n_layers, n_languages, hidden_size), mu_a (n_layers, hidden_size) and M_s
        transposed (n_layers, n_languages - 1, hidden_size), all float64. Entry k is the output of
        layer k, but the last one has passed the final norm, as transformers has it.
    """
    means = []
    with torch.no_grad():
        for texts in prompts.values():
            states = []
            for start in range(0, len(texts), PROBE_BATCH_SIZE):
                batch = texts[start : start + PROBE_BATCH_SIZE]
                output = _forward(model, batch)
                for row, ids in enumerate(batch):
                    # The first is the embedding, which the package leaves out.
                    entries = [entry[row, len(ids) - 1] for entry in output.hidden_states[1:]]
                    states.append(torch.stack(entries))
            means.append(torch.stack(states).cpu().double().mean(0))
    per_layer = torch.stack(means, dim=1)  # (n_layers, n_languages, hidden_size)
    agnostic, basis = zip(*(decompose(layer_means.T) for layer_means in per_layer), strict=True)
    return per_layer, torch.stack(agnostic), torch.stack(basis)


def decompose(means: Tensor) -> tuple[Tensor, Tensor]:
    """Language subspace probing; (hidden_size, n_languages) → mu_a and M_s transposed."""
    rank = means.shape[1] - 1
    ones = torch.ones(means.shape[1], 1, dtype=means.dtype)
    mu = means @ ones / len(ones)
    u, s, v = torch.linalg.svd(means - mu @ ones.T, full_matrices=False)
    approximated = mu @ ones.T + u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
    dual = torch.linalg.pinv(approximated).T @ ones
    mu_a = dual / dual.norm() ** 2
    u, _, _ = torch.linalg.svd(approximated - mu_a @ ones.T, full_matrices=False)
    return mu_a[:, 0], u[:, :rank].T


def train(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    rows: Sequence[Mapping[str, int]],
    subspaces: tuple[Tensor, Tensor, Tensor],
    languages: Sequence[str],
) -> list[dict[str, float]]:
    """Train the top two layers for one epoch.

    Args:
        model: is changed.
        reference: the same model, which stays.
        prompts: token ids.
        rows: language → index into `prompts`, for each parallel row.
        subspaces: as `probe` returns them, of the same languages.
        languages: the central one first.

    Returns:
        The losses of every step: "loss", "retain", "align.<language>", "separate.<language>".
    """
    central, *targets = languages
    means, agnostic, basis = (entry[-1].float().to(model.device) for entry in subspaces)
    unit = agnostic / agnostic.norm()
    omega = {k: (means[i] - means[0]) @ basis.T @ basis for i, k in enumerate(languages)}
    model.requires_grad_(False)
    for layer in model.get_decoder().layers[-2:]:
        layer.requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
    )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    n_steps = math.ceil(len(rows) / BATCH_SIZE)
    log: list[dict[str, float]] = []
    for step in range(n_steps):
        batch = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
        parts: dict[str, float] = {}
        optimizer.zero_grad()
        for row in batch:
            now: dict[str, Tensor] = {}
            before: dict[str, Tensor] = {}
            for language, index in rows[row].items():
                ids = prompts[index]
                now[language] = _forward(model, [ids]).hidden_states[-1][0]
                with torch.no_grad():
                    before[language] = _forward(reference, [ids]).hidden_states[-1][0]
            losses = {"retain": (now[central].mean(0) - before[central].mean(0)).square().mean()}
            for language in targets:
                pulled = (now[language][-1] - now[central][-1]) @ unit * unit
                losses[f"align.{language}"] = pulled.square().mean()
                pushed = (now[language][-1] - before[language][-1]) @ basis.T @ basis
                losses[f"separate.{language}"] = (pushed - omega[language]).square().mean()
            total = torch.stack(list(losses.values())).sum() / len(batch)
            total.backward()
            for name, value in {**losses, "loss": total * len(batch)}.items():
                parts[name] = parts.get(name, 0.0) + float(value.detach()) / len(batch)
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * _schedule(step, n_steps)
        optimizer.step()
        log.append(parts)
    return log


def _forward(model: PreTrainedModel, batch: Sequence[Sequence[int]]) -> Any:
    padded = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.int64)
    mask = torch.zeros_like(padded)
    for row, ids in enumerate(batch):
        padded[row, : len(ids)] = torch.tensor(ids)
        mask[row, : len(ids)] = 1
    return model(
        input_ids=padded.to(model.device),
        attention_mask=mask.to(model.device),
        output_hidden_states=True,
        use_cache=False,
    )


def _schedule(step: int, n_steps: int) -> float:
    warm = math.ceil(WARMUP_RATIO * n_steps)
    if step < warm:
        return step / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, n_steps - warm)))
