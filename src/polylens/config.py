"""What a run is: frozen, typed settings that refuse unknown keys.

`RunConfig` holds what changes the numbers; `Runtime` how the run is carried out. Precedence, lowest
first: the defaults below, the preset, the YAML file, the command line. Field descriptions are the
help texts of the command line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from polylens.errors import ConfigError, LanguageError, nearest
from polylens.languages import normalize_language, normalize_languages

T = TypeVar("T", bound=BaseModel)

DEFAULT_MODEL = "smollm2-135m-instruct"

PositiveInt = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]


class Settings(BaseModel):
    """Base of all settings: frozen, and no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ProbeSettings(Settings):
    """Language subspace probing."""

    corpus: str = Field(
        "starter", description="Texts per language: a file, a folder, a Hub id, or 'starter'."
    )
    texts_per_language: PositiveInt | None = Field(
        300, description="Use at most so many texts of each language."
    )
    max_tokens: PositiveInt = Field(64, description="Longest prompt; longer texts lose their end.")
    pooling: Literal["last", "mean"] = Field(
        "last", description="State of a text: that of its last token, or the mean over tokens."
    )
    rank: PositiveInt | None = Field(
        None, description="Dimension of the language-specific subspace; default: languages - 1."
    )
    agnostic: Literal["mean", "complement"] = Field(
        "mean",
        description="Language-agnostic subspace: 'mean' is span(mu_a), as published; 'complement' "
        "is everything orthogonal to the specific subspace.",
    )
    layers: tuple[int, ...] | None = Field(
        None,
        description="Layers to probe (from 0; n_layers is after the final norm); default: all.",
    )


class OptimizerSettings(Settings):
    """AdamW, and how often and in what order it sees the rows."""

    learning_rate: float = Field(1e-4, gt=0, description="AdamW's peak learning rate.")
    epochs: PositiveInt = Field(3, description="Times each row is seen.")
    batch_size: PositiveInt = Field(8, description="Parallel rows an optimizer step.")
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="Share of the steps that warm up.")
    weight_decay: float = Field(0.1, ge=0, description="AdamW's weight decay.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")


class CrownSettings(OptimizerSettings):
    """Which layers train, and how."""

    layers: PositiveInt | tuple[int, ...] = Field(
        2, description="Decoder layers that train: so many at the top, or a list (from 0)."
    )


