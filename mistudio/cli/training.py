"""`train` and `record`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mistudio.cli.shared import SITES, Add, Stopped, find, layers, run_here
from mistudio.errors import InvalidInput
from mistudio.formatting import count, duration, number, percent
from mistudio.library.library import Library


def add_commands(add: Add, commands: Any) -> None:
    train = add("train", _train, "train one SAE per layer")
    train.add_argument("--model", required=True, metavar="M", help="name or number")
    train.add_argument("--dataset", required=True, metavar="D", help="name or number")
    train.add_argument("--layers", required=True, metavar="L,L", help="such as 10 or 10,20")
    train.add_argument(
        "--site",
        choices=SITES,
        help="where to read (default: resid_post; mlp_in for transcoders)",
    )
    train.add_argument("--config", type=Path, metavar="FILE", help="options as a JSON object")
    train.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="one option, repeatable"
    )
    train.add_argument("--name", default="", help="what to call the run")
    train.add_argument(
        "--source",
        default="auto",
        choices=("auto", "stream", "store", "extract", "hybrid"),
        help="stream activations; store them first, for later runs too; extract them for this run "
        "alone, so that the model is not in memory beside the training; hybrid: that in portions. "
        "auto: store where the text is repeated",
    )

    record = add(
        "record", _record, "how a run came about: settings, seeds, versions, hashes, results"
    )
    record.add_argument("run", metavar="RUN", help="a run's name or number")
    record.add_argument(
        "--html", type=Path, metavar="FILE", help="also write it as a page to print"
    )


def _train(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.engine.models.hooks import HookPoint
    from mistudio.engine.training.config import parse
    from mistudio.engine.training.run import sites_of
    from mistudio.jobs.kinds import Train
    from mistudio.jobs.models import check_layers

    model, dataset = find(library.models, options.model), find(library.datasets, options.dataset)
    config = _training_options(options)
    parsed = parse(config)
    transcoder = parsed.wiring in ("transcoder", "skip_transcoder")
    site = options.site or ("mlp_in" if transcoder else "resid_post")
    points = tuple(HookPoint(site, layer) for layer in layers(options.layers))
    names = [point.name for point in points]
    check_layers(library, model.id, names)
    read = sorted({point.name for at in sites_of(points, parsed) for point in at.points})
    extraction_id = _stored_activations(options, library, model.id, dataset.id, read, config)
    source = options.source if options.source in ("extract", "hybrid") else "auto"
    job = Train(model.id, dataset.id, names, config, extraction_id, options.name, source=source)
    kind = "stored" if extraction_id is not None else "stream" if source == "auto" else source
    _print_plan(library, model.id, points, parsed, kind)
    return trained(library, run_here(library, job, keep_on_stop=True))


def _print_plan(library: Library, model_id: int, points: Any, config: Any, kind: str) -> None:
    from mistudio.engine.training.planning import describe
    from mistudio.jobs.plans import planned

    if plan := planned(library, model_id, points, config, kind, timed=True):
        print("\n".join(("Plan:", *(f"  {line}" for line in describe(plan)))), file=sys.stderr)


def trained(library: Library, result: dict[str, Any]) -> dict[str, Any]:
    """Print what a training gave."""
    training = library.trainings.get(result["training_id"])
    print(
        f"Run {training.id}: {training.name} ({training.status}), "
        f"{duration(training.seconds)}, {count(training.record['tokens_per_second'])} tokens/s"
    )
    for note in training.record.get("notes", ()):
        print(f"  {note}")
    summary: dict[str, Any] = {**result, "run": training.name, "saes": []}
    for sae in library.saes.of_training(training.id):
        m = sae.metrics
        print(
            f"  {sae.hook_point}: explained variance {number(m['explained_variance'], 3)}, "
            f"L0 {number(m['l0'], 1)} (target {sae.k:g}), dead {percent(m['dead_share'])} over "
            f"{count(m['tokens'])} held-out tokens, loss recovered {percent(m['ce_loss_score'])}"
        )
        summary["saes"].append({"hook_point": sae.hook_point, "sae_id": sae.id, **m})
    if training.status == "stopped":
        raise Stopped(summary)
    return summary


def _stored_activations(
    options: argparse.Namespace,
    library: Library,
    model_id: int,
    dataset_id: int,
    points: list[str],
    config: dict[str, Any],
) -> int | None:
    """Store activations first where that is asked for, or where training will repeat the text."""
    from mistudio.engine.training.config import derive, parse
    from mistudio.jobs.kinds import Extract, Tokenize

    parsed = parse(config)
    if options.source not in ("auto", "store"):
        return None
    tokenization_id = run_here(library, Tokenize(dataset_id, model_id), quiet=True)[
        "tokenization_id"
    ]
    tokens = library.tokenizations.get(tokenization_id).tokens
    plan = derive(parsed, library.models.get(model_id).d_model)
    if options.source == "auto" and plan.steps * plan.batch_size <= 1.2 * tokens:
        return None
    for found in library.extractions.of_model(model_id):
        if (
            found.tokenization_id == tokenization_id
            and set(points) <= set(found.hook_points)
            and found.settings.get("context") == parsed.context
            and found.tokens >= 0.9 * tokens
        ):
            return found.id
    job = Extract(model_id, dataset_id, points, max_tokens=tokens, context=parsed.context)
    return int(run_here(library, job)["extraction_id"])


def _training_options(options: argparse.Namespace) -> dict[str, Any]:
    config: dict[str, Any] = {}
    if options.config:
        try:
            config = json.loads(options.config.read_text(encoding="utf-8"))
        except ValueError as exc:  # also bytes that are not UTF-8
            raise InvalidInput(
                "The configuration is not valid JSON",
                f"{options.config}: {exc}.",
                'Write an object such as {"k": 32, "tokens": 1000000}.',
            ) from exc
        if not isinstance(config, dict):
            raise InvalidInput(
                "The configuration is not a JSON object",
                f"{options.config} holds a {type(config).__name__}.",
                'Write an object such as {"k": 32, "tokens": 1000000}.',
            )
    config = {key: "auto" if value is None else value for key, value in config.items()}
    for key, value in config.items():
        if isinstance(value, list | dict):
            raise InvalidInput(
                "A training option cannot be read",
                f"{key} in {options.config} is {json.dumps(value)[:60]}.",
                "Options are numbers, words, true or false.",
                field=key,
            )
    for pair in options.set:
        key, equals, value = pair.partition("=")
        if not equals:
            raise InvalidInput("--set takes KEY=VALUE", f"It got {pair!r}.", "Write --set k=32.")
        config[key.strip()] = value.strip()
    return config


def _record(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.jobs.run_records import save_record
    from mistudio.terminal import table

    training = find(library.trainings, options.run)
    record: dict[str, Any] = training.record
    versions = record.get("versions", {})
    print(f"{training.name}, {training.status}, {duration(training.seconds)}")
    print(f"{record['model']['name']} + {record['dataset']['name']}, on {record.get('device')}")
    print(f"miStudio {versions.get('mistudio')}, torch {versions.get('torch')}")
    rows = [
        {
            "site": site,
            "explained": number(row.get("explained_variance"), 3),
            "l0": number(row.get("l0"), 1),
            "dead": percent(row.get("dead_share")),
            "ce recovered": percent(row.get("ce_loss_score")),
        }
        for site, row in record.get("sites", {}).items()
    ]
    print(table(rows, {key: key for key in rows[0]}) if rows else "No SAEs.")
    if options.html:
        print(f"Written to {save_record(library, training.id, options.html, to_print=True)}")
    return record
