"""States at every layer are those of transformers, and each point shows its own text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_jobs import SETTINGS

from polylens.config import load_config
from polylens.corpora import starter_corpus
from polylens.errors import CorpusError, LanguageError, SubspaceError
from polylens.hidden_states import Keep, collect_hidden_states
from polylens.models import load_model
from polylens.plan import choose_rows
from polylens.prompts import choose_format
from polylens.report.plots import probe_figure, subspace_map
from polylens.run_folder import RunFolder
from polylens.studio.looking import Look, look_into_model, look_into_run


@pytest.fixture
def look(tiny_folder: Path) -> Look:
    return look_into_model(str(tiny_folder), "Swahili, en", "en", n_texts=4)


def test_states_belong_to_their_texts(look: Look, tiny_folder: Path) -> None:
    model = load_model(tiny_folder)
    texts = starter_corpus().to_corpus().texts
    assert list(look.texts) == ["en", "sw"]
    for language, own in look.texts.items():
        assert set(own) <= set(texts[language])
        assert look.before[language].shape == (4, model.structure.n_layers + 1, 32)
        prompts = choose_format(model.tokenizer).encode(model.tokenizer, own, 64)
        for text_states, ids in zip(look.before[language], prompts.ids, strict=True):
            output = model.causal_lm(torch.tensor([ids]), output_hidden_states=True)
            # transformers counts the embedding, and leaves out the last layer before its norm.
            for layer in (0, 1, 2):
                wanted = output.hidden_states[layer + 1][0, -1]
                torch.testing.assert_close(text_states[layer], wanted, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                text_states[-1], output.hidden_states[-1][0, -1], rtol=1e-4, atol=1e-5
            )


def test_a_map_shows_each_point_its_text(look: Look) -> None:
    figure = look.map_at(2)
    shown = {trace.name: trace.text for trace in figure.data}
    for language, name in (("en", "English"), ("sw", "Swahili")):
        for text, lines in zip(look.texts[language], shown[name], strict=True):
            assert lines.replace("<br>", " ").startswith(text[:30].replace("'", "&#x27;"))
    assert not figure.layout.annotations[2:]  # two titles, no arrows
    with pytest.raises(SubspaceError):
        look.map_at(99)


def test_what_looks_like_a_tag_is_text(look: Look) -> None:
    texts = {k: ["<b>bold</b> & " + "long " * 200] * 4 for k in look.texts}
    states = {k: found[:, 1] for k, found in look.before.items()}
    for after in (None, states):
        figure = subspace_map(states, after, look.subspaces, 1, texts)
        for trace in figure.data:
            assert len(trace.x) == len(trace.text) == 4
            assert trace.text[0].startswith("&lt;b&gt;bold&lt;/b&gt; &amp;")
            assert trace.text[0].count("<br>") <= 5
            assert trace.text[0].endswith("[...]")


def test_a_language_has_one_colour_in_all_figures(tiny_folder: Path) -> None:
    look = look_into_model(str(tiny_folder), "sw, es", "en", n_texts=4)
    states = {k: look.before[k][:, 1] for k in sorted(look.before)}  # as a file keeps them
    colours = {
        trace.name: trace.marker.color
        for trace in subspace_map(states, states, look.subspaces, 1).data
    }
    curves = {trace.name: trace.line.color for trace in probe_figure(look.subspaces).data}
    assert colours["Swahili"] == curves["Swahili"] != colours["Spanish"] == curves["Spanish"]


def test_a_run_shows_its_heldout_prompts(look: Look, tiny_folder: Path, tmp_path: Path) -> None:
    config = load_config(None, {**SETTINGS, "model": str(tiny_folder)})
    folder = RunFolder(tmp_path)
    look.subspaces.save(folder.subspaces)
    found = look_into_run(folder, config)
    _, heldout = choose_rows(config)
    assert found.texts == {k: [row[k] for row in heldout.rows] for k in ("en", "sw")}
    model = load_model(tiny_folder)
    ids = choose_format(model.tokenizer).encode(model.tokenizer, found.texts["sw"], 128).ids
    wanted = collect_hidden_states(model.structure, ids, Keep(pooling="last"), token_budget=512)
    torch.testing.assert_close(found.before["sw"], wanted.pooled, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_looked_at_is_said(tiny_folder: Path) -> None:
    with pytest.raises(LanguageError, match="swahilli"):
        look_into_model(str(tiny_folder), "swahilli", "en")
    with pytest.raises(CorpusError, match="yo"):
        look_into_model(str(tiny_folder), "yo", "en")
    with pytest.raises(SubspaceError, match="2 languages"):
        look_into_model(str(tiny_folder), "en", "en")
