"""Neuronpedia's bulk-import directory: format B.

    {model}/{layer}-{set}[__{suffix}]/release.jsonl, model.jsonl, sourceset.jsonl, source.jsonl
                                      features/batch-{n}.jsonl.gz      at most 128 features each
                                      activations/batch-{n}.jsonl.gz   their examples

One JSON object a line, all lines of a file with the same keys, which are the columns of
Neuronpedia's database, as SAEDashboard's `neuronpedia_export` writes them. Its importer reads from
its own storage only: who wants them in an instance of his own inserts each file with
`jsonb_to_recordset`. Explanations are not written: for each, Neuronpedia would ask a cloud service
for an embedding.

What the numbers are is told in `neuronpedia_a`; beside those, `topkCosSim*` are the nearest decoder
directions. Ids are made of what is exported, so the same export gives the same bytes.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from mistudio.engine.features.exports.material import KNOWN, Feature, Material
from mistudio.engine.features.exports.neuronpedia_a import (
    BATCH,
    Naming,
    clean,
    dashboard,
    maximum_of,
    rounded,
    rows_of,
    safe,
    vector,
)
from mistudio.engine.progress import SILENT, Progress

CREATOR_ID = "clkht01d40000jv08hvalcvly"  # what bulk imports use where nobody is named
LEVEL = 5


@dataclass(frozen=True)
class Release:
    """Who publishes it under which name. `created` is written into every row."""

    name: str
    title: str = ""
    creator: str = ""
    creator_id: str = CREATOR_ID
    url: str = ""
    created: datetime | None = None


def write(
    material: Material,
    folder: Path,
    naming: Naming,
    release: Release,
    progress: Progress = SILENT,
) -> Path:
    """Write the directory below `folder`; returns the source's own folder."""
    source = source_id(material, naming)
    model = safe(material.origin.model)
    target = folder / model / source
    for name in ("features", "activations"):
        (target / name).mkdir(parents=True)
    created = (release.created or datetime.now(UTC)).strftime("%Y-%m-%dT%H:%M:%S.%f")
    shared = {"creatorId": release.creator_id, "createdAt": created}
    _lines(target, "release", _release(release) | shared)
    _lines(target, "model", _model(material, model) | shared | {"updatedAt": created})
    _lines(target, "sourceset", _source_set(naming, model, release) | shared)
    _lines(target, "source", _source(material, naming, model, source) | shared)
    identity = _identity(material, source)
    place = {"modelId": model, "layer": source}
    with ExitStack() as stack:
        files: tuple[IO[bytes], IO[bytes]] | None = None
        for number, feature in enumerate(material.each(KNOWN)):
            progress.check()
            if number % BATCH == 0:
                stack.close()
                files = tuple(  # type: ignore[assignment]
                    stack.enter_context(_Compressed(target / kind / f"batch-{number // BATCH}"))
                    for kind in ("features", "activations")
                )
            assert files is not None
            row = place | _feature(feature, material, naming.vectors) | shared
            files[0].write((json.dumps(row) + "\n").encode())
            for line in _activations(feature, place, shared, identity):
                files[1].write(line.encode())
            progress.report(number + 1, len(material), phase="write")
    return target


def source_id(material: Material, naming: Naming) -> str:
    suffix = f"__{safe(naming.suffix)}" if naming.suffix else ""
    return f"{material.origin.layer}-{safe(naming.set_name)}{suffix}"


class _Compressed:
    """A gzip file without a time or name in it, so that the same rows give the same bytes."""

    def __init__(self, path: Path) -> None:
        self._plain = path.with_name(f"{path.name}.jsonl.gz").open("wb")
        self._file = gzip.GzipFile("", "wb", LEVEL, self._plain, mtime=0)

    def __enter__(self) -> gzip.GzipFile:
        return self._file

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()
        finally:
            self._plain.close()


def _lines(folder: Path, name: str, row: dict[str, Any]) -> None:
    (folder / f"{name}.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")


# --- rows -----------------------------------------------------------------------------------------


def _release(release: Release) -> dict[str, Any]:
    return {
        "name": release.name,
        "description": release.title or release.name,
        "creatorName": release.creator,
        "visibility": "PUBLIC",
        "isNewUi": False,
        "featured": False,
        "descriptionShort": release.title or release.name,
        "urls": [release.url] if release.url else [],
        "creatorEmail": None,
        "creatorNameShort": release.creator,
        "defaultSourceSetName": None,
        "defaultSourceId": None,
        "defaultUmapSourceIds": [],
    }


