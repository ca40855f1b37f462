"""LSP recovers planted subspaces, agrees with the published code, and keeps its invariants."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from polylens.errors import CorruptFileError, SubspaceError
from polylens.subspaces import Subspaces, decompose, probe_subspaces

GOLDEN = (
    Path(__file__).parents[1] / ".." / "shared" / "golden" / "lsp_reference_smollm2.safetensors"
)
WIDTH = 24


def orthonormal(n: int, width: int = WIDTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    q, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    return q.T[:n]


def projector(rows: torch.Tensor) -> torch.Tensor:
    return rows.T @ torch.linalg.inv(rows @ rows.T) @ rows


def planted(n_languages: int = 5, rank: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means = a shared vector + points of a subspace orthogonal to it; all three."""
    basis = orthonormal(rank + 1)
    shared, specific = 7.0 * basis[0], basis[1:]
    generator = torch.Generator().manual_seed(3)
    coordinates = torch.randn(n_languages, rank, generator=generator, dtype=torch.float64)
    return shared + coordinates @ specific, shared, specific


def states(means: torch.Tensor, n_texts: int = 6, noise: float = 0.01) -> dict[str, torch.Tensor]:
    """Texts scattered about each mean, two layers and the final norm."""
    generator = torch.Generator().manual_seed(4)
    names = ["en", "zh", "sw", "bn", "ar", "ko"][: len(means)]
    return {
        name: mean
        + noise * torch.randn(n_texts, 3, WIDTH, generator=generator, dtype=torch.float64)
        for name, mean in zip(names, means, strict=True)
    }


def test_planted_subspaces_are_recovered() -> None:
    means, shared, specific = planted()
    split = decompose(means, rank=3)
    torch.testing.assert_close(projector(split.specific_basis), projector(specific))
    torch.testing.assert_close(split.agnostic, shared)


