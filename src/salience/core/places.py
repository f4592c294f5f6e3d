"""Where salience keeps what it made once on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where made things are kept: $SALIENCE_CACHE, else $XDG_CACHE_HOME/salience, else ~/.cache/salience."""
    chosen = os.environ.get("SALIENCE_CACHE", "")
    if chosen:
        return Path(chosen).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(shared) if shared else Path.home() / ".cache") / "salience"
