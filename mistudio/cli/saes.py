"""`export`, `import` and `sae`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mistudio.cli.shared import RUN_HELP, SITES, Add, find, find_saes, one_of, run_here
from mistudio.errors import InvalidInput
from mistudio.formatting import count
from mistudio.library.library import Library


def add_commands(add: Add, commands: Any) -> None:
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


def _export(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.jobs.kinds import Export

    _, saes = find_saes(library, options.run)
    target = str(options.to.expanduser().resolve())
    if options.layer is not None or saes[0].training_id is None:
        job = Export(None, target, options.format, one_of(saes, options).id)
    else:
        job = Export(saes[0].training_id, target, options.format)
    result = run_here(library, job)
    for folder in result["folders"]:
        print(folder)
    return {**result, "format": options.format}


def _import(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.jobs.kinds import ImportSae

    model = find(library.models, options.model) if options.model else None
    job = ImportSae(
        str(Path(options.path).expanduser().resolve()),
        model.id if model else None,
        options.name,
        options.format,
        options.layer,
        options.site,
    )
    result = run_here(library, job)
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
    _, saes = find_saes(library, f"sae:{wanted}" if wanted.isdigit() else wanted)
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
