"""Where miStudio keeps things: the library, settings and logs, each overridable."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

APP = "miStudio"


def default_library() -> Path:
    """The library when none is named: MISTUDIO_HOME, the one chosen in settings, or the user's
    data folder."""
    home = os.environ.get("MISTUDIO_HOME")
    if home:
        return Path(home)
    return Path(platformdirs.user_data_dir(APP, appauthor=False))


def config_folder() -> Path:
    """Settings and window state. Follows MISTUDIO_HOME so that tests touch nothing of the user."""
    home = os.environ.get("MISTUDIO_HOME")
    return (
        Path(home) / "config" if home else Path(platformdirs.user_config_dir(APP, appauthor=False))
    )


def log_folder() -> Path:
    home = os.environ.get("MISTUDIO_HOME")
    return Path(home) / "logs" if home else Path(platformdirs.user_log_dir(APP, appauthor=False))
