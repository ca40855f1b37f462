"""Hidden states of texts at every layer, for the pictures: of a model, or of a run's held-out rows.

The pictures themselves are the report's (`polylens.report.plots`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from torch import Tensor

from polylens.config import ProbeSettings, RunConfig, Runtime
from polylens.corpora import starter_corpus
from polylens.execution import Execution, open_model
from polylens.hidden_states import Keep
from polylens.languages import normalize_language, normalize_languages
from polylens.models.loading import LanguageModel
from polylens.plan import choose_rows
from polylens.progress import Progress, silent
from polylens.prompts import Prompts, choose_format, encode_texts
from polylens.report.plots import subspace_map
from polylens.run_folder import RunFolder
from polylens.states_cache import cached_hidden_states
from polylens.steps import probe_prompts
from polylens.subspaces import Subspaces


@dataclass(frozen=True)
class Look:
    """What a model makes of some texts.

    Attributes:
        subspaces: of the model.
        texts: language → texts.
        before: language → (n_texts, n_layers + 1, hidden_size), states of the untouched model;
            entry k is layer k's output, the last is after the final norm.
    """

    subspaces: Subspaces
    texts: Mapping[str, Sequence[str]]
    before: Mapping[str, Tensor]

    def map_at(self, layer: int) -> go.Figure:
        """Draw the texts in both subspaces of a layer.

        Raises:
            SubspaceError: the layer was not probed.
        """
        self.subspaces.position(layer)
        states = {k: found[:, layer] for k, found in self.before.items()}
        return subspace_map(states, None, self.subspaces, layer, self.texts)


def look_into_model(
    spec: str,
    languages: str,
    central: str,
    *,
    n_texts: int = 48,
    progress: Progress = silent,
) -> Look:
    """Probe a model on the starter corpus, and keep the states it was probed by.

    Args:
        spec: what `polylens.load_model` takes.
        languages: by commas, codes or names; the central one may be among them.
        central: the language that the others are compared with.
        n_texts: of each language.
        progress: told the tokens done.

    Raises:
        PolyLensError: a language is unknown, or there is no such model.
    """
    centre = normalize_language(central)
    chosen = dict.fromkeys((centre, *normalize_languages(languages.split(","))))
    corpus = starter_corpus().to_corpus().select(tuple(chosen), n_texts)
    model, execution = open_model(spec, Runtime(), progress=progress)
    settings = ProbeSettings()
    prompt_format = choose_format(model.tokenizer)
    prompts = encode_texts(
        corpus, tuple(chosen), prompt_format, model.tokenizer, settings.max_tokens
    )
    subspaces = probe_prompts(
        model,
        prompts,
        central=centre,
        settings=settings,
        template=prompt_format.name,
        scratch=execution.scratch(),
        progress=progress,
    )
    texts = {k: [corpus.texts[k][i] for i in part.kept] for k, part in prompts.items()}
    return Look(subspaces, texts, _states(model, execution, prompts, subspaces, progress))


def look_into_run(folder: RunFolder, config: RunConfig, *, progress: Progress = silent) -> Look:
    """Run the held-out prompts of a run through its untouched model.

    Args:
        folder: of a run that has been probed.
        config: of the run.
        progress: told the tokens done.

    Raises:
        PolyLensError: the model or the corpora are no longer there, or are others.
    """
    model, execution = open_model(
        config.model, Runtime(), revision=config.revision, progress=progress
    )
    subspaces = Subspaces.load(folder.subspaces, fingerprint=model.fingerprint)
    corpus = choose_rows(config)[1].to_corpus()
    prompts = encode_texts(
        corpus,
        config.all_languages,
        choose_format(model.tokenizer, config.template),
        model.tokenizer,
        config.train.max_tokens,
    )
    texts = {k: [corpus.texts[k][i] for i in part.kept] for k, part in prompts.items()}
    return Look(subspaces, texts, _states(model, execution, prompts, subspaces, progress))


def _states(
    model: LanguageModel,
    execution: Execution,
    prompts: Mapping[str, Prompts],
    subspaces: Subspaces,
    progress: Progress,
) -> dict[str, Tensor]:
    """Language → (n_texts, n_layers + 1, hidden_size); from the cache where they are in it."""
    states = cached_hidden_states(
        model,
        [ids for part in prompts.values() for ids in part.ids],
        Keep(pooling=subspaces.metadata["pooling"]),
        scratch=execution.scratch(),
        progress=progress,
    )
    assert states.pooled is not None
    counts = [len(part.ids) for part in prompts.values()]
    # Copies: what the cache holds is mapped from a file that may go.
    return {k: part.clone() for k, part in zip(prompts, states.pooled.split(counts), strict=True)}
