"""A selection as a table: CSV and Parquet, one row a feature; and JSON with examples.

Statistics have the names of `columns.py`, where what they mean, their units and samples stand;
Parquet and JSON say so themselves.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mistudio.engine.features.columns import BY_NAME
from mistudio.engine.features.exports.material import NO, Context, Feature, Material
from mistudio.engine.features.exports.neuronpedia_a import rounded
from mistudio.engine.progress import SILENT, Progress

FORMAT, VERSION = "mistudio-features", 1
GROUP = 2048  # rows of a Parquet row group
_FORMULA = ("=", "+", "-", "@", "\t", "\r")

_INTEGERS = ("uint8", "uint16", "int32", "int64")


def _columns(material: Material) -> list[tuple[str, pa.DataType, Callable[[Feature], Any]]]:
    """(name, type, value of a feature) of every column of a table."""
    found: list[tuple[str, pa.DataType, Callable[[Feature], Any]]] = [
        ("feature", pa.int64(), lambda f: f.index),
        ("label", pa.string(), lambda f: f.said.label),
        ("description", pa.string(), lambda f: f.description),
        ("note", pa.string(), lambda f: f.said.note),
        ("starred", pa.bool_(), lambda f: f.said.starred),
        ("hidden", pa.bool_(), lambda f: f.said.hidden),
        ("lists", pa.list_(pa.string()), lambda f: list(f.said.lists)),
        ("labels", pa.list_(pa.string()), lambda f: [label.text for label in f.said.labels]),
        ("top_token_text", pa.string(), lambda f: f.top_token),
        ("common_token_text", pa.string(), lambda f: f.commonest_token),
    ]
    for name in (name for name in BY_NAME if name in material.store.columns):
        kind = pa.float32()
        if name == "band":
            kind = pa.string()
        elif BY_NAME[name].dtype in _INTEGERS:
            kind = pa.int64()
        found.append((name, kind, lambda f, name=name: f.statistics[name]))  # type: ignore[misc]
    for scorer in ("embedding", "model", "human"):
        for part in ("accuracy", "low", "high"):
            found.append((f"{scorer}_{part}", pa.float64(), _of_scorer(scorer, part)))
        found.append((f"{scorer}_contexts", pa.int64(), _of_scorer(scorer, "contexts")))
    found += [
        ("top_tokens", pa.list_(pa.string()), lambda f: [t.text for t in f.tokens]),
        ("top_token_counts", pa.list_(pa.int64()), lambda f: [t.count for t in f.tokens]),
        ("promoted", pa.list_(pa.string()), lambda f: [t.text for t in f.promoted]),
        ("promoted_logits", pa.list_(pa.float64()), lambda f: _logits(f.promoted)),
        ("suppressed", pa.list_(pa.string()), lambda f: [t.text for t in f.suppressed]),
        ("suppressed_logits", pa.list_(pa.float64()), lambda f: _logits(f.suppressed)),
    ]
    return found


def _logits(weighed: Sequence[Any]) -> list[float]:
    return rounded([token.logit for token in weighed])


def _of_scorer(scorer: str, part: str) -> Callable[[Feature], float | None]:
    def value(feature: Feature) -> float | None:
        for score in feature.said.scores:
            if score.scorer == scorer:
                if part == "contexts":
                    return score.active + score.inactive
                return getattr(score, part)
        return None

    return value


# --- CSV ------------------------------------------------------------------------------------------


def write_csv(material: Material, path: Path, progress: Progress = SILENT) -> None:
    """UTF-8 with a header row. Lists, and the texts of tokens, are JSON, so that blanks and commas
    are told apart. What the user wrote gets an apostrophe in front where a spreadsheet would take
    it for a formula. A number that there is not is empty."""
    columns = _columns(material)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([name for name, _, _ in columns])
        for done, feature in enumerate(material.each(NO), 1):
            progress.check()
            writer.writerow([_cell(name, value(feature)) for name, _, value in columns])
            progress.report(done, len(material), phase="write")


def _cell(name: str, value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    if name.endswith("_token_text"):
        return json.dumps(value, ensure_ascii=False) if value else ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and value.startswith(_FORMULA):
        return f"'{value}"
    return value


# --- Parquet --------------------------------------------------------------------------------------


def write_parquet(material: Material, path: Path, progress: Progress = SILENT) -> None:
    """Lists are lists; what each statistic means stands in its field's metadata."""
    columns = _columns(material)
    schema = pa.schema(
        [pa.field(name, kind, metadata=_told(name)) for name, kind, _ in columns],
        metadata={"mistudio": json.dumps(_about(material))},
    )
    features = material.each(NO)
    done = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while rows := list(islice(features, GROUP)):
            progress.check()
            arrays = [
                pa.array([value(feature) for feature in rows], kind) for _, kind, value in columns
            ]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
            done += len(rows)
            progress.report(done, len(material), phase="write")


