"""Control vectors: the directions of the subspaces, where llama.cpp looks for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from polylens.errors import PolyLensError
from polylens.export import save_control_vector
from polylens.subspaces import Subspaces, probe_subspaces

N_LAYERS, WIDTH = 6, 16


@pytest.fixture
def subspaces() -> Subspaces:
    generator = torch.Generator().manual_seed(0)
    pooled = {
        language: torch.randn(5, N_LAYERS + 1, WIDTH, generator=generator)
        for language in ("en", "sw", "zh")
    }
    metadata = {"model": "tiny", "fingerprint": "0", "n_layers": N_LAYERS}
    return probe_subspaces(pooled, central="en", layers=[0, 1, 2, 5, 6], metadata=metadata)


def test_a_file_holds_the_scaled_directions_under_the_numbers_of_their_layers(
    subspaces: Subspaces, tmp_path: Path
) -> None:
    path = tmp_path / "sw.gguf"
    assert save_control_vector(
        subspaces, path, language="Swahili", layers=[5, 1, 5], strength=-0.5
    ) == (1, 5)
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.model_hint"].contents() == "tiny"
    assert reader.fields["controlvector.layer_count"].contents() == 2
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert sorted(tensors) == ["direction.1", "direction.5"]
    for layer in (1, 5):
        values = tensors[f"direction.{layer}"]
        assert values.shape == (WIDTH,)
        assert values.dtype == np.float32
        wanted = -0.5 * subspaces.direction("sw", layer)
        torch.testing.assert_close(torch.from_numpy(values.copy()), wanted.float())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"language": "fr"}, "one of those probed (en, sw, zh), got 'fr'"),
        ({"language": "en"}, "away from the central language"),
        ({"layers": [0]}, "layers 1 to 5 of this model, got 0"),
        ({"layers": [6]}, "layers 1 to 5 of this model, got 6"),
        ({"layers": [3]}, "layer must be one of those probed"),
    ],
)
def test_what_llama_cpp_cannot_do_is_refused_and_nothing_written(
    subspaces: Subspaces, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PolyLensError) as error:
        save_control_vector(
            subspaces, tmp_path / "v.gguf", **{"language": "sw", "layers": [1], **options}
        )
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())
