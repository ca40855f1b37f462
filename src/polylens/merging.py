"""The enhanced model as a folder that plain transformers, vLLM and others load.

Rounding is the trap here: a step of training changes a weight by less than half the spacing of
bfloat16 numbers, so a merged model in the stored dtype can lose most of what was learnt.
`choose_dtype` measures that, and what is evaluated is the model as saved.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from polylens.artefacts import write_text, writing
from polylens.crown import CrownDelta
from polylens.models.loading import LanguageModel
from polylens.models.source import describe
from polylens.scratch import Scratch

# With less than a tenth of the change lost to rounding, the saved model is the trained one for all
# purposes; the loss measured on SmolLM2 with the published settings is in docs/performance.md.
MAX_LOST_RATIO = 0.1


def stored_dtype(model: LanguageModel) -> torch.dtype:
    """Return the dtype that the model's weights were stored in, before any widening."""
    if model.source is None:
        return model.structure.dtype
    stored: torch.dtype = getattr(torch, describe(model.source.folder).dtype)
    return stored


def lost_ratio(
    model: LanguageModel, delta: CrownDelta, dtype: torch.dtype, strength: float = 1.0
) -> float:
    """Return the share of the change that rounding to `dtype` loses: ‖rounded - exact‖ / ‖change‖.

    Args:
        model: the untouched model.
        delta: what training changed.
        dtype: to round to.
        strength: the dial.

    Returns:
        0 for no loss; about 1 when nothing is left of the change.
    """
    lost = total = 0.0
    original = dict(model.causal_lm.named_parameters())
    for name, change in delta.changes.items():
        wanted = strength * change
        weight = original[name].detach().float().cpu()
        rounded = (weight + wanted).to(dtype).float() - weight
        lost += float((rounded - wanted).double().square().sum())
        total += float(wanted.double().square().sum())
    return (lost / total) ** 0.5 if total else 0.0


def choose_dtype(
    model: LanguageModel, delta: CrownDelta, dtype: str, strength: float
) -> torch.dtype:
    """Return the dtype to save in.

    Args:
        model: the untouched model.
        delta: what training changed.
        dtype: "auto" or the name of a dtype.
        strength: the dial.

    Returns:
        For "auto" the stored dtype if rounding to it loses at most `MAX_LOST_RATIO` of the change,
        else float32.
    """
    if dtype != "auto":
        chosen = getattr(torch, dtype)
        assert isinstance(chosen, torch.dtype)
        return chosen
    stored = stored_dtype(model)
    return stored if lost_ratio(model, delta, stored, strength) <= MAX_LOST_RATIO else torch.float32


def save_model(
    model: LanguageModel,
    delta: CrownDelta,
    folder: str | Path,
    *,
    strength: float = 1.0,
    dtype: torch.dtype | None = None,
    card: str | None = None,
) -> None:
    """Write the merged model with all that belongs to it, whole or not at all.

    Args:
        model: the untouched model; it is not changed.
        delta: what training changed.
        folder: the folder to make or replace.
        strength: the dial: W + strength · change.
        dtype: of the saved weights; None chooses as `choose_dtype` with "auto".
        card: text of README.md; None for none.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    dtype = dtype or choose_dtype(model, delta, "auto", strength)
    with writing(Path(folder)) as temporary:
        # Changed in float32 and rounded once, whatever dtype the model computes in.
        weights = dict(delta.weights(model.structure, strength, dtype))
        precise = _kept_precise(model, dtype)
        cast: dict[int, torch.Tensor] = {}  # tied weights stay one tensor
        # What was too large for memory is too large for it now.
        scratch = Scratch(None if model.structure.streaming is None else 0)
        for name, tensor in model.causal_lm.state_dict().items():
            if name not in weights:
                if tensor.data_ptr() not in cast:
                    wanted = torch.float32 if precise.search(name) else dtype
                    cast[tensor.data_ptr()] = _cast(tensor, wanted, scratch)
                weights[name] = cast[tensor.data_ptr()]
        model.causal_lm.save_pretrained(temporary, state_dict=weights)
        del weights, cast
        model.tokenizer.save_pretrained(temporary)
        _set_dtype(temporary / "config.json", dtype)
        if card is not None:
            write_text(temporary / "README.md", card)


def _kept_precise(model: LanguageModel, dtype: torch.dtype) -> re.Pattern[str]:
    """Match the names of weights that the model computes with in float32 whatever its dtype."""
    causal_lm = model.causal_lm
    names = set(causal_lm._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        names |= set(causal_lm._keep_in_fp32_modules or ())
    parts = "|".join(map(re.escape, sorted(names)))
    return re.compile(rf"(^|\.)({parts})(\.|$)" if parts else r"(?!)")


def _cast(tensor: torch.Tensor, dtype: torch.dtype, scratch: Scratch) -> torch.Tensor:
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    return scratch.empty(tuple(tensor.shape), dtype).copy_(tensor)


def _set_dtype(path: Path, dtype: torch.dtype) -> None:
    """State the dtype of the saved weights; transformers wrote the computing dtype."""
    config = json.loads(path.read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    for section in (config, config.get("text_config")):
        if section is not None:
            section.pop("torch_dtype", None)
            section["dtype"] = name
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
