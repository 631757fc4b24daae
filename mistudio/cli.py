"""The command line: the very jobs that the window runs, without the window."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mistudio import __version__, paths
from mistudio.engine.datasets.token_settings import PADDINGS, TRUNCATIONS
from mistudio.errors import InvalidInput, NotFound, UserError, explain
from mistudio.formatting import count, duration, number, percent, short_count, size
from mistudio.jobs.control import Control
from mistudio.jobs.job import can_go_on
from mistudio.library.library import Library

DONE, FAILED, BAD_USAGE, STOPPED = 0, 1, 2, 130
SITES = ("resid_pre", "resid_post", "mlp_in", "mlp_out", "attn_out")
RUN_HELP = "a run's name or number, an imported SAE's name, or sae:NUMBER"
SORTS = ("density", "context_density", "max_activation", "mean_activation", "top_token_share", "id")

Command = Callable[[argparse.Namespace, Library], "dict[str, Any]"]


class _Stopped(Exception):
    """The user pressed Ctrl-C and the job ended for it; `result` is what was kept."""

    def __init__(self, result: dict[str, Any] | None = None) -> None:
        self.result = result


class _JobFailed(Exception):
    """A job ended with an error that its row holds."""

    def __init__(self, error: dict[str, Any]) -> None:
        self.error = error


def run(arguments: list[str]) -> int:
    """Parse, do, and return the exit code."""
    from mistudio.engine.training import distributed

    return _first_of_many(arguments) if distributed.launched() else _command(arguments)


def _first_of_many(arguments: list[str]) -> int:
    """As one of the processes that `torchrun` or `accelerate launch` started: the first does what
    was typed, the others help it to train."""
    from mistudio import bootstrap
    from mistudio.engine.training import distributed
    from mistudio.jobs.assist import assist

    bootstrap.prepare()
    try:
        world = distributed.from_environment()
    except UserError as exc:
        _print_error({"title": exc.title, "what": exc.what, "next_step": exc.next_step})
        return FAILED
    if isinstance(world, distributed.Processes) and world.rank:
        return assist(world)
    code = _command(arguments)
    if code == DONE:
        world.leave()
    return code  # where it is another, the others end because this process does


def _command(arguments: list[str]) -> int:
    from mistudio.engine.training import distributed

    parser = _parser()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as exit:
        return int(exit.code or 0)
    if options.command is None or options.command == "app":
        if distributed.launched():
            print("The window needs one process: start it without a launcher.", file=sys.stderr)
            return BAD_USAGE
        from mistudio.app import main as window

        return window([*_window_arguments(options)])
    from mistudio import bootstrap, logs

    bootstrap.prepare()
    logs.set_up()
    try:
        _check_json(options)
        library = Library(options.library or paths.default_library())
        result = options.do(options, library)
        _write_json(options, result)
        if options.command == "demo":
            return _show_results(options, result)
        return DONE if result.get("healthy", True) else FAILED
    except _Stopped as stopped:
        if stopped.result is not None:
            _write_json(options, stopped.result)
        print("Stopped.", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return STOPPED
    except _JobFailed as failure:
        _print_error(failure.error)
        return FAILED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as exc:
        known = explain(exc)
        if known is None:
            raise
        _print_error({"title": known.title, "what": known.what, "next_step": known.next_step})
        return FAILED


# --- what can be typed --------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    # Both may stand before or after the command: a command's own copy must not set a default, or
    # it would undo what stood before.
    common = _common_options(argparse.SUPPRESS)
    parser = argparse.ArgumentParser(
        prog="mistudio",
        description="Look inside a language model. Without a command the window opens.",
        parents=[_common_options(None)],
    )
    parser.add_argument("--version", action="version", version=f"miStudio {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, do: Command, help: str, group: Any = commands) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = group.add_parser(
            name, help=help, description=help, parents=[common]
        )
        sub.set_defaults(do=do)
        return sub

    commands.add_parser("app", help="open the window", parents=[common])
    demo = add("demo", _demo, "the whole road on the embedded sample")
    demo.add_argument("--no-window", action="store_true", help="print the report and end")
    demo.add_argument("--seed", type=int, default=0)
    add("doctor", _doctor, "device, memory, versions, library health, what to mend")
    add("list", _list, "what the library holds")

    dataset = commands.add_parser("dataset", help="datasets").add_subparsers(required=True)
    sub = add("add", _dataset_add, "add a text file or folder (or `sample`)", dataset)
    sub.add_argument("path", metavar="PATH")
    sub.add_argument("--text-column", metavar="C")
    sub.add_argument("--name")
    sub.add_argument("--skip-bad-rows", action="store_true", help="leave out rows without text")
    sub.add_argument("--encoding", metavar="E", help="such as cp1252 (default: found out)")
    sub.add_argument("--max-documents", type=int, metavar="N", help="take the first N")
    sub.add_argument("--max-bytes", type=int, metavar="N", help="take the first N bytes of text")
    sub.add_argument(
        "--keep-in-place", action="store_true", help="read the files where they are, copy nothing"
    )
    sub = add("remove", _dataset_remove, "move a dataset to the trash", dataset)
    sub.add_argument("dataset", metavar="DATASET")
    sub = add("rename", _dataset_rename, "give a dataset another name", dataset)
    sub.add_argument("dataset", metavar="DATASET")
    sub.add_argument("name", metavar="NAME")
    sub = add("provenance", _dataset_provenance, "where a dataset comes from, as JSON", dataset)
    sub.add_argument("dataset", metavar="DATASET")
    sub.add_argument("--out", metavar="FILE", help="write it there instead")

    sub = add("tokenize", _dataset_tokenize, "turn a dataset's text into tokens", dataset)
    sub.add_argument("dataset", metavar="DATASET")
    which = sub.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="M", help="whose tokenizer: name or number")
    which.add_argument("--tokenizer", metavar="T", help="one of your own: name or number")
    sub.add_argument("--padding", choices=PADDINGS, default="pack", help="default: pack")
    sub.add_argument("--truncation", choices=TRUNCATIONS, default="longest_first")
    sub.add_argument("--max-length", type=int, default=512, metavar="N", help="where not packed")
    sub.add_argument("--no-special-tokens", action="store_true")
    sub.add_argument("--no-attention-mask", action="store_true")
    sub.add_argument("--heldout-share", type=float, default=0.1, metavar="X")
    sub = add("statistics", _dataset_statistics, "what a dataset's text is like", dataset)
    sub.add_argument("dataset", metavar="DATASET")
    sub.add_argument("--again", action="store_true", help="count anew")

    tokenizer = commands.add_parser("tokenizer", help="tokenizers without a model").add_subparsers(
        required=True
    )
    sub = add(
        "add",
        _tokenizer_add,
        "add a tokenizer.json, a SentencePiece .model, a folder, a Hub id, `gpt2` or `llama`",
        tokenizer,
    )
    sub.add_argument("source", metavar="SOURCE")
    sub.add_argument("--name", default="")
    sub = add("remove", _tokenizer_remove, "move a tokenizer to the trash", tokenizer)
    sub.add_argument("tokenizer", metavar="TOKENIZER")

    sub = add("search", _dataset_search, "look for datasets on the Hugging Face Hub", dataset)
    sub.add_argument("text", metavar="TEXT")
    sub.add_argument("--limit", type=_not_negative, default=20, metavar="N")
    sub = add("info", _dataset_info, "what a dataset on the Hub holds", dataset)
    sub.add_argument("repository", metavar="OWNER/NAME")
    sub.add_argument("--revision", metavar="R", help="branch, tag or commit")
    sub = add("download", _dataset_download, "bring a dataset from the Hub", dataset)
    sub.add_argument("repository", metavar="OWNER/NAME")
    sub.add_argument("--config", metavar="C", help="where it has several")
    sub.add_argument("--split", metavar="S", help="such as train (default: all)")
    sub.add_argument("--revision", metavar="R", help="branch, tag or commit (default: the newest)")
    sub.add_argument("--text-column", metavar="C")
    sub.add_argument("--name")
    sub.add_argument("--skip-bad-rows", action="store_true", help="leave out rows without text")
    sub.add_argument("--max-documents", type=int, metavar="N", help="take the first N")
    sub.add_argument("--max-bytes", type=int, metavar="N", help="take the first N bytes of text")
    sub.add_argument(
        "--link",
        action="store_true",
        help="store nothing but a look; read it on the Hub each time it is tokenised",
    )

    login = add("login", _login, "remember an access token of the Hugging Face Hub (asked for)")
    login.add_argument(
        "--unchecked", action="store_true", help="do not ask the Hub whose token it is"
    )
    add("logout", _logout, "forget the access token")

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
    pull.add_argument("--max-tokens", type=_positive, metavar="N", help="default: all")
    pull.add_argument(
        "--max-samples", type=_positive, metavar="N", help="the dataset's first N documents only"
    )
    pull.add_argument("--context", type=_positive, default=128, metavar="N", help="default: 128")
    pull.add_argument(
        "--batch-size", type=_positive, default=8, metavar="N", help="windows a pass (default: 8)"
    )
    pull.add_argument("--storage", default="fp16", choices=("fp16", "bf16"))
    pull.add_argument("--seed", type=int, default=0)
    pull.add_argument("--plan", action="store_true", help="measure and say what it takes, no more")

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

    resume = add("resume", _resume, "go on with a training or other work that was interrupted")
    resume.add_argument("job", type=int, nargs="?", help="default: the last one")
    resume.add_argument(
        "--step", type=int, metavar="N", help="from this checkpoint; later ones are deleted"
    )
    saved = add("checkpoints", _checkpoints, "what interrupted trainings can go on from")
    saved.add_argument("job", type=int, nargs="?", help="default: all")
    saved.add_argument("--delete", type=int, metavar="STEP", help="delete this one of the job")

    record = add(
        "record", _record, "how a run came about: settings, seeds, versions, hashes, results"
    )
    record.add_argument("run", metavar="RUN", help="a run's name or number")
    record.add_argument(
        "--html", type=Path, metavar="FILE", help="also write it as a page to print"
    )

    discover = add("discover", _discover, "find what every latent fires on")
    discover.add_argument("run", metavar="RUN", help=RUN_HELP)
    discover.add_argument(
        "--dataset", metavar="D", help="text to look through (default: the run's own)"
    )
    discover.add_argument("--max-tokens", type=int, default=500_000)
    discover.add_argument("--top-k", type=int, default=20)

    features = add("features", _features, "list features")
    _add_sae_options(features)
    features.add_argument("--search", metavar="TEXT", help="in labels and tokens")
    features.add_argument(
        "--sort", default="density", choices=SORTS, metavar="COLUMN", help=", ".join(SORTS)
    )
    features.add_argument("--top", type=_not_negative, default=20, metavar="N")

    steer = add("steer", _steer, "continue a prompt with a feature added")
    _add_sae_options(steer)
    steer.add_argument("--feature", type=int, required=True, metavar="N")
    steer.add_argument(
        "--strength",
        type=float,
        required=True,
        metavar="S",
        help="multiples of the feature's largest activation",
    )
    steer.add_argument("--prompt", required=True, metavar="TEXT")
    steer.add_argument("--temperature", type=float, default=0.7)
    steer.add_argument("--top-p", type=float, default=1.0)
    steer.add_argument("--max-tokens", type=int, default=60)
    steer.add_argument("--seed", type=int, default=0)
    steer.add_argument("--chat", action="store_true", help="use the model's chat format")

    export = add("export", _export, "write a run's SAEs to a folder that other libraries read")
    export.add_argument("run", metavar="RUN", help=RUN_HELP)
    export.add_argument("--layer", type=int, help="only this layer's SAE")
    export.add_argument(
        "--format", default="saelens", choices=("saelens", "sparsify", "safetensors")
    )
    export.add_argument("--to", required=True, type=Path, metavar="DIR")

    bring = add("import", _import, "bring SAEs that another library wrote into this one")
    bring.add_argument("path", metavar="PATH", help="a folder or file; its format is recognised")
    bring.add_argument("--model", metavar="M", help="whose activations they read")
    bring.add_argument("--layer", type=int, metavar="N", help="where the files do not say")
    bring.add_argument("--site", choices=SITES, help="where the files do not say")
    bring.add_argument("--name", default="", help="what to call it")
    bring.add_argument("--format", metavar="F", help="refuse any other format")

    sae = commands.add_parser("sae", help="imported SAEs").add_subparsers(required=True)
    sub = add("remove", _sae_remove, "move an imported SAE to the trash", sae)
    sub.add_argument("sae", metavar="SAE", help="its name, or its number in `mistudio list`")

    job = commands.add_parser("job", help="jobs that were interrupted").add_subparsers(
        required=True
    )
    sub = add(
        "retry",
        _job_retry,
        "run an interrupted, failed or stopped job again (a training goes on from its checkpoint)",
        job,
    )
    sub.add_argument("job", type=int)
    sub = add("dismiss", _job_dismiss, "put an ended job away", job)
    sub.add_argument("job", type=int)
    return parser


def _common_options(default: Any) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--library", type=Path, metavar="DIR", default=default, help="library folder"
    )
    options.add_argument(
        "--json", type=Path, metavar="FILE", default=default, help="also write the result as JSON"
    )
    return options


def _add_sae_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--layer", type=int, help="which SAE, where the run has several")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _not_negative(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is less than 0")
    return number


def _window_arguments(options: argparse.Namespace) -> Iterator[str]:
    if options.library:
        yield from ("--library", str(options.library))


# --- commands -----------------------------------------------------------------------------------


def _demo(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.jobs.kinds import Demo
    from mistudio.report import demo_report

    print(
        "The whole road on the embedded sample: model, text, activations, SAE, features, steering."
    )
    result = _run(library, Demo(seed=options.seed))
    print(demo_report(result, str(library.root)))
    return result


def _show_results(options: argparse.Namespace, result: dict[str, Any]) -> int:
    """Open the window on the demo's features, where there is a display and it is wanted."""
    if options.no_window or not _has_display():
        return DONE
    from mistudio.app import main as window

    return window([*_window_arguments(options)], ("features", {"sae_id": result["sae_id"]}))


