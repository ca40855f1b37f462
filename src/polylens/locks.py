"""One process at a time in a folder.

Two runs in one folder would each take the other's half-done work for its own. The lock is the
operating system's, on an empty file `.lock`: it ends with the process that holds it, however that
ends, so a killed run leaves nothing that would keep the next one out. The file itself stays, but
for a folder that was made for a command that then failed before it wrote anything.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Iterator
from pathlib import Path

from polylens import distributed
from polylens.artefacts import readable_storage_errors
from polylens.errors import RunError

logger = logging.getLogger(__name__)

LOCK = ".lock"

# What systems say of a lock that another process holds; anything else is a system without locks.
_HELD = (errno.EACCES, errno.EAGAIN)


@contextlib.contextmanager
def alone_in(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a folder, which is made if it is not there; of a distributed job the first process does.

    Args:
        folder: the folder.
        wait: for a process that holds it, which is about to let go.

    Raises:
        RunError: another process holds it.
        StorageError: it cannot be made or written.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    if not distributed.is_first():
        yield
        return
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    lock = folder / LOCK
    with contextlib.ExitStack() as stack:
        with readable_storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(lock.open("w"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in _HELD:
                raise RunError(
                    f"a folder must be used by one command at a time, but another one is at work "
                    f"in {folder}; wait until it ends, or choose another --out"
                ) from None
            logger.warning("%s is on storage without locks; start nothing else in it", folder)
        try:
            yield
        except BaseException:
            # Not from under one that waits for it.
            if made and not wait and list(folder.iterdir()) == [lock]:
                lock.unlink()
                with contextlib.suppress(OSError):  # others may have put something there
                    for one in made:
                        one.rmdir()
            raise


def is_held(folder: Path) -> bool:
    """Whether a process holds a folder; False where systems or storage know no locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        with (folder / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or not ours to read
        return False
    return False
