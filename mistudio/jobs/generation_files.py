"""Generations as a file: JSON with everything that is needed to repeat them, or a CSV table with
one line for each text."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mistudio.library.library import Library
from mistudio.library.records import Generation

VERSION = 1
COLUMNS = (
    "generation",
    "created_at",
    "model",
    "hook_point",
    "features",
    "prompt",
    "seed",
    "temperature",
    "variant",
    "text",
    "tokens",
    "kl_per_token",
    "perplexity",
    "perplexity_unsteered",
    "similarity",
    "word_overlap",
    "distinct_2",
    "repetition_4",
)


def write_generations(library: Library, model_id: int, path: Path) -> int:
    """All generations with SAEs of a model, oldest first; CSV where the name ends so, else JSON.
    Returns how many. What was at `path` stays where this fails."""
    saes = {sae.id: sae for sae in library.saes.all() if sae.model_id == model_id}
    found = [g for g in library.generations.all() if g.sae_id in saes]
    found.sort(key=lambda generation: generation.id)
    model = library.models.get(model_id).name
    entries = [
        {
            "generation": g.id,
            "created_at": g.created_at,
            "model": model,
            "hook_point": saes[g.sae_id].hook_point,
            "request": g.request,
            "result": g.result,
        }
        for g in found
    ]
    if path.suffix.lower() == ".csv":
        text = _table([row for g, e in zip(found, entries, strict=True) for row in _rows(g, e)])
    else:
        text = json.dumps({"version": VERSION, "generations": entries}, indent=1)
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_text(text, encoding="utf-8", newline="")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return len(found)


def _rows(generation: Generation, entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    request, result = generation.request, generation.result
    chosen = [*request.get("features", []), *request.get("others", [])]
    common = {
        **{name: entry[name] for name in COLUMNS[:4]},
        "features": json.dumps(chosen),
        **{name: request.get(name) for name in ("prompt", "seed", "temperature")},
    }
    unsteered = {"variant": "unsteered", "text": result["unsteered"]}
    yield common | unsteered | {"tokens": len(result.get("unsteered_ids", ()))}
    for variant in result["variants"]:
        control = " control" if variant.get("control") else ""
        measured = {name: variant.get(name) for name in COLUMNS[9:]}
        yield common | measured | {"variant": f"x {variant.get('scale', 1.0):g}{control}"}


def _table(rows: Sequence[dict[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
