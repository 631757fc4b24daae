"""What the user wrote about the features of one SAE, as the table needs it: made in the background,
as somebody may have labelled every one of a hundred thousand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from mistudio.library.features import FeatureNote


@dataclass(frozen=True)
class Notes:
    """Notes by feature, and arrays of the n features of a table: `starred`, `labelled`, `hidden`
    bool [n]; `by_name` int32, the labelled ones in the order of their labels."""

    of: Mapping[int, FeatureNote] = field(default_factory=dict)
    starred: np.ndarray | None = None
    labelled: np.ndarray | None = None
    hidden: np.ndarray | None = None
    by_name: np.ndarray | None = None

    @classmethod
    def gathered(cls, notes: Mapping[int, FeatureNote], n: int) -> Notes:
        inside = [note for note in notes.values() if 0 <= note.feature < n]
        named = sorted(
            (note for note in inside if note.label),
            key=lambda note: (note.label.casefold(), note.feature),
        )
        return cls(
            notes,
            _mask([note.feature for note in inside if note.starred], n),
            _mask([note.feature for note in named], n),
            _mask([note.feature for note in inside if note.hidden], n),
            np.array([note.feature for note in named], np.int32),
        )

    def containing(self, text: str, fields: tuple[str, ...]) -> list[int]:
        """The features in whose label or note (those of `fields`) every word of the text is."""
        words = text.casefold().split()
        found = []
        for note in self.of.values():
            parts = [note.label] if "label" in fields else []
            parts += [note.note] if "note" in fields else []
            whole = "\n".join(parts).casefold()
            if words and all(word in whole for word in words):
                found.append(note.feature)
        return found


def _mask(features: list[int], n: int) -> np.ndarray:
    mask = np.zeros(n, bool)
    mask[features] = True
    return mask
