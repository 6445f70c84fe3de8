"""Where MMLM keeps what it can make again: converted weights, fetched pictures, features.

The folder is `MMLM_CACHE`, else `mmlm` below the user's cache folder (`XDG_CACHE_HOME`, or what
the system uses). Everything in it may be deleted at any time.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mmlm.errors import ConfigError


def cache_root() -> Path:
    """Return the cache folder; it need not exist."""
    if named := os.environ.get("MMLM_CACHE"):
        return Path(named).expanduser().absolute()
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named).expanduser().absolute() / "mmlm"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mmlm"
    if sys.platform == "win32" and (named := os.environ.get("LOCALAPPDATA")):
        return Path(named) / "mmlm" / "cache"
    return Path.home() / ".cache" / "mmlm"


def cache_folder(kind: str) -> Path:
    """Return the folder of one kind of things, such as ``gguf``, and make it.

    Raises:
        ConfigError: if it cannot be made.
    """
    folder = cache_root() / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"The cache folder {folder} cannot be made: {error}. "
            f"Name another one in the environment variable MMLM_CACHE."
        ) from None
    return folder
