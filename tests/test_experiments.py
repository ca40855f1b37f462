"""The results page says of made-up values what was put into them."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from polylens.artefacts import write_json
from polylens.forecast import Signs

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
SIGNS = Signs(32, 1.0, 3.0, 2.0, 0.5, 2.0, 2.0, 2.0, 3.0, 10, 0.5, 0.0)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script, as a module; its neighbours have names that others might want."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    before = set(sys.modules)
    import page

    yield page
    for name in set(sys.modules) - before:
        if str(EXPERIMENTS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def prediction(page: Any) -> Any:
    return sys.modules["prediction"]


def kept(page: Any, what: str, metric: str, values: dict[str, list[float]]) -> list[dict[str, Any]]:
    """What experiments/run.py keeps of one part."""
    return [
        {
            "task": f"{what}_{language}",
            "language": language,
            "metric": metric,
            "higher_is_better": metric == "in_language",
            "examples": "0",
            "values": values[language],
        }
        for language in page.LANGUAGES
    ]


def test_the_forecast_block(page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of six languages, the more bits a text costs the less replies gain; two answers gain."""
    monkeypatch.setattr(sys.modules["kept"], "RESULTS", tmp_path)
    folder = tmp_path / "gemma3-270m"
    languages = list(page.LANGUAGES)
    signs = {
        language: dataclasses.replace(
            SIGNS, relative_bits=1.0 + number / 2, fidelity=1.0 if number == 0 else 0.5
        )
        for number, language in enumerate(languages)
    }
    write_json(
        folder / "signs.json", {"signs": {k: dataclasses.asdict(v) for k, v in signs.items()}}
    )
    same = {language: [2.0] * 4 for language in languages}
    half = {language: [0.0, 1.0] * 2 for language in languages}
    after = {language: [1.0 + number / 10] * 4 for number, language in enumerate(languages)}
    # The first has nothing to gain, and the second none after all; the others gain, and the last
    # two repeat themselves besides.
    gained = {k: half[k] if n < 2 else [1.0] * 4 for n, k in enumerate(languages)}
    none = dict.fromkeys(languages, [0.0] * 4)
    repeats = {k: [0.0] * 4 if n < 4 else [1.0] * 4 for n, k in enumerate(languages)}
    for name, replies, fidelity, repeating in (
        ("base", same, half, none),
        ("tokens-0", after, gained, repeats),
    ):
        parts = {
            "replies": kept(page, "replies", "bits_per_byte", replies),
            "answers": kept(page, "fidelity", "in_language", fidelity)
            + kept(page, "repeating", "repeating", repeating),
        }
        write_json(folder / "report" / f"{name}.json", {"parts": parts})
    block = page.blocks()["forecast"]
    (line,) = [line for line in block.split("\n") if line.startswith("| bits, relative")]
    assert "-1.00" in line.split("|")[2]
    (line,) = [line for line in block.split("\n") if line.startswith("| told apart")]
    assert line.split("|")[2:4] == [" – ", " – "]
    # Said: nothing, worth a run twice, hardly known three times. Came: each twice, in this order.
    assert "`tokens`: the sentence was right for 4 of 6" in block
    assert '"nothing to gain", said of all, for 2.' in block
    (line,) = [line for line in block.split("\n") if f"| {languages[4]} |" in line]
    assert line.endswith("| hardly known | **hardly known (+50, +100)** |  |")


def test_the_order_by_replies_is_compared_with_that_by_both(
    page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["kept"], "RESULTS", tmp_path)
    bits = {  # of replies and texts: replies say 1, 2, 3, both together 3, 1, 2
        "base": (2.0, 2.0),
        "paper-0": (1.4, 2.9),
        "default-0": (1.6, 2.0),
        "states-0": (1.8, 2.0),
        "answers-0": (0.1, 0.1),  # not of Lens's losses
    }
    for name, both in bits.items():
        parts = {
            what: kept(page, what, "bits_per_byte", {k: [value] * 4 for k in page.LANGUAGES})
            for what, value in zip(("replies", "bits_per_byte"), both, strict=True)
        }
        write_json(tmp_path / "gemma3-270m" / "development" / f"{name}.json", {"parts": parts})
    (line,) = page.blocks()["preview"].split("\n")[2:]
    assert line == "| Gemma-3-270M | 3 | -0.50 |"


def test_models_without_signs_or_figures_are_left_out(
    page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["kept"], "RESULTS", tmp_path)
    write_json(tmp_path / "gemma3-270m" / "signs.json", {"signs": {}})
    assert not {"forecast", "preview"} & page.blocks().keys()


def test_rank_correlation_is_spearmans_with_exact_chance(prediction: Any) -> None:
    sign, gain = [0.3, 0.1, 0.9, 0.4, 0.4], [5.0, 1.0, 4.0, 2.0, 2.5]
    rho, p = prediction.rank_correlation(sign, gain, ["one"] * 5)
    assert rho == pytest.approx(spearmanr(sign, gain).statistic)
    every = [spearmanr(sign, one).statistic for one in itertools.permutations(gain)]
    assert p == pytest.approx(np.mean(np.abs(every) >= abs(rho) - 1e-9), abs=0.02)


def test_what_lies_between_models_alone_is_chance(prediction: Any) -> None:
    models = ["one"] * 4 + ["two"] * 4
    apart = [1.0] * 4 + [2.0] * 4
    rho, p = prediction.rank_correlation(apart, [float(k) for k in range(8)], models)
    assert rho > 0.8
    assert p == 1
    assert prediction.rank_correlation(apart, [1.0] * 8, models) is None
