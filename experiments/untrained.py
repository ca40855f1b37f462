"""What one would do without training: solved examples before each question, or steering alone.

Both act on one language's questions at a time, and need to know which language a question is in.
"""

from __future__ import annotations

import contextlib
import dataclasses

from design import CENTRAL, Setting, training_rows
from polylens.baselines import FewShotSettings, few_shot_template
from polylens.config import ProbeSettings
from polylens.evaluation.comparison import Heldout, answer
from polylens.evaluation.results import Answer
from polylens.models.loading import LanguageModel
from polylens.prompts import PromptFormat, choose_format, encode_parallel, encode_texts
from polylens.steering import Steering, Towards
from polylens.steps import probe_prompts

UNTRAINED = ("few-shot", "steering")


def answers_of(
    model: LanguageModel,
    setting: Setting,
    heldout: Heldout,
    max_new_tokens: int,
    repetition_penalty: float,
    seed: int,
) -> list[Answer]:
    """Let the model answer every held-out prompt, in each language with what is done for it."""
    prompted = setting.method == "few-shot"
    asked = _with_examples(model, setting, heldout, seed) if prompted else heldout
    steerings = {} if prompted else _steerings(model, heldout)
    found = []
    for language in heldout.all_languages:
        rows = tuple(
            {k: at for k, at in row.items() if k == language} for row in asked.prompts.rows
        )
        own = dataclasses.replace(asked, prompts=dataclasses.replace(asked.prompts, rows=rows))
        steering = steerings.get(language)
        steered = (
            steering.applied(model.structure, setting.dial)
            if steering
            else contextlib.nullcontext()
        )
        with steered:
            found += answer(model, own, max_new_tokens, repetition_penalty=repetition_penalty)
    return found


def _with_examples(model: LanguageModel, setting: Setting, heldout: Heldout, seed: int) -> Heldout:
    """The same questions, each after solved examples in its language."""
    settings = FewShotSettings(**setting.settings)
    examples = training_rows(heldout.languages).to_answered()
    ids: list[tuple[int, ...]] = []
    rows: list[dict[str, int]] = [{} for _ in heldout.prompts.rows]
    for language in heldout.all_languages:
        template = few_shot_template(
            model.tokenizer, examples, language, settings=settings, seed=seed
        )
        style = PromptFormat(template, "few-shot")
        encoded = encode_parallel(
            heldout.corpus, heldout.all_languages, style, model.tokenizer, 2 * settings.max_tokens
        )
        for row, of_row in zip(rows, encoded.rows, strict=True):
            row[language] = len(ids)
            ids.append(encoded.ids[of_row[language]])
    prompts = dataclasses.replace(heldout.prompts, ids=tuple(ids), rows=tuple(rows))
    return dataclasses.replace(heldout, prompts=prompts)


def _steerings(model: LanguageModel, heldout: Heldout) -> dict[str, Steering]:
    """Target language → a push towards it, at the layers that the library chooses."""
    settings, style = ProbeSettings(), choose_format(model.tokenizer, "auto")
    texts = training_rows(heldout.languages).to_corpus()
    subspaces = probe_prompts(
        model,
        encode_texts(texts, heldout.all_languages, style, model.tokenizer, settings.max_tokens),
        central=CENTRAL,
        settings=settings,
        template=style.name,
    )
    return {k: Steering(subspaces, (Towards(k),)) for k in heldout.languages}
