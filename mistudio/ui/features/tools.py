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


def _pictures(view: str) -> Callable[[FeaturesPage, list[int]], None]:
    def open_view(page: FeaturesPage, features: list[int]) -> None:
        from mistudio.ui.features.pictures import open_pictures

        open_pictures(page, features, view)

    return open_view


def _export(page: FeaturesPage, features: list[int]) -> None:
    from mistudio.ui.features.export import open_export

    open_export(page, features)


def _describe(page: FeaturesPage, features: list[int]) -> None:
    from mistudio.ui.features.describing import open_describe

    open_describe(page, features)


def _score(page: FeaturesPage, features: list[int]) -> None:
    from mistudio.ui.features.describing import score_by_activations

    score_by_activations(page, features)


def _blind(page: FeaturesPage, features: list[int]) -> None:
    from mistudio.ui.features.describing import open_blind

    open_blind(page, features)


TOOLS: list[Tool] = [
    Tool(
        "Feature map…",
        "circle-dot",
        "Features whose decoder directions point alike stand close together (UMAP, t-SNE). "
        "Draw around some to see them alone in the table",
        _pictures("map"),
    ),
    Tool(
        "Correlation heatmap…",
        "grid-3x3",
        "Which of the selected features fire together, or have alike directions: up to 200",
        _pictures("correlations"),
    ),
    Tool(
        "Activation matrix…",
        "layers",
        "How strongly each of the selected features fires in which windows of the text: up to 100 "
        "features, 500 windows",
        _pictures("activations"),
    ),
    Tool(
        "Describe with a language model…",
        "sparkles",
        "A model of the library, or a server on this machine, writes labels and is judged by them: "
        "up to 1,000 features",
        _describe,
    ),
    Tool(
        "Score by activations",
        "gauge",
        "How well the model's own activations tell where each feature is active: weak evidence, "
        "beside the score of its rule. Up to 1,000 features",
        _score,
    ),
    Tool(
        "Blind test…",
        "eye",
        "Find the excerpt that does not belong, ten times: the strongest evidence that the first "
        "of the chosen features means something to people",
        _blind,
    ),
    Tool(
        "Export…",
        "download",
        "The selected, shown or starred features, a list, or all: as CSV, Parquet, JSON, a web "
        "page, or for Neuronpedia",
        _export,
    ),
]