def _model(material: Material, model: str) -> dict[str, Any]:
    origin = material.origin
    return {
        "id": model,
        "instruct": origin.instruct,
        "displayNameShort": clean(origin.model),
        "displayName": clean(origin.model),
        "tlensId": None,
        "dimension": origin.d_model or None,
        "visibility": "PUBLIC",
        "defaultSourceSetName": None,
        "defaultSourceId": None,
        "inferenceEnabled": False,
        "layers": origin.layers,
        "neuronsPerLayer": 0,
        "owner": "",
        "website": None,
    }


def _source_set(naming: Naming, model: str, release: Release) -> dict[str, Any]:
    return {
        "modelId": model,
        "name": safe(naming.set_name),
        "hasDashboards": True,
        "visibility": "PUBLIC",
        "description": release.title or release.name,
        "type": "",
        "creatorName": release.creator,
        "urls": [],
        "creatorEmail": None,
        "releaseName": release.name,
        "defaultOfModelId": None,
        "defaultRange": 1,
        "defaultShowBreaks": True,
        "showDfa": False,
        "showCorrelated": False,
        "showHeadAttribution": False,
        "showUmap": False,
    }


def _source(material: Material, naming: Naming, model: str, source: str) -> dict[str, Any]:
    meta = material.store.meta
    return {
        "id": source,
        "modelId": model,
        "setName": safe(naming.set_name),
        "hasDashboards": True,
        "inferenceEnabled": False,
        "inferenceHosts": [],
        "saelensConfig": None,
        "saelensRelease": None,
        "saelensSaeId": None,
        "hfRepoId": None,
        "hfFolderId": None,
        "visibility": "PUBLIC",
        "defaultOfModelId": None,
        "hasUmap": False,
        "hasUmapLogSparsity": False,
        "hasUmapClusters": False,
        "num_prompts": meta.contexts,
        "num_tokens_in_prompt": meta.context,
        "dataset": clean(material.origin.dataset),
        "notes": f"Written by miStudio {material.origin.version}".strip(),
    }


def _feature(feature: Feature, material: Material, vectors: bool) -> dict[str, Any]:
    direction = vector(feature) if vectors else []
    maximum = maximum_of(feature)
    return {
        "index": str(feature.index),
        "maxActApprox": maximum,
        "hasVector": bool(direction),
        "vector": direction,
        "vectorLabel": None,
        "vectorDefaultSteerStrength": maximum if direction else 10,
        "hookName": material.origin.hook_point if direction else None,
        "topkCosSimIndices": [number for number, _ in feature.neighbours],
        "topkCosSimValues": rounded([cosine for _, cosine in feature.neighbours]),
        "sourceSetName": None,
        **dashboard(feature, material),
    }


def _activations(
    feature: Feature, place: dict[str, Any], shared: dict[str, Any], identity: str
) -> Iterator[str]:
    common = json.dumps(
        {
            **place,
            "index": str(feature.index),
            "dataIndex": None,
            "dataSource": None,
            "dfaValues": [],
            "dfaTargetIndex": None,
            "dfaMaxValue": None,
            "lossValues": [],
            "logitContributions": None,
            "zIndices": None,
            "zValues": None,
            **shared,
        }
    )
    for number, row in enumerate(rows_of(feature)):
        number_id = _id(identity, feature.index, number)
        yield (
            f'{common[:-1]}, "id": "{number_id}", "tokens": {row.tokens}, "values": {row.values}, '
            f'"maxValue": {row.largest!r}, "maxValueTokenIndex": {row.largest_at}, '
            f'"minValue": {row.smallest!r}, "binMin": {row.bin_min!r}, "binMax": {row.bin_max!r}, '
            f'"binContains": {row.bin_contains!r}, "qualifyingTokenIndex": {row.qualifying}}}\n'
        )


def _identity(material: Material, source: str) -> str:
    """What ids begin with: 10 hexadecimal digits of what is exported."""
    told = json.dumps([material.origin.model, source, material.store.meta.provenance])
    return hashlib.sha256(told.encode()).hexdigest()[:10]


def _id(identity: str, feature: int, number: int) -> str:
    """25 characters in the manner of a CUID, another for every example of an export."""
    found = f"c{identity}{feature:08x}{number:06x}"
    assert re.fullmatch(r"c[0-9a-f]{24}", found)
    return found
