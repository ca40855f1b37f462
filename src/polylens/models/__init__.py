"""Models: find them, fetch them, load them, take them apart."""

from polylens.models.loading import LanguageModel, load_model, wrap_model
from polylens.models.source import ModelFacts, ModelSource, describe, resolve
from polylens.models.structure import DecoderStructure, find_structure

__all__ = [
    "DecoderStructure",
    "LanguageModel",
    "ModelFacts",
    "ModelSource",
    "describe",
    "find_structure",
    "load_model",
    "resolve",
    "wrap_model",
]
