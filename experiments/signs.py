"""Measure the signs that `polylens doctor --forecast` reads, and keep them.

    python experiments/signs.py MODEL [MODEL …]

They are read off the rows that train, so what is measured later is on other rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import polylens
from design import CENTRAL, LANGUAGES, training_rows
from polylens.artefacts import write_json
from polylens.forecast import measure_signs
from polylens.journal import versions
from run import HERE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    for name in parser.parse_args().models:
        model = polylens.load_model(name, dtype="float32")
        started = time.monotonic()
        signs = measure_signs(model, training_rows(), central=CENTRAL, languages=LANGUAGES)
        content = {
            "signs": {language: dataclasses.asdict(own) for language, own in signs.items()},
            "seconds": round(time.monotonic() - started),
            "versions": versions(),
        }
        write_json(HERE / "results" / name / "signs.json", content)


if __name__ == "__main__":
    main()
