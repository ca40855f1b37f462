"""Language directions as a control vector that llama.cpp adds to the residual stream.

The file is GGUF without a model: one float32 tensor `direction.k` a layer. llama.cpp adds it to the
output of decoder layer k, counted from 0 as we do: its loader keeps `direction.k` at place k - 1 of
a buffer that begins with layer 1, and its graph adds that to what layer k gives to the next. It has
no place for layer 0, nor for what follows the final norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

from polylens.artefacts import writing
from polylens.errors import UsageError
from polylens.languages import normalize_language
from polylens.subspaces import Subspaces

_ARCHITECTURE = "controlvector"


def save_control_vector(
    subspaces: Subspaces,
    path: str | Path,
    *,
    language: str,
    layers: Sequence[int],
    strength: float = 1.0,
) -> tuple[int, ...]:
    """Write `strength · omega_l` of some layers as a GGUF control vector, whole or not at all.

    Args:
        subspaces: of the model that the vector is for.
        path: the file to write.
        language: the language to push towards, away from the central one.
        layers: decoder layers whose output is changed, each at least 1. What several layers add
            piles up on the way through the model, so one or a few are enough.
        strength: of the push; llama.cpp can scale it further.

    Returns:
        The layers written.

    Raises:
        SubspaceError: the language or a layer was not probed.
        UsageError: a layer cannot be changed by llama.cpp, or the language is the central one.
    """
    language = normalize_language(language)
    if language == subspaces.central:
        raise UsageError(
            f"a control vector must point away from the central language, got {language!r} itself; "
            "choose another of those probed"
        )
    last = int(subspaces.metadata["n_layers"]) - 1
    chosen = sorted(set(layers))
    for layer in chosen:
        if not 1 <= layer <= last:
            raise UsageError(
                f"llama.cpp changes the outputs of layers 1 to {last} of this model, got {layer}; "
                "choose among those"
            )
    directions = {layer: strength * subspaces.direction(language, layer) for layer in chosen}
    with writing(Path(path)) as temporary:
        writer = gguf.GGUFWriter(temporary, _ARCHITECTURE)
        writer.add_name(f"{language} against {subspaces.central}")
        writer.add_string(f"{_ARCHITECTURE}.model_hint", str(subspaces.metadata["model"]))
        writer.add_uint32(f"{_ARCHITECTURE}.layer_count", len(chosen))
        for layer, direction in directions.items():
            writer.add_tensor(f"direction.{layer}", direction.numpy().astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return tuple(chosen)
