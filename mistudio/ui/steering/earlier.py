"""What the list of earlier generations says of each, read without their texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mistudio.library.library import Library


@dataclass(frozen=True)
class Earlier:
    """A generation in short. `kl`: nats per token of each steered text, None where it has none;
    norms are lengths of activations."""

    id: int
    sae_id: int
    created_at: str
    request: Mapping[str, Any]
    kl: tuple[float | None, ...]
    layer_norms: Mapping[int, float]
    median_norm: float | None


def earlier_generations(library: Library, ids: Sequence[int]) -> list[Earlier]:
    """Those that are still there. A result of 2,048 tokens is half a megabyte: SQLite picks what is
    wanted, so that the window's own thread does not read it all."""
    marks = ", ".join("?" for _ in ids)
    rows = library.rows(
        "SELECT id, sae_id, created_at, request, "
        "(SELECT json_group_array(json_extract(value, '$.kl_per_token')) "
        " FROM json_each(result, '$.variants')) AS kl, "
        "json_extract(result, '$.layer_norms') AS layer_norms, "
        "json_extract(result, '$.median_norm') AS median_norm "
        # a NaN, which Python writes and SQLite does not read, must not hide the others
        "FROM (SELECT id, sae_id, created_at, request, "
        "      CASE WHEN json_valid(result) THEN result ELSE '{}' END AS result "
        f"     FROM generations WHERE id IN ({marks}))",
        tuple(ids),
    )
    return [
        Earlier(
            row["id"],
            row["sae_id"],
            row["created_at"],
            json.loads(row["request"]),
            tuple(json.loads(row["kl"])),
            {int(n): float(v) for n, v in json.loads(row["layer_norms"] or "{}").items()},
            row["median_norm"],
        )
        for row in rows
    ]
