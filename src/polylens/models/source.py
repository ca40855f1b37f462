"""Find a model by what the user calls it, and describe it without loading its weights.

`resolve` turns a folder, a GGUF file, a registry name or a Hub id into a local folder of
safetensors; `describe` reads sizes from the config and the safetensors headers alone, for plans and
costs.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from polylens.artefacts import file_sha256, parse_json, readable_storage_errors, user_path
from polylens.cache import cache_folder
from polylens.errors import DownloadError, MissingExtraError, ModelError, nearest
from polylens.models.fetch import convert_into_cache, fetch, usable
from polylens.models.registry import REGISTRY
from polylens.offline import is_offline
from polylens.progress import Progress, silent

_WIDTHS = ("hidden_size", "vocab_size")

# Names of dtypes in safetensors' headers.
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class ModelSource:
    """A model as a local folder.

    Attributes:
        spec: what the user gave.
        kind: where it came from.
        folder: local folder with safetensors, config and tokenizer.
        name: short name, without a machine's path.
        revision: commit of a Hub model, where known.
        license: of the weights, where known.
    """

    spec: str
    kind: Literal["folder", "gguf", "registry", "hub"]
    folder: Path
    name: str
    revision: str | None = None
    license: str | None = None


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a model, read without its weights.

    Attributes:
        model_type: transformers' name of the architecture.
        n_layers: decoder layers.
        hidden_size: width of the residual stream.
        vocab_size: tokens.
        n_parameters: all weights; tied ones count once.
        n_layer_parameters: weights of all decoder layers together.
        n_bytes: of the safetensors files.
        dtype: name of the dtype that most weights are stored in, e.g. "bfloat16".
    """

    model_type: str
    n_layers: int
    hidden_size: int
    vocab_size: int
    n_parameters: int
    n_layer_parameters: int
    n_bytes: int
    dtype: str = "float32"


