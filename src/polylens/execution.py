"""How a model is run on this machine: device, dtype, in memory or streamed, and with what room.

Decided from sizes alone, before any weight is read, so that it can be shown and tested.
`open_model` decides and loads.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from polylens import distributed
from polylens.config import CrownSettings, Runtime
from polylens.errors import ConfigError
from polylens.machine import computing_dtype
from polylens.models.loading import LanguageModel, choose_device, load_model
from polylens.models.source import ModelFacts, describe, resolve
from polylens.progress import Progress, silent
from polylens.scratch import Scratch, default_memory
from polylens.token_budget import LOGIT_ROWS
from polylens.training import trained_layers

# What torch, transformers and a tokenizer take before any weight is loaded, as measured on Linux.
LIBRARIES_BYTES = 600_000_000

# Of the memory that may be used, what the activations of a batch may take; and as much again for
# blocks that were freed and do not fit what is asked for next.
_BATCH_SHARE = 1 / 8


def _batch_bytes(memory: int) -> int:
    """A power of two: batches, and so the last bits of results, must not follow each free byte."""
    return int(2 ** math.floor(math.log2(max(1, _BATCH_SHARE * memory))))


@dataclass(frozen=True)
class Execution:
    """How a model is run.

    Attributes:
        device: where it computes.
        dtype: what it computes in.
        streamed: weights stay in their files, and each layer is read when it is needed.
        needed_bytes: of memory (of the GPU's, if there is one) with all weights in it.
        memory_bytes: that may be used.
        scratch_bytes: of main memory, for states, weights in training, their gradients and the
            optimizer's moments; what does not fit goes to memory-mapped files.
        batch_bytes: for the activations of a batch.
    """

    device: torch.device
    dtype: torch.dtype
    streamed: bool
    needed_bytes: int
    memory_bytes: int
    scratch_bytes: int
    batch_bytes: int

    @property
    def computing_name(self) -> str:
        """The dtype's name, e.g. "float32"."""
        return str(self.dtype).removeprefix("torch.")

    def scratch(self) -> Scratch:
        """Return room for one stage."""
        return Scratch(self.scratch_bytes, batch_bytes=self.batch_bytes)

    def agreed(self) -> Execution:
        """Return the same for all processes of a distributed run: the smallest batches of any."""
        batch_bytes = min(distributed.collect_all([self.batch_bytes]))
        return dataclasses.replace(self, batch_bytes=batch_bytes)

    def sentence(self) -> str:
        """Return the decision and its reason in words."""
        needed, memory = (
            f"{n_bytes / 1e9:.1f} GB" for n_bytes in (self.needed_bytes, self.memory_bytes)
        )
        how = (
            f"streamed layer by layer: in memory it would take {needed}, of {memory}"
            if self.streamed
            else f"in memory: {needed} of {memory}"
        )
        return f"{self.device} in {self.computing_name}, model {how}"


def plan_execution(
    facts: ModelFacts, runtime: Runtime, *, n_crown_layers: int = 0, with_head: bool = True
) -> Execution:
    """Decide how a model is run.

    Args:
        facts: its sizes.
        runtime: what the user asked for.
        n_crown_layers: layers that train; they do so where the model is.
        with_head: logits are needed, as for evaluation.

    Raises:
        ConfigError: the memory allowed is too small even for one layer.
        ModelError: no such device.
    """
    device = choose_device(runtime.device)
    stored = getattr(torch, facts.dtype)
    dtype = (
        computing_dtype(stored, device)
        if runtime.dtype == "auto"
        else getattr(torch, runtime.dtype)
    )
    memory = runtime.memory or default_memory()
    batch = _batch_bytes(memory)
    layer = facts.n_layer_parameters // facts.n_layers
    weights = facts.n_parameters * dtype.itemsize
    # Logits and their log-softmax, float32.
    logits = 2 * 4 * LOGIT_ROWS * facts.vocab_size if with_head else 0
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        needed = weights + 16 * layer * n_crown_layers + logits
        batch = _batch_bytes(free)
        return Execution(device, dtype, needed + 2 * batch > free, needed, free, memory, batch)
    needed = LIBRARIES_BYTES + weights + logits
    room = memory - 2 * batch - needed
    if room >= 0:
        return Execution(device, dtype, False, needed, memory, room, batch)
    # A layer and what its conversion leaves behind; or the head with its logits.
    head = facts.vocab_size * facts.hidden_size * dtype.itemsize if with_head else 0
    least = LIBRARIES_BYTES + max(2 * layer * dtype.itemsize, head + logits)
    room = memory - 2 * batch - least
    if room < 0:
        enough = least / (1 - 2 * _BATCH_SHARE)
        raise ConfigError(
            f"memory must be at least {enough / 1e9:.1f} GB for this model, even streamed, but is "
            f"{memory / 1e9:.1f} GB; raise --memory or free some"
        )
    return Execution(device, dtype, True, needed, memory, room, batch)


def open_model(
    spec: str,
    runtime: Runtime,
    *,
    revision: str | None = None,
    train: Sequence[CrownSettings] = (),
    with_head: bool = False,
    progress: Progress = silent,
) -> tuple[LanguageModel, Execution]:
    """Find a model, decide how to run it, and load it so.

    Args:
        spec: folder, `.gguf` file, registry name or Hub id.
        runtime: what the user asked for.
        revision: branch, tag or commit of a Hub model.
        train: how it will be trained, if it will; several times, perhaps.
        with_head: logits are needed, as for evaluation.
        progress: told about downloads.

    Raises:
        ModelError: no such model, or not a decoder-only language model.
        ConfigError: too little memory.
        DownloadError: the weights cannot be fetched.
    """
    with distributed.first_alone():  # what is downloaded or converted, is once
        source = resolve(spec, revision=revision, offline=runtime.offline, progress=progress)
    facts = describe(source.folder, trust_remote_code=runtime.trust_remote_code)
    sizes = [facts.n_layers - min(trained_layers(one, facts.n_layers)) for one in train]
    execution = plan_execution(
        facts, runtime, n_crown_layers=max(sizes, default=0), with_head=with_head
    ).agreed()
    return load_as_planned(spec, execution, runtime, revision, progress), execution


def load_as_planned(
    spec: str,
    execution: Execution,
    runtime: Runtime,
    revision: str | None = None,
    progress: Progress = silent,
) -> LanguageModel:
    """Load a model as was decided; see `open_model`."""
    return load_model(
        spec,
        revision=revision,
        device=str(execution.device),
        dtype=execution.dtype,
        streamed=execution.streamed,
        offline=runtime.offline,
        trust_remote_code=runtime.trust_remote_code,
        progress=progress,
    )
