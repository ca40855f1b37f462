"""PolyLens makes open language models better in the languages they speak badly, and keeps English.

The steps as functions: `load_model`, `read_texts` and `read_parallel` (or `starter_corpus`),
`probe`, `train`, `evaluate`, `save_model`; or all of them in one: `enhance`. A `Steering` changes
answers without training. They take and return plain objects, print nothing, and never touch the
global seed.
"""

from polylens.config import RunConfig, load_config
from polylens.corpora import read_parallel, read_texts, starter_corpus
from polylens.errors import PolyLensError
from polylens.evaluation import evaluate
from polylens.merging import save_model
from polylens.models import load_model
from polylens.run import enhance
from polylens.steering import Removal, Steering, Towards
from polylens.steps import probe, train

__all__ = [
    "PolyLensError",
    "Removal",
    "RunConfig",
    "Steering",
    "Towards",
    "enhance",
    "evaluate",
    "load_config",
    "load_model",
    "probe",
    "read_parallel",
    "read_texts",
    "save_model",
    "starter_corpus",
    "train",
]
