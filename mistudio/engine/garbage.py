"""Freeing what refers in circles, which only a garbage collection finds."""

from __future__ import annotations

import gc
from collections.abc import Callable

_collect: Callable[[], object] = gc.collect


def collect() -> None:
    """Free all garbage, before memory is counted or asked for."""
    _collect()


def collect_through(how: Callable[[], object] = gc.collect) -> None:
    """From now on `collect` calls `how`. A window's widgets must be freed in its own thread, so it
    has all garbage collected there."""
    global _collect
    _collect = how
