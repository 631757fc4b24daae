"""`dataset` and `tokenizer`."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mistudio.cli.shared import Add, find, not_negative, run_here
from mistudio.engine.datasets.token_settings import PADDINGS, TRUNCATIONS
from mistudio.formatting import count, percent, short_count, size
from mistudio.library.library import Library


def add_commands(add: Add, commands: Any) -> None:
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

    sub = add("search", _dataset_search, "look for datasets on the Hugging Face Hub", dataset)
    sub.add_argument("text", metavar="TEXT")
    sub.add_argument("--limit", type=not_negative, default=20, metavar="N")
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


def _dataset_add(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.jobs.kinds import AddDataset, AddSampleDataset

    if options.path == "sample":
        result = run_here(library, AddSampleDataset())
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
        result = run_here(library, job)
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

    dataset = find(library.datasets, options.dataset)
    model = find(library.models, options.model) if options.model else None
    own = find(library.tokenizers, options.tokenizer) if options.tokenizer else None
    settings = {
        "max_length": options.max_length,
        "padding": options.padding,
        "truncation": options.truncation,
        "add_special_tokens": not options.no_special_tokens,
        "attention_mask": not options.no_attention_mask,
        "heldout_share": options.heldout_share,
    }
    job = Tokenize(dataset.id, model.id if model else None, own.id if own else None, settings)
    result = run_here(library, job)
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

    dataset = find(library.datasets, options.dataset)
    run_here(library, AnalyseDataset(dataset.id, options.again))
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
    result = run_here(library, job)
    dataset = library.datasets.get(result["dataset_id"])
    left_out = f" ({count(result['skipped'])} bad rows left out)" if result["skipped"] else ""
    kept = "the first " if dataset.link else ""
    print(
        f"Dataset {dataset.id}: {dataset.name}, {kept}{count(dataset.documents)} documents, "
        f"{count(dataset.characters)} characters{left_out}"
    )
    return {**result, "characters": dataset.characters}


def _dataset_remove(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    dataset = find(library.datasets, options.dataset)
    library.discard("datasets", dataset.id)
    print(f"Moved {dataset.name} to the trash (kept seven days).")
    return {"dataset_id": dataset.id}


def _dataset_rename(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    dataset = find(library.datasets, options.dataset)
    library.datasets.rename(dataset.id, options.name)
    name = library.datasets.get(dataset.id).name
    print(f"{dataset.name} is now called {name}.")
    return {"dataset_id": dataset.id, "name": name}


def _dataset_provenance(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    dataset = find(library.datasets, options.dataset)
    record = library.datasets.provenance(dataset.id)
    text = json.dumps(record, indent=2, ensure_ascii=False)
    if options.out:
        Path(options.out).expanduser().write_text(text + "\n", encoding="utf-8")
        print(f"Wrote {options.out}")
    else:
        print(text)
    return record


def _tokenizer_add(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.jobs.kinds import AddTokenizer

    source = options.source
    if Path(source).expanduser().exists():
        source = os.path.abspath(Path(source).expanduser())
    result = run_here(library, AddTokenizer(source, options.name))
    record = library.tokenizers.get(result["tokenizer_id"])
    print(f"Tokenizer {record.id}: {record.name}, {count(record.vocab_size)} tokens")
    return result


def _tokenizer_remove(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    tokenizer = find(library.tokenizers, options.tokenizer)
    library.discard("tokenizers", tokenizer.id)
    print(f"Moved {tokenizer.name} to the trash (kept seven days).")
    return {"tokenizer_id": tokenizer.id}
