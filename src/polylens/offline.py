"""Whether the network may be used."""

from __future__ import annotations

import os


def is_offline(offline: bool = False) -> bool:
    """Whether the network must not be used: by argument, `POLYLENS_OFFLINE` or `HF_HUB_OFFLINE`."""
    names = ("POLYLENS_OFFLINE", "HF_HUB_OFFLINE")
    return offline or any(os.environ.get(name, "") in ("1", "true", "yes") for name in names)
