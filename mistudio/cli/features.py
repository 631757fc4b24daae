"""`discover` and `features`."""

from __future__ import annotations

import argparse
from typing import Any

from mistudio.cli.shared import (
    RUN_HELP,
    Add,
    add_sae_options,
    find,
    find_sae,
    find_saes,
    not_negative,
    run_here,
)
from mistudio.formatting import count, number, percent
from mistudio.library.library import Library

SORTS = ("density", "context_density", "max_activation", "mean_activation", "top_token_share", "id")


def add_commands(add: Add, commands: Any) -> None:
    discover = add("discover", _discover, "find what every latent fires on")
    discover.add_argument("run", metavar="RUN", help=RUN_HELP)
    discover.add_argument(
        "--dataset", metavar="D", help="text to look through (default: the run's own)"
    )
    discover.add_argument("--max-tokens", type=int, default=500_000)
    discover.add_argument("--top-k", type=int, default=20)

    features = add("features", _features, "list features")
    add_sae_options(features)
    features.add_argument("--search", metavar="TEXT", help="in labels and tokens")
    features.add_argument(
        "--sort", default="density", choices=SORTS, metavar="COLUMN", help=", ".join(SORTS)
    )
    features.add_argument("--top", type=not_negative, default=20, metavar="N")


def _discover(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.jobs.kinds import Discover

    dataset = find(library.datasets, options.dataset) if options.dataset else None
    name, saes = find_saes(library, options.run)
    rows = []
    for sae in saes:
        job = Discover(sae.id, options.max_tokens, options.top_k, dataset.id if dataset else None)
        run = library.feature_runs.get(run_here(library, job)["feature_run_id"])
        print(
            f"{sae.hook_point}: {count(run.summary['alive'])} of {count(run.n_features)} "
            f"features fired on {count(run.tokens)} tokens"
        )
        rows.append(
            {
                "sae_id": sae.id,
                "feature_run_id": run.id,
                "alive": run.summary["alive"],
                "total": run.n_features,
                "tokens": run.tokens,
            }
        )
    return {"run": name, "feature_runs": rows}


def _features(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    import numpy as np

    from mistudio.engine.features.describe import search
    from mistudio.engine.models.loading import load_tokenizer
    from mistudio.jobs.features import newest_run, open_features
    from mistudio.terminal import table

    sae = find_sae(library, options)
    store, tokens = open_features(library, newest_run(library, sae.id))
    tokenizer = load_tokenizer(library.path(library.models.get(sae.model_id).folder))
    notes = library.feature_notes.of_sae(sae.id)
    shown = np.flatnonzero(store.alive)
    if options.search:
        wanted = options.search.lower()
        labelled = {f for f, note in notes.items() if wanted in note.label.lower()}
        shown = np.asarray(
            sorted(labelled | set(search(store, tokenizer, options.search, shown.tolist()))), int
        )
    if options.sort != "id":
        shown = shown[np.argsort(-np.asarray(store.columns[options.sort])[shown], kind="stable")]
    rows = []
    for feature in map(int, shown[: options.top]):
        example = store.examples(feature, tokens, 1)[0]
        around = example.ids[max(0, example.peak - 8) : example.peak + 5]
        rows.append(
            {
                "feature": feature,
                "label": notes[feature].label if feature in notes else "",
                "density": float(store.columns["density"][feature]),
                "max_activation": float(store.columns["max_activation"][feature]),
                "top_token": tokenizer.decode([int(store.columns["top_token"][feature])]),
                "top_token_share": float(store.columns["top_token_share"][feature]),
                "promotes": [tokenizer.decode([i]) for i, _ in store.promoted(feature)[:5]],
                "example": tokenizer.decode(around),
            }
        )
    display = [
        {
            "#": row["feature"],
            "label": row["label"],
            "freq": percent(row["density"], 3),
            "max": number(row["max_activation"], 2),
            "token": repr(row["top_token"]),
            "share": percent(row["top_token_share"], 0),
            "promotes": " ".join(repr(t) for t in row["promotes"][:3]),
            "example": " ".join(row["example"].split()),
        }
        for row in rows
    ]
    print(
        f"{len(rows)} of {count(len(shown))} features of {sae.hook_point} "
        f"(sample: {count(store.meta.tokens)} tokens)"
    )
    if display:
        print(table(display, {key: key for key in display[0]}))
    return {"sae_id": sae.id, "tokens": store.meta.tokens, "matching": len(shown), "features": rows}
