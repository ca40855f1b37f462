"""Finding a model by what the user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from polylens.errors import ModelError
from polylens.models import load_model
from polylens.models.source import describe, resolve
from tiny import build, save_tiny


def test_a_folder_is_taken_as_it_is(tiny_folder: Path) -> None:
    source = resolve(str(tiny_folder))
    assert source.kind == "folder"
    assert source.folder == tiny_folder
    assert source.name == tiny_folder.name


def test_sizes_are_those_of_the_model(tmp_path: Path, family: str) -> None:
    folder = save_tiny(tmp_path / family, family)
    model = build(family)
    facts = describe(folder)
    stored = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    assert facts.n_parameters == sum(stored.values())
    assert facts.n_layers == 4
    assert facts.hidden_size == 32


def config(folder: Path, **values: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "is BertForMaskedLM"),
        (
            {
                "model_type": "t5",
                "architectures": ["T5ForConditionalGeneration"],
                "is_encoder_decoder": True,
            },
            "decoder-only",
        ),
        ({}, "no stated architecture"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "holds none"),
        (
            {
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "quantization_config": {"quant_method": "fp8"},
            },
            r"quantised \(fp8\)",
        ),
    ],
)
def test_folders_that_are_no_model(tmp_path: Path, values: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve(str(config(tmp_path / "x", **values)))


def test_a_weight_that_is_missing_is_told(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 are missing \(model\.layers\.2\.mlp\.up_proj"):
        load_model(folder)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"must hold config\.json"):
        resolve(str(tmp_path))


def test_missing_shards_are_named(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "sharded")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="lacks model-00001-of-00002"):
        resolve(str(folder))


def test_damaged_weights(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "damaged")
    (folder / "model.safetensors").write_bytes(b"\x00" * 50)
    with pytest.raises(ModelError, match="is damaged"):
        describe(folder)


@pytest.mark.parametrize("spec", ["./nowhere", "nothing-like-it", "model.gguf", "a/b/c"])
def test_unknown_names_list_the_forms(spec: str) -> None:
    with pytest.raises(ModelError, match=r"registry name .*smollm2-135m-instruct.* or a Hub id"):
        resolve(spec)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_text("")
    with pytest.raises(ModelError, match="got the file"):
        resolve(str(file))
