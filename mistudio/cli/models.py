"""`model` and `extract`."""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mistudio.cli.shared import SITES, Add, find, layers, positive, run_here
from mistudio.errors import InvalidInput
from mistudio.formatting import count, number, percent, short_count, size
from mistudio.library.library import Library


def add_commands(add: Add, commands: Any) -> None:
    model = commands.add_parser("model", help="models").add_subparsers(required=True)
    sub = add("add", _model_add, "add a model folder, a GGUF file, a Hub id or `sample`", model)
    sub.add_argument("source", metavar="PATH_OR_ID")
    sub.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "fp32", "bf16", "fp16", "q8", "q4", "q2"),
        help="auto: the best that fits this computer's memory; q8 to q2 are quantised",
    )
    sub.add_argument(
        "--show-code",
        action="store_true",
        help="print the Python program that the model brings and needs, and end; runs nothing",
    )
    sub.add_argument(
        "--trust-code",
        metavar="SHA256",
        help="run the model's own program, if it is the one with this hash (see --show-code): it "
        "runs with all your rights",
    )
    sub = add("show", _model_show, "what a model is made of and needs at each precision", model)
    sub.add_argument("model", metavar="MODEL", help="name or number, or a model's folder")
    sub.add_argument("--batch", type=int, default=8, help="texts at a time (default 8)")
    sub.add_argument("--context", type=int, default=128, help="tokens of each (default 128)")
    sub = add("check", _model_check, "what quantising costs: loss on sample text", model)
    sub.add_argument("model", metavar="MODEL")
    sub = add("remove", _model_remove, "move a model to the trash", model)
    sub.add_argument("model", metavar="MODEL")

    pull = add("extract", _extract, "store a model's activations on disk")
    pull.add_argument("--model", required=True, metavar="M", help="name or number")
    pull.add_argument("--dataset", required=True, metavar="D", help="name or number")
    pull.add_argument("--layers", required=True, metavar="L,L", help="such as 10 or 0,10,20")
    pull.add_argument(
        "--sites",
        default="resid_post",
        metavar="SITE,SITE",
        help=f"of each layer, in one pass: {', '.join(SITES)} (default: resid_post)",
    )
    pull.add_argument("--max-tokens", type=positive, metavar="N", help="default: all")
    pull.add_argument(
        "--max-samples", type=positive, metavar="N", help="the dataset's first N documents only"
    )
    pull.add_argument("--context", type=positive, default=128, metavar="N", help="default: 128")
    pull.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help="windows a pass (default: 8)"
    )
    pull.add_argument("--storage", default="fp16", choices=("fp16", "bf16"))
    pull.add_argument("--seed", type=int, default=0)
    pull.add_argument("--plan", action="store_true", help="measure and say what it takes, no more")