def _told(name: str) -> dict[str, str] | None:
    if name not in BY_NAME:
        return None
    column = BY_NAME[name]
    return {"definition": column.definition, "unit": column.unit, "sample": column.sample}


def _about(material: Material) -> dict[str, Any]:
    """What the features are of, and of how much text."""
    meta, origin = material.store.meta, material.origin
    return {
        "format": FORMAT,
        "version": VERSION,
        "written_by": f"miStudio {origin.version}".strip(),
        "model": origin.model,
        "sae": origin.sae,
        "hook_point": origin.hook_point,
        "layer": origin.layer,
        "dataset": origin.dataset,
        "tokens": meta.tokens,
        "contexts": meta.contexts,
        "context": meta.context,
        "split": meta.split,
        "n_features": meta.n_features,
        "exclusions": meta.exclusions,
        "provenance": meta.provenance,
    }


# --- JSON -----------------------------------------------------------------------------------------


def write_json(material: Material, path: Path, progress: Progress = SILENT) -> None:
    """One document, described by schemas/features.schema.json."""
    names = [name for name in BY_NAME if name in material.store.columns]
    about = {**_about(material), "columns": {name: _defined(name) for name in names}}
    with path.open("w", encoding="utf-8") as file:
        file.write(f'{json.dumps(about, ensure_ascii=False)[:-1]}, "features": [\n')
        for done, feature in enumerate(material, 1):
            progress.check()
            file.write(json.dumps(feature_record(feature), ensure_ascii=False))
            file.write(",\n" if done < len(material) else "\n")
            progress.report(done, len(material), phase="write")
        file.write("]}\n")


def _defined(name: str) -> dict[str, str]:
    column = BY_NAME[name]
    return {
        "label": column.label,
        "unit": column.unit,
        "definition": column.definition,
        "sample": column.sample,
    }


def feature_record(feature: Feature) -> dict[str, Any]:
    """One feature as the JSON document has it; no number that there is not."""
    said = feature.said
    return {
        "feature": feature.index,
        "label": _plain(said.label),
        "description": _plain(feature.description),
        "note": _plain(said.note),
        "starred": said.starred,
        "hidden": said.hidden,
        "lists": [_plain(name) for name in said.lists],
        "labels": [
            {"text": _plain(label.text), "source": label.source, "origin": label.origin}
            for label in said.labels
        ],
        "scores": [
            {
                "scorer": score.scorer,
                "accuracy": score.accuracy,
                "low": score.low,
                "high": score.high,
                "active": score.active,
                "inactive": score.inactive,
            }
            for score in said.scores
        ],
        "statistics": feature.statistics,
        "top_token_text": _plain(feature.top_token),
        "tokens": [
            {
                "token": token.id,
                "text": _plain(token.text),
                "count": token.count,
                "occurrences": token.occurrences,
                "error": token.error,
            }
            for token in feature.tokens
        ],
        "promoted": _weighed(feature.promoted),
        "suppressed": _weighed(feature.suppressed),
        "nearest": [
            {"feature": number, "cosine": round(cosine, 5)} for number, cosine in feature.neighbours
        ],
        "histogram": _histogram(feature),
        "decile_edges": rounded(feature.decile_edges) if feature.alive else [],
        "examples": [_example(context) for context in feature.contexts],
    }


def _histogram(feature: Feature) -> dict[str, Any]:
    """Only the bins between the first and the last that hold something."""
    held = feature.histogram.counts.nonzero()[0]
    if not len(held):
        return {"edges": [], "counts": []}
    first, last = int(held[0]), int(held[-1]) + 1
    edges = feature.histogram.edges[first : last + 1]
    return {
        "edges": [float(f"{edge:.6g}") for edge in edges],
        "counts": feature.histogram.counts[first:last].tolist(),
    }


def _weighed(weighed: Sequence[Any]) -> list[dict[str, Any]]:
    return [
        {"token": token.id, "text": _plain(token.text), "logit": round(token.logit, 5)}
        for token in weighed
    ]


def _example(context: Context) -> dict[str, Any]:
    return {
        "group": context.group,
        "decile": context.decile if context.decile >= 0 else None,
        "window": context.window,
        "position": context.position,
        "document": context.document,
        "activation": round(context.activation, 5),
        "peak": context.peak,
        "ids": list(context.ids),
        "tokens": [_plain(text) for text in context.texts],
        "values": _rounded(context.values) if context.known else None,
    }


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 5) for value in values]


def _plain(text: str) -> str:
    """Halves of surrogate pairs cannot be written as UTF-8."""
    return text.encode("utf-8", "replace").decode()
