"""What the Features tab's Tools menu offers: one entry a tool.

A tool opens a window of its own over some features. Its module is imported when it is chosen, so
that the tab opens without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mistudio.ui.features.page import FeaturesPage


@dataclass(frozen=True)
class Tool:
    """An entry of the menu. `open(page, features)` gets the selected features, or all shown ones,
    in the order of the table, where fewer than two are selected. `icon` is a Lucide name."""

    title: str
    icon: str
    tooltip: str
    open: Callable[[FeaturesPage, list[int]], None]


TOOLS: list[Tool] = []
