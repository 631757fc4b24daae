"""What several views of a dataset share."""

from __future__ import annotations

from mistudio import formatting
from mistudio.library.records import Dataset

SOURCE_NAMES = {"sample": "Sample", "local": "Local file", "hub": "Hugging Face"}


def samples_text(dataset: Dataset) -> str:
    """`10,000 samples`; of a linked dataset only what is known: those that are kept for a look."""
    if dataset.link:
        return f"the first {formatting.count(dataset.documents)} samples are shown"
    noun = "sample" if dataset.documents == 1 else "samples"
    return f"{formatting.count(dataset.documents)} {noun}"


def count_or_dash(value: float | None) -> str:
    return "—" if value is None else formatting.count(value)
