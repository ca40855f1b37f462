"""Keys and values of a prefix that many prompts share, so that it is run once for all of them.

Prompts of one template begin with the same tokens: a system prompt, the user's role. With causal
attention their states do not depend on what follows. `SharedPrefix` is a key-value cache of
transformers' own kind: the prefix is run once with `recording`, which notes keys and values layer
by layer; every batch of the remaining tokens is run with `extending`, which puts them in front.
Gradients flow through, so the crown is trained so as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class _Store:
    keys: Tensor | None = None
    values: Tensor | None = None


class _Recording(DynamicLayer):  # type: ignore[misc]
    """Notes the keys and values that it is given; never holds any of its own."""

    def __init__(self, store: _Store) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._store = store

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        self._store.keys, self._store.values = key_states, value_states
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0


class _Extending(DynamicLayer):  # type: ignore[misc]
    """Puts the noted keys and values before those that it is given; keeps nothing."""

    def __init__(self, store: _Store, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._store = store
        self._length = length

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self._store.keys, self._store.values
        assert keys is not None
        assert values is not None
        shape = (len(key_states), -1, -1, -1)  # (batch, heads, seq_len, head_size)
        return (
            torch.cat([keys.expand(shape), key_states], dim=-2),
            torch.cat([values.expand(shape), value_states], dim=-2),
        )

    def get_seq_length(self) -> int:
        return self._length


class SharedPrefix:
    """Caches for a prefix of `length` tokens: one to run it with, one for what follows it.

    Attributes:
        length: tokens of the prefix.
        recording: pass as `past_key_values` when running the prefix, as a batch of one.
        extending: pass when running what follows.
    """

    def __init__(self, n_layers: int, length: int) -> None:
        self.length = length
        stores = [_Store() for _ in range(n_layers)]
        self.recording = Cache(layers=[_Recording(store) for store in stores])
        self.extending = Cache(layers=[_Extending(store, length) for store in stores])