def test_planted_subspaces_are_recovered_from_noisy_means() -> None:
    means, _, specific = planted()
    noise = torch.randn(
        means.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    split = decompose(means + 1e-3 * noise, rank=3)
    angles = torch.linalg.svdvals(split.specific_basis @ specific.T)
    assert angles.min() > 0.9999


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_the_agnostic_vector_is_orthogonal_and_the_basis_orthonormal(rank: int) -> None:
    means, _, _ = planted(n_languages=5, rank=4)
    split = decompose(means, rank)
    assert (split.specific_basis @ split.agnostic).abs().max() < 1e-9
    torch.testing.assert_close(
        split.specific_basis @ split.specific_basis.T, torch.eye(rank, dtype=torch.float64)
    )
    assert split.singular_values.shape == (rank,)
    assert split.singular_values.diff().le(0).all()


def test_the_agnostic_vector_is_the_nearest_point_of_the_affine_hull() -> None:
    means, _, _ = planted(n_languages=4, rank=3)
    agnostic = decompose(means, rank=3).agnostic
    weights = torch.linalg.lstsq(means.T, agnostic).solution
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close(means.T @ weights, agnostic)
    for mean in means:  # no point of the hull is nearer to the origin
        assert (agnostic @ (mean - agnostic)).abs() < 1e-9


def test_permuting_languages_permutes_directions_and_keeps_the_subspace() -> None:
    pooled = states(planted()[0])
    a = probe_subspaces(pooled, central="en")
    b = probe_subspaces(dict(reversed(pooled.items())), central="en")
    for language in pooled:
        torch.testing.assert_close(a.direction(language, 1), b.direction(language, 1))
    torch.testing.assert_close(projector(a.specific_basis[1]), projector(b.specific_basis[1]))


def test_adding_a_language_never_changes_a_given_rank() -> None:
    means = planted()[0]
    few, many = states(means[:4]), states(means)
    assert probe_subspaces(few, central="en", rank=2).rank == 2
    assert probe_subspaces(many, central="en", rank=2).rank == 2
    assert probe_subspaces(few, central="en").rank == 3
    assert probe_subspaces(many, central="en").rank == 4


def test_projections_and_directions_by_hand() -> None:
    means = torch.tensor([[3.0, 1.0, 0.0], [3.0, -1.0, 0.0]])
    subspaces = probe_subspaces(
        {"en": means[0].expand(2, 1, 3), "sw": means[1].expand(2, 1, 3)}, central="en"
    )
    x = torch.tensor([[5.0, 6.0, 7.0]])
    for actual, expected in (
        (subspaces.project_specific(x, 0)[0], [0.0, 6.0, 0.0]),
        (subspaces.project_agnostic(x, 0)[0], [5.0, 0.0, 0.0]),
        (subspaces.direction("sw", 0), [0.0, -2.0, 0.0]),
        (subspaces.direction("en", 0), [0.0, 0.0, 0.0]),
    ):
        torch.testing.assert_close(actual.float(), torch.tensor(expected))
    agnostic, specific = subspaces.distances("sw", 0)
    assert agnostic == pytest.approx(0)
    assert specific == pytest.approx(2 / 10**0.5)


def test_the_complement_is_everything_else() -> None:
    subspaces = probe_subspaces(states(planted()[0]), central="en", agnostic="complement")
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    total = subspaces.project_agnostic(x, 0) + subspaces.project_specific(x, 0)
    torch.testing.assert_close(total, x)


def test_separability_tells_apart_from_mixed() -> None:
    means = planted()[0]
    apart = probe_subspaces(states(means, noise=0.001), central="en")
    assert apart.separability.eq(1).all()
    mixed = probe_subspaces(states(means, n_texts=60, noise=1000.0), central="en")
    assert mixed.separability.max() < 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "between 1 and 4 for 5 languages, got 0"),
        ({"rank": 5}, "between 1 and 4 for 5 languages, got 5"),
        ({"layers": [3]}, "between 0 and 1, or 2 for the state after the final norm, got 3"),
        ({"layers": [-1]}, "got -1"),
        ({"central": "fr"}, "central language 'fr' must be among"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    pooled = states(planted()[0])
    with pytest.raises(SubspaceError, match=message):
        probe_subspaces(pooled, **{"central": "en", **arguments})  # type: ignore[arg-type]


def test_one_language_is_too_few() -> None:
    with pytest.raises(SubspaceError, match="at least 2 languages, got 1"):
        probe_subspaces({"en": torch.zeros(2, 3, WIDTH)}, central="en")


def test_chosen_layers_are_those_of_a_full_probe() -> None:
    pooled = states(planted()[0])
    full = probe_subspaces(pooled, central="en")
    some = probe_subspaces(pooled, central="en", layers=[2, 0])
    assert some.layers == (0, 2)
    torch.testing.assert_close(some.specific_basis[1], full.specific_basis[2])
    with pytest.raises(SubspaceError, match="one of those probed"):
        some.position(1)


def test_saving_keeps_everything_and_guards_the_model(tmp_path: Path) -> None:
    subspaces = probe_subspaces(
        states(planted()[0]), central="en", metadata={"fingerprint": "a" * 64, "model": "tiny"}
    )
    path = tmp_path / "subspaces.safetensors"
    subspaces.save(path)
    loaded = Subspaces.load(path, fingerprint="a" * 64)
    assert loaded.languages == subspaces.languages
    assert loaded.layers == subspaces.layers
    assert loaded.metadata["n_texts"] == {"en": 6, "zh": 6, "sw": 6, "bn": 6, "ar": 6}
    assert torch.equal(loaded.specific_basis, subspaces.specific_basis)
    with pytest.raises(SubspaceError, match="probed on another one"):
        Subspaces.load(path, fingerprint="b" * 64)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CorruptFileError):
        Subspaces.load(path)


@pytest.mark.skipif(not GOLDEN.exists(), reason="reference arrays are not here")
def test_agrees_with_the_published_code() -> None:
    golden = load_file(GOLDEN)
    for layer in range(30):
        means = golden["language_means"][:, layer]
        split = decompose(means, rank=6)
        specific = projector(golden["language_specific_basis"][layer].double())
        agnostic = projector(golden["language_agnostic_vector"][layer, None].double())
        assert (projector(split.specific_basis) - specific).norm() < 1e-4
        assert (projector(split.agnostic[None]) - agnostic).norm() < 1e-4
        directions = (means - means[0]).double() @ projector(split.specific_basis)
        expected = golden["language_directions"][:, layer].double()
        assert (directions - expected).norm() < 1e-4 * expected.norm()
