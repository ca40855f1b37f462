"""Files that are either whole or absent.

Everything PolyLens writes goes through here: a temporary name beside the target, fsync, rename.
Tensors are safetensors with a checksum in their metadata, so that a half-written or tampered file
is noticed and never used. Nothing is pickled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from polylens.errors import (
    CorruptFileError,
    DiskFullError,
    PolyLensError,
    StorageError,
    UsageError,
)

T = TypeVar("T")

# One entry holds everything: safetensors writes several in an order that differs from run to run.
_METADATA_KEY = "polylens"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_MACHINE = f"{uuid.getnode():x}"  # temporary names tell whose they are


@contextlib.contextmanager
def readable_storage_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` under `path` into a `StorageError` of one clear sentence."""
    try:
        yield
    except PolyLensError:  # some of them are OSErrors too
        raise
    except OSError as error:
        kind = DiskFullError if error.errno in _FULL else StorageError
        raise kind(_explain(error, path)) from error
    except SafetensorError as error:  # safetensors wraps the operating system's error in its own
        if "No space left" in str(error) or "os error 28" in str(error):
            raise DiskFullError(_explain(OSError(errno.ENOSPC, ""), path)) from error
        raise


def _explain(error: OSError, path: Path) -> str:
    if error.errno in _FULL:
        return (
            f"the disk that holds {path} is full; free some space or choose another folder, then "
            "run again"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return (
            f"{path} must be readable and writable, but the system refuses access; check its "
            "permissions or choose another folder"
        )
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return (
            f"{path} must be a folder, but a file of that name is in the way; remove it or choose "
            "another folder"
        )
    return (
        f"{path} cannot be read or written ({error.strerror or error}); check the disk, then run "
        "again"
    )


def user_path(given: str | Path) -> Path:
    """Return the path that a user named, "~" expanded.

    Raises:
        UsageError: it can be the name of no file.
    """
    try:
        path = Path(given).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such user, a NUL
        raise UsageError(
            f"a path must be one that this system can have, got {str(given)[:80]!r} ({error}); "
            "check it"
        ) from error
    return path


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, which takes its name on success and goes on failure.

    Args:
        path: the file or folder to write. Its parents are made. An existing file is replaced; an
            existing folder too.

    Yields:
        A path that does not exist yet; make a file or a folder of it.

    Raises:
        DiskFullError: the disk is full.
        StorageError: the place cannot be written.
    """
    with readable_storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.name}.{_MACHINE}-{os.getpid()}."
        temporary = Path(tempfile.mkdtemp(prefix=prefix, suffix=".part", dir=path.parent))
        inner = temporary / path.name
        try:
            yield inner
            _open_to_readers(inner)
            _fsync(inner)
            if inner.is_dir() and path.is_dir():
                path.rename(temporary / "replaced")
            inner.rename(path)
            _fsync_folder(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes of this machine left in `folder` under temporary names."""
    for leftover in folder.glob(".*.part"):
        machine, _, pid = leftover.name.split(".")[-3].partition("-")
        if machine == _MACHINE and not _is_alive(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _open_to_readers(path: Path) -> None:
    """Give files the mode that a plain `open` would; safetensors keeps its own to the owner."""
    umask = os.umask(0)
    os.umask(umask)
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~umask)


def _fsync(path: Path) -> None:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    for file in files:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` as JSON with a stable key order, whole or not at all."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=2, sort_keys=False) + "\n")


def read_text(path: Path) -> str:
    """Read a text file of any origin, with or without a byte order mark.

    Raises:
        StorageError: it cannot be read, or is not UTF-8.
    """
    with readable_storage_errors(path):
        content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise StorageError(f"{path} must be text in UTF-8, but is not; convert it") from error


def parse_json(text: str) -> Any:
    """Parse JSON of any origin.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or holds half a surrogate pair, which is
            no text and could never be written again.
    """
    try:
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return value


def read_json(path: Path) -> Any:
    """Read a JSON file that PolyLens wrote.

    Raises:
        CorruptFileError: the file cannot be parsed.
        StorageError: the file cannot be read.
    """
    with readable_storage_errors(path):
        content = path.read_bytes()
    try:
        return parse_json(content.decode("utf-8"))
    except ValueError as error:
        raise CorruptFileError(
            f"{path} must hold JSON, but it is damaged ({error}); delete it and run again"
        ) from error


def read_object(path: Path, make: Callable[[Any], T]) -> T:
    """Read an object that PolyLens wrote as JSON.

    Args:
        path: the file.
        make: makes the object of its plain values.

    Raises:
        CorruptFileError: the file cannot be parsed, or is not of such an object.
        StorageError: the file cannot be read.
    """
    values = read_json(path)
    try:
        return make(values)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CorruptFileError(
            f"{path} must be as PolyLens wrote it, but is damaged or changed ({error!r}); delete "
            "it and run again"
        ) from error


def save_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write tensors and their metadata as safetensors with a checksum, whole or not at all.

    Args:
        path: the file to write.
        tensors: name → tensor, any shape and dtype; copied to the CPU.
        metadata: JSON-serialisable values, one a key.
    """
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"sha256": _checksum(ready, metadata), **metadata}, ensure_ascii=False)
    with writing(path) as temporary:
        save_file(ready, temporary, metadata={_METADATA_KEY: text})


def load_tensors(
    path: Path, *, verify: bool = True
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote, and check it against its checksum.

    The tensors are mapped from the file: they cost no memory until they are changed.

    Args:
        path: the file.
        verify: check it; False for a file of ours that was written a moment ago.

    Returns:
        The tensors by name, and the metadata.

    Raises:
        CorruptFileError: the file is not whole, or was changed after it was written.
        StorageError: the file cannot be read.
    """
    with readable_storage_errors(path):
        if not path.is_file():
            raise StorageError(
                f"{path} must be a file that PolyLens wrote, but there is none; check the path"
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata = parse_json((file.metadata() or {}).get(_METADATA_KEY, "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            if not isinstance(metadata, dict):
                raise ValueError("its metadata is no object")
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CorruptFileError(
                f"{path} must be a safetensors file, but it is damaged ({error}); delete it and "
                "run again"
            ) from error
    stated = metadata.pop("sha256", None)
    if verify and stated != _checksum(tensors, metadata):
        raise CorruptFileError(
            f"{path} does not match its own checksum, so it was damaged or changed; delete it and "
            "run again"
        )
    return tensors, metadata


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_digest(tensor: torch.Tensor) -> bytes:
    """SHA-256 of a tensor's bytes (its dtype and shape are not part of it)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).digest()


def _checksum(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> str:
    # Through JSON and back, since that turns tuples into lists.
    plain = json.loads(json.dumps(dict(metadata)))
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor_digest(tensor))
    return digest.hexdigest()
