"""Where PolyLens keeps what can be made again: converted models and trunk states.

The folder is `$POLYLENS_CACHE`, else `$XDG_CACHE_HOME/polylens`, else `~/.cache/polylens`. Deleting
it costs time only.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the cache folder (it need not exist yet)."""
    if explicit := os.environ.get("POLYLENS_CACHE"):
        return Path(explicit).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "polylens"
