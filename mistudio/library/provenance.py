"""Where a dataset comes from and what was made of it, as one JSON-able record to keep elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mistudio import __version__
from mistudio.library.records import Dataset
from mistudio.library.table import now

if TYPE_CHECKING:
    from mistudio.library.library import Library


def provenance_record(library: Library, dataset: Dataset) -> dict[str, Any]:
    """Source, revision, licence, hashes and settings; every tokenization with its own."""
    tokenizations = library.tokenizations.of_dataset(dataset.id)
    return {
        "name": dataset.name,
        "source": dataset.source,
        "origin": dataset.origin,
        "added_at": dataset.created_at,
        "stored": not dataset.link,
        "documents": dataset.documents,
        "characters": dataset.characters,
        "bytes": dataset.bytes,
        **({"link": dataset.link} if dataset.link else {}),
        "provenance": dataset.provenance,
        "tokenizations": [
            {
                "tokenizer": found.statistics.get("tokenizer", ""),
                "tokenizer_sha256": found.tokenizer_hash,
                "settings": found.settings,
                "tokens": found.tokens,
                "made_at": found.created_at,
            }
            for found in tokenizations
        ],
        "written_at": now(),
        "written_by": f"miStudio {__version__}",
    }
