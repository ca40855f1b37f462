"""README.md of a merged model: what it is, how it was made, what was measured and what was not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from polylens.config import RunConfig
from polylens.evaluation import Evaluation
from polylens.evaluation.gate import Dial
from polylens.languages import language_name

CITATION = """@article{zhao2024lens,
  title   = {Lens: Rethinking Multilingual Enhancement for Large Language Models},
  author  = {Zhao, Weixiang and Hu, Yulin and Guo, Jiahe and Sui, Xingyu and Wu, Tongtong and
             Deng, Yang and Zhao, Yanyan and Qin, Bing and Che, Wanxiang and Liu, Ting},
  journal = {arXiv preprint arXiv:2410.04407},
  year    = {2024}
}"""


def model_card(
    config: RunConfig, evaluation: Evaluation, plan: Mapping[str, Any], dial: Dial
) -> str:
    """Write the card of a merged model.

    Args:
        config: of the run.
        evaluation: before and after.
        plan: what plan.json of the run holds.
        dial: the strength that was chosen, and why.

    Returns:
        Markdown with the front matter that the Hub reads. No path of the machine is in it.
    """
    base = plan["model"]["name"]
    front: dict[str, Any] = {
        "language": list(config.all_languages),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["polylens", "lens", "multilingual"],
    }
    if plan["model"]["license"]:
        front["license"] = plan["model"]["license"]
    if plan["model"]["kind"] == "hub":
        front["base_model"] = base
    names = ", ".join(language_name(language) for language in config.languages)
    central = language_name(config.central)
    training, heldout = plan["corpora"]["training"], plan["corpora"]["heldout"]
    settings = [
        ("layers trained", config.train.layers),
        ("learning rate", config.train.learning_rate),
        ("epochs", config.train.epochs),
        ("parallel rows", training["rows"]),
        ("strength", _strength(config.train.strength)),
        (
            "weights align / separate / retain / answer",
            f"{config.train.align_weight} / {config.train.separate_weight} / "
            f"{config.train.retain_weight} / {config.train.answer_weight}",
        ),
        ("agnostic subspace", config.probe.agnostic),
        ("dial of this model", dial.strength),
        ("seed", config.seed),
    ]
    done = []
    if config.train.align_weight:
        done.append(f"the target languages are pulled towards {central} in the first")
    if config.train.separate_weight:
        done.append("the target languages are pushed along their own direction in the second")
    if config.train.retain_weight:
        done.append(f"{central} is held where it was")
        if config.train.retain_targets:
            done.append("the target languages' prompts are held up to their last token")
        if n_choices := training.get("retained_choices"):
            done.append(
                f"so is, for {n_choices} of PolyLens's own questions in {central} with two "
                "answers, the state from which the letter is chosen"
            )
    answered = any(training.get("answers", {}).get(k) for k in config.languages)
    if answered and config.train.answer_weight:
        done.append("answers in the target languages are learned")
    elif not answered:
        done.append("no answers are learned, only parallel prompts are read")
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()}
---

# {base}, enhanced in {names}

This is `{base}` with its top decoder layers changed by PolyLens, an implementation of
[*Lens*](https://arxiv.org/abs/2410.04407): the hidden states are probed for a language-agnostic
and a language-specific subspace; {"; ".join(done)}.

## Results

{results_table(evaluation)}

{dial.sentence()}

Choice of letters, where the gate names it: which of two answers belongs to each of 32 questions of
the starter corpus, by the letter that the model replies; points of the share of right ones.

Held-out prompts: {heldout["rows"]} rows of `{heldout["name"]}`, {evaluation.how_answered}, which
count as in the language when py3langid, limited to the languages of the table, says so. An answer
is repeating when more than half of its 4-grams occurred before in it, or it ends with the same
words three times in a row, and echoing when it begins by repeating the question. Bits per byte are
over the held-out texts; lower is better. The change of states is ‖h - h°‖ / ‖h°‖ of the mean state
after the final norm.

Not measured here: benchmarks, the quality of the answers, safety, and languages outside the table.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

## How it was made

Probing texts: `{plan["corpora"]["probing"]["name"]}`. Parallel prompts: `{training["name"]}`.

| setting | value |
|-|-|
{chr(10).join(f"| {name} | {value} |" for name, value in settings)}

Made with polylens {plan["versions"]["polylens"]}, torch {plan["versions"]["torch"]}, transformers
{plan["versions"]["transformers"]}.

## Citation

```bibtex
{CITATION}
```
"""


def _strength(strength: float | str | Mapping[str, float]) -> str:
    if isinstance(strength, Mapping):
        return ", ".join(f"{language} {one:.3g}" for language, one in strength.items())
    return str(strength)


def results_table(evaluation: Evaluation) -> str:
    """Return before and after as a Markdown table, central language first."""
    lines = [
        "| language | answers in it, before | after | repeating, before | after "
        "| echoing, before | after | bits per byte, before | after | change of states |",
        "|-|-|-|-|-|-|-|-|-|-|",
    ]
    for language in evaluation.all_languages:
        fidelity = evaluation.fidelity[language]
        bits = evaluation.bits_per_byte[language]
        before, after = fidelity.before, fidelity.after
        lines.append(
            f"| {language_name(language)} | {before.passed} of {before.n} | {after.passed} of "
            f"{after.n} | {before.repeating} | {after.repeating} "
            f"| {before.echoing} | {after.echoing} "
            f"| {bits.before:.4f} | {bits.after:.4f} "
            f"| {evaluation.state_change[language].relative:.2%} |"
        )
    return "\n".join(lines)