class TrainSettings(CrownSettings):
    """Language subspace manipulation."""

    corpus: str = Field(
        "starter", description="Parallel prompts: a file, a folder, a Hub id, or 'starter'."
    )
    rows: PositiveInt | None = Field(200, description="Use at most so many parallel rows.")
    max_tokens: PositiveInt = Field(128, description="Longest prompt; longer texts lose their end.")
    position: Literal["last", "mean", "all", "answer"] = Field(
        "last",
        description="States that are aligned and separated: the prompt's 'last' token, the 'mean' "
        "over its tokens, 'all' of them, or those that predict the tokens of an 'answer'.",
    )
    max_answer_tokens: PositiveInt = Field(
        16, description="Tokens of an answer that are read at most; longer ones lose their end."
    )
    state: Literal["normed", "residual"] = Field(
        "normed",
        description="Last layer's state after ('normed') or before ('residual') the final norm.",
    )
    loss_layers: Literal["last", "trained"] = Field(
        "last",
        description="Layers whose states the losses read, averaged over them: the 'last' alone, or "
        "every 'trained' one too.",
    )
    strength: float | Literal["auto"] | dict[str, float] = Field(
        1.0,
        description="How far to push along a language's direction; one number, one a language, or "
        "'auto': the less, the more of its own answers are in the language already.",
    )
    align_weight: Weight = Field(1.0, description="Weight of the align loss.")
    separate_weight: Weight = Field(1.0, description="Weight of the separate loss.")
    retain_weight: Weight = Field(1.0, description="Weight of the retain loss.")
    retain: Literal["states", "tokens", "distribution"] = Field(
        "states",
        description="What of the central language's prompts is retained: mean 'states', as "
        "published, the state of each of the 'tokens', or the 'distribution' of each next token.",
    )
    retain_targets: bool = Field(
        False,
        description="Retain the target languages' prompts, too, but for the last token, which is "
        "to move.",
    )
    retain_choices: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="Questions with two answers, of the starter corpus and in the central "
        "language, of which the last token, where the letter is chosen, is retained: so many "
        "beside each row, until there are no more (there are 96, or as many as the corpus shares "
        "with the starter corpus). They are never cut.",
    )
    answer_weight: Weight = Field(
        0.0,
        description="Weight of the answers' own next tokens in the target languages (supervised "
        "fine-tuning), where the corpus has answers.",
    )
    update_rank: PositiveInt | None = Field(
        None,
        description="Rank of each linear map's change, by the extra `lora`; default: any, and all "
        "weights of the layers train.",
    )

    @field_validator("strength", mode="after")
    @classmethod
    def _normalize(
        cls, value: float | Literal["auto"] | dict[str, float]
    ) -> float | Literal["auto"] | dict[str, float]:
        if isinstance(value, dict):
            return {normalize_language(language): strength for language, strength in value.items()}
        return value

    @property
    def answer_tokens(self) -> int | None:
        """Most tokens of an answer that follow a prompt; None where none follow."""
        reads = self.position == "answer" or self.answer_weight > 0
        return self.max_answer_tokens if reads else None

    @property
    def retains_distribution(self) -> bool:
        """Whether next-token distributions of the central language are retained."""
        return self.retain_weight > 0 and self.retain == "distribution"

    def n_choices(self, n_rows: int) -> int:
        """Return how many questions with two answers are retained: none where nothing is."""
        return round(self.retain_choices * n_rows) if self.retain_weight > 0 else 0

    @property
    def reads_logits(self) -> bool:
        """Whether a loss may need the head."""
        return self.retains_distribution or self.answer_weight > 0

    @model_validator(mode="after")
    def _some_loss(self) -> TrainSettings:
        weights = ("align_weight", "separate_weight", "retain_weight", "answer_weight")
        if not any(getattr(self, name) for name in weights):
            raise ValueError(f"at least one of {', '.join(weights)} must be above 0")
        return self

    @model_validator(mode="after")
    def _moved_or_retained(self) -> TrainSettings:
        if self.retain_targets and self.position in ("mean", "all"):
            raise ValueError(
                "retain_targets holds the tokens before a prompt's last one, which position "
                f"'{self.position}' moves; use position 'last' or 'answer', or retain_targets false"
            )
        return self

    @property
    def pushes_by_shortfall(self) -> bool:
        """Whether the untouched model's own answers tell how far to push."""
        return self.strength == "auto" and self.separate_weight > 0

    def strength_of(self, language: str) -> float:
        """Strength for one language; 1 for a language that a mapping leaves out."""
        if isinstance(self.strength, dict):
            return self.strength.get(language, 1.0)
        assert self.strength != "auto", "a model's own answers tell; see polylens.shortfall"
        return self.strength


