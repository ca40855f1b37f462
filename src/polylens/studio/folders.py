"""Which paths the studio may touch: runs, models and data in chosen folders, and nothing else.

Whatever a browser sends is a name. It is looked up beneath one of the folders with links followed,
so that neither `..`, nor an absolute path, nor a link leads out of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from polylens.artefacts import readable_storage_errors
from polylens.config import RunConfig, load_config
from polylens.corpora.files import SUFFIXES
from polylens.corpora.readers import STARTER
from polylens.errors import RunError, UsageError
from polylens.models.registry import REGISTRY
from polylens.run_folder import RunFolder

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_OWN_TEMPLATES = ("auto", "chat", "plain")
_DEPTH = 3  # of folders below the one with models


@dataclass(frozen=True)
class Folders:
    """The folders that the studio may touch.

    Attributes:
        runs: with a folder a run; read and written.
        models: with model folders and GGUF files; read. None for none.
        data: with corpora; read. None for none.
    """

    runs: Path
    models: Path | None = None
    data: Path | None = None

    def new_run(self, name: str) -> Path:
        """Return where a run of a new name goes.

        Raises:
            UsageError: the name is no plain name, or is taken.
        """
        path = self.run_path(name)
        if path.exists():
            raise UsageError(
                f"a new run must have a name of its own, but {name!r} is there already; choose "
                "another"
            )
        return path

    def run(self, name: str) -> RunFolder:
        """Return the folder of a run that is there.

        Raises:
            UsageError: there is none of that name, or it leads out of the runs.
        """
        path = self.run_path(name)
        if not path.is_dir():
            raise UsageError(f"there must be a run named {name!r}, but there is none; open another")
        _refuse_links_out(path, self.runs)
        return RunFolder(path)

    def run_path(self, name: str) -> Path:
        """Return where a run of this name is, or would be.

        Raises:
            UsageError: the name is no plain name, or a link that leads out of the runs.
        """
        if not is_run_name(name):
            raise UsageError(
                "a run's name must be up to 64 letters, digits, dots, dashes and underscores, and "
                f"begin with a letter or digit, got {name!r}"
            )
        path = self.runs / name
        if not _is_within(path, self.runs):
            raise UsageError(f"a run must lie in the runs folder, but {name!r} is a link out of it")
        return path

    def runs_there(self) -> list[str]:
        """Return the names of all runs, the newest first."""
        with readable_storage_errors(self.runs):
            found = [
                path
                for path in (self.runs.iterdir() if self.runs.is_dir() else ())
                if is_run_name(path.name)
                and _is_within(path, self.runs)
                and (path / "resolved.yaml").is_file()
            ]
            found.sort(key=lambda path: (path / "resolved.yaml").stat().st_mtime, reverse=True)
        return [path.name for path in found]

    def models_there(self) -> list[str]:
        """Return what `model` takes: registry names, then what lies in the models folder."""
        return [*REGISTRY, *_names(self.models, _is_model, _DEPTH)]

    def model(self, name: str) -> str:
        """Return what `polylens.load_model` takes for one of `models_there`.

        Raises:
            UsageError: there is no such model in the folder.
        """
        if name in REGISTRY:
            return name
        return str(_within(self.models, name, "model", "--models"))

    def corpora_there(self) -> list[str]:
        """Return what `corpus` takes: the starter corpus, then files of the data folder."""
        return [STARTER, *_names(self.data, lambda path: path.suffix in SUFFIXES, 1)]

    def corpus(self, name: str) -> str:
        """Return what a configuration takes for one of `corpora_there`.

        Raises:
            UsageError: there is no such file in the folder.
        """
        if name == STARTER:
            return name
        return str(_within(self.data, name, "corpus", "--data"))

    def config(self, folder: RunFolder) -> RunConfig:
        """Read a run's configuration, and check that it stays within the folders.

        Raises:
            RunError: it names files elsewhere.
            ConfigError: it cannot be read.
        """
        config = load_config(folder.resolved)
        self.check(config)
        return config

    def check(self, config: RunConfig) -> None:
        """Check that a configuration reads nothing outside the folders.

        Raises:
            RunError: it does.
        """
        named = {
            "model": (config.model, (*REGISTRY,), (self.models, self.runs)),
            "template": (config.template, _OWN_TEMPLATES, ()),
            "probe.corpus": (config.probe.corpus, (STARTER,), (self.data,)),
            "train.corpus": (config.train.corpus, (STARTER,), (self.data,)),
            "evaluate.corpus": (config.evaluate.corpus, (STARTER, None), (self.data,)),
            "evaluate.texts": (config.evaluate.texts, (STARTER, None), (self.data,)),
            "evaluate.data_dir": (config.evaluate.data_dir, (None,), (self.data,)),
        }
        for key, (value, known, places) in named.items():
            if value in known:
                continue
            inside = any(place and _is_within(Path(str(value)), place) for place in places)
            if not inside or not Path(str(value)).exists():
                raise RunError(
                    f"the studio must not read outside its folders, but {key} of this run is "
                    f"{value!r}; start the studio with --models or --data above it, or use the "
                    "command line"
                )


def is_run_name(name: object) -> bool:
    """Whether something can be a run's name."""
    return isinstance(name, str) and _RUN_NAME.fullmatch(name) is not None


def _within(root: Path | None, name: str, what: str, option: str) -> Path:
    """Find a name beneath a folder."""
    if root is None:
        raise UsageError(
            f"the {what} must be one of those offered, got {name!r}; start the studio with "
            f"{option} to offer a folder's"
        )
    path = root / str(name)
    if not name or not _is_within(path, root) or not path.exists():
        raise UsageError(
            f"the {what} must be one of those offered, which lie in {root.name}, got {name!r}"
        )
    _refuse_links_out(path, root)
    return path.resolve()


def _refuse_links_out(folder: Path, root: Path) -> None:
    """Refuse a folder that holds a link to somewhere outside `root`."""
    for inner in folder.rglob("*"):
        if inner.is_symlink() and not _is_within(inner, root):
            raise UsageError(
                f"{folder.name} must lie in {root.name} with all its files, but {inner.name} is a "
                "link out of it; replace it by what it points to"
            )


def _is_within(path: Path, root: Path) -> bool:
    """Whether a path lies beneath a folder, once all links are followed."""
    try:
        found = path.resolve()
    except (OSError, RuntimeError, ValueError):  # a loop of links, a name with a null byte
        return False
    return found != root.resolve() and found.is_relative_to(root.resolve())


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file() or (path.suffix == ".gguf" and path.is_file())


def _names(root: Path | None, wanted: Callable[[Path], bool], depth: int) -> list[str]:
    """Return the paths below a folder of which `wanted` is true, none below one of them."""

    def walk(folder: Path, left: int) -> Iterator[Path]:
        for path in sorted(folder.iterdir()):
            if path.name.startswith(".") or not _is_within(path, root or folder):
                continue
            if wanted(path):
                yield path
            elif path.is_dir() and left > 1:
                yield from walk(path, left - 1)

    if root is None or not root.is_dir():
        return []
    with readable_storage_errors(root):
        return [path.relative_to(root).as_posix() for path in walk(root, depth)]
