"""A byte-level BPE tokenizer as the metadata of a GGUF file.

llama.cpp does not read how a tokenizer splits text before BPE: it has a few ways built in, chosen
by name. A name is written only if the tokenizer splits exactly so; any other would load and
tokenise wrongly.
"""

from __future__ import annotations

import json
from typing import Any

import gguf

from polylens.errors import ModelError

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")

# What a tokenizer does before BPE, and whether whole words skip the merges → llama.cpp's name.
_NAMES = {
    (("Split", LLAMA3_PATTERN), ("ByteLevel", False), True): "llama-bpe",
    (("Split", QWEN2_PATTERN), ("ByteLevel", False), False): "qwen2",
    (("Digits", True), ("ByteLevel", True), False): "smollm",
    (("ByteLevel", True), False): "gpt-2",
}


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, vocab_size: int) -> None:
    """Write a tokenizer's vocabulary, merges, special tokens and chat template.

    Args:
        writer: of the file.
        tokenizer: a fast tokenizer.
        vocab_size: rows of the embedding; those without a token are marked as unused.

    Raises:
        ModelError: it is not a byte-level BPE tokenizer that splits text in a way llama.cpp knows.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    split_name = _split_name(state)
    added = {entry["id"]: entry for entry in state["added_tokens"]}
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    texts, kinds = [], []
    for index in range(vocab_size):
        texts.append(tokens.get(index, f"[PAD{index}]"))
        if index not in tokens:
            kinds.append(gguf.TokenType.UNUSED)
        elif index in added:
            is_special = added[index]["special"]
            kinds.append(gguf.TokenType.CONTROL if is_special else gguf.TokenType.USER_DEFINED)
        else:
            kinds.append(gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_name)
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    merges = state["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    for add, index in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
    ):
        if index is not None:
            add(index)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _split_name(state: dict[str, Any]) -> str:
    """Return llama.cpp's name of the way that a tokenizer splits text."""
    bpe, normalizer = state["model"], state["normalizer"]
    plain = bpe["type"] == "BPE" and not bpe["byte_fallback"] and not bpe["fuse_unk"]
    # llama.cpp normalises no text; NFC changes hardly any, and its own converter drops it too.
    if plain and (normalizer is None or normalizer["type"] == "NFC"):
        before = state["pre_tokenizer"] or {"type": "Sequence", "pretokenizers": []}
        steps = before["pretokenizers"] if before["type"] == "Sequence" else [before]
        name = _NAMES.get((*map(_step, steps), bpe["ignore_merges"]))
        if name is not None:
            return name
    raise ModelError(
        f"a GGUF file needs a byte-level BPE tokenizer that splits text as one of "
        f"{', '.join(_NAMES.values())} does, but this one splits otherwise; export it as merged "
        "and give that folder to llama.cpp's convert_hf_to_gguf.py instead"
    )


def _step(step: dict[str, Any]) -> tuple[str, Any]:
    kind = step["type"]
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return kind, step["pattern"].get("Regex")
    if kind == "Digits":
        return kind, step["individual_digits"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return kind, step["use_regex"]
    return kind, None
