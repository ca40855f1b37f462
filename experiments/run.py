"""Train and measure named settings, and keep every example's value.

    python experiments/run.py MODEL SETTING [SETTING …] [--seeds 0,1,2] [--split report]
        [--parts texts,replies,choices,answers,penalised,xcopa,xcopa_letters] [--limit N]

One trunk pass serves all settings of a seed wherever likelihoods are asked for. Each finished part
is kept, in experiments/results/MODEL/SPLIT/, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polylens
from design import (
    BENCHMARK_LANGUAGES,
    CENTRAL,
    MAX_NEW_TOKENS,
    REPETITION_PENALTY,
    SETTINGS,
    SPLITS,
    Setting,
    languages_of,
    measured_rows,
    training_rows,
)
from faults import FAULTY, cut, probe_with_pads
from polylens.artefacts import read_json, write_json
from polylens.baselines import (
    LowRankSettings,
    PretrainingSettings,
    SupervisedSettings,
    fine_tune,
    pretrain,
)
from polylens.baselines.supervised import translations
from polylens.config import ProbeSettings, TrainSettings
from polylens.corpora import ParallelCorpus
from polylens.crown import CrownDelta
from polylens.evaluation.choices import encode_choices, measure_choices
from polylens.evaluation.comparison import Heldout, answer
from polylens.evaluation.fidelity import is_echo, is_repeating
from polylens.evaluation.measures import Example, Task, TaskRun
from polylens.evaluation.replies import measure_replies
from polylens.evaluation.results import Answer, read_answers, write_answers
from polylens.evaluation.scoring import Candidate
from polylens.evaluation.suite import Suite, measure_texts, run_suite
from polylens.evaluation.tasks import choose_tasks
from polylens.journal import versions
from polylens.models.loading import LanguageModel
from polylens.prompts import choose_format, encode_parallel, encode_texts
from polylens.shortfall import measure_shortfall, strengths_of
from polylens.steps import encode_shared, probe_prompts, train_prompts
from untrained import UNTRAINED, answers_of

HERE = Path(__file__).parent
DELTAS = Path("runs/experiments")
OF_LENS = ("lens", *FAULTY)
PARTS = ("texts", "replies", "choices", "xcopa_letters", "xcopa", "answers", "penalised")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("settings", nargs="+", choices=SETTINGS)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--split", choices=SPLITS, default="development")
    parser.add_argument("--parts", default=",".join(PARTS[:-2]))
    parser.add_argument("--limit", type=int, default=32, help="held-out rows")
    parser.add_argument("--examples", type=int, help="examples of a benchmark and language")
    parser.add_argument("--data-dir", type=Path, required=True, help="has lens, xcopa and copa")
    given = parser.parse_args()
    model = polylens.load_model(given.model, dtype="float32")
    languages = languages_of(given.split)
    rows = measured_rows(given.split, given.data_dir, given.limit)
    heldout = make_heldout(model, rows, languages)
    folder = HERE / "results" / given.model / given.split
    for seed in map(int, given.seeds.split(",")):
        trained = [name for name in given.settings if SETTINGS[name].method not in UNTRAINED]
        deltas = make_deltas(model, given.model, trained, seed, languages)
        measure(model, deltas, seed, heldout, folder, given)


def make_heldout(model: LanguageModel, rows: ParallelCorpus, languages: tuple[str, ...]) -> Heldout:
    style = choose_format(model.tokenizer, "auto")
    prompts = encode_parallel(rows, (CENTRAL, *languages), style, model.tokenizer, 512)
    choices = encode_choices(CENTRAL, style, model.tokenizer)
    texts = rows.to_corpus().texts
    return Heldout(rows, prompts, texts, CENTRAL, languages, choices=choices)


def make_deltas(
    model: LanguageModel, spec: str, names: Sequence[str], seed: int, languages: tuple[str, ...]
) -> dict[str, CrownDelta]:
    """Train, or read what was trained; deltas lie in runs/, not in the repository."""
    folder = DELTAS / spec
    folder.mkdir(parents=True, exist_ok=True)
    rows = training_rows(languages)
    paths = {name: folder / f"{_digest(SETTINGS[name], rows)}-{seed}.safetensors" for name in names}
    left = [name for name in {paths[n]: n for n in names}.values() if not paths[name].exists()]
    for name in left:
        if SETTINGS[name].method not in OF_LENS:
            _save(_baseline(model, SETTINGS[name], seed, rows, languages), paths[name])
    of_lens = [name for name in left if SETTINGS[name].method in OF_LENS]
    while of_lens:
        first = _states_of(SETTINGS[of_lens[0]])
        chosen = [n for n in of_lens if _states_of(SETTINGS[n]) == first]
        of_lens = [n for n in of_lens if n not in chosen]
        trained = _lens(model, folder, chosen, seed, rows, languages)
        for name, delta in zip(chosen, trained, strict=True):
            _save(delta, paths[name])
    return {
        name: CrownDelta.load(path, fingerprint=model.fingerprint) for name, path in paths.items()
    }


def _states_of(setting: Setting) -> tuple[Any, ...]:
    """What determines the states that a setting of Lens trains from."""
    settings = TrainSettings(**setting.settings)
    return setting.method, setting.rows, setting.probe, settings.max_answer_tokens


def _digest(setting: Setting, rows: ParallelCorpus) -> str:
    trained = (dataclasses.replace(setting, dial=1.0), rows.fingerprint)
    return hashlib.sha256(repr(trained).encode()).hexdigest()[:12]


def _save(delta: CrownDelta, path: Path) -> None:
    delta.save(path)
    print(f"{path.name}: trained", file=sys.stderr, flush=True)


def _lens(
    model: LanguageModel,
    folder: Path,
    names: Sequence[str],
    seed: int,
    rows: ParallelCorpus,
    targets: tuple[str, ...],
) -> Iterator[CrownDelta]:
    """Train settings of Lens that have `_states_of` in common, from one trunk pass."""
    first = SETTINGS[names[0]]
    rows = dataclasses.replace(rows, rows=rows.rows[: first.rows])
    languages = (CENTRAL, *targets)
    texts, style = rows.to_corpus(), choose_format(model.tokenizer, "auto")
    probe_settings = ProbeSettings(**first.probe)
    probing = encode_texts(texts, languages, style, model.tokenizer, probe_settings.max_tokens)
    if first.method == "pads":
        subspaces = probe_with_pads(model, probing, CENTRAL, probe_settings)
    else:
        subspaces = probe_prompts(
            model, probing, central=CENTRAL, settings=probe_settings, template=style.name
        )
    settings = [TrainSettings(**SETTINGS[name].settings) for name in names]
    if first.method == "cuts":
        prompts = cut(rows, languages, style, model, settings[0].max_tokens)
    else:
        prompts = encode_shared(model.tokenizer, style, rows, languages, settings)
    if any(one.strength == "auto" for one in settings):
        # The same for every seed.
        path = folder / f"shortfall-{len(rows.rows)}-{'-'.join(targets)}.json"
        if not path.exists():
            asked = prompts.without_answers()
            write_json(path, measure_shortfall(model, asked, CENTRAL, targets))
        auto = {"strength": strengths_of(read_json(path))}
        settings = [
            one.model_copy(update=auto) if one.strength == "auto" else one for one in settings
        ]
    yield from train_prompts(model, subspaces, prompts, settings=settings, seed=seed)


def _baseline(
    model: LanguageModel,
    setting: Setting,
    seed: int,
    rows: ParallelCorpus,
    languages: tuple[str, ...],
) -> CrownDelta:
    how: dict[str, Any] = {"languages": languages, "central": CENTRAL, "seed": seed}
    if setting.method == "pretraining":
        chosen = PretrainingSettings(**setting.settings)
        return pretrain(model, rows.to_corpus(), settings=chosen, **how)
    kind = LowRankSettings if setting.method == "sft-lora" else SupervisedSettings
    examples = rows.to_answered()
    if setting.method == "sft-translations":
        examples = translations(rows, CENTRAL)
    return fine_tune(model, examples, settings=kind(**setting.settings), **how)


def measure(
    model: LanguageModel,
    deltas: dict[str, CrownDelta],
    seed: int,
    heldout: Heldout,
    folder: Path,
    given: argparse.Namespace,
) -> None:
    """Measure what is not there yet, part by part; of what is not trained, answers alone."""
    names = ["base", *(f"{name}-{seed}" for name in given.settings)]
    candidates = [
        Candidate(),
        *(Candidate(deltas.get(name), SETTINGS[name].dial) for name in given.settings),
    ]
    files = [folder / f"{name}.json" for name in names]
    contents = [read_json(path) if path.exists() else {"parts": {}} for path in files]
    for content, candidate in zip(contents, candidates, strict=True):
        if candidate.delta is not None:
            known = candidate.delta.metadata
            content["settings"] = known["settings"]
            content["strength"] = candidate.strength
        content["versions"] = versions()
    for part in given.parts.split(","):
        left = [
            i
            for i, (content, candidate) in enumerate(zip(contents, candidates, strict=True))
            if part not in content["parts"]
            and (i == 0 or candidate.delta is not None or part in ("answers", "penalised"))
        ]
        if not left:
            continue
        started = time.monotonic()
        chosen = {names[i]: candidates[i] for i in left}
        runs = _measurers(given)[part](model, chosen, heldout)
        for place, index in enumerate(left):
            contents[index]["parts"][part] = [_kept(run, place) for run in runs]
            write_json(files[index], contents[index])
        took = time.monotonic() - started
        print(f"{part}: {[names[i] for i in left]} in {took:.0f} s", file=sys.stderr, flush=True)


def _measurers(given: argparse.Namespace) -> dict[str, Callable[..., list[TaskRun]]]:
    first = 0 if given.split == "development" else 1

    def benchmark(name: str) -> Callable[..., list[TaskRun]]:
        def of(model: LanguageModel, some: Mapping[str, Candidate], _: Heldout) -> list[TaskRun]:
            specs = tuple(choose_tasks([name], BENCHMARK_LANGUAGES, given.data_dir))
            suite = Suite(
                (), specs, None, limit=given.examples, data_dir=given.data_dir, every=(first, 2)
            )
            parts = run_suite(model, [*some.values()], suite)
            return [run for _, runs in parts for run in runs]

        return of

    return {
        "texts": lambda model, some, heldout: measure_texts(model, [*some.values()], heldout),
        "replies": lambda model, some, heldout: measure_replies(model, [*some.values()], heldout),
        "choices": lambda model, some, heldout: [
            measure_choices(model, [*some.values()], CENTRAL, heldout.choices)
        ],
        "answers": lambda model, some, heldout: _answers(
            model, some, heldout, DELTAS / given.model / f"answers-{given.split}"
        ),
        "penalised": lambda model, some, heldout: _answers(
            model,
            some,
            heldout,
            DELTAS / given.model / f"answers-{given.split}-penalised",
            REPETITION_PENALTY,
            "_penalised",
        ),
        "xcopa": benchmark("xcopa"),
        "xcopa_letters": benchmark("xcopa_letters"),
    }


def _answers(
    model: LanguageModel,
    some: Mapping[str, Candidate],
    heldout: Heldout,
    folder: Path,
    repetition_penalty: float = 1.0,
    suffix: str = "",
) -> list[TaskRun]:
    """What can be told of answers; they themselves are kept in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    sides = []
    for name, candidate in some.items():
        path = folder / f"{name}.jsonl"
        if not path.exists():
            setting, _, seed = name.rpartition("-")
            if setting and SETTINGS[setting].method in UNTRAINED:
                found = answers_of(
                    model,
                    SETTINGS[setting],
                    heldout,
                    MAX_NEW_TOKENS,
                    repetition_penalty,
                    int(seed),
                )
            else:
                with candidate.applied(model.structure):
                    found = answer(
                        model, heldout, MAX_NEW_TOKENS, repetition_penalty=repetition_penalty
                    )
            write_answers(path, found)
        sides.append(read_answers(path))
    return [
        TaskRun(
            Task(f"{what}_{language}{suffix}", language, "answers", what, what not in BAD),
            tuple(
                tuple(
                    Example(str(one.id), float(value(one)))
                    for one in answers
                    if one.language == language
                )
                for answers in sides
            ),
        )
        for language in heldout.all_languages
        for what, value in OF_ANSWERS.items()
    ]


def _is_sound(one: Answer) -> bool:
    return one.passed and not is_repeating(one.answer) and not is_echo(one.prompt, one.answer)


OF_ANSWERS: Mapping[str, Callable[[Answer], float]] = {
    "fidelity": lambda one: one.passed,
    "repeating": lambda one: is_repeating(one.answer),
    "echoing": lambda one: is_echo(one.prompt, one.answer),
    "sound": _is_sound,
    "length": lambda one: len(one.answer),
}
BAD = ("repeating", "echoing")


def _kept(run: TaskRun, place: int) -> dict[str, Any]:
    """One side's values, and a digest of which examples they are of."""
    examples = run.examples[place]
    keys = hashlib.sha256(json.dumps([one.key for one in examples]).encode()).hexdigest()[:16]
    kept = {
        "task": run.task.name,
        "language": run.task.language,
        "metric": run.task.metric,
        "higher_is_better": run.task.higher_is_better,
        "examples": keys,
        "values": [round(one.value, 5) for one in examples],
    }
    if run.task.protocol == "choice":
        kept["log_odds"] = [[round(x, 5) for x in one.log_odds or ()] for one in examples]
    return kept


if __name__ == "__main__":
    main()