def resolve(
    spec: str,
    *,
    revision: str | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> ModelSource:
    """Find a model and bring it into a local folder of safetensors.

    Args:
        spec: folder, `.gguf` file, registry name or Hub id ("owner/name").
        revision: branch, tag or commit of a Hub model.
        offline: never use the network.
        progress: told about downloads.

    Raises:
        ModelError: nothing of that name, or not a decoder-only language model in safetensors.
        DownloadError: the weights cannot be fetched.
    """
    progress = progress or silent
    path = user_path(spec)
    if spec in REGISTRY:
        entry = REGISTRY[spec]
        folder = fetch(entry, offline=offline, progress=progress)
        return ModelSource(spec, "registry", folder, spec, license=entry.license)
    if path.suffix == ".gguf" and path.is_file():
        return ModelSource(spec, "gguf", _converted(path), path.stem)
    if path.is_dir():
        check_folder(path)
        return ModelSource(spec, "folder", path, path.resolve().name)
    if path.is_file():
        raise ModelError(
            "model must be a folder, a .gguf file, a registry name or a Hub id, got the file "
            f"{spec}; give the folder that holds it"
        )
    looks_like_path = spec.startswith((".", "/", "~")) or path.suffix == ".gguf"
    if looks_like_path or not _HUB_ID.fullmatch(spec):
        raise ModelError(
            f"model must be an existing folder or .gguf file, a registry name "
            f"({', '.join(REGISTRY)}) or a Hub id such as owner/name, got {spec!r}"
            f"{nearest(spec, REGISTRY)}"
        )
    return _from_hub(spec, revision, offline)


def check_folder(folder: Path) -> dict[str, Any]:
    """Check, cheaply, that a folder holds a decoder-only language model in safetensors.

    Returns:
        The model's config.json.

    Raises:
        ModelError: it does not.
    """
    config_path = folder / "config.json"
    with readable_storage_errors(folder):
        if not config_path.is_file():
            raise ModelError(
                f"a model folder must hold config.json, but {folder} does not; give the folder "
                "that `save_pretrained` wrote"
            )
        config = _json_object(config_path)
        _check_decoder(config, folder)
        _check_precision(config, folder)
        if not list(folder.glob("*.safetensors")):
            pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
            raise ModelError(
                f"a model folder must hold weights as .safetensors, but {folder} holds "
                + (
                    f"{pickled[0].name}, a pickle, which PolyLens never loads; convert it first"
                    if pickled
                    else "none; copy the weights there"
                )
            )
        if (folder / "adapter_config.json").exists():
            raise ModelError(
                f"a model folder must hold a whole model, but {folder} holds an adapter, which "
                "names another model to load; merge the adapter first"
            )
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            shards = _shards(index)
            missing = sorted(shard for shard in shards if not (folder / shard).is_file())
            if missing:
                raise ModelError(
                    f"{folder} must hold every shard that its index names, but lacks "
                    f"{', '.join(missing[:3])}; fetch the model again"
                )
    return dict(config)


def _json_object(path: Path) -> dict[str, Any]:
    try:
        loaded = parse_json(path.read_bytes().decode("utf-8"))
        if not isinstance(loaded, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise ModelError(f"{path} must be JSON, but is not ({error}); mend it") from error
    return loaded


def _shards(index: Path) -> set[str]:
    """Return the files that an index names; they must lie beside it."""
    shards = _json_object(index).get("weight_map")
    names = set(map(str, shards.values())) if isinstance(shards, dict) else set()
    if not names or any(not re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
        raise ModelError(
            f"{index} must map weights to .safetensors files beside it, but names others or none; "
            "fetch the model again"
        )
    return names


def describe(folder: Path, *, trust_remote_code: bool = False) -> ModelFacts:
    """Read a model's sizes from its config and safetensors headers.

    Raises:
        ModelError: the folder does not hold a decoder-only language model.
    """
    given = check_folder(folder)
    sizes: Counter[str] = Counter()
    stored: Counter[str] = Counter()
    n_tensors = 0
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    header = tensors.get_slice(name)
                    size = math.prod(header.get_shape())
                    n_tensors += 1
                    stored[header.get_dtype()] += size
                    sizes["layers" if re.search(r"\.\d+\.", name) else "other"] += size
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{file} must be a safetensors file, but is damaged ({error}); fetch the model "
                "again"
            ) from error
    most = stored.most_common(1)[0][0] if stored else "no weights"
    if most not in _DTYPES:
        raise ModelError(
            f"weights must be float32, bfloat16 or float16, but {folder.name} has {most}; give the "
            "model that it was made from"
        )
    _check_sizes(given, n_tensors, sizes.total(), folder)
    try:
        config = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
        text = config.get_text_config(decoder=True)
        numbers = {k: int(getattr(text, k)) for k in ("num_hidden_layers", *_WIDTHS)}
    except Exception as error:  # a library boundary: it trusts what a config says
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{folder} must hold a config that transformers reads, but it cannot ({reason})"
        ) from error
    return ModelFacts(
        model_type=config.model_type,
        n_layers=numbers["num_hidden_layers"],
        hidden_size=numbers["hidden_size"],
        vocab_size=numbers["vocab_size"],
        n_parameters=sizes.total(),
        n_layer_parameters=sizes["layers"],
        n_bytes=sum(file.stat().st_size for file in files),
        dtype=_DTYPES[most],
    )


def _check_sizes(config: Mapping[str, Any], n_tensors: int, n_weights: int, folder: Path) -> None:
    """Refuse a config that claims a larger model than its files hold: room is made by its word."""
    for section in (config, config.get("text_config")):
        if not isinstance(section, dict):
            continue
        n_layers = _size(section, "num_hidden_layers", "n_layer", "num_layers")
        hidden_size = _size(section, "hidden_size", "n_embd")
        widest = max(_size(section, name) for name in ("vocab_size", "intermediate_size"))
        if n_layers > n_tensors or hidden_size * max(1, widest) > n_weights:
            raise ModelError(
                f"the weights of {folder.name} must be as many as its config.json says, but there "
                f"are {n_weights} in {n_tensors} tensors for {n_layers} layers of size "
                f"{hidden_size}; fetch the model again"
            )


def _size(section: Mapping[str, Any], *names: str) -> int:
    found = [section[name] for name in names if isinstance(section.get(name), int)]
    return max(found, default=0)


def _check_decoder(config: dict[str, Any], folder: Path) -> None:
    model_type = str(config.get("model_type", ""))
    named = config.get("architectures")
    architectures = [str(name) for name in named] if isinstance(named, list) else []
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
    if not architectures:
        causal = model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if "ForConditionalGeneration" in "".join(architectures) and "text_config" in config:
        causal = True
    if config.get("is_encoder_decoder") or not causal:
        kind = ", ".join(architectures) or model_type or "a model of no stated architecture"
        raise ModelError(
            f"the model must be a decoder-only language model (…ForCausalLM), but {folder.name} is "
            f"{kind}; choose another model"
        )


def _check_precision(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse weights that are not plain numbers: they cannot be trained, and not be changed."""
    sections = [one for one in (config, config.get("text_config")) if isinstance(one, dict)]
    for quantised in filter(None, (one.get("quantization_config") for one in sections)):
        stated = quantised if isinstance(quantised, dict) else {}
        method = stated.get("quant_method", "an unknown method")
        raise ModelError(
            f"weights must be float32, bfloat16 or float16, but those of {folder.name} are "
            f"quantised ({method}); give the model that it was made from, or a GGUF file"
        )


def _converted(gguf: Path) -> Path:
    """Convert a GGUF file once; the cache is keyed by its contents."""
    with readable_storage_errors(gguf):
        sha256 = file_sha256(gguf)
        folder = cache_folder() / "models" / f"gguf-{sha256[:12]}"
        if not usable(folder):
            convert_into_cache(gguf.resolve(), folder, sha256)
    return folder


def _from_hub(spec: str, revision: str | None, offline: bool) -> ModelSource:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError as error:
        raise MissingExtraError("huggingface-hub", "hub", f"the Hub model {spec}") from error
    try:
        folder = Path(
            snapshot_download(
                spec,
                revision=revision,
                local_files_only=is_offline(offline),
                # Never a pickle; Python files only matter to --trust-remote-code.
                allow_patterns=[
                    "*.safetensors",
                    "*.json",
                    "*.txt",
                    "*.model",
                    "*.jinja",
                    "*.py",
                    "README.md",
                ],
            )
        )
    except LocalEntryNotFoundError as error:
        if is_offline(offline):
            raise ModelError(
                f"{spec} must be in the Hub cache to be used offline, but is not; load it once "
                "with a network first"
            ) from error
        raise DownloadError(
            f"{spec} must be downloadable from the Hub, but the Hub cannot be reached; check the "
            "network, or give a local folder"
        ) from error
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{spec} must be a Hub model that you may read, but is not ({reason}); check its name, "
            "or accept its licence and log in"
        ) from error
    except OSError as error:
        raise DownloadError(
            f"{spec} must be downloadable from the Hub, but is not ({error}); check the network"
        ) from error
    check_folder(folder)
    license_name = None
    with contextlib.suppress(OSError, ValueError):
        card = (folder / "README.md").read_text(encoding="utf-8")
        found = re.search(r"^license:\s*(\S+)", card, flags=re.MULTILINE)
        license_name = found.group(1) if found else None
    return ModelSource(spec, "hub", folder, spec, revision=folder.name, license=license_name)
