"""One process of a distributed job that tests start: what it computes goes to a file.

Usage: distributed_job.py MODEL OUT [crash], under torchrun or with RANK, WORLD_SIZE and the rest
in the environment. With `crash`, the last process dies in the middle of training.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import save_file

from polylens import distributed
from polylens.config import TrainSettings
from polylens.corpora import starter_corpus
from polylens.hidden_states import Keep, collect_hidden_states
from polylens.models.loading import load_model
from polylens.steps import probe, train

LANGUAGES = ("en", "sw", "zh")
SETTINGS = TrainSettings(
    batch_size=3, epochs=2, max_tokens=512, answer_weight=1.0, retain_choices=0.5
)
PROMPTS = [[5, 9, 30, 12, 7, 80], [5, 9, 30, 12, 8], [5, 9, 30, 12, 20, 19, 33]]


def main() -> None:
    torch.set_num_threads(1)
    distributed.start()
    model = load_model(sys.argv[1])
    corpus = starter_corpus().limit(7)

    def crash(done: int, total: int, what: str) -> None:
        last = distributed.rank() == distributed.size() - 1
        if "crash" in sys.argv and what == "training" and done == 2 and last:
            os._exit(9)

    subspaces = probe(model, corpus.to_corpus(), languages=LANGUAGES)
    delta = train(model, subspaces, corpus, settings=SETTINGS, progress=crash)
    # Fewer prompts than processes is lawful too.
    keep = Keep(pooling="mean", boundary_layers=(1, 2), final=True)
    states = collect_hidden_states(model.structure, PROMPTS, keep)
    lone = collect_hidden_states(model.structure, PROMPTS[:1], keep)
    result = {
        "means": subspaces.language_means,
        "basis": subspaces.specific_basis,
        "losses": torch.tensor([entry["loss"] for entry in delta.metadata["log"]]),
        "pooled": states.pooled,
        "boundary": states.boundary[2],
        "final": states.final,
        "lone": lone.final,
        **{f"change.{name}": change for name, change in delta.changes.items()},
    }
    save_file(result, Path(sys.argv[2]) / f"{distributed.rank()}.safetensors")
    distributed.stop()


if __name__ == "__main__":
    main()