def _has_display() -> bool:
    if sys.platform in ("win32", "darwin"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _doctor(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.doctor import examine

    findings = examine(library)
    for finding in findings:
        print(f"{'ok  ' if finding.ok else 'MEND'}  {finding.area:<11} {finding.text}")
        if not finding.ok:
            print(f"      {'':<11} -> {finding.mend}")
    healthy = all(finding.ok for finding in findings)
    print("All is well." if healthy else "Some things need mending.")
    return {"healthy": healthy, "findings": [asdict(finding) for finding in findings]}


def _list(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.terminal import table

    models = [
        {
            "id": m.id,
            "name": m.name,
            "parameters": short_count(m.parameters),
            "layers": m.n_layers,
            "d_model": m.d_model,
            "size": size(m.bytes),
        }
        for m in library.models.all()
    ]
    datasets = [
        {
            "id": d.id,
            "name": d.name,
            "documents": count(d.documents),
            "size": size(d.bytes),
            "tokens": ", ".join(count(t.tokens) for t in library.tokenizations.of_dataset(d.id))
            or "-",
        }
        for d in library.datasets.all()
    ]
    tokenizers = [
        {"id": t.id, "name": t.name, "tokens": count(t.vocab_size), "from": t.origin}
        for t in library.tokenizers.all()
    ]
    runs = [
        {
            "id": t.id,
            "name": t.name,
            "status": t.status,
            "layer": sae.layer,
            "latents": sae.d_sae,
            "l0": number(sae.metrics.get("l0"), 1),
            "explained": number(sae.metrics.get("explained_variance"), 3),
            "features": "yes" if library.feature_runs.newest_of_sae(sae.id) else "no",
        }
        for t in library.trainings.all()
        for sae in library.saes.of_training(t.id)
    ]
    imported = [
        {
            "id": sae.id,
            "name": sae.name,
            "format": sae.provenance.get("format", ""),
            "reads": sae.hook_point,
            "writes": sae.hook_point_out if sae.is_transcoder else "",
            "latents": sae.d_sae,
            "features": "yes" if library.feature_runs.newest_of_sae(sae.id) else "no",
        }
        for sae in library.saes.imported()
    ]
    jobs = [
        {"id": j.id, "title": j.title, "status": j.status, "progress": percent(j.fraction, 0)}
        for j in library.jobs.all("status NOT IN ('finished', 'cancelled')")
    ]
    sections: dict[str, list[dict[str, Any]]] = {
        "Models": models,
        "Datasets": datasets,
        "Tokenizers": tokenizers,
        "Runs": runs,
        "Imported": imported,
        "Jobs": jobs,
    }
    print(f"Library: {library.root}")
    for heading, rows in sections.items():
        print(f"\n{heading}")
        print(table(rows, {key: key for key in rows[0]}) if rows else "  none")
    return {name.lower(): rows for name, rows in sections.items()}


def _dataset_add(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.jobs.kinds import AddDataset, AddSampleDataset

    if options.path == "sample":
        result = _run(library, AddSampleDataset())
    else:
        path = os.path.abspath(Path(options.path).expanduser())
        job = AddDataset(
            path,
            options.text_column,
            options.name,
            options.skip_bad_rows,
            keep_in_place=options.keep_in_place,
            max_documents=options.max_documents,
            max_bytes=options.max_bytes,
            encoding=options.encoding,
        )
        result = _run(library, job)
    dataset = library.datasets.get(result["dataset_id"])
    left_out = f" ({count(result['skipped'])} bad rows left out)" if result.get("skipped") else ""
    kept = "the first " if dataset.link else ""
    print(
        f"Dataset {dataset.id}: {dataset.name}, {kept}{count(dataset.documents)} documents, "
        f"{count(dataset.characters)} characters{left_out}"
    )
    _print_rejected(result.get("rejected", {}))
    return {**result, "documents": dataset.documents, "characters": dataset.characters}


def _print_rejected(rejected: dict[str, Any]) -> None:
    """What reading left out, changed or guessed, for people to judge."""
    for row in rejected.get("first", [])[:5]:
        place = f"{row['file']}, line {row['line']}" if row["line"] else row["file"]
        print(f"  left out: {place}: {row['reason']}")
    if replaced := rejected.get("replaced"):
        print(f"  replaced: {count(replaced)} places that are no characters")
    for encoding in rejected.get("encodings", {}):
        if encoding != "UTF-8":
            print(f"  encoding: {encoding} (another: --encoding)")
    for sentence in rejected.get("left_out", []):
        print(f"  {sentence}")


def _dataset_tokenize(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.jobs.kinds import Tokenize

    dataset = _find(library.datasets, options.dataset)
    model = _find(library.models, options.model) if options.model else None
    own = _find(library.tokenizers, options.tokenizer) if options.tokenizer else None
    settings = {
        "max_length": options.max_length,
        "padding": options.padding,
        "truncation": options.truncation,
        "add_special_tokens": not options.no_special_tokens,
        "attention_mask": not options.no_attention_mask,
        "heldout_share": options.heldout_share,
    }
    job = Tokenize(dataset.id, model.id if model else None, own.id if own else None, settings)
    result = _run(library, job)
    record = library.tokenizations.get(result["tokenization_id"])
    found = record.statistics
    print(f"Tokenisation {record.id} of {dataset.name}: {count(record.tokens)} tokens")
    print(f"  {found['tokenizer']}, {found.get('layout', 'packed')}")
    if refused := found.get("plain_chats"):
        print(f"  {count(refused)} conversations do not fit the chat format: taken as plain text")
    if long := found.get("long_texts"):
        print(f"  {count(long)} very long documents were tokenised in parts that meet at a space")
    return {**result, "statistics": found}


def _dataset_statistics(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.jobs.kinds import AnalyseDataset
    from mistudio.jobs.statistics import warnings_of

    dataset = _find(library.datasets, options.dataset)
    _run(library, AnalyseDataset(dataset.id, options.again))
    found = library.datasets.get(dataset.id).statistics
    lengths, duplicates, near = found["lengths"], found["duplicates"], found["near_duplicates"]
    print(f"{dataset.name}: {count(found['documents'])} documents, {size(found['bytes'])} of text")
    print(
        f"  characters in a document: median {count(round(lengths['median']))}, "
        f"{count(lengths['min'])} to {count(lengths['max'])}"
    )
    print(f"  exact duplicates: {count(duplicates['copies'])}")
    print(f"  near duplicates: {count(near['documents'])} of {count(near['sample'])} sampled")
    shares = ", ".join(f"{code} {percent(share)}" for code, share in found["languages"]["shares"])
    print(f"  languages of {count(found['languages']['sample'])} sampled: {shares}")
    for split, documents in found["splits"].items():
        print(f"  split {split}: {count(documents)} documents")
    warned = warnings_of(library, dataset.id)
    for warning in warned:
        print(f"  {'!' if warning.serious else '-'} {warning.title}: {warning.text}")
    return {"statistics": found, "warnings": [asdict(warning) for warning in warned]}


def _tokenizer_add(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.jobs.kinds import AddTokenizer

    source = options.source
    if Path(source).expanduser().exists():
        source = os.path.abspath(Path(source).expanduser())
    result = _run(library, AddTokenizer(source, options.name))
    record = library.tokenizers.get(result["tokenizer_id"])
    print(f"Tokenizer {record.id}: {record.name}, {count(record.vocab_size)} tokens")
    return result


def _tokenizer_remove(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    tokenizer = _find(library.tokenizers, options.tokenizer)
    library.discard("tokenizers", tokenizer.id)
    print(f"Moved {tokenizer.name} to the trash (kept seven days).")
    return {"tokenizer_id": tokenizer.id}


def _dataset_search(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.credentials import access_for
    from mistudio.engine.hub import search_datasets
    from mistudio.terminal import table

    found = search_datasets(options.text, limit=options.limit or 1, access=access_for())
    rows = [
        {
            "repository": f.repository,
            "downloads": short_count(f.downloads),
            "likes": short_count(f.likes),
            "size": "" if f.bytes is None else size(f.bytes),
            "gated": {"": "", "manual": "asks the owner"}.get(f.gated, "terms to accept"),
            "licence": f.licence,
        }
        for f in found
    ]
    print(table(rows, {name: name for name in rows[0]}) if rows else "Nothing found.")
    return {"datasets": [asdict(f) for f in found]}


def _dataset_info(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.credentials import access_for
    from mistudio.engine.hub import check_repository, dataset_info

    name = check_repository(options.repository)
    found = dataset_info(name, options.revision, access_for(name))
    print(f"{found.repository}  {found.licence}  {found.page}")
    if found.problem:
        print(f"Nothing of it can be read: {found.problem}")
    for config in found.configs:
        default = " (default)" if config.name == found.default_config else ""
        print(f"{config.name}{default}: {', '.join(f'{c} ({t})' for c, t in config.columns)}")
        for split in config.splits:
            rows = "" if split.rows is None else f", {count(split.rows)} rows"
            print(f"  {split.name}: {len(split.files)} files, {size(split.bytes)}{rows}")
    return asdict(found)


def _dataset_download(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.jobs.kinds import DownloadDataset

    job = DownloadDataset(
        options.repository,
        config=options.config,
        split=options.split,
        revision=options.revision,
        text_column=options.text_column,
        name=options.name,
        skip_bad_rows=options.skip_bad_rows,
        max_documents=options.max_documents,
        max_bytes=options.max_bytes,
        store=not options.link,
    )
    result = _run(library, job)
    dataset = library.datasets.get(result["dataset_id"])
    left_out = f" ({count(result['skipped'])} bad rows left out)" if result["skipped"] else ""
    kept = "the first " if dataset.link else ""
    print(
        f"Dataset {dataset.id}: {dataset.name}, {kept}{count(dataset.documents)} documents, "
        f"{count(dataset.characters)} characters{left_out}"
    )
    return {**result, "characters": dataset.characters}


def _login(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    """The token comes from the terminal without an echo, or from standard input: as an argument it
    would stay in the shell's history."""
    import getpass

    from mistudio import credentials

    if sys.stdin.isatty():
        text = getpass.getpass("Access token (hf_...): ")
    else:
        text = sys.stdin.readline()
    token = credentials.checked(text)
    name = ""
    if not options.unchecked:
        name = credentials.whose(replace(credentials.access_for(), token=token))
        print(f"This is {name}'s token.")
    kept = credentials.remember(token.reveal())
    print(kept.sentence)
    return {"name": name, "kept_in": kept.kind}


def _logout(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio import credentials

    credentials.forget()
    print("The access token is forgotten here.")
    access = credentials.access_for()
    if access.token is not None:
        print("HF_TOKEN, or what `hf auth login` has stored, still signs you in.")
    return {"signed_in": access.token is not None}


def _dataset_remove(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    dataset = _find(library.datasets, options.dataset)
    library.discard("datasets", dataset.id)
    print(f"Moved {dataset.name} to the trash (kept seven days).")
    return {"dataset_id": dataset.id}


def _dataset_rename(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    dataset = _find(library.datasets, options.dataset)
    library.datasets.rename(dataset.id, options.name)
    name = library.datasets.get(dataset.id).name
    print(f"{dataset.name} is now called {name}.")
    return {"dataset_id": dataset.id, "name": name}


def _dataset_provenance(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    dataset = _find(library.datasets, options.dataset)
    record = library.datasets.provenance(dataset.id)
    text = json.dumps(record, indent=2, ensure_ascii=False)
    if options.out:
        Path(options.out).expanduser().write_text(text + "\n", encoding="utf-8")
        print(f"Wrote {options.out}")
    else:
        print(text)
    return record


def _model_add(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.jobs.kinds import AddModel

    path = Path(options.source).expanduser()
    source = str(path.resolve()) if path.exists() else options.source
    if options.show_code:
        return _show_code(source)
    code = _trusted_code(source, options.trust_code) if options.trust_code else {}
    result = _run(library, AddModel(source, options.precision, code))
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
    model = _find(library.models, options.model)
    return {"model_id": model.id, "quality": _checked(library, model.id)}


def _checked(library: Library, model_id: int) -> dict[str, Any]:
    """Measure what quantising costs a model, and say it."""
    from mistudio.jobs.kinds import CheckQuality

    found: dict[str, Any] = _run(library, CheckQuality(model_id))["quality"]
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
    folder = path if path.is_dir() else library.path(_find(library.models, options.model).folder)
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
    model = _find(library.models, options.model)
    library.discard("models", model.id)
    print(f"Moved {model.name} to the trash (kept seven days).")
    return {"model_id": model.id}


def _extract(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.engine.models.hooks import HookPoint
    from mistudio.jobs.kinds import Extract
    from mistudio.jobs.models import check_layers

    model, dataset = _find(library.models, options.model), _find(library.datasets, options.dataset)
    sites = [site.strip() for site in options.sites.split(",")]
    names = [HookPoint(site, layer).name for layer in _layers(options.layers) for site in sites]
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
    result = _run(library, job)
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


def _train(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.engine.models.hooks import HookPoint
    from mistudio.engine.training.config import parse
    from mistudio.engine.training.run import sites_of
    from mistudio.jobs.kinds import Train
    from mistudio.jobs.models import check_layers

    model, dataset = _find(library.models, options.model), _find(library.datasets, options.dataset)
    config = _training_options(options)
    parsed = parse(config)
    transcoder = parsed.wiring in ("transcoder", "skip_transcoder")
    site = options.site or ("mlp_in" if transcoder else "resid_post")
    points = tuple(HookPoint(site, layer) for layer in _layers(options.layers))
    names = [point.name for point in points]
    check_layers(library, model.id, names)
    read = sorted({point.name for at in sites_of(points, parsed) for point in at.points})
    extraction_id = _stored_activations(options, library, model.id, dataset.id, read, config)
    source = options.source if options.source in ("extract", "hybrid") else "auto"
    job = Train(model.id, dataset.id, names, config, extraction_id, options.name, source=source)
    kind = "stored" if extraction_id is not None else "stream" if source == "auto" else source
    _print_plan(library, model.id, points, parsed, kind)
    return _trained(library, _run(library, job, keep_on_stop=True))


def _print_plan(library: Library, model_id: int, points: Any, config: Any, kind: str) -> None:
    from mistudio.engine.training.planning import describe
    from mistudio.jobs.plans import planned

    if plan := planned(library, model_id, points, config, kind, timed=True):
        print("\n".join(("Plan:", *(f"  {line}" for line in describe(plan)))), file=sys.stderr)


def _trained(library: Library, result: dict[str, Any]) -> dict[str, Any]:
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
        raise _Stopped(summary)
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
    tokenization_id = _run(library, Tokenize(dataset_id, model_id), quiet=True)["tokenization_id"]
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
    return int(_run(library, job)["extraction_id"])


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


def _layers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as exc:
        raise InvalidInput(
            "Layers are numbers", f"{text!r} cannot be read.", "Write them as 10 or 10,20."
        ) from exc


def _discover(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.jobs.kinds import Discover

    dataset = _find(library.datasets, options.dataset) if options.dataset else None
    name, saes = _find_saes(library, options.run)
    rows = []
    for sae in saes:
        job = Discover(sae.id, options.max_tokens, options.top_k, dataset.id if dataset else None)
        run = library.feature_runs.get(_run(library, job)["feature_run_id"])
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

    sae = _find_sae(library, options)
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


def _steer(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.jobs.kinds import Steer

    sae = _find_sae(library, options)
    job = Steer(
        sae.id,
        [[options.feature, options.strength]],
        options.prompt,
        temperature=options.temperature,
        top_p=options.top_p,
        max_new_tokens=options.max_tokens,
        seed=options.seed,
        chat=options.chat,
    )
    generation = library.generations.get(_run(library, job)["generation_id"])
    result = generation.result
    variant = result["variants"][0]
    print(f"Unsteered: {result['unsteered']}\n\nSteered:   {variant['text']}\n")
    print(
        f"KL {number(variant['kl_per_token'], 4)} nats/token over {variant['tokens']} tokens, "
        f"perplexity x{number(variant['perplexity_ratio'], 2)}, "
        f"word overlap {percent(variant['word_overlap'], 0)}, coefficient "
        f"{number(variant['coefficients'][0], 2)} "
        f"({number(variant['percent_of_norm'], 0)} % of the layer's norm)"
    )
    return {
        "feature": options.feature,
        "strength": options.strength,
        "unsteered": result["unsteered"],
        "steered": variant["text"],
        "unsteered_ids": result["unsteered_ids"],
        "steered_ids": variant["ids"],
        "kl_per_token": variant["kl_per_token"],
        "perplexity_ratio": variant["perplexity_ratio"],
        "word_overlap": variant["word_overlap"],
        "generation_id": generation.id,
    }


def _export(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.jobs.kinds import Export

    _, saes = _find_saes(library, options.run)
    target = str(options.to.expanduser().resolve())
    if options.layer is not None or saes[0].training_id is None:
        job = Export(None, target, options.format, _one_of(saes, options).id)
    else:
        job = Export(saes[0].training_id, target, options.format)
    result = _run(library, job)
    for folder in result["folders"]:
        print(folder)
    return {**result, "format": options.format}


def _import(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.jobs.kinds import ImportSae

    model = _find(library.models, options.model) if options.model else None
    job = ImportSae(
        str(Path(options.path).expanduser().resolve()),
        model.id if model else None,
        options.name,
        options.format,
        options.layer,
        options.site,
    )
    result = _run(library, job)
    rows = []
    for sae in map(library.saes.get, result["sae_ids"]):
        to = f" -> {sae.hook_point_out}" if sae.is_transcoder else ""
        print(
            f"SAE {sae.id}: {sae.name}, {count(sae.d_sae)} latents ({sae.architecture}), "
            f"{library.models.get(sae.model_id).name} {sae.hook_point}{to}"
        )
        for note in sae.provenance["notes"]:
            print(f"  {note}")
        rows.append(
            {
                "sae_id": sae.id,
                "name": sae.name,
                "format": sae.provenance["format"],
                "model_id": sae.model_id,
                "hook_point": sae.hook_point,
                "hook_point_out": sae.hook_point_out,
                "wiring": sae.wiring,
                "architecture": sae.architecture,
                "d_in": sae.d_in,
                "d_sae": sae.d_sae,
                "notes": sae.provenance["notes"],
            }
        )
    return {"saes": rows}


def _sae_remove(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    wanted = options.sae
    _, saes = _find_saes(library, f"sae:{wanted}" if wanted.isdigit() else wanted)
    sae = saes[0]
    if sae.training_id is not None:
        raise InvalidInput(
            "This SAE belongs to a run",
            f"It was trained here, by {library.trainings.get(sae.training_id).name}.",
            "Delete the run as a whole, in the Training tab.",
        )
    library.discard("saes", sae.id)
    print(f"Moved {sae.name} to the trash (kept seven days).")
    return {"sae_id": sae.id}


def _resume(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    found = [record for record in library.jobs.resumable() if can_go_on(library, record)]
    if options.job is not None:
        library.jobs.get(options.job)
        found = [record for record in found if record.id == options.job]
    if not found:
        what = "No training with a checkpoint was interrupted."
        if options.job is not None:
            status = library.jobs.get(options.job).status
            what = f"Job {options.job} ({status}) has no checkpoint to go on from."
        raise NotFound(
            "There is nothing to go on with", what, "`mistudio checkpoints` lists what there is."
        )
    return _go_on(library, found[0], options.step)


def _go_on(library: Library, record: Any, step: int | None = None) -> dict[str, Any]:
    """Run a job again under its own number: it goes on from what it kept."""
    from mistudio.jobs.job import take_up
    from mistudio.jobs.kinds import job_from_row

    job = job_from_row(record.kind, record.params)
    take_up(library, record.id, step)
    if record.kind != "train":
        return _run(library, job, job_id=record.id)
    return _trained(library, _run(library, job, keep_on_stop=True, job_id=record.id))


def _checkpoints(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.engine.training import checkpoints
    from mistudio.terminal import table

    if options.delete is not None:
        if options.job is None:
            raise InvalidInput("Which job's checkpoint?", "Name the job before --delete.")
        library.jobs.get(options.job)
        checkpoints.delete(library.checkpoint_folder(options.job), options.delete)
    jobs = library.jobs.all() if options.job is None else [library.jobs.get(options.job)]
    rows, total = [], 0
    for record in jobs:
        folder = library.checkpoint_folder(record.id)
        best = checkpoints.best(folder)
        for checkpoint in checkpoints.listing(folder):
            rows.append(
                {
                    "job": record.id,
                    "title": record.title,
                    "status": record.status,
                    "step": checkpoint.step,
                    "of": next(iter(checkpoint.run["plans"].values()))["steps"],
                    "loss": number(checkpoint.loss, 4),
                    "fvu": number(checkpoint.fvu, 3),
                    "best": "best" if best and best.step == checkpoint.step else "",
                    "kept": "until deleted" if checkpoint.kept else "",
                    "size": size(checkpoint.bytes),
                }
            )
            total += checkpoint.bytes
    print(table(rows, {key: key for key in rows[0]}) if rows else "No checkpoints.")
    if rows:
        print(f"{size(total)} in all.")
    return {"checkpoints": rows}


def _record(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.jobs.run_records import save_record
    from mistudio.terminal import table

    training = _find(library.trainings, options.run)
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


def _job_retry(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.jobs.kinds import job_from_row

    record = library.jobs.get(options.job)
    if record.active:
        raise InvalidInput("This job has not ended", f"Job {record.id} is {record.status}.")
    if can_go_on(library, record):
        return _go_on(library, record)
    job = job_from_row(record.kind, record.params)
    result = _run(library, job, keep_on_stop=record.kind == "train")
    if record.status == "interrupted":
        library.jobs.move(record.id, ("interrupted",), "cancelled")
    print(f"{record.title}: done.")
    return result


def _job_dismiss(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    record = library.jobs.get(options.job)
    if record.active:
        raise InvalidInput("This job has not ended", f"Job {record.id} is {record.status}.")
    library.jobs.remove(record.id)
    return {"job_id": record.id}


# --- helpers ------------------------------------------------------------------------------------


def _run(
    library: Library,
    job: Any,
    *,
    keep_on_stop: bool = False,
    quiet: bool = False,
    job_id: int | None = None,
) -> dict[str, Any]:
    """Submit (where it is not queued already) and run one job here, with progress and Ctrl-C; its
    result.

    Where `keep_on_stop` is set, the first Ctrl-C ends the work early and keeps it; the second
    throws it away.
    """
    from mistudio.jobs.job import run_job, submit
    from mistudio.terminal import ProgressLines

    control = Control()
    lines = ProgressLines()
    job_id = submit(library, job) if job_id is None else job_id
    with _interrupts(control, keep_on_stop):
        record = run_job(library, job, job_id, control, None if quiet else lines.show)
    if record.status == "finished":
        lines.finish_phase()
        return record.result
    lines.break_off()
    if can_go_on(library, record):
        print(f"`mistudio resume {record.id}` goes on from the last checkpoint.", file=sys.stderr)
    if record.status == "failed":
        raise _JobFailed(record.error)
    raise _Stopped


@contextmanager
def _interrupts(control: Control, keep: bool) -> Iterator[None]:
    def on_interrupt(signum: int, frame: object) -> None:
        if keep and not control.wants_finish:
            print("\nStopping; the SAE is kept. Ctrl-C again discards it.", file=sys.stderr)
            control.finish_early()
        else:
            control.cancel()

    def on_terminate(signum: int, frame: object) -> None:
        control.interrupt()  # the system shuts down: what can go on later is kept for that

    try:
        before = signal.signal(signal.SIGINT, on_interrupt)
    except ValueError:  # not the main thread: nobody can press Ctrl-C here
        yield
        return
    before_terminate = signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, before_terminate)


def _find(table: Any, wanted: str) -> Any:
    """A record by its number or its name (the newest of several)."""
    if wanted.isdigit() and (record := table.find(int(wanted))):
        return record
    for record in table.all():
        if record.name.lower() == wanted.lower():
            return record
    names = ", ".join(f"{record.id} {record.name!r}" for record in table.all()) or "none yet"
    raise NotFound(
        f"No {table.noun} called {wanted!r}", f"The library has: {names}.", "Use a name or number."
    )


def _find_saes(library: Library, wanted: str) -> tuple[str, list[Any]]:
    """(name, SAEs) of a run by number or name, of an imported SAE by name, or of `sae:NUMBER`."""
    from mistudio.jobs.saes import sae_title

    kind, _, number = wanted.partition(":")
    if kind == "sae" and number.isdigit():
        sae = library.saes.get(int(number))
        return sae_title(library, sae), [sae]
    try:
        training = _find(library.trainings, wanted)
    except NotFound as exc:
        for sae in library.saes.imported():
            if sae.name.lower() == wanted.lower():
                return sae.name, [sae]
        names = ", ".join(f"sae:{sae.id} {sae.name!r}" for sae in library.saes.imported())
        if not names:
            raise
        raise NotFound(
            f"No run or imported SAE called {wanted!r}",
            f"{exc.what} Imported: {names}.",
            exc.next_step,
        ) from None
    saes = library.saes.of_training(training.id)
    if not saes:
        raise NotFound("This run has no SAEs", next_step="Choose another run.")
    return training.name, saes


def _find_sae(library: Library, options: argparse.Namespace) -> Any:
    return _one_of(_find_saes(library, options.run)[1], options)


def _one_of(saes: list[Any], options: argparse.Namespace) -> Any:
    """The SAE of the layer that was asked for, else the first."""
    chosen = [sae for sae in saes if options.layer in (None, sae.layer)]
    if not chosen:
        raise NotFound(
            "This run has no such layer",
            f"It has the layers {', '.join(str(sae.layer) for sae in saes)}.",
        )
    return chosen[0]


def _check_json(options: argparse.Namespace) -> None:
    """Refuse a place for the result before hours of work lead to it."""
    if options.json and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        raise InvalidInput(
            "The JSON file cannot be written there",
            f"{options.json} is a folder, or its folder does not exist.",
            "Name a file in an existing folder.",
        )


def _write_json(options: argparse.Namespace, result: dict[str, Any]) -> None:
    if not options.json:
        return
    partial = options.json.with_name(options.json.name + ".partial")
    partial.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, options.json)


def _print_error(error: dict[str, Any]) -> None:
    print(f"{error['title']}.", file=sys.stderr)
    for key in ("what", "next_step"):
        if error.get(key):
            print(f"  {error[key]}", file=sys.stderr)
    if error.get("traceback"):
        print(error["traceback"], file=sys.stderr)


__all__ = ["UserError", "run"]
