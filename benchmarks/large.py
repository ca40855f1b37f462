"""A model larger than the memory it is given: 8 billion parameters, probed and trained in 6 GB.

The model is Llama-3-shaped with random weights, written to disk in bfloat16 (16 GB), so this part
needs that much disk. It says what streaming takes, not what the method does.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from common import DEVICE, Data, by_language, layer_parameters, open_quietly, record, timed
from polylens.config import Runtime, TrainSettings
from polylens.execution import plan_execution
from polylens.hidden_states import Keep, collect_hidden_states, n_tokens_run
from polylens.memory import PeakMemory
from polylens.models.source import describe, resolve
from polylens.objective import ParallelStates
from polylens.subspaces import probe_subspaces
from polylens.training import train_crown

MEMORY = 6 * 10**9
CONFIG = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    tie_word_embeddings=False,
    dtype="bfloat16",
)


def write_model(folder: Path, tokenizer_of: str) -> None:
    """Write random weights, one shard a layer, without ever holding more."""
    partial = folder.with_suffix(".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    CONFIG.architectures = ["LlamaForCausalLM"]
    CONFIG.save_pretrained(partial)
    with torch.device("meta"):
        shapes = {
            name: tensor.shape
            for name, tensor in AutoModelForCausalLM.from_config(CONFIG).state_dict().items()
        }
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        layer = name.split(".")[2] if ".layers." in name else name.split(".")[-2]
        shards.setdefault(f"model-{layer}.safetensors", []).append(name)
    for file, names in shards.items():
        tensors = {}
        for name in names:
            shape = shapes[name]
            if len(shape) == 1:
                tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
            else:
                tensors[name] = torch.empty(shape, dtype=torch.bfloat16)
                tensors[name].normal_(std=0.02, generator=generator)
            weight_map[name] = file
        save_file(tensors, partial / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    for file in resolve(tokenizer_of).folder.glob("*token*"):
        shutil.copy(file, partial)
    for file in resolve(tokenizer_of).folder.glob("*.jinja"):
        shutil.copy(file, partial)
    partial.rename(folder)


def run(name: str, data: Data, folder: Path) -> None:
    """Measure and record; `name` lends its tokenizer.

    On a GPU the model is held there and gets the whole data; on a CPU it gets `MEMORY` and a few
    prompts.
    """
    if not folder.exists():
        write_model(folder, name)
    on_gpu = DEVICE.type == "cuda"
    runtime = Runtime.model_validate({"memory": None if on_gpu else MEMORY})
    facts = describe(folder)
    execution = plan_execution(facts, runtime, n_crown_layers=2)
    dtype = execution.dtype
    model = open_quietly(str(folder), dtype=dtype, streamed=execution.streamed)
    structure = model.structure
    texts = data.texts(model, 300 if on_gpu else 4)
    prompts = data.rows(model, 200 if on_gpu else 4)
    ids = [one for found in texts.values() for one in found]
    with PeakMemory() as peak:
        with timed(dtype) as probing:
            pooled = collect_hidden_states(
                structure, ids, Keep(pooling="last"), scratch=execution.scratch()
            )
        subspaces = probe_subspaces(by_language(pooled, texts), central="en")
        with timed(dtype) as trunk:
            keep = Keep(boundary_layers=(structure.n_layers - 2,), final=True)
            states = collect_hidden_states(
                structure, prompts.ids, keep, scratch=execution.scratch()
            )
        with timed(dtype) as training:
            parallel = ParallelStates(states, prompts.rows, "en")
            settings = TrainSettings(epochs=1, batch_size=8 if on_gpu else 2)
            train_crown(structure, subspaces, parallel, settings, scratch=execution.scratch())
    floor = 2 * layer_parameters(model) * structure.n_layers
    n_probe, n_train = n_tokens_run(ids, once=True), n_tokens_run(prompts.ids)
    result: dict[str, Any] = {
        "model": "Llama-3-shaped, random",
        "n_parameters": facts.n_parameters,
        "bytes_on_disk": facts.n_bytes,
        "how": execution.sentence(),
        "memory_allowed": execution.memory_bytes,
        "peak_bytes": peak.bytes,
        "n_tokens": {"probe": n_probe, "train": n_train},
        "probe": {"seconds": probing.seconds, "over_floor": probing.over_floor(floor * n_probe)},
        "trunk": {"seconds": trunk.seconds, "over_floor": trunk.over_floor(floor * n_train)},
        "train": {"seconds": training.seconds, "peak_bytes": training.peak_bytes},
    }
    record("large", result)
    print(table(result))


def table(result: dict[str, Any]) -> str:
    """Return the result as it stands in docs/performance.md."""
    probing, trunk, training = result["probe"], result["trunk"], result["train"]
    tokens = result["n_tokens"]
    return (
        "A model of random weights and the shape of Llama 3, with "
        f"{result['n_parameters'] / 1e9:.1f} billion parameters "
        f"({result['bytes_on_disk'] / 1e9:.0f} GB in bfloat16 on disk; {result['how']}): the peak "
        f"of main memory was {result['peak_bytes'] / 1e9:.1f} GB. Trunk passes over "
        f"{tokens['probe']} and {tokens['train']} tokens took {probing['seconds']:.0f} s "
        f"({probing['over_floor']:.2f} times the floor) and {trunk['seconds']:.0f} s "
        f"({trunk['over_floor']:.2f} times), training the top two layers "
        f"{training['seconds']:.0f} s."
    )