class EvaluateSettings(Settings):
    """Before and after, on prompts that training never saw."""

    corpus: str | None = Field(
        None,
        description="Held-out parallel prompts; default: rows of the training corpus kept apart.",
    )
    rows: int = Field(32, ge=2, description="Held-out rows.")
    texts: str | None = Field(
        None, description="Texts for bits per byte; default: the held-out prompts themselves."
    )
    max_texts: PositiveInt = Field(
        200, description="Use at most so many of those texts a language."
    )
    max_new_tokens: PositiveInt = Field(48, description="Longest answer, in tokens.")
    repetition_penalty: float = Field(
        1.0,
        ge=1,
        description="Penalty on tokens that the prompt or the answer has, as many models are "
        "shipped with (1.05 to 1.1); 1 is none.",
    )
    extra_languages: tuple[str, ...] = Field(
        (), description="Languages to watch that are neither central nor trained."
    )
    tasks: tuple[str, ...] = Field(
        (), description="Benchmarks (`polylens evaluate --list-tasks`) that the gate is to read."
    )
    data_dir: str | None = Field(None, description="Folder with local copies of benchmarks.")
    limit: PositiveInt | None = Field(
        None, description="Use only so many examples of a benchmark; default: all."
    )

    @field_validator("extra_languages", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return _split_languages(value)

    @field_validator("extra_languages", mode="after")
    @classmethod
    def _normalize(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return normalize_languages(value)


class GateSettings(Settings):
    """When languages count as unharmed: the central one, and the texts of the targets."""

    margin: float = Field(
        0.01, gt=0, lt=1, description="Largest loss of accuracy that is tolerated; 0.01 is a point."
    )
    text_margin: float = Field(
        0.01,
        gt=0,
        description="Largest rise of bits per byte that is tolerated, as a share of them.",
    )
    choice_margin: float = Field(
        0.03,
        gt=0,
        description="Largest loss of the share of right letters, where one of two answers is to be "
        "picked by its letter, that is tolerated.",
    )
    level: float = Field(
        0.95, gt=0.5, lt=1, description="Confidence with which a larger loss is to be ruled out."
    )
    targets: bool = Field(True, description="Protect the texts of the target languages as well.")
    watched: bool = Field(
        False, description="Protect the languages of evaluate.extra_languages as well."
    )
    steps: PositiveInt = Field(
        8, description="Strengths that are tried, evenly spaced up to output.strength."
    )


class OutputSettings(Settings):
    """The merged model."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Dtype of the saved weights; 'auto' keeps the stored one unless rounding to it "
        "would lose more than a tenth of the change, and takes float32 then.",
    )
    strength: float = Field(
        1.0, ge=0, description="Strength dial of the merged model: W + strength·delta."
    )


class RunConfig(Settings):
    """Everything that determines the result of a run."""

    model: str = Field(
        DEFAULT_MODEL, description="Folder, GGUF file, registry name (`polylens models`) or Hub id."
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub model.")
    languages: tuple[str, ...] = Field(min_length=1, description="Target languages.")
    central: str = Field("en", description="The language to pull towards and to protect.")
    preset: Literal["default", "paper", "answers"] = Field(
        "default", description="Starting values of all settings."
    )
    template: str = Field(
        "auto", description="Prompt template: 'auto', 'chat', 'plain', or a Jinja file."
    )
    seed: int = Field(0, ge=0, description="Choice and order of rows.")
    probe: ProbeSettings = ProbeSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    gate: GateSettings = GateSettings()
    output: OutputSettings = OutputSettings()

    @field_validator("languages", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return _split_languages(value)

    @field_validator("languages", mode="after")
    @classmethod
    def _normalize_languages(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return normalize_languages(value)

    @field_validator("central", mode="after")
    @classmethod
    def _normalize_central(cls, value: str) -> str:
        return normalize_language(value)

    @model_validator(mode="after")
    def _distinct(self) -> RunConfig:
        if self.central in self.languages:
            raise ValueError(
                f"target languages must differ from the central language, got {self.central!r} as "
                "both; leave it out of languages or choose another central language"
            )
        for language in self.evaluate.extra_languages:
            if language in self.all_languages:
                raise ValueError(
                    "evaluate.extra_languages must be neither central nor trained, got "
                    f"{language!r}; leave it out"
                )
        if isinstance(self.train.strength, dict):
            for language in self.train.strength:
                if language not in self.languages:
                    raise ValueError(
                        f"train.strength must name target languages ({', '.join(self.languages)}), "
                        f"got {language!r}"
                    )
        return self

    @property
    def all_languages(self) -> tuple[str, ...]:
        """Central language first, then the targets."""
        return (self.central, *self.languages)


def _split_languages(value: Any) -> Any:
    """Take languages separated by commas; YAML reads Norwegian's "no" as false."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    parts = value if isinstance(value, list | tuple) else [value]
    return ["no" if part is False else part for part in parts]


class Runtime(Settings):
    """How a run is carried out; none of it is meant to change the numbers."""

    device: str = Field("auto", description="Device: 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Dtype to compute in; 'auto': the stored one, but float32 on a CPU that is not "
        "faster in it.",
    )
    memory: ByteSize | None = Field(
        None,
        gt=0,
        description="Memory to use, e.g. 4GB; what does not fit is streamed from, or put in, files."
        " Default: four fifths of what is free.",
    )
    token_budget: PositiveInt | None = Field(
        None, description="Padded tokens of a batch; default: what is fastest here."
    )
    deterministic: bool = Field(
        False, description="Use only operations that give the same bits every time."
    )
    offline: bool = Field(False, description="Never use the network.")
    trust_remote_code: bool = Field(False, description="Let the model's own Python code run.")


# "default": what ablations support (docs/results.md). "paper": the published settings (arXiv
# 2410.04407, appendix, and the published scripts), written out in full, so that a later change of a
# default cannot change them. "answers": supervised fine-tuning, none of Lens's losses.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": {
        "train": {
            "strength": "auto",
            "retain": "tokens",
            "retain_targets": True,
            "retain_choices": 0.5,
        }
    },
    "paper": {
        "probe": {
            "texts_per_language": 300,
            "max_tokens": 64,
            "pooling": "last",
            "rank": None,
            "agnostic": "mean",
        },
        "train": {
            "rows": 200,
            "max_tokens": 128,
            "layers": 2,
            "position": "last",
            "max_answer_tokens": 16,
            "state": "normed",
            "loss_layers": "last",
            "strength": 1.0,
            "align_weight": 1.0,
            "separate_weight": 1.0,
            "retain_weight": 1.0,
            "retain": "states",
            "retain_targets": False,
            "retain_choices": 0.0,
            "answer_weight": 0.0,
            "update_rank": None,
            "learning_rate": 1e-5,
            "epochs": 1,
            "batch_size": 8,
            "warmup_ratio": 0.05,
            "weight_decay": 0.1,
            "max_grad_norm": 1.0,
        },
        # All 200 rows train, so evaluation takes the starter corpus's held-out rows.
        "evaluate": {"corpus": "starter"},
    },
    "answers": {
        "train": {
            "align_weight": 0.0,
            "separate_weight": 0.0,
            "retain_weight": 0.0,
            "answer_weight": 1.0,
            "max_answer_tokens": 128,
            "batch_size": 2,
        }
    },
}


