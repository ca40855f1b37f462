"""`polylens data`: look into a corpus before using it."""

from __future__ import annotations

from typing import Annotated

import typer

from polylens.cli import options
from polylens.cli.console import out, print_json, table
from polylens.corpora import Corpus, ParallelCorpus, read_parallel, read_texts
from polylens.corpora.inspection import inspect_corpus
from polylens.errors import CorpusError
from polylens.languages import language_name, normalize_language, normalize_languages
from polylens.models.loading import load_tokenizer
from polylens.models.source import resolve
from polylens.prompts import choose_format


def data(
    corpus: Annotated[
        str, typer.Argument(help="A file, a folder, a Hub id, or 'starter'.")
    ] = "starter",
    kind: Annotated[
        str, typer.Option(help="parallel: rows that say the same; texts: for probing.")
    ] = "parallel",
    model: options.Model = None,
    languages: options.Languages = None,
    central: options.Central = None,
    template: options.Template = None,
    max_tokens: Annotated[int, typer.Option(help="Count prompts longer than this.")] = 128,
    offline: options.Offline = False,
    as_json: options.AsJson = False,
) -> None:
    """Inspect a corpus: rows, tokens, duplicates, untranslated rows, rows in another language.

    With --model, tokens are counted with its tokenizer.

    **Examples**

        polylens data

        polylens data prompts.jsonl --model smollm2-135m-instruct

        polylens data texts.jsonl --kind texts --json
    """
    if kind not in ("parallel", "texts"):
        raise CorpusError(f"kind must be 'parallel' or 'texts', got {kind!r}; choose one of those")
    centre = normalize_language(central or "en")
    targets = normalize_languages(languages.split(",")) if languages else ()
    wanted = tuple(dict.fromkeys((centre, *targets))) if targets else None
    found: Corpus | ParallelCorpus
    if kind == "parallel":
        found = read_parallel(corpus, wanted, offline=offline)
    else:
        found = read_texts(corpus, wanted, offline=offline)
    tokenizer = prompt_format = None
    if model is not None:
        tokenizer = load_tokenizer(resolve(model, offline=offline))
        prompt_format = choose_format(tokenizer, template or "auto")
    report = inspect_corpus(
        found,
        central=centre,
        tokenizer=tokenizer,
        prompt_format=prompt_format,
        max_tokens=max_tokens,
    )
    if as_json:
        print_json(report.to_dict())
        return
    columns = ["language", "texts", "missing", "duplicates", "untranslated", "other language"]
    if tokenizer is not None:
        columns += ["tokens", "per word", "premium", f"over {max_tokens}"]
    rows = []
    for one in report.languages:
        row = [
            f"{language_name(one.language)} ({one.language})",
            str(one.n_texts),
            str(one.n_missing),
            str(one.n_duplicates),
            str(one.n_untranslated),
            str(len(one.foreign)),
        ]
        if one.n_tokens is not None and one.tokens_per_word is not None:
            premium = f"{one.token_premium:.2f}" if one.token_premium is not None else "-"
            row += [
                f"{one.n_tokens:,}",
                f"{one.tokens_per_word:.2f}",
                premium,
                str(one.n_truncated),
            ]
        rows.append(row)
    rows_or_texts = "parallel rows" if report.parallel else "texts"
    table(f"{report.name}: {report.n_rows} {rows_or_texts}", columns, rows)
    for warning in report.warnings:
        out.print(f"! {warning}", highlight=False, soft_wrap=True)
