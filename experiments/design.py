"""What the results page compares: models, languages, rows, and named settings.

Three sets of rows share no text. The starter corpus's training rows train every method. Its
held-out rows, with the even examples of XCOPA, are for development: settings are chosen on them.
The paper's parallel instructions, with the odd examples, are what is reported; nothing was chosen
on them, but that Swahili was pushed whole on Qwen was tried for what they showed. Groups of
languages are trained by themselves, and measured for development.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import polylens
from polylens.config import PRESETS
from polylens.corpora import ParallelCorpus, read_parallel

MODELS = {
    "smollm2-135m-instruct": "SmolLM2-135M-Instruct",
    "gemma3-270m": "Gemma-3-270M",
    "qwen2.5-coder-1.5b-instruct": "Qwen2.5-Coder-1.5B-Instruct",
}
CENTRAL = "en"
LANGUAGES = ("zh", "ja", "ko", "ar", "bn", "sw")
# XCOPA has no Japanese, Korean, Arabic or Bengali; COPA is its English.
BENCHMARK_LANGUAGES = ("en", "zh", "sw")
N_HELDOUT = 32
MAX_NEW_TOKENS = 48
# Common in the generation settings that models are shipped with; a GGUF file leaves them out.
REPETITION_PENALTY = 1.1

Split = Literal["development", "report", "related", "distant"]
SPLITS: tuple[Split, ...] = ("development", "report", "related", "distant")
# Like the central language, and unlike it.
GROUPS: dict[Split, tuple[str, ...]] = {
    "related": ("es", "fr", "de"),
    "distant": ("zh", "sw", "bn"),
}
Method = Literal[
    "lens",
    "pads",
    "cuts",
    "sft",
    "sft-lora",
    "sft-translations",
    "pretraining",
    "few-shot",
    "steering",
]


@dataclass(frozen=True)
class Setting:
    """One way to change a model, or what it answers.

    Attributes:
        method: Lens, also with a fault of the published code, or what one would do instead.
        settings: those of the method that differ from its own defaults.
        rows: training rows; None takes all.
        probe: settings of the subspaces that differ from their defaults.
        dial: strength at which the change is measured.
    """

    method: Method = "lens"
    settings: dict[str, Any] = field(default_factory=dict)
    rows: int | None = None
    probe: dict[str, Any] = field(default_factory=dict)
    dial: float = 1.0


# The published mathematics and weights; on the starter corpus's rows, so that methods differ alone.
_PAPER = {
    k: v
    for k, v in PRESETS["paper"]["train"].items()
    if k not in ("rows", "max_tokens", "retain_targets", "retain_choices")
}


def lens(**settings: Any) -> Setting:
    return Setting("lens", {**_PAPER, **settings})


def tokens(
    *, rows: int | None = None, probe: dict[str, Any] | None = None, dial: float = 1.0, **own: Any
) -> Setting:
    return Setting("lens", {**_TOKENS, **own}, rows=rows, probe=probe or {}, dial=dial)


def default(**settings: Any) -> Setting:
    return Setting("lens", {**PRESETS["default"]["train"], **settings})


# What is more than the published loss, one after the other.
_FASTER = {"learning_rate": 1e-4, "epochs": 3}
_KL = {**_FASTER, "retain": "distribution"}
_AUTO = {**_KL, "strength": "auto"}
# The default preset until it held each token, and until it held questions with two answers.
_STATES = {**_FASTER, "strength": "auto"}
_TOKENS = {"strength": "auto", "retain": "tokens", "retain_targets": True}
_SWAHILI = {language: float(language == "sw") for language in LANGUAGES}
# What `strength: auto` would be if it pushed whole from one answer in sixteen on, not one in four;
# for Qwen2.5-Coder-1.5B that is `_SWAHILI`.
_STEEP = {
    "smollm2": {"zh": 0.5, "ja": 0.5, "ko": 1.0, "ar": 0.0, "bn": 0.0, "sw": 1.0},
    "gemma": {"zh": 1.0, "ja": 1.0, "ko": 1.0, "ar": 0.0, "bn": 1.0, "sw": 0.5},
}
# The same share of a state's length a step as 1e-4 is where states have 576 dimensions.
_QWEN_RATE = {"learning_rate": 3.75e-5}

# The preset `answers` as it was, which is what Qwen2.5-Coder-1.5B was measured with.
_ANSWERS_64 = {**PRESETS["answers"]["train"], "retain_weight": 1.0, "max_answer_tokens": 64}

# What the search on Swahili found (experiments/results/smollm2-135m-instruct/search/sw.json).
_SEARCHED = {
    **_PAPER,
    "layers": 4,
    "learning_rate": 6.49e-4,
    "epochs": 4,
    "batch_size": 2,
    "strength": 2.0,
    "align_weight": 0.595,
    "retain_weight": 0.515,
    "position": "mean",
    "state": "residual",
}

SETTINGS: dict[str, Setting] = {
    "paper": lens(),
    "faster": lens(**_FASTER),
    "kl": lens(**_KL),
    "kl10": lens(**_KL, retain_weight=10.0),
    "auto": lens(**_AUTO),
    "auto-kl10": lens(**_AUTO, retain_weight=10.0),
    "auto-kl10-half": Setting("lens", {**_PAPER, **_AUTO, "retain_weight": 10.0}, dial=0.5),
    "auto-kl10-slow": lens(**{**_AUTO, "learning_rate": 1e-5}, retain_weight=10.0),
    "answer-kl10": lens(**_AUTO, position="answer", retain_weight=10.0),
    "states": lens(**_STATES),
    "states-half": Setting("lens", {**_PAPER, **_STATES}, dial=0.5),
    "states-quarter": Setting("lens", {**_PAPER, **_STATES}, dial=0.25),
    "states-slow": lens(**{**_STATES, "learning_rate": 2.5e-5}),
    "states-slower": lens(**{**_STATES, **_QWEN_RATE}),
    "auto-states10": lens(**_STATES, retain_weight=10.0),
    "tokens": tokens(),
    "tokens10": tokens(retain_weight=10.0),
    "tokens-slower": tokens(**_QWEN_RATE),
    "tokens10-slower": tokens(**_QWEN_RATE, retain_weight=10.0),
    "tokens-push": tokens(strength=1.0),
    "tokens-swahili": tokens(strength=_SWAHILI),
    "tokens-swahili-three-eighths": tokens(dial=0.375, strength=_SWAHILI),
    "tokens-swahili-no-align": tokens(strength=_SWAHILI, align_weight=0.0),
    "tokens10-swahili": tokens(strength=_SWAHILI, retain_weight=10.0),
    "steep-smollm2": tokens(strength=_STEEP["smollm2"]),
    "steep-gemma": tokens(strength=_STEEP["gemma"]),
    "tokens-no-align": tokens(align_weight=0.0),
    "tokens-no-separate": tokens(separate_weight=0.0),
    "tokens-english": tokens(retain_targets=False),
    "tokens-layers1": tokens(layers=1),
    "tokens-rank1": tokens(probe={"rank": 1}),
    "tokens-rank3": tokens(probe={"rank": 3}),
    "tokens-complement": tokens(probe={"agnostic": "complement"}),
    "tokens-rows25": tokens(rows=24),
    "tokens-rows50": tokens(rows=48),
    "default": default(),
    "default-swahili": default(strength=_SWAHILI),
    "faster-pads": Setting("pads", {**_PAPER, **_FASTER}),
    "faster-cuts": Setting("cuts", {**_PAPER, **_FASTER}),
    "tokens-pads": Setting("pads", _TOKENS),
    "tokens-cuts": Setting("cuts", _TOKENS),
    "rank16": lens(**{**_AUTO, "learning_rate": 1e-3}, update_rank=16),
    "answer": lens(**_AUTO, position="answer"),
    "answer-states": lens(**_FASTER, position="answer"),
    "no-align": lens(**_AUTO, align_weight=0.0),
    "no-separate": lens(**_AUTO, separate_weight=0.0),
    "no-retain": lens(**_STATES, retain_weight=0.0),
    "layers1": lens(**_AUTO, layers=1),
    "layers4": lens(**_AUTO, layers=4),
    "rows25": Setting("lens", {**_PAPER, **_AUTO}, rows=24),
    "rows50": Setting("lens", {**_PAPER, **_AUTO}, rows=48),
    "small-batch": lens(**_STATES, batch_size=2),
    "complement": Setting("lens", {**_PAPER, **_AUTO}, probe={"agnostic": "complement"}),
    "searched": Setting("lens", _SEARCHED, dial=0.25),
    "searched-half": Setting("lens", _SEARCHED, dial=0.5),
    "sft": Setting("sft"),
    "sft-half": Setting("sft", dial=0.5),
    "sft-quarter": Setting("sft", dial=0.25),
    "sft-translations": Setting("sft-translations"),
    "sft-replay": Setting("sft", {"replay_ratio": 0.5}),
    "answers": Setting("lens", PRESETS["answers"]["train"]),
    "answers-half": Setting("lens", PRESETS["answers"]["train"], dial=0.5),
    "answers-quarter": Setting("lens", PRESETS["answers"]["train"], dial=0.25),
    "answers-retain": Setting("lens", {**PRESETS["answers"]["train"], "retain_weight": 1.0}),
    "answers-64": Setting("lens", _ANSWERS_64),
    "answers-64-half": Setting("lens", _ANSWERS_64, dial=0.5),
    "answers-64-quarter": Setting("lens", _ANSWERS_64, dial=0.25),
    "answers-lens": lens(**_STATES, answer_weight=1.0, max_answer_tokens=64, batch_size=2),
    "sft-lora": Setting("sft-lora"),
    "sft-lora-replay": Setting("sft-lora", {"replay_ratio": 0.5}),
    "pretraining": Setting("pretraining"),
    "pretraining-replay": Setting("pretraining", {"replay_ratio": 0.5}),
    "few-shot": Setting("few-shot", {"shots": 2, "max_tokens": 1024}),
    "steering": Setting("steering"),
    "steering-half": Setting("steering", dial=0.5),
}


def languages_of(split: Split) -> tuple[str, ...]:
    """Target languages that are trained and measured."""
    return GROUPS.get(split, LANGUAGES)


def training_rows(languages: tuple[str, ...] = LANGUAGES) -> ParallelCorpus:
    rows, _ = polylens.starter_corpus().select((CENTRAL, *languages)).split(N_HELDOUT)
    return rows


def measured_rows(split: Split, data: Path, limit: int) -> ParallelCorpus:
    """Rows to measure on, the first `limit` of them."""
    languages = (CENTRAL, *languages_of(split))
    if split == "report":
        rows = read_parallel(data / "lens" / "parallel_instructions_7_languages.json")
        rows = rows.select(languages)
    else:
        _, rows = polylens.starter_corpus().select(languages).split(N_HELDOUT)
    return ParallelCorpus(rows.name, rows.rows[:limit])
