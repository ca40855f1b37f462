import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from polylens.crown import CrownDelta, run_crown
from polylens.evaluation import likelihood
from polylens.evaluation.likelihood import encode_plain, score_bits
from polylens.hidden_states import Keep, collect_hidden_states
from tiny import BOS_ID, EOS_ID, VOCAB_SIZE, tiny_tokenizer

BOUNDARY = 2
LENGTHS = (7, 1, 23, 12, 23, 2)


def _prompts():
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(VOCAB_SIZE, (n,), generator=generator).tolist() for n in LENGTHS]


def _scored(model, prompts, token_budget=30):
    states = collect_hidden_states(model.structure, prompts, Keep(boundary_layers=(BOUNDARY,)))
    batches = run_crown(model.structure, states, token_budget=token_budget)
    return score_bits(model.structure, batches, prompts)


@torch.no_grad()
def _expected(model, prompts):
    """Bits by transformers' own forward, one text at a time."""
    bits = []
    for ids in prompts:
        logits = model.causal_lm(torch.tensor([ids])).logits[0, :-1]
        nats = functional.cross_entropy(logits, torch.tensor(ids)[1:], reduction="sum")
        bits.append(float(nats) / math.log(2))
    return bits


def _delta(model, scale):
    generator = torch.Generator().manual_seed(9)
    layer = model.structure.layers[BOUNDARY]
    return CrownDelta(
        {
            model.structure.parameter_name(BOUNDARY, name): scale
            * torch.randn(parameter.shape, generator=generator)
            for name, parameter in layer.named_parameters()
        },
        {},
    )


def test_bits_equal_those_of_the_whole_model(tiny_model):
    prompts = _prompts()
    bits = _scored(tiny_model, prompts)
    assert bits == pytest.approx(_expected(tiny_model, prompts), rel=1e-5)
    assert bits[1] == 0.0  # a single token has no context


def test_bits_after_equal_those_of_the_changed_model(tiny_model):
    prompts = _prompts()
    states = collect_hidden_states(tiny_model.structure, prompts, Keep(boundary_layers=(BOUNDARY,)))
    before = _scored(tiny_model, prompts)
    with _delta(tiny_model, 0.05).applied(tiny_model.structure):
        batches = run_crown(tiny_model.structure, states, token_budget=30)
        after = score_bits(tiny_model.structure, batches, prompts)
        assert after == pytest.approx(_expected(tiny_model, prompts), rel=1e-5)
    assert after != pytest.approx(before, rel=1e-3)
    with _delta(tiny_model, 0.0).applied(tiny_model.structure):
        assert _scored(tiny_model, prompts) == before  # bit for bit


@pytest.mark.parametrize("rows", [1, 7, 22, 62, 63])
def test_chunks_of_the_head_do_not_change_bits(llama, monkeypatch, rows):
    prompts = _prompts()
    expected = _scored(llama, prompts)
    shapes = set()
    llama.causal_lm.lm_head.register_forward_hook(lambda *call: shapes.add(call[2].shape[:-1]))
    monkeypatch.setattr(likelihood, "LOGIT_ROWS", rows)
    assert _scored(llama, prompts) == pytest.approx(expected, rel=1e-5)
    assert max(shapes) <= (1, rows)


def test_no_texts_have_no_bits(llama):
    assert score_bits(llama.structure, [], []) == []


@pytest.mark.parametrize(
    ("text", "max_tokens", "n_tokens", "n_bytes"),
    [
        ("hello", 99, 5, 4),
        ("日本語", 99, 9, 8),  # the first byte of the first character is context
        ("日本語", 9, 9, 8),
        ("日本語", 8, 6, 5),  # cut back to a whole character
        ("日本語", 2, 0, 0),
        ("h", 99, 1, 0),
    ],
)
def test_without_a_beginning_of_text_token_the_first_token_does_not_count(
    text, max_tokens, n_tokens, n_bytes
):
    ids, size = encode_plain(tiny_tokenizer(), text, max_tokens)
    assert (len(ids), size) == (n_tokens, n_bytes)
    assert ids == tiny_tokenizer()(text)["input_ids"][:n_tokens]


@pytest.mark.parametrize(
    ("text", "max_tokens", "n_tokens", "n_bytes"),
    [("hello", 99, 6, 5), ("日本語", 99, 10, 9), ("日本語", 9, 7, 6), (" a ", 99, 4, 3)],
)
def test_with_a_beginning_of_text_token_every_byte_counts(text, max_tokens, n_tokens, n_bytes):
    ids, size = encode_plain(tiny_tokenizer(bos=True), text, max_tokens)
    assert (len(ids), size) == (n_tokens, n_bytes)
    assert ids[0] == BOS_ID


def test_special_tokens_at_the_end_are_not_scored():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", EOS_ID)]
    )
    assert tokenizer("hi")["input_ids"][-1] == EOS_ID
    ids, n_bytes = encode_plain(tokenizer, "hi", 99)
    assert (len(ids), n_bytes) == (2, 1)


def _byte_fallback_tokenizer(prefix):
    """In the manner of SentencePiece: "▁" for a space, single bytes for characters it lacks."""
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "h", "i"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    ("prefix", "text", "n_bytes"),
    [
        (False, "日 hi", 5),  # the first token is one byte of three
        (True, "日 hi", 6),  # the first token is a space that the text does not have
        (False, "hi 日", 5),
        (True, "hi 日", 6),
    ],
)
def test_bytes_of_sentencepiece_tokens(prefix, text, n_bytes):
    assert encode_plain(_byte_fallback_tokenizer(prefix), text, 99)[1] == n_bytes


class _SlowTokenizer:
    """A tokenizer that tells no offsets: a token a letter."""

    is_fast = False

    def __call__(self, text, *, return_offsets_mapping, **settings):
        assert not return_offsets_mapping
        return {
            "input_ids": [1, *map(ord, text)],
            "special_tokens_mask": [1] + [0] * len(text),
        }

    def decode(self, ids, **settings):
        return "".join(chr(token) for token in ids if token != 1)


def test_bytes_of_a_tokenizer_without_offsets():
    assert encode_plain(_SlowTokenizer(), "né", 99)[1] == 3
    assert encode_plain(_SlowTokenizer(), "néné", 4)[1] == 4
