"""GGUF files: transformers loads them and gives the logits of the merged model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers as hf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerFast

from polylens.corpora import starter_corpus
from polylens.errors import ModelError, UsageError
from polylens.export import save_gguf
from polylens.export.gguf import ARCHITECTURES
from polylens.export.gguf_tokenizer import LLAMA3_PATTERN, QWEN2_PATTERN
from polylens.models.loading import LanguageModel, wrap_model
from test_crown import logits, random_delta
from tiny import FAMILIES, build, tiny_tokenizer

BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)

# Ways to split text, by llama.cpp's name.
SPLITS: dict[str, Any] = {
    "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"), BYTE_LEVEL],
    "qwen2": [pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated"), BYTE_LEVEL],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), GPT2],
    "gpt-2": [GPT2],
}


def tiny(family: str, **settings: Any) -> LanguageModel:
    """A tiny model with other settings of its config."""
    model = build(family)
    if family == "qwen3":  # transformers takes this for granted in GGUF files
        settings = {"head_dim": 128, **settings}
    if settings:
        config = copy.deepcopy(model.config)
        config.update(settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = type(model)(config).eval()
    return wrap_model(model, tiny_tokenizer(), family)


def trained_tokenizer(split: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that was taught the starter corpus, with two special tokens."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=split == "llama-bpe"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[split])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for row in starter_corpus().rows for text in row.values()]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def loaded(path: Path) -> LanguageModel:
    """The file as transformers reads it."""
    model: PreTrainedModel = hf.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    return wrap_model(model, tiny_tokenizer())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_file_gives_the_logits_of_the_merged_model(
    family: str, tied: bool, tmp_path: Path
) -> None:
    model = tiny(family, tie_word_embeddings=True) if tied else tiny(family)
    delta = random_delta(model)
    exported = save_gguf(model, delta, tmp_path / "m.gguf", strength=0.5, numbers="float32")
    with delta.applied(model.structure, 0.5):
        wanted = logits(model)
    assert exported.lost_ratio == 0
    assert (wanted - logits(model)).abs().max() > 1e-3
    torch.testing.assert_close(logits(loaded(tmp_path / "m.gguf")), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("numbers", "least", "most"),
    [("float16", 1e-5, 1e-2), ("bfloat16", 1e-3, 1e-1), ("q8_0", 1e-3, 1e-1)],
)
def test_what_rounding_loses_is_measured(
    numbers: Any, least: float, most: float, tmp_path: Path
) -> None:
    model = tiny("llama")
    delta = random_delta(model)
    exported = save_gguf(model, delta, tmp_path / "m.gguf", numbers=numbers)
    before = dict(model.causal_lm.named_parameters())
    after = dict(loaded(tmp_path / "m.gguf").causal_lm.named_parameters())
    lost = total = 0.0
    for name, change in delta.changes.items():
        lost += float((after[name] - before[name] - change).detach().square().sum())
        total += float(change.square().sum())
    assert exported.lost_ratio == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    assert least < exported.lost_ratio < most


def test_llama_3_scaling_is_written_as_factors_of_the_frequencies(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = tiny("llama", rope_parameters=rope)
    save_gguf(model, random_delta(model), tmp_path / "m.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    factors = torch.from_numpy(tensors["rope_freqs.weight"].data.copy())
    plain = 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(plain / factors, model.causal_lm.model.rotary_emb.inv_freq)
    assert factors.min() == 1  # the fastest frequency stays as it is
    assert factors.max() == pytest.approx(8)  # the slowest is divided by the whole factor


@pytest.mark.parametrize("split", SPLITS)
def test_a_tokenizer_is_written_under_the_name_of_its_split(split: str, tmp_path: Path) -> None:
    model = tiny("llama", vocab_size=1100)
    tokenizer = trained_tokenizer(split)
    model = wrap_model(model.causal_lm, tokenizer)
    save_gguf(model, random_delta(model), tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == split
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == 1100
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert kinds == [3, 3] + [1] * (len(tokenizer) - 2) + [5] * (1100 - len(tokenizer))
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizer.eos_token_id
    assert not fields["tokenizer.ggml.add_bos_token"].contents()
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert again.get_vocab().items() >= tokenizer.get_vocab().items()


def other_split() -> PreTrainedTokenizerFast:
    tokenizer = trained_tokenizer("gpt-2")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), GPT2]
    )
    return tokenizer


def test_a_tokenizer_that_splits_otherwise_is_refused(tmp_path: Path) -> None:
    model = wrap_model(tiny("llama", vocab_size=1100).causal_lm, other_split())
    with pytest.raises(ModelError, match="splits text as one of llama-bpe, qwen2, smollm, gpt-2"):
        save_gguf(model, random_delta(model), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ARCHITECTURES])
def test_other_families_are_refused(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    with pytest.raises(ModelError, match="written for llama, qwen2, qwen3, got a model of type"):
        save_gguf(model, random_delta(model), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "settings", "named"),
    [
        ("llama", {"attention_bias": True}, "attention_bias=True"),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act=gelu"),
        (
            "qwen3",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "rope_type=linear",
        ),
    ],
)
def test_unusual_settings_are_refused(
    family: str, settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    model = tiny(family, **settings)
    with pytest.raises(ModelError, match=f"{named}.*convert_hf_to_gguf.py"):
        save_gguf(model, random_delta(model), tmp_path / "m.gguf")


def test_an_unknown_format_of_numbers_is_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    with pytest.raises(UsageError, match="got 'q8', did you mean 'q8_0'"):
        save_gguf(model, random_delta(model), tmp_path / "m.gguf", numbers="q8")  # type: ignore[arg-type]
