"""Tiny random models of every family that must work, and a byte-level tokenizer for them.

Weights are drawn from a generator of their own, so neither the global seed nor the order of tests
matters. They are large enough that tokens, layers and positions all tell in the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from polylens.corpora import starter_corpus

N_LAYERS = 4
HIDDEN_SIZE = 32
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
VOCAB_SIZE = len(SPECIAL_TOKENS) + 256

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SHORT_WINDOW = 5  # shorter than the prompts of the tests, so that it bites
_LAYER_TYPES = ["sliding_attention", "full_attention"] * (N_LAYERS // 2)


def _family(
    model: type[PreTrainedModel], config: type[hf.PretrainedConfig], **settings: Any
) -> Callable[[], PreTrainedModel]:
    def make() -> PreTrainedModel:
        shared = {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": HIDDEN_SIZE,
            "intermediate_size": 48,
            "num_hidden_layers": N_LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": PAD_ID,
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
        }
        return _with_fixed_weights(lambda: model(config(**{**shared, **settings})))

    return make


def _gpt2() -> PreTrainedModel:
    config = hf.GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=HIDDEN_SIZE,
        n_layer=N_LAYERS,
        n_head=4,
        n_positions=512,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    return _with_fixed_weights(lambda: hf.GPT2LMHeadModel(config))


def _bloom() -> PreTrainedModel:
    """Its decoder takes its layers' states out of tuples; positions are a bias of attention."""
    config = hf.BloomConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        n_layer=N_LAYERS,
        n_head=4,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    return _with_fixed_weights(lambda: hf.BloomForCausalLM(config))


def _gemma3_with_vision() -> PreTrainedModel:
    """A language model inside a larger one, as Gemma 3 from 4 billion parameters up."""
    text = build("gemma3").config.to_dict()
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = hf.Gemma3Config(text_config=text, vision_config=vision)
    return _with_fixed_weights(lambda: hf.Gemma3ForConditionalGeneration(config))


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _family(hf.LlamaForCausalLM, hf.LlamaConfig),
    "qwen2": _family(hf.Qwen2ForCausalLM, hf.Qwen2Config),
    "qwen3": _family(hf.Qwen3ForCausalLM, hf.Qwen3Config, head_dim=8),
    "mistral": _family(hf.MistralForCausalLM, hf.MistralConfig, sliding_window=_SHORT_WINDOW),
    "phi3": _family(hf.Phi3ForCausalLM, hf.Phi3Config),
    "gemma2": _family(
        hf.Gemma2ForCausalLM, hf.Gemma2Config, head_dim=8, sliding_window=_SHORT_WINDOW
    ),
    "gemma3": _family(
        hf.Gemma3ForCausalLM,
        hf.Gemma3TextConfig,
        head_dim=8,
        sliding_window=_SHORT_WINDOW,
        layer_types=_LAYER_TYPES,
    ),
    "olmo2": _family(hf.Olmo2ForCausalLM, hf.Olmo2Config),
    "qwen3_moe": _family(
        hf.Qwen3MoeForCausalLM,
        hf.Qwen3MoeConfig,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    ),
    "mixtral": _family(hf.MixtralForCausalLM, hf.MixtralConfig, num_local_experts=4),
    "gpt2": _gpt2,
    "bloom": _bloom,
    "gemma3_with_vision": _gemma3_with_vision,
    # A memory beside keys and values: prefixes cannot be shared.
    "lfm2": _family(
        hf.Lfm2ForCausalLM, hf.Lfm2Config, layer_types=["conv", "full_attention"] * (N_LAYERS // 2)
    ),
    # Latent attention, and a buffer in each router.
    "deepseek_v3": _family(
        hf.DeepseekV3ForCausalLM,
        hf.DeepseekV3Config,
        num_key_value_heads=4,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        first_k_dense_replace=1,
    ),
}


def build(family: str = "llama") -> PreTrainedModel:
    """A new tiny model, the same weights every time."""
    return FAMILIES[family]()


def tiny_tokenizer(*, chat_template: bool = True, bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, after the special tokens.

    Args:
        chat_template: give it `CHAT_TEMPLATE`.
        bos: put "<s>" before every text that is tokenised with special tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS_ID)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE if chat_template else None,
    )


def save_tiny(folder: Path, family: str = "llama", *, chat_template: bool = True) -> Path:
    """Write a complete model folder that transformers' Auto classes load."""
    build(family).save_pretrained(folder)
    tiny_tokenizer(chat_template=chat_template).save_pretrained(folder)
    return folder


def save_taught(folder: Path) -> Path:
    """Write a model folder like `save_tiny`, of a model that has something to lose in English.

    A random model cannot be harmed. This one knows which letters follow each other.
    """
    model, tokenizer = build(), tiny_tokenizer()
    texts = [row["en"] for row in starter_corpus().rows[:24]]
    batch = tokenizer(texts, max_length=64, truncation=True, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(40):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _with_fixed_weights(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):  # the initialisation we overwrite draws from it
        model = make().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:  # norms and biases: near what they start as
                parameter += 0.1 * noise
            else:
                parameter.copy_(0.25 * noise)
    return model
