"""Keep what `polylens steer --measure` wrote, without answers and paths.

python experiments/keep_steering.py LANGUAGE=FOLDER [LANGUAGE=FOLDER …]
"""

from __future__ import annotations

import sys
from pathlib import Path

from polylens.artefacts import read_json, write_json

HERE = Path(__file__).parent


def main() -> None:
    for argument in sys.argv[1:]:
        language, _, folder = argument.partition("=")
        content = read_json(Path(folder) / "steering.json")
        del content["subspaces"]
        target = HERE / "results" / content["model"] / "steering"
        target.mkdir(parents=True, exist_ok=True)
        write_json(target / f"{language}.json", content)


if __name__ == "__main__":
    main()
