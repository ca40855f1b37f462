"""The merged model is the model that was evaluated, in plain transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from polylens.merging import choose_dtype, lost_ratio, save_model, stored_dtype
from polylens.models import load_model
from polylens.models.loading import LanguageModel, wrap_model
from test_crown import IDS, logits, random_delta
from tiny import build, save_tiny, tiny_tokenizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_transformers_gives_the_same_logits(
    tiny_model: LanguageModel, tmp_path: Path, dtype: torch.dtype
) -> None:
    delta = random_delta(tiny_model)
    if dtype == torch.bfloat16:  # a model stored in bfloat16 and computed in float32
        for parameter in tiny_model.causal_lm.parameters():
            parameter.data = parameter.data.bfloat16().float()
    save_model(tiny_model, delta, tmp_path / "model", dtype=dtype, card="# card")
    with delta.applied(tiny_model.structure, dtype=dtype):
        expected = logits(tiny_model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(IDS, use_cache=False).logits, expected)
    assert json.loads((tmp_path / "model/config.json").read_text())["dtype"] == str(dtype)[6:]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.chat_template == tiny_model.tokenizer.chat_template
    assert (tmp_path / "model/README.md").read_text() == "# card"


def test_what_is_computed_in_float32_whatever_the_dtype_is_saved_so(tmp_path: Path) -> None:
    """A router's bias decides which experts run: rounded, it would choose others."""
    model = wrap_model(build("deepseek_v3"), tiny_tokenizer())
    save_model(model, random_delta(model), tmp_path / "model", dtype=torch.bfloat16)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").state_dict()
    kinds = {name.rpartition(".")[2]: tensor.dtype for name, tensor in saved.items()}
    assert kinds["e_score_correction_bias"] == torch.float32
    assert kinds["weight"] == torch.bfloat16


def test_saving_leaves_the_model_as_it_was(llama: LanguageModel, tmp_path: Path) -> None:
    before = logits(llama)
    save_model(llama, random_delta(llama), tmp_path / "model", dtype=torch.bfloat16)
    assert torch.equal(logits(llama), before)


def test_strength_0_saves_the_untouched_model(llama: LanguageModel, tmp_path: Path) -> None:
    save_model(llama, random_delta(llama), tmp_path / "model", strength=0.0, dtype=torch.float32)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for (name, a), (_, b) in zip(
        saved.named_parameters(), llama.causal_lm.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name


def test_a_small_change_is_kept_from_rounding_away(tmp_path: Path) -> None:
    model = wrap_model(build().bfloat16(), tiny_tokenizer())
    small, large = random_delta(model, scale=1e-4), random_delta(model, scale=0.5)
    assert lost_ratio(model, small, torch.bfloat16) > 0.5
    assert lost_ratio(model, large, torch.bfloat16) < 0.01
    assert lost_ratio(model, small, torch.float32) < 1e-3
    assert choose_dtype(model, small, "auto", 1.0) == torch.float32
    assert choose_dtype(model, large, "auto", 1.0) == torch.bfloat16
    assert choose_dtype(model, small, "float16", 1.0) == torch.float16


def test_the_stored_dtype_is_that_of_the_folder(tmp_path: Path) -> None:
    build().bfloat16().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.structure.dtype == torch.float32
    assert stored_dtype(model) == torch.bfloat16


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = build("gemma2")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    wrapped = wrap_model(model, tiny_tokenizer())
    save_model(wrapped, random_delta(wrapped), tmp_path / "model", dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_a_saved_model_can_be_enhanced_again(tmp_path: Path) -> None:
    first = load_model(save_tiny(tmp_path / "base"))
    save_model(first, random_delta(first), tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert again.fingerprint != first.fingerprint


def test_a_model_that_computes_in_bfloat16_is_saved_with_the_whole_change(
    llama: LanguageModel, tmp_path: Path
) -> None:
    delta = random_delta(llama, scale=1e-6)
    exact = delta.weights(llama.structure, dtype=torch.float32)
    narrow = wrap_model(build("llama").bfloat16(), llama.tokenizer)
    save_model(narrow, delta, tmp_path / "out", dtype=torch.float32)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    original = build("llama").bfloat16().float().state_dict()
    for name, change in delta.changes.items():
        assert torch.equal(saved[name], original[name] + change)
        assert saved[name].shape == exact[name].shape


def test_the_fingerprint_knows_settings_that_change_the_result(llama: LanguageModel) -> None:
    other = build("llama")
    other.config.rms_norm_eps *= 10
    assert wrap_model(other, llama.tokenizer).fingerprint != llama.fingerprint
    assert wrap_model(build("llama"), llama.tokenizer).fingerprint == llama.fingerprint
