"""Solved examples before each question, as a chat template: no training at all.

The template is the model's own with some turns put in front, so `--template` takes it wherever a
prompt is made.
"""

from __future__ import annotations

import json
import random
from typing import Any

from polylens.baselines.settings import FewShotSettings
from polylens.chat_templates import render_conversation
from polylens.corpora import AnsweredCorpus, require_languages
from polylens.errors import CorpusError
from polylens.prompts import CHAT, choose_format


def few_shot_template(
    tokenizer: Any,
    corpus: AnsweredCorpus,
    language: str,
    *,
    settings: FewShotSettings | None = None,
    seed: int = 0,
) -> str:
    """Return the model's chat template with solved examples before the conversation.

    Examples are taken in an order drawn by `seed`; one that would not fit is passed over.

    Args:
        tokenizer: the model's, with a chat template.
        corpus: prompts with answers.
        language: of the examples.
        settings: how many, and how long.
        seed: choice of the examples.

    Raises:
        ConfigError: the model has no chat template.
        CorpusError: the language is missing, or too few examples fit.
    """
    settings = settings or FewShotSettings()
    require_languages(corpus, [language])
    own = choose_format(tokenizer, CHAT).template
    assert own is not None
    pairs = list(corpus.pairs[language])
    random.Random(seed).shuffle(pairs)
    turns: list[dict[str, str]] = []
    for prompt, answer in pairs:
        longer = [
            *turns,
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": answer},
        ]
        rendered = render_conversation(tokenizer, own, longer)
        n_tokens = len(tokenizer(rendered, add_special_tokens=False)["input_ids"])
        if n_tokens <= settings.max_tokens:
            turns = longer
        if len(turns) == 2 * settings.shots:
            break
    else:
        raise CorpusError(
            f"{settings.shots} examples of {corpus.name} in {language} must fit in "
            f"{settings.max_tokens} tokens, but only {len(turns) // 2} do; lower shots, raise "
            "max_tokens, or give shorter examples"
        )
    # What JSON writes, Jinja reads as a list of the same texts.
    return f"{{%- set messages = {json.dumps(turns, ensure_ascii=False)} + messages -%}}{own}"
