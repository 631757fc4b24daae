"""`demo`, `doctor`, `list`, `login`, `logout`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from mistudio.cli.shared import Add, run_here
from mistudio.formatting import count, number, percent, short_count, size
from mistudio.library.library import Library


def add_commands(add: Add, commands: Any) -> None:
    demo = add("demo", _demo, "the whole road on the embedded sample")
    demo.add_argument("--no-window", action="store_true", help="print the report and end")
    demo.add_argument("--seed", type=int, default=0)
    add("doctor", _doctor, "device, memory, versions, library health, what to mend")
    add("list", _list, "what the library holds")

    login = add("login", _login, "remember an access token of the Hugging Face Hub (asked for)")
    login.add_argument(
        "--unchecked", action="store_true", help="do not ask the Hub whose token it is"
    )
    add("logout", _logout, "forget the access token")


def _demo(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.jobs.kinds import Demo
    from mistudio.report import demo_report

    print(
        "The whole road on the embedded sample: model, text, activations, SAE, features, steering."
    )
    result = run_here(library, Demo(seed=options.seed))
    print(demo_report(result, str(library.root)))
    return result


def show_results(options: argparse.Namespace, result: dict[str, Any]) -> int:
    """Open the window on the demo's features, where there is a display and it is wanted."""
    if options.no_window or not _has_display():
        return 0
    from mistudio.app import main as window

    return window([*window_arguments(options)], ("features", {"sae_id": result["sae_id"]}))


def _has_display() -> bool:
    if sys.platform in ("win32", "darwin"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def window_arguments(options: argparse.Namespace) -> Iterator[str]:
    if options.library:
        yield from ("--library", str(options.library))


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
