"""Real weights in the tools that exports are for: PEFT, and llama.cpp through its binding."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from test_gguf import SPLITS, tiny, trained_tokenizer
from torch import Tensor

import polylens
from polylens.config import TrainSettings
from polylens.corpora import starter_corpus
from polylens.crown import CrownDelta
from polylens.export import save_control_vector, save_gguf, save_lora
from polylens.models.loading import LanguageModel, load_model, wrap_model
from polylens.subspaces import Subspaces
from test_crown import random_delta

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

MIXED = "Habari 2024! I've 12345 naïve   spaces\n\n 你好，世界 🚀 – ¿Qué tal? বাংলা\tDON'T"


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load_model("smollm2-135m-instruct", dtype="float32")


@pytest.fixture(scope="module")
def subspaces(model: LanguageModel) -> Subspaces:
    rows, _ = starter_corpus().split(n_heldout=32)
    return polylens.probe(model, rows.limit(24, 0).to_corpus(), languages=["en", "sw", "es"])


@pytest.fixture(scope="module")
def delta(model: LanguageModel, subspaces: Subspaces) -> CrownDelta:
    rows, _ = starter_corpus().split(n_heldout=32)
    return polylens.train(model, subspaces, rows.limit(24, 0), settings=TrainSettings(epochs=1))


@pytest.fixture(scope="module")
def ids(model: LanguageModel) -> list[int]:
    message = {"role": "user", "content": "Give three tips for staying healthy."}
    return model.tokenizer.apply_chat_template(
        [message], add_generation_prompt=True, return_dict=False
    )


@torch.no_grad()
def logits(causal_lm: Any, ids: Sequence[int]) -> Tensor:
    return causal_lm(torch.tensor([ids]), use_cache=False).logits[0]


class LlamaCpp:
    """A GGUF file in llama.cpp, with keys and values in float32 rather than float16."""

    def __init__(self, path: Path) -> None:
        self.library = pytest.importorskip("llama_cpp")
        self.llama = self.library.Llama(
            str(path), n_ctx=256, logits_all=True, verbose=False, type_k=0, type_v=0
        )

    def logits(self, ids: Sequence[int]) -> Tensor:
        self.llama.reset()
        self.llama.eval(ids)
        return torch.from_numpy(self.llama.scores[: len(ids)].copy())

    def steer(self, path: Path) -> None:
        """Set a control vector as llama.cpp's own loader does, which has no binding.

        `direction.k` goes to place k - 1 of a buffer that begins with layer 1.
        """
        width, n_layers = self.llama.n_embd(), self.library.llama_model_n_layer(self.llama.model)
        buffer = np.zeros((n_layers - 1, width), np.float32)
        for tensor in gguf.GGUFReader(path).tensors:
            buffer[int(tensor.name.removeprefix("direction.")) - 1] += tensor.data
        pointer = buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        failed = self.library.llama_set_adapter_cvec(
            self.llama.ctx, pointer, buffer.size, width, 1, n_layers
        )
        assert not failed

    def close(self) -> None:
        self.llama.close()


@pytest.fixture(scope="module")
def base(model: LanguageModel, delta: CrownDelta, tmp_path_factory: Any) -> Iterator[LlamaCpp]:
    """The untouched model in llama.cpp."""
    path = tmp_path_factory.mktemp("base") / "base.gguf"
    save_gguf(model, delta, path, strength=0, numbers="float32")
    opened = LlamaCpp(path)
    yield opened
    opened.close()


def test_peft_agrees_with_the_delta_at_full_rank_and_less_below(
    model: LanguageModel, delta: CrownDelta, ids: list[int], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    untouched = logits(model.causal_lm, ids)
    with delta.applied(model.structure):
        wanted = logits(model.causal_lm, ids)
    effect = (wanted - untouched).abs().max()
    wrong = {}
    for rank in (4, 64, 576):
        save_lora(model, delta, tmp_path / f"{rank}", rank=rank)
        adapted = peft.PeftModel.from_pretrained(
            copy.deepcopy(model.causal_lm), tmp_path / f"{rank}"
        )
        wrong[rank] = (logits(adapted, ids) - wanted).abs().max()
    assert wrong[576] < 1e-3 * effect
    assert wrong[576] < wrong[64] < wrong[4] < effect


@pytest.mark.parametrize(
    ("numbers", "most"), [("float32", 1e-3), ("float16", 0.2), ("bfloat16", 1.0), ("q8_0", 6.0)]
)
def test_llama_cpp_gives_the_logits_of_the_merged_model(
    model: LanguageModel,
    delta: CrownDelta,
    ids: list[int],
    tmp_path: Path,
    numbers: Any,
    most: float,
) -> None:
    save_gguf(model, delta, tmp_path / "m.gguf", numbers=numbers)
    llama = LlamaCpp(tmp_path / "m.gguf")
    with delta.applied(model.structure):
        wanted = logits(model.causal_lm, ids)
    assert (llama.logits(ids) - wanted).abs().max() < most
    assert (wanted - logits(model.causal_lm, ids)).abs().max() > 0.2
    llama.close()


def test_llama_cpp_tokenises_as_the_model_does(model: LanguageModel, base: LlamaCpp) -> None:
    found = base.llama.tokenize(MIXED.encode(), add_bos=False, special=True)
    assert found == model.tokenizer(MIXED, add_special_tokens=False)["input_ids"]
    chat = base.llama.tokenize(b"<|im_start|>user\nHi<|im_end|>\n", add_bos=False, special=True)
    assert chat[0] == model.tokenizer.convert_tokens_to_ids("<|im_start|>")


@pytest.mark.parametrize("layer", [1, 15, 29])
def test_a_control_vector_adds_to_the_output_of_its_own_layer_alone(
    model: LanguageModel,
    subspaces: Subspaces,
    base: LlamaCpp,
    ids: list[int],
    layer: int,
    tmp_path: Path,
) -> None:
    save_control_vector(
        subspaces, tmp_path / "es.gguf", language="es", layers=[layer], strength=0.8
    )
    base.steer(tmp_path / "es.gguf")
    steered = base.logits(ids)
    added = 0.8 * subspaces.direction("es", layer).float()

    def shifted_at(place: int) -> Tensor:
        module = model.structure.layers[place]
        hook = module.register_forward_hook(lambda _, inputs, output: output + added)
        try:
            return logits(model.causal_lm, ids)
        finally:
            hook.remove()

    assert (steered - shifted_at(layer)).abs().max() < 1e-3
    assert (steered - logits(model.causal_lm, ids)).abs().max() > 1
    for place in {layer - 1, layer + 1} - {model.structure.n_layers}:
        assert (steered - shifted_at(place)).abs().max() > 1


@pytest.mark.parametrize("split", SPLITS)
def test_llama_cpp_splits_text_as_the_tokenizer_does(split: str, tmp_path: Path) -> None:
    tokenizer = trained_tokenizer(split)
    tiny_model = wrap_model(tiny("llama", vocab_size=len(tokenizer)).causal_lm, tokenizer)
    save_gguf(tiny_model, random_delta(tiny_model), tmp_path / "m.gguf")
    llama = LlamaCpp(tmp_path / "m.gguf")
    for text in (MIXED, *(text for row in starter_corpus().rows[:20] for text in row.values())):
        found = llama.llama.tokenize(text.encode(), add_bos=False, special=False)
        assert found == tokenizer(text, add_special_tokens=False)["input_ids"], text
    llama.close()


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize(
    ("family", "settings"),
    [("llama", {}), ("llama", {"rope_parameters": LLAMA3_ROPE}), ("qwen2", {}), ("qwen3", {})],
)
def test_llama_cpp_runs_each_family_as_transformers_does(
    family: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = trained_tokenizer("gpt-2")
    made = tiny(family, vocab_size=len(tokenizer), **settings)
    tiny_model = wrap_model(made.causal_lm, tokenizer)
    delta = random_delta(tiny_model)
    save_gguf(tiny_model, delta, tmp_path / "m.gguf", numbers="float32")
    llama = LlamaCpp(tmp_path / "m.gguf")
    prompt = list(range(5, 105))  # far enough for the scaling of positions to tell
    with delta.applied(tiny_model.structure):
        wanted = logits(tiny_model.causal_lm, prompt)
    torch.testing.assert_close(llama.logits(prompt), wanted, rtol=1e-3, atol=1e-3)
    llama.close()
