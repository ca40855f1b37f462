"""What a GGUF file says of itself, checked before a library believes it.

A header states lengths, counts and sizes, and readers loop over them or make room for them: a file
of a hundred bytes can claim an array of 2^60 numbers. `check_header` reads the header once, and
refuses one whose claims do not fit in the file. The layout is that of
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

from polylens.artefacts import readable_storage_errors
from polylens.errors import ModelError

_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_N_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of scalars
_UNSIGNED = {0: "<B", 2: "<H", 4: "<I", 10: "<Q"}

# ggml's own limit.
_MAX_DIMENSIONS = 4

# Sizes that weights have, by the last part of their key.
_WIDTHS = ("embedding_length", "feed_forward_length", "vocab_size")


def check_header(path: Path) -> None:
    """Check that everything a GGUF file's header claims fits in the file.

    Raises:
        ModelError: it does not.
        StorageError: the file cannot be read.
    """
    with readable_storage_errors(path), path.open("rb") as file:
        try:
            _Header(file).check()
        except ValueError as error:
            raise ModelError(
                f"{path} must be a GGUF file that is whole, but {error}; fetch it again"
            ) from None


class _Header:
    """Reads a header from its start; every read is checked against the size of the file."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._n_bytes = os.fstat(file.fileno()).st_size
        self._sizes: dict[str, int] = {}

    def check(self) -> None:
        if self._take(4) != _MAGIC:
            raise ValueError("it does not begin as one")
        version = self._number("<I")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, where 2 and 3 are known")
        n_tensors, n_keys = self._number("<Q"), self._number("<Q")
        for _ in range(self._claim(n_keys, 12)):
            key = self._text()
            self._value(key, self._number("<I"))
        n_weights = 0
        for _ in range(self._claim(n_tensors, 24)):
            self._text()
            n_weights += self._tensor()
        n_layers = self._sizes.get("block_count", 0)
        width = self._sizes.get("embedding_length", 0)
        if n_layers > n_tensors or any(
            self._sizes.get(name, 0) * max(1, width * (name != "embedding_length")) > n_weights
            for name in _WIDTHS
        ):
            raise ValueError("it claims a larger model than the weights that it holds")

    def _value(self, key: str, kind: int) -> None:
        if kind in _UNSIGNED:
            self._sizes[key.rpartition(".")[2]] = self._number(_UNSIGNED[kind])
        elif kind in _N_BYTES:
            self._skip(_N_BYTES[kind])
        elif kind == _STRING:
            self._skip(self._number("<Q"))
        elif kind == _ARRAY:
            kind, length = self._number("<I"), self._number("<Q")
            if kind in _N_BYTES:
                self._skip(length * _N_BYTES[kind])
            elif kind == _STRING:
                for _ in range(self._claim(length, 8)):
                    self._skip(self._number("<Q"))
            else:
                raise ValueError(f"its {key[:60]!r} is an array of something else than values")
        else:
            raise ValueError(f"its {key[:60]!r} is of no known type")

    def _tensor(self) -> int:
        """Read what is said of a tensor; return how many weights it has."""
        n_dimensions = self._number("<I")
        if n_dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"a tensor has {n_dimensions} dimensions")
        size = 1
        for _ in range(n_dimensions):
            size *= self._number("<Q")
        self._number("<I")  # type
        if self._number("<Q") > self._n_bytes:
            raise ValueError("a tensor begins behind its end")
        # No type takes less than a bit a weight.
        if size > 8 * self._n_bytes:
            raise ValueError("a tensor is larger than the file")
        return size

    def _number(self, form: str) -> int:
        (number,) = struct.unpack(form, self._take(struct.calcsize(form)))
        return int(number)

    def _text(self) -> str:
        return self._take(self._number("<Q")).decode("utf-8")

    def _claim(self, n_items: int, n_bytes_each: int) -> int:
        """Return a count of things that take at least so many bytes each, if they can be there."""
        if n_items * n_bytes_each > self._n_bytes - self._file.tell():
            raise ValueError(f"it ends before {n_items} things that it claims to hold")
        return n_items

    def _take(self, n_bytes: int) -> bytes:
        return self._file.read(self._claim(n_bytes, 1))

    def _skip(self, n_bytes: int) -> None:
        self._file.seek(self._claim(n_bytes, 1), os.SEEK_CUR)