def load_config(path: Path | None = None, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Make a run's configuration from a YAML file and overrides.

    Args:
        path: YAML file; None for none.
        overrides: values that win over the file: nested mappings, or dotted keys such as
            "train.epochs".

    Raises:
        ConfigError: the file cannot be read, or a value is faulty; all faults are in the message.
    """
    given = read_yaml(path) if path is not None else {}
    given = _merge(given, _nest(overrides or {}))
    preset = given.get("preset", "default")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ConfigError(
            f"preset must be one of {', '.join(PRESETS)}, got {preset!r}; choose one of those"
        )
    values = _merge(PRESETS[preset], given)
    return check(RunConfig, values, path)


def changed(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """Return a configuration with some settings replaced.

    Args:
        config: any.
        settings: values by dotted key, such as "train.epochs".

    Raises:
        ConfigError: a value is faulty, or does not go with the others.
    """
    return check(RunConfig, _merge(config.model_dump(), _nest(settings)))


def check(model: type[T], values: Mapping[str, Any], path: Path | None = None) -> T:
    """Make typed settings of plain values.

    Args:
        model: the settings' class.
        values: by field name.
        path: the file they came from, for the message.

    Raises:
        ConfigError: a value is faulty; all faults are in the message.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, model, path)) from None


def dump_yaml(config: BaseModel) -> str:
    """Return a configuration as YAML, every value written out."""
    return yaml.safe_dump(
        config.model_dump(mode="json"),
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=False,
    )


class _Loader(yaml.SafeLoader):
    """Plain values alone, written out: a few lines of aliases can stand for billions of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not understood; write the value out")
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds keys and values.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        json.dumps(loaded, ensure_ascii=False, default=str).encode()  # half a surrogate pair fails
    except OSError as error:
        raise ConfigError(
            f"{path} must be a readable YAML file, but is not ({error.strerror}); check the path"
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{path} must be YAML, but is nested too deeply; mend it") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:  # also dates that there are not
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path} must be YAML, but is not ({reason}); mend it") from error
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"{path} must hold settings as `key: value`, got {type(loaded).__name__}; see examples/"
        )
    return loaded


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = value
    return nested


def _merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        # A strength per language replaces the single number; sections merge key by key.
        both = isinstance(below, Mapping) and isinstance(value, Mapping) and key != "strength"
        merged[key] = _merge(below, value) if both else value  # type: ignore[arg-type]
    return merged


def _explain(error: ValidationError, model: type[BaseModel], path: Path | None) -> str:
    faults = []
    for fault in error.errors():
        where = ".".join(
            str(part) for part in fault["loc"] if part not in ("int", "float", "dict[str,float]")
        )
        if fault["type"] == "extra_forbidden":
            *parents, key = fault["loc"]
            faults.append(f"unknown key {where}{nearest(str(key), _keys(model, parents))}")
        elif fault["type"] == "missing":
            faults.append(f"{where} is missing")
        elif isinstance(cause := fault.get("ctx", {}).get("error"), LanguageError | ValueError):
            faults.append(str(cause) if not where else f"{where}: {cause}")
        else:
            message = fault["msg"][0].lower() + fault["msg"][1:]
            faults.append(f"{where}: {message}, got {fault['input']!r}")
    source = f"{path}: " if path is not None else ""
    return source + "; ".join(dict.fromkeys(faults))


def _keys(model: type[BaseModel], parents: Sequence[Any]) -> list[str]:
    for parent in parents:
        annotation = model.model_fields[str(parent)].annotation
        assert isinstance(annotation, type)
        model = annotation
    return list(model.model_fields)
