"""What would make the window stand still although nothing of its own takes long.

A full garbage collection looks through everything that refers to something. With torch and
transformers imported these are 394,000 objects: 266 ms in which no thread runs Python, the window's
neither. What was imported stays to the end, so it is set aside (0 ms after).
"""

from __future__ import annotations

import gc
import sys


def set_imports_aside() -> None:
    """To be called when a large import has ended. Nothing happens where a model is in memory: set
    aside, its reference cycles would never be freed."""
    loaded = sys.modules.get("mistudio.jobs.loaded")
    if loaded is None or not loaded.loaded_models():
        gc.freeze()
