"""Language subspace probing (LSP): where each layer keeps what languages share and what parts them.

`decompose` is the mathematics for one layer, `probe_subspaces` applies it to every layer,
`Subspaces` holds the result and projects. Everything here is float64; inputs may be anything
narrower.

Sources: Zhao et al. 2024, Lens (arXiv 2410.04407), section 3.1, algorithm 1; Xie et al. 2022, LSAR
    (arXiv 2210.05096);
Piratla et al. 2020, common-specific decomposition (arXiv 2003.12815).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from polylens.artefacts import load_tensors, save_tensors
from polylens.errors import CorruptFileError, SubspaceError

Agnostic = Literal["mean", "complement"]

LAYER_CONVENTION = "entry k < n_layers: output of decoder layer k; entry n_layers: after final norm"


@dataclass(frozen=True)
class Decomposition:
    """The two subspaces of one layer, float64.

    Attributes:
        agnostic: (hidden_size,), mu_a: the point of the affine hull of the means that lies nearest
            to the origin, hence orthogonal to `specific_basis`.
        specific_basis: (rank, hidden_size), orthonormal rows, M_s transposed. Signs: the entry of
            largest magnitude in each row is positive.
        singular_values: (rank,), of the means about mu_a, descending.
    """

    agnostic: Tensor
    specific_basis: Tensor
    singular_values: Tensor


def decompose(means: Tensor, rank: int) -> Decomposition:
    """Split language means into what languages share and what sets them apart.

    1. mu = M·1/L; the rank-r SVD of M - mu·1ᵀ gives M' = mu·1ᵀ + its best rank-r approximation.
    2. mu_a = (M'⁺)ᵀ·1 / ‖(M'⁺)ᵀ·1‖²; the rank-r SVD of M' - mu_a·1ᵀ gives M_s.

    Args:
        means: (n_languages, hidden_size), the mean hidden state of each language; M transposed.
        rank: dimension r of the language-specific subspace, 1 to n_languages - 1.

    Raises:
        SubspaceError: `rank` is out of range.

    Example:
        >>> split = decompose(torch.tensor([[3.0, 1.0, 0.0], [3.0, -1.0, 0.0]]), rank=1)
        >>> torch.allclose(split.agnostic, torch.tensor([3.0, 0.0, 0.0]).double())
        True
        >>> torch.allclose(split.specific_basis, torch.tensor([[0.0, 1.0, 0.0]]).double())
        True
    """
    n_languages = len(means)
    check_rank(rank, n_languages)
    columns = means.double().T  # (hidden_size, n_languages), M of the paper
    mean = columns.mean(1, keepdim=True)
    u, s, vh = torch.linalg.svd(columns - mean, full_matrices=False)
    approximated = mean + u[:, :rank] * s[:rank] @ vh[:rank]  # M'
    dual = torch.linalg.pinv(approximated).T @ torch.ones(n_languages, 1, dtype=torch.float64)
    agnostic = dual / dual.square().sum()  # mu_a
    u, s, _ = torch.linalg.svd(approximated - agnostic, full_matrices=False)
    basis = u[:, :rank].T
    largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
    return Decomposition(agnostic[:, 0], (basis * largest.sign()).contiguous(), s[:rank])


def check_probe(
    languages: Sequence[str],
    central: str,
    rank: int | None,
    layers: Sequence[int] | None,
    n_entries: int,
) -> tuple[int, tuple[int, ...]]:
    """Check what is to be probed, which needs no states; return rank and layers.

    Args:
        languages: the languages to probe.
        central: the central language.
        rank: None takes n_languages - 1.
        layers: None takes all.
        n_entries: n_layers + 1, the states that each text has.

    Raises:
        SubspaceError: as `probe_subspaces`.
    """
    if central not in languages:
        raise SubspaceError(
            f"the central language {central!r} must be among the probed ones, got "
            f"{', '.join(languages)}; add texts in it or choose another central language"
        )
    rank = len(languages) - 1 if rank is None else rank
    check_rank(rank, len(languages))
    return rank, check_layers(layers, n_entries)


def check_rank(rank: int, n_languages: int) -> None:
    """Check that a language-specific subspace can have this rank.

    Raises:
        SubspaceError: it cannot.
    """
    if n_languages < 2:
        raise SubspaceError(
            f"subspaces need at least 2 languages, got {n_languages}; add a target language"
        )
    if not 1 <= rank <= n_languages - 1:
        raise SubspaceError(
            f"rank must be between 1 and {n_languages - 1} for {n_languages} languages, got "
            f"{rank}; lower rank or add languages"
        )


@dataclass(frozen=True)
class Subspaces:
    """Language subspaces of some layers of one model.

    Attributes:
        languages: BCP 47 codes, in the order of `language_means`.
        central: the language that the others are compared with.
        layers: the layers probed, in the package's layer convention (`n_layers` is the state after
            the final norm); the first axis of every tensor below.
        language_means: (n_probed, n_languages, hidden_size) float64.
        agnostic_vector: (n_probed, hidden_size) float64, mu_a.
        specific_basis: (n_probed, rank, hidden_size) float64, orthonormal rows.
        singular_values: (n_probed, rank) float64.
        separability: (n_probed,) float64, share of probing texts whose nearest language mean,
            within the specific subspace, is that of their own language (each text left out of its
            mean).
        agnostic: "mean": the agnostic subspace is span(mu_a), as published; "complement":
            everything orthogonal to the specific basis.
        metadata: fingerprint and name of the model, pooling, template, counts, versions.
    """

    languages: tuple[str, ...]
    central: str
    layers: tuple[int, ...]
    language_means: Tensor
    agnostic_vector: Tensor
    specific_basis: Tensor
    singular_values: Tensor
    separability: Tensor
    agnostic: Agnostic
    metadata: Mapping[str, Any]

    @property
    def rank(self) -> int:
        """Dimension of the language-specific subspaces."""
        return self.specific_basis.shape[1]

    def position(self, layer: int) -> int:
        """Index of `layer` on the first axis.

        Raises:
            SubspaceError: the layer was not probed.
        """
        if layer not in self.layers:
            raise SubspaceError(
                f"layer must be one of those probed ({_ranges(self.layers)}), got {layer}; "
                "probe that layer or choose another"
            )
        return self.layers.index(layer)

    def project_specific(self, x: Tensor, layer: int) -> Tensor:
        """Projection on the language-specific subspace: P_s x.

        Args:
            x: (..., hidden_size), any floating dtype.
            layer: a probed layer.

        Returns:
            (..., hidden_size), dtype of `x`.
        """
        basis = self.specific_basis[self.position(layer)].to(x)
        return x @ basis.T @ basis

    def project_agnostic(self, x: Tensor, layer: int) -> Tensor:
        """Projection on the language-agnostic subspace: P_a x. Shapes as in `project_specific`."""
        if self.agnostic == "complement":
            return x - self.project_specific(x, layer)
        vector = self.agnostic_vector[self.position(layer)]
        unit = (vector / vector.norm()).to(x)
        projection: Tensor = (x @ unit)[..., None] * unit
        return projection

    def direction(self, language: str, layer: int) -> Tensor:
        """Language direction omega_l = M_s·M_sᵀ·(m_l - m_c), (hidden_size,) float64.

        Raises:
            SubspaceError: the language or the layer was not probed.
        """
        if language not in self.languages:
            raise SubspaceError(
                f"language must be one of those probed ({', '.join(self.languages)}), got "
                f"{language!r}; probe with it or choose another"
            )
        means = self.language_means[self.position(layer)]
        difference = means[self.languages.index(language)]
        difference = difference - means[self.languages.index(self.central)]
        return self.project_specific(difference, layer)

    def distances(self, language: str, layer: int) -> tuple[float, float]:
        """How far a language's mean is from the central one's, in units of the central mean's norm.

        Returns:
            The distance within the agnostic and within the specific subspace.
        """
        means = self.language_means[self.position(layer)]
        centre = means[self.languages.index(self.central)]
        difference = means[self.languages.index(language)] - centre
        agnostic = self.project_agnostic(difference, layer).norm() / centre.norm()
        specific = self.project_specific(difference, layer).norm() / centre.norm()
        return float(agnostic), float(specific)

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, whole or not at all."""
        save_tensors(
            Path(path),
            {name: getattr(self, name) for name in _TENSORS},
            {
                "kind": "polylens.subspaces",
                "layer_convention": LAYER_CONVENTION,
                "languages": self.languages,
                "central": self.central,
                "layers": self.layers,
                "rank": self.rank,
                "agnostic": self.agnostic,
                **self.metadata,
            },
        )

    @classmethod
    def load(cls, path: str | Path, *, fingerprint: str | None = None) -> Subspaces:
        """Read what `save` wrote.

        Args:
            path: the file.
            fingerprint: of the model that the subspaces are for; None accepts any.

        Raises:
            SubspaceError: the subspaces are of another model, or the file holds something else.
            CorruptFileError: the file is damaged.
        """
        tensors, metadata = load_tensors(Path(path))
        if metadata.pop("kind", None) != "polylens.subspaces":
            raise SubspaceError(
                f"{path} must hold subspaces, but holds something else; give the "
                "subspaces.safetensors that `polylens probe` wrote"
            )
        if fingerprint is not None and metadata.get("fingerprint") != fingerprint:
            raise SubspaceError(
                f"subspaces must be those of the model in use, but {path} was probed on another "
                f"one ({metadata.get('model', 'unknown')}); probe this model again"
            )
        try:
            del metadata["layer_convention"], metadata["rank"]
            found = cls(
                languages=tuple(metadata.pop("languages")),
                central=metadata.pop("central"),
                layers=tuple(metadata.pop("layers")),
                agnostic=metadata.pop("agnostic"),
                **{name: tensors[name] for name in _TENSORS},
                metadata=metadata,
            )
            found.languages.index(found.central)
            if found.language_means.shape[:2] != (len(found.layers), len(found.languages)):
                raise ValueError("its means are not those of its layers and languages")
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptFileError(
                f"{path} must hold whole subspaces, but does not ({error!r}); probe again"
            ) from error
        return found