def _model_add(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.jobs.kinds import AddModel

    path = Path(options.source).expanduser()
    source = str(path.resolve()) if path.exists() else options.source
    if options.show_code:
        return _show_code(source)
    code = _trusted_code(source, options.trust_code) if options.trust_code else {}
    result = run_here(library, AddModel(source, options.precision, code))
    model = library.models.get(result["model_id"])
    print(
        f"Model {model.id}: {model.name}, {short_count(model.parameters)} parameters, "
        f"{model.n_layers} layers, width {model.d_model}, {size(model.bytes)}"
    )
    found = {**result, "name": model.name, "parameters": model.parameters}
    if model.precision in ("q8", "q4", "q2"):
        found["quality"] = _checked(library, model.id)
    return found


def _show_code(source: str) -> dict[str, Any]:
    """Print every file that would run, and the one hash that stands for them all."""
    from mistudio.engine.models.custom_code import MEANING
    from mistudio.jobs.models import code_of

    code = code_of(source)
    if code is None:
        print("transformers knows this architecture itself: no program of the model's is run.")
        return {"digest": None, "files": []}
    for file in code.files:
        print(f"=== {file.name}: {count(file.bytes)} bytes, SHA-256 {file.sha256}")
        print(file.text)
    consent = code.consent()
    where = f"{code.origin} at commit {code.revision}" if code.revision else code.origin
    print(f"=== {len(code.files)} files from {where}")
    print(f"{MEANING}\nHash of them all: {consent.digest}")
    print("If you have read them and trust where they come from:")
    print(f"  mistudio model add {source} --trust-code {consent.digest[:16]}")
    return {**consent.as_dict(), "files": [[f.name, f.bytes, f.sha256] for f in code.files]}


def _trusted_code(source: str, prefix: str) -> dict[str, Any]:
    """The consent that `--trust-code` gives: only to a program with this very hash."""
    from mistudio.jobs.models import code_of

    wanted = prefix.strip().lower()
    if not re.fullmatch(r"[0-9a-f]{12,64}", wanted):
        raise InvalidInput(
            "This is no hash of a program",
            f"{prefix!r} is not 12 to 64 hexadecimal digits.",
            "Read the program with --show-code: its hash stands at the end.",
            field="trust_code",
        )
    code = code_of(source)
    if code is None:
        return {}
    consent = code.consent()
    if not consent.digest.startswith(wanted):
        raise InvalidInput(
            "The model's program is not the one you named",
            f"Its hash is {consent.digest[:16]}..., not {wanted}.",
            "It may have changed since you read it: read it again with --show-code.",
            field="trust_code",
        )
    return consent.as_dict()


def _model_check(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    model = find(library.models, options.model)
    return {"model_id": model.id, "quality": _checked(library, model.id)}


def _checked(library: Library, model_id: int) -> dict[str, Any]:
    """Measure what quantising costs a model, and say it."""
    from mistudio.jobs.kinds import CheckQuality

    found: dict[str, Any] = run_here(library, CheckQuality(model_id))["quality"]
    print(f"{found['verdict'].upper()}: {found['sentence']}")
    if "delta" in found:
        print(
            f"  {found['precision']} {number(found['ce'], 3)}, {found['reference']} "
            f"{number(found['ce_reference'], 3)} nats per token; difference "
            f"{number(found['delta'], 3)} ± {number(found['error'], 3)} over "
            f"{count(found['tokens'])} tokens of {found['documents']} documents"
        )
    return found


def _model_show(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.engine.models.architecture import read_architecture
    from mistudio.engine.models.memory import Use
    from mistudio.jobs.loaded import model_plans
    from mistudio.terminal import table

    path = Path(options.model).expanduser()
    folder = path if path.is_dir() else library.path(find(library.models, options.model).folder)
    found = read_architecture(folder)
    kind = "gated " if found.gated_mlp else ""
    print(
        f"{found.architecture}: {count(found.parameters)} parameters, {found.n_layers} layers of "
        f"{found.d_model} channels\n"
        f"  attention: {found.n_heads} heads of {found.head_dim}, {found.n_kv_heads} of them for "
        f"keys and values; positions: {found.positions}\n"
        f"  MLP: {kind}{found.activation}, {count(found.d_mlp)} wide"
        f"{f', {found.experts} experts' if found.experts else ''}; norm: {found.norm}\n"
        f"  vocabulary: {count(found.vocab_size)}"
        f"{', embeddings tied' if found.tied_embeddings else ''}; context: "
        f"{count(found.context_length) if found.context_length else 'unbounded'}\n"
        f"  a block: {count(found.blocks[0].parameters)} parameters (attention "
        f"{count(found.blocks[0].attention)}, MLP {count(found.blocks[0].mlp)}, norms "
        f"{count(found.blocks[0].norms)})"
    )
    rows = [
        {
            "precision": plan.precision,
            "weights": size(plan.weights),
            "in use": size(plan.memory),
            "free": size(plan.free),
            "fits": "yes" if plan.fits else "no",
        }
        for plan in model_plans(library, folder, Use(options.batch, options.context))
    ]
    print(table(rows, {key: key for key in rows[0]}))
    return {"architecture": asdict(found), "plans": rows}


def _model_remove(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    model = find(library.models, options.model)
    library.discard("models", model.id)
    print(f"Moved {model.name} to the trash (kept seven days).")
    return {"model_id": model.id}


def _extract(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.engine.models.hooks import HookPoint
    from mistudio.jobs.kinds import Extract
    from mistudio.jobs.models import check_layers

    model, dataset = find(library.models, options.model), find(library.datasets, options.dataset)
    sites = [site.strip() for site in options.sites.split(",")]
    names = [HookPoint(site, layer).name for layer in layers(options.layers) for site in sites]
    check_layers(library, model.id, names)
    job = Extract(
        model.id,
        dataset.id,
        names,
        max_tokens=options.max_tokens,
        context=options.context,
        batch_windows=options.batch_size,
        seed=options.seed,
        max_samples=options.max_samples,
        storage=options.storage,
        plan_only=options.plan,
    )
    result = run_here(library, job)
    if not options.plan:
        _print_extraction(library, result["extraction_id"])
    return result


def _print_extraction(library: Library, extraction_id: int) -> None:
    """What was stored, and what it is like."""
    from mistudio.terminal import table

    record = library.extractions.get(extraction_id)
    left_out = record.statistics["dropped_special"] + record.statistics["dropped_outliers"]
    print(
        f"Activations {record.id}: {count(record.tokens)} tokens, {size(record.bytes)} "
        f"({count(left_out)} positions left out: the first of each window, special tokens, "
        "outliers)"
    )
    rows = [
        {
            "site": point,
            "mean norm": number(site["mean_norm"], 2),
            "variance": number(site["total_variance"], 1),
            "outliers": percent(site["outlier_share"], 2),
            "outlier dimensions": " ".join(str(i) for i, _ in site["outlier_dimensions"][:8]),
        }
        for point, site in record.statistics["sites"].items()
    ]
    print(table(rows, {key: key for key in rows[0]}))
