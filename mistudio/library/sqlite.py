"""`sqlite_utils`, imported without pandas.

It takes pandas in where that is installed (`datasets` brings it), only to know its number types;
the window would wait half a second longer for nothing.
"""

from __future__ import annotations

import importlib
import sys


def _without_pandas() -> None:
    hidden = "pandas" not in sys.modules
    if hidden:
        sys.modules["pandas"] = None  # type: ignore[assignment]  # an import of it fails at once
    try:
        importlib.import_module("sqlite_utils.db")
    finally:
        if hidden:
            del sys.modules["pandas"]


_without_pandas()

from sqlite_utils import Database  # noqa: E402

__all__ = ["Database"]