_TENSORS = tuple(field.name for field in dataclasses.fields(Subspaces) if field.type == "Tensor")


def probe_subspaces(
    pooled: Mapping[str, Tensor],
    *,
    central: str,
    rank: int | None = None,
    agnostic: Agnostic = "mean",
    layers: Sequence[int] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Subspaces:
    """Find the language subspaces of every layer from pooled states.

    Args:
        pooled: language → (n_texts, n_layers + 1, hidden_size), one state a text and layer.
            Languages may have different numbers of texts.
        central: the central language; one of the keys.
        rank: dimension of the language-specific subspace; None takes n_languages - 1.
        agnostic: form of the agnostic subspace.
        layers: layers to probe; None takes all, and the state after the final norm.
        metadata: kept with the result; must include "fingerprint" to guard against mix-ups.

    Raises:
        SubspaceError: fewer than two languages, no central language, rank or layer out of range.
    """
    languages = tuple(pooled)
    n_entries = next(iter(pooled.values())).shape[1]
    rank, chosen = check_probe(languages, central, rank, layers, n_entries)
    means = torch.stack([states[:, chosen].double().mean(0) for states in pooled.values()], 1)
    splits = [decompose(layer_means, rank) for layer_means in means]
    basis = torch.stack([split.specific_basis for split in splits])
    return Subspaces(
        languages=languages,
        central=central,
        layers=chosen,
        language_means=means,
        agnostic_vector=torch.stack([split.agnostic for split in splits]),
        specific_basis=basis,
        singular_values=torch.stack([split.singular_values for split in splits]),
        separability=_separability(pooled, chosen, basis),
        agnostic=agnostic,
        metadata={
            "n_texts": {language: len(states) for language, states in pooled.items()},
            **(metadata or {}),
        },
    )


def check_layers(layers: Sequence[int] | None, n_entries: int) -> tuple[int, ...]:
    """Return the layers to probe, ascending, each once.

    Args:
        layers: layers wanted; None for all.
        n_entries: n_layers + 1.

    Raises:
        SubspaceError: a layer does not exist.
    """
    if layers is None:
        return tuple(range(n_entries))
    for layer in layers:
        if not 0 <= layer < n_entries:
            raise SubspaceError(
                f"layer must be between 0 and {n_entries - 2}, or {n_entries - 1} for the state "
                f"after the final norm, got {layer}; choose one of those"
            )
    return tuple(sorted(set(layers)))


def told_apart(states: Mapping[str, Tensor], basis: Tensor) -> dict[str, Tensor]:
    """Tell languages by the nearest mean within a subspace, each text left out of its own mean.

    Args:
        states: language → (n_texts, hidden_size) float64, states of one layer.
        basis: (rank, hidden_size) float64, orthonormal rows.

    Returns:
        Language → (n_texts,) bool, whether the nearest mean is that of the text's own language; a
        language's only text has no mean left, and is never told.
    """
    counts = torch.tensor([len(part) for part in states.values()], dtype=torch.float64)
    label = torch.repeat_interleave(torch.arange(len(counts)), counts.long())
    coordinates = torch.cat(list(states.values())) @ basis.T  # (n_texts, rank)
    sums = torch.zeros(len(counts), basis.shape[0], dtype=torch.float64)
    sums = sums.index_add(0, label, coordinates)
    distance = torch.cdist(coordinates, sums / counts[:, None])  # (n_texts, n_languages)
    others = (sums[label] - coordinates) / (counts[label] - 1).clamp(min=1)[:, None]
    own = (coordinates - others).norm(dim=1)
    own[counts[label] == 1] = torch.inf
    distance[torch.arange(len(label)), label] = own
    told = distance.argmin(1) == label
    return dict(zip(states, told.split([len(part) for part in states.values()]), strict=True))


def _separability(pooled: Mapping[str, Tensor], layers: Sequence[int], basis: Tensor) -> Tensor:
    """Share of all texts that are told apart, per layer, in the specific subspace."""
    accuracy = []
    for index, layer in enumerate(layers):
        states = {language: part[:, layer].double() for language, part in pooled.items()}
        accuracy.append(torch.cat([*told_apart(states, basis[index]).values()]).double().mean())
    return torch.stack(accuracy)


def _ranges(numbers: Sequence[int]) -> str:
    if len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))
