"""Pictures of features: the map of their directions, correlations, activations over samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mistudio.ui.features.page import FeaturesPage
    from mistudio.ui.features.pictures.dialog import PicturesDialog


def open_pictures(page: FeaturesPage, features: Sequence[int], view: str = "map") -> PicturesDialog:
    """The window of this page, opened or brought to the front, on one of its views ("map",
    "correlations", "activations")."""
    from mistudio.ui.features.pictures.dialog import PicturesDialog

    dialog = page.findChild(PicturesDialog)
    if dialog is None or not dialog.isVisible():  # closed, and not deleted yet
        dialog = PicturesDialog(page._services, page, features, view)
    else:
        dialog.show_view(view, features)
    dialog.show()
    dialog.raise_()
    dialog.activateWindow()
    return dialog
