"""A library with very many features, made in under a minute: `make_library(folder, 100_000)`.

A small dictionary is trained on the tests' tiny model and its features are discovered, both for
real. Then each of its latents is repeated with other numbers until there are as many as asked for:
directions are turned a little, counts and activations are scaled at random, examples are those of
the original. So every file has the size, the types and the spread that a real one would have, and
opens with the ordinary code; what the numbers say means nothing. The texts of the search index are
words of the corpus, drawn anew for each feature, as the size of the vocabulary decides its speed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mistudio.engine.features.columns import TABLE, bands
from mistudio.library.library import Library

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "tests" / "data" / "tiny-llama-0.9m"
TEXT = ROOT / "resources" / "sample" / "wikipedia_vital_intros.jsonl"
POINT = "blocks.2.hook_resid_post"
DOCUMENTS = 400
SHARES = {"0 to 1", *(column.unit for column in TABLE if column.unit.startswith("share"))}
CONFIG = {"tokens": 20_000, "expansion": 4, "k": 8, "context": 128}


def make_library(folder: Path, n_features: int = 100_000, seed: int = 0) -> tuple[Library, int]:
    """(an open library in `folder`, the id of its only SAE, whose features are discovered)."""
    library = Library(folder)
    sae_id = _discovered(library)
    chance = np.random.default_rng(seed)
    _widen_sae(library, sae_id, n_features, chance)
    _widen_store(library, sae_id, n_features, chance)
    return library, sae_id


def _discovered(library: Library) -> int:
    from mistudio.jobs.job import Job, run_job, submit
    from mistudio.jobs.kinds import AddDataset, AddModel, Discover, Train

    def run(job: Job) -> dict[str, Any]:
        record = run_job(library, job, submit(library, job))
        if record.status != "finished":
            raise RuntimeError(f"{record.kind}: {record.error}")
        return record.result

    lines = TEXT.read_text(encoding="utf-8").splitlines(keepends=True)
    text = library.root / "intros.jsonl"
    text.write_text("".join(lines[:DOCUMENTS]), encoding="utf-8")
    dataset_id = run(AddDataset(str(text)))["dataset_id"]
    text.unlink()
    model_id = run(AddModel(str(MODEL), "fp32"))["model_id"]
    run(Train(model_id, dataset_id, [POINT], CONFIG, loss_tokens=1024))
    sae_id = library.saes.all()[0].id
    run(Discover(sae_id, max_tokens=100_000))
    return sae_id


def _widen_sae(library: Library, sae_id: int, n: int, chance: np.random.Generator) -> None:
    import torch

    from mistudio.engine.sae.files import load_sae, save_sae

    sae = library.saes.get(sae_id)
    small = load_sae(library.path(sae.folder))
    rows = torch.arange(n) % small.dictionary.d_sae

    def turned(table: torch.Tensor) -> torch.Tensor:
        noise = torch.from_numpy(chance.standard_normal((n, table.shape[1]), np.float32))
        wide = table[rows] + 0.5 * table[rows].norm(dim=1, keepdim=True) * noise / noise.norm(
            dim=1, keepdim=True
        )
        return wide * (table[rows].norm(dim=1, keepdim=True) / wide.norm(dim=1, keepdim=True))

    dictionary = replace(
        small.dictionary,
        encoder=turned(small.dictionary.encoder),
        b_enc=small.dictionary.b_enc[rows],
        decoder=turned(small.dictionary.decoder),
        activation=_repeated(small.dictionary.activation, rows),
    )
    name = library.new_folder("saes", f"{n} latents")
    model = library.models.get(sae.model_id)
    save_sae(dictionary, library.path(name), site=small.site, model_name=model.name, context=128)
    library.saes.update(sae_id, folder=name, d_sae=n)


def _repeated(activation: Any, rows: Any) -> Any:
    """Thresholds are one a latent in some functions."""
    threshold = getattr(activation, "threshold", None)
    if threshold is None or not hasattr(threshold, "shape") or not threshold.shape:
        return activation
    return replace(activation, threshold=threshold[rows])


def _widen_store(library: Library, sae_id: int, n: int, chance: np.random.Generator) -> None:
    from mistudio.engine.features.store import (
        DESCRIPTIONS,
        META,
        FeatureStore,
        add_descriptions,
        write_store,
    )
    from mistudio.library.feature_index import FILE, build

    run = library.feature_runs.newest_of_sae(sae_id)
    assert run is not None
    old = library.path(run.folder)
    store = FeatureStore(old)
    rows = np.arange(n) % len(store)
    columns = _columns(store, rows, chance)
    arrays = {}
    for path in sorted(old.glob("*.npy")):
        if path.stem == DESCRIPTIONS:  # places in a text, not one value a feature
            continue
        array = store.array(path.stem)
        whole = array.ndim > 0 and len(array) == len(store)
        arrays[path.stem] = array[rows] if whole else np.array(array)
    alive = int((columns["n_active"] > 0).sum())
    statistics = {**store.meta.statistics, "alive": alive, "l0": float(columns["density"].sum())}
    meta = replace(store.meta, n_features=n, statistics=statistics)
    name = library.new_folder("features", f"{n} features")
    write_store(library.path(name), meta, columns, arrays)
    add_descriptions(library.path(name), (store.description(row) for row in rows.tolist()))
    build(library.path(name) / FILE, _texts(n, chance))
    summary = {**run.summary, **statistics}
    for path in old.glob("*.json"):
        if path.name != META:
            (library.path(name) / path.name).write_bytes(path.read_bytes())
    library.feature_runs.update(run.id, folder=name, n_features=n, summary=summary)


def _columns(store: Any, rows: np.ndarray, chance: np.random.Generator) -> dict[str, np.ndarray]:
    """Every statistic there is: those that the discovery lacks are drawn from [0, 1)."""
    n = len(rows)
    columns = {}
    for column in TABLE:
        if column.name in store.columns:
            values = np.asarray(store.columns[column.name])[rows]
            if column.dtype == "float32":
                spread = np.exp(0.3 * chance.standard_normal(n, np.float32))
                values = (
                    np.minimum(values * spread, 1) if column.unit in SHARES else values * spread
                )
        elif column.dtype == "float32":
            values = chance.random(n, np.float32)
        else:
            values = chance.integers(0, min(n, 250), n)
        columns[column.name] = values
    scale = np.exp(1.5 * chance.standard_normal(n))
    for count, share, total in (
        ("n_active", "density", store.meta.tokens),
        ("n_contexts", "context_density", store.meta.contexts),
    ):
        counts = np.ceil(columns[count] * scale).astype(np.int64)
        columns[count] = np.minimum(counts, total // 2)
        columns[share] = columns[count] / total
    columns["band"] = bands(columns["n_active"], store.meta.tokens)
    return columns


def _texts(n: int, chance: np.random.Generator) -> Iterator[Any]:
    from mistudio.library.feature_index import IndexRow

    words: list[str] = []
    with TEXT.open(encoding="utf-8") as file:
        for line in file:
            words += json.loads(line)["text"].split()
    vocabulary = np.array(words, object)

    def some(number: int) -> str:
        return " ".join(vocabulary[chance.integers(0, len(vocabulary), number)])

    for _ in range(n):
        start = int(chance.integers(0, len(words) - 100))
        yield IndexRow(some(4), some(16), some(20), " ".join(words[start : start + 100]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a new folder for the library")
    parser.add_argument("features", type=int, nargs="?", default=100_000)
    asked = parser.parse_args()
    began = time.monotonic()
    made, number = make_library(asked.folder, asked.features)
    made.close()
    print(f"SAE {number} with {asked.features:,} features in {time.monotonic() - began:.0f} s")
