"""`discover`, `features` and `feature`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistudio.cli.shared import (
    RUN_HELP,
    Add,
    add_sae_options,
    find,
    find_sae,
    find_saes,
    not_negative,
    positive,
    run_here,
)
from mistudio.engine.features.columns import BY_NAME, TABLE
from mistudio.errors import InvalidInput, NotFound
from mistudio.formatting import count, number, percent
from mistudio.library.library import Library

if TYPE_CHECKING:
    from mistudio.engine.features.store import FeatureStore

MODES = ("zero", "mean")
SORTS = ("id", *(column.name for column in TABLE))


def add_commands(add: Add, commands: Any) -> None:
    discover = add("discover", _discover, "find what every latent fires on")
    discover.add_argument("run", metavar="RUN", help=RUN_HELP)
    discover.add_argument(
        "--dataset", metavar="D", help="text to look through (default: the run's own)"
    )
    discover.add_argument("--max-tokens", type=int, default=500_000, metavar="N")
    discover.add_argument(
        "--max-documents", type=positive, metavar="N", help="the first N documents only"
    )
    discover.add_argument(
        "--top-k", type=int, default=20, metavar="N", help="top examples of each (default 20)"
    )
    discover.add_argument(
        "--repeat-contexts", action="store_true", help="several top examples of one context count"
    )

    features = add("features", _features, "list features")
    add_sae_options(features)
    features.add_argument(
        "--search", metavar="TEXT", help="in labels, descriptions, tokens and examples"
    )
    features.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="COLUMN=LOW..HIGH",
        help="a range of a column, such as density=0.001..0.01 or score_low=0.7.. ; repeatable",
    )
    features.add_argument(
        "--sort", default="density", choices=SORTS, metavar="COLUMN", help=", ".join(SORTS)
    )
    features.add_argument("--ascending", action="store_true", help="smallest first")
    features.add_argument("--top", type=not_negative, default=20, metavar="N")

    feature = commands.add_parser("feature", help="one feature").add_subparsers(required=True)
    sub = add("show", _show, "its statistics, score, tokens, neighbours and examples", feature)
    add_sae_options(sub)
    sub.add_argument("feature", type=not_negative, metavar="N")
    sub.add_argument("--examples", type=not_negative, default=5, metavar="N")
    sub = add("probe", _probe, "which features fire on a text", feature)
    add_sae_options(sub)
    sub.add_argument("text", metavar="TEXT")
    sub.add_argument("--top", type=not_negative, default=20, metavar="N")
    sub = add("ablate", _ablate, "what taking it away does to the predictions", feature)
    add_sae_options(sub)
    sub.add_argument("feature", type=not_negative, metavar="N")
    sub.add_argument("--mode", default="zero", choices=MODES, help="default: zero")
    sub.add_argument("--contexts", type=positive, default=64, metavar="N")
    sub.add_argument("--controls", type=not_negative, default=5, metavar="N")
    sub = add("export", _export_features, "write features to a file or folder", feature)
    add_sae_options(sub)
    sub.add_argument(
        "--format",
        default="csv",
        choices=("csv", "parquet", "json", "html", "neuronpedia_a", "neuronpedia_b"),
    )
    sub.add_argument("--features", default="", metavar="0-99,205", help="default: all")
    sub.add_argument("--to", required=True, type=Path, metavar="PATH")
    sub.add_argument(
        "--whole-contexts",
        action="store_true",
        help="with the activations of whole contexts, which takes a pass of the model",
    )
    sub = add("label", _label, "give a feature a label (none: take it away)", feature)
    add_sae_options(sub)
    sub.add_argument("feature", type=not_negative, metavar="N")
    sub.add_argument("text", metavar="TEXT", nargs="?", default="")


# --- discovering ----------------------------------------------------------------------------------


def _discover(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.jobs.kinds import Discover, DiscoverRun

    dataset = find(library.datasets, options.dataset) if options.dataset else None
    name, saes = find_saes(library, options.run)
    settings = {
        "max_tokens": options.max_tokens,
        "top_k": options.top_k,
        "max_documents": options.max_documents,
        "one_per_context": not options.repeat_contexts,
    }
    if len(saes) > 1 and dataset is None:  # of one run: the model passes over the text once
        numbers = run_here(library, DiscoverRun(saes[0].training_id, **settings))["feature_run_ids"]
    else:
        chosen = dataset.id if dataset else None
        numbers = [
            run_here(library, Discover(sae.id, dataset_id=chosen, **settings))["feature_run_id"]
            for sae in saes
        ]
    rows = []
    for found in map(library.feature_runs.get, numbers):
        summary = found.summary
        print(
            f"{library.saes.get(found.sae_id).hook_point}: {count(summary['alive'])} of "
            f"{count(found.n_features)} features fired on {count(found.tokens)} tokens; a rule "
            f"tells where {count(summary['interpretable'])} of {count(summary['scored'])} that "
            "could be scored are active (lower bound of balanced accuracy at least 0.70)"
        )
        rows.append(
            {
                "sae_id": found.sae_id,
                "feature_run_id": found.id,
                "alive": summary["alive"],
                "scored": summary["scored"],
                "interpretable": summary["interpretable"],
                "total": found.n_features,
                "tokens": found.tokens,
            }
        )
    return {"run": name, "feature_runs": rows}


# --- many -----------------------------------------------------------------------------------------


def _features(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    import numpy as np

    from mistudio.engine.models.loading import load_tokenizer
    from mistudio.jobs.features import (
        describe_features,
        newest_run,
        open_features,
        search_features,
    )
    from mistudio.terminal import table

    sae = find_sae(library, options)
    run = newest_run(library, sae.id)
    store, tokens = open_features(library, run)
    tokenizer = load_tokenizer(library.path(library.models.get(sae.model_id).folder))
    notes = library.feature_notes.of_sae(sae.id)
    kept = store.alive & _within(store, options.where)
    if options.search:
        kept &= np.isin(np.arange(len(store)), search_features(library, run, options.search))
    shown = _sorted(store, np.flatnonzero(kept), options.sort, options.ascending)
    chosen = [int(feature) for feature in shown[: options.top]]
    rows = []
    for feature, description in zip(chosen, describe_features(library, run, chosen), strict=True):
        example = store.examples(feature, tokens, 1)[0]
        around = example.ids[max(0, example.peak - 8) : example.peak + 5]
        statistics = {name: _plain(values[feature]) for name, values in store.columns.items()}
        rows.append(
            {
                "feature": feature,
                "label": notes[feature].label if feature in notes else "",
                "description": description,
                **statistics,
                "top_token": tokenizer.decode([int(store.columns["top_token"][feature])]),
                "promotes": [tokenizer.decode([i]) for i, _ in store.promoted(feature)[:5]],
                "example": tokenizer.decode(around),
            }
        )
    display = [
        {
            "#": row["feature"],
            "label": row["label"] or row["description"],
            "freq": percent(row["density"], 3),
            "max": number(row["max_activation"], 2),
            "score": number(row.get("score"), 2),
            "token": repr(row["top_token"]),
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


def _within(store: FeatureStore, ranges: list[str]) -> Any:
    """Bool [n]: in all the ranges, `COLUMN=LOW..HIGH` each; either end may be left out. A feature
    that has no such number is in none."""
    import numpy as np

    kept = np.ones(len(store), bool)
    for text in ranges:
        name, _, bounds = text.partition("=")
        low, dots, high = bounds.partition("..")
        try:
            least, most = float(low or "-inf"), float(high or "inf")
        except ValueError:
            dots = ""
        if not dots:
            raise InvalidInput(
                "This range cannot be read",
                f"{text!r} is not of the form COLUMN=LOW..HIGH.",
                "Write it as density=0.001..0.01, or score_low=0.7.. without one end.",
                field="where",
            )
        values = _column(store, name)
        kept &= (values >= least) & (values <= most)
    return kept


def _sorted(store: FeatureStore, features: Any, name: str, ascending: bool) -> Any:
    import numpy as np

    if name == "id":
        return features
    values = _column(store, name)[features].astype(np.float64)
    order = np.argsort(values if ascending else -values, kind="stable")  # NaN comes last
    return features[order]


def _column(store: FeatureStore, name: str) -> Any:
    import numpy as np

    if name in store.columns:
        return np.asarray(store.columns[name])
    if name in BY_NAME:
        raise NotFound(
            f"This discovery has no column {name!r}",
            "It was made by an earlier version.",
            "Discover the features of this SAE again.",
        )
    raise InvalidInput(
        f"There is no column {name!r}",
        f"The columns are {', '.join(column.name for column in TABLE)}.",
        field="where",
    )


def _plain(value: Any) -> Any:
    """A number for JSON: None where there is none."""
    plain = value.item()
    return None if plain != plain else plain


# --- one ------------------------------------------------------------------------------------------


def _show(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.engine.models.loading import load_tokenizer
    from mistudio.jobs.features import describe_features, newest_run, open_features

    sae = find_sae(library, options)
    run = newest_run(library, sae.id)
    feature = _existing(options.feature, run.n_features)
    store, tokens = open_features(library, run)
    tokenizer = load_tokenizer(library.path(library.models.get(sae.model_id).folder))
    note = library.feature_notes.of_sae(sae.id).get(feature)
    (description,) = describe_features(library, run, [feature])
    columns = {name: _plain(values[feature]) for name, values in store.columns.items()}
    found = {
        "sae_id": sae.id,
        "feature": feature,
        "label": note.label if note else "",
        "note": note.note if note else "",
        "description": description,
        "tokens": store.meta.tokens,
        "statistics": columns,
        "fires_on": [
            {
                "token": tokenizer.decode([entry.token]),
                "count": entry.count,
                "of": entry.occurrences,
            }
            for entry in store.token_counts(feature)
        ],
        "promotes": [[tokenizer.decode([i]), value] for i, value in store.promoted(feature)],
        "suppresses": [[tokenizer.decode([i]), value] for i, value in store.suppressed(feature)],
        "examples": [
            {
                "activation": one.activation,
                "before": tokenizer.decode(one.ids[: one.peak]),
                "token": tokenizer.decode([int(one.ids[one.peak])]),
                "after": tokenizer.decode(one.ids[one.peak + 1 :]),
            }
            for one in store.examples(feature, tokens, options.examples)
        ],
    }
    _print_feature(found)
    return found


def _print_feature(found: dict[str, Any]) -> None:
    print(f"#{found['feature']} {found['label']}".rstrip())
    print(f"  {found['description'] or 'It never fired.'}")
    if found["note"]:
        print(f"  {found['note']}")
    print(f"Over {count(found['tokens'])} tokens:")
    for name, value in found["statistics"].items():
        unit = BY_NAME[name].unit
        print(f"  {BY_NAME[name].label:<24} {number(value, 4):>12}  {unit}".rstrip())
    for title, key in (("Promotes", "promotes"), ("Suppresses", "suppresses")):
        print(f"{title}: {' '.join(repr(text) for text, _ in found[key][:10])}")
    fires = (f"{one['token']!r} {one['count']}/{one['of']}" for one in found["fires_on"][:8])
    print(f"Fires on: {' '.join(fires)}")
    for one in found["examples"]:
        text = f"{one['before']}»{one['token']}«{one['after']}"
        print(f"  {number(one['activation'], 3):>9}  {' '.join(text.split())}")


def _probe(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    import numpy as np

    from mistudio.jobs.features import describe_features
    from mistudio.jobs.probing import probe
    from mistudio.terminal import table

    sae = find_sae(library, options)
    found = probe(library, sae.id, options.text)
    strongest = np.zeros(sae.d_sae, np.float32)
    np.maximum.at(strongest, found.features, found.values)
    run = library.feature_runs.newest_of_sae(sae.id)
    order = [int(i) for i in np.argsort(-strongest, kind="stable") if strongest[i] > 0]
    order = order[: options.top]
    described = describe_features(library, run, order) if run else ["" for _ in order]
    rows: list[dict[str, Any]] = [
        {
            "feature": feature,
            "activation": float(strongest[feature]),
            "token": found.pieces[int(found.of(feature).argmax())],
            "description": description,
        }
        for feature, description in zip(order, described, strict=True)
    ]
    print(
        f"{count(int((strongest > 0).sum()))} features of {sae.hook_point} fire on "
        f"{count(int(found.counted.sum()))} of {count(len(found.ids) - 1)} tokens"
    )
    if rows:
        shown = [
            {**row, "token": repr(row["token"]), "activation": number(row["activation"], 3)}
            for row in rows
        ]
        print(table(shown, {key: key for key in shown[0]}))
    return {"sae_id": sae.id, "tokens": list(found.pieces), "features": rows}


def _ablate(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.jobs.ablation import ablation_params
    from mistudio.jobs.features import newest_run
    from mistudio.jobs.kinds import Ablate

    sae = find_sae(library, options)
    run = newest_run(library, sae.id)
    feature = _existing(options.feature, run.n_features)
    job = Ablate(run.id, [feature], options.mode, options.contexts, options.controls)
    run_here(library, job)
    params = ablation_params(options.mode, options.contexts, options.controls)
    found = library.feature_analyses.get(run.id, feature, "ablation", params) or {}
    print(f"Feature #{feature} of {sae.hook_point}, taken away ({options.mode}):")
    for name, words in (("active", "where it fires"), ("following", "after it has fired")):
        group = found.get(name)
        if group is None:
            print(f"  {words}: no predictions")
            continue
        own, control = group["feature"], group["control"]
        print(
            f"  {words} ({count(own['tokens'])} tokens, {count(own['contexts'])} contexts): "
            f"loss {_estimate(own['delta_ce'])}, KL {_estimate(own['kl'])} nats a token"
        )
        if control is not None:
            print(
                f"    random directions of the same size: loss {_estimate(control['delta_ce'])}, "
                f"KL {_estimate(control['kl'])}"
            )
    return {"sae_id": sae.id, "feature": feature, **found}


def _estimate(found: dict[str, Any]) -> str:
    """A mean with its 95 % interval."""
    mean, low, high = (number(found[name], 4) for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _export_features(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.jobs.kinds import ExportFeatures, ExportWholeContexts

    sae = find_sae(library, options)
    kind = ExportWholeContexts if options.whole_contexts else ExportFeatures
    job = kind(sae.id, str(options.to.absolute()), options.format, options.features)
    written = run_here(library, job)
    print(f"Written to {written['path']}")
    return {"sae_id": sae.id, **written}


def _label(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    sae = find_sae(library, options)
    feature = _existing(options.feature, sae.d_sae)
    library.feature_labels.write_human(sae.id, feature, options.text.strip())
    return {"sae_id": sae.id, "feature": feature, "label": options.text.strip()}


def _existing(feature: int, n_features: int) -> int:
    if feature >= n_features:
        raise NotFound(
            f"There is no feature {feature}",
            f"This SAE has {count(n_features)}, numbered from 0.",
        )
    return feature
