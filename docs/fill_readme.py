"""Put the results of finished runs into README.md, between its markers.

Run: python docs/fill_readme.py NAME=RUN_FOLDER [NAME=RUN_FOLDER ...]

`<!-- NAME -->` and `<!-- end -->` in README.md enclose what the run found: the table as the command
line prints it, and its conditions as the run itself recorded them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import yaml

from polylens.artefacts import read_json
from polylens.cli.console import duration, out, size
from polylens.cli.run import print_evaluation
from polylens.evaluation import Evaluation
from polylens.run_folder import RunFolder

README = Path(__file__).parents[1] / "README.md"


def block(folder: RunFolder) -> str:
    evaluation = Evaluation.from_dict(read_json(folder.summary))
    with out.capture() as capture:
        print_evaluation(evaluation)
    lines = [line.rstrip() for line in capture.get().rstrip().splitlines()]
    plan, entries = read_json(folder.plan), folder.journal.entries()
    settings = yaml.safe_load(folder.resolved.read_text(encoding="utf-8"))
    seconds = sum(entry["seconds"] for entry in entries)
    peak = max(entry["peak_memory_bytes"] for entry in entries)
    train, corpora = settings["train"], plan["corpora"]
    versions = plan["versions"]
    conditions = (
        f"{plan['model']['name']}, preset {settings['preset']}, top {train['layers']} of "
        f"{plan['model']['n_layers']} layers, {corpora['training']['rows']} rows of "
        f"`{corpora['training']['name']}`, learning rate {train['learning_rate']:g}, "
        f"{train['epochs']} epoch{'s' if train['epochs'] > 1 else ''}, seed {settings['seed']}; "
        "evaluated on "
        f"{corpora['heldout']['rows']} held-out rows of `{corpora['heldout']['name']}`, "
        f"{evaluation.how_answered}; {duration(seconds)} and "
        f"{size(peak)} on two CPU cores, torch {versions['torch']}, transformers "
        f"{versions['transformers']}."
    )
    return "\n".join(["```text", *lines, "```", "", conditions])


def main() -> None:
    text = README.read_text(encoding="utf-8")
    for argument in sys.argv[1:]:
        name, _, folder = argument.partition("=")
        pattern = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"README.md must hold <!-- {name} --> and <!-- end -->; add them")
        filled = block(RunFolder(Path(folder)))
        text = pattern.sub(lambda match, new=filled: match[1] + new + "\n" + match[2], text)
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
