"""Jobs on finished dictionaries: export them, import others'."""

from __future__ import annotations

import glob
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import psutil

import mistudio
from mistudio.engine.progress import SILENT, Progress
from mistudio.errors import Incompatible, InvalidInput, NotFound
from mistudio.formatting import count
from mistudio.jobs.control import Phase
from mistudio.jobs.job import JobContext
from mistudio.jobs.stages import Stage
from mistudio.library.library import Library, flush_tree
from mistudio.library.records import Model, Sae

if TYPE_CHECKING:
    from mistudio.engine.sae.formats.common import ImportedSae
    from mistudio.engine.sae.formats.reading import Found
    from mistudio.engine.sae.site import Site


@dataclass(frozen=True)
class Export:
    """The SAEs of a run, or the one SAE `sae_id`, are written to a folder outside the library."""

    training_id: int | None
    folder: str
    format: str = "saelens"
    sae_id: int | None = None

    kind: ClassVar[str] = "export"
    lane: ClassVar[str] = "disk"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("export"),)

    def title(self, library: Library) -> str:
        return f"Export {self._name(library)} as {self.format}"

    def _name(self, library: Library) -> str:
        if self.training_id is not None:
            return library.trainings.get(self.training_id).name
        return sae_title(library, library.saes.get(self.sae_id or 0))

    def run(self, context: JobContext) -> dict[str, Any]:
        folder = Path(self.folder).expanduser()
        saes = saes_of(context.library, self.training_id, self.sae_id)
        return {"folders": export(context.library, saes, self.format, folder, context)}


@dataclass(frozen=True)
class ImportSae:
    """Dictionaries that another library wrote come into this one, beside those trained here.

    `path` is a folder or file in any format of `engine/sae/formats`; all that lie in it are
    imported, or none. `model_id` is the model they belong to (None: the one that the files name,
    or the only one there is). `layer` and `site` say where they belong, where the files do not.
    """

    path: str
    model_id: int | None = None
    name: str = ""
    format: str | None = None
    layer: int | None = None
    site: str | None = None

    kind: ClassVar[str] = "import_sae"
    lane: ClassVar[str] = "disk"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("import"),)

    def title(self, library: Library) -> str:
        return f"Import {self.name or Path(self.path).name}"

    def run(self, context: JobContext) -> dict[str, Any]:
        context.report(0, 1, phase="import")
        saes = import_saes(context.library, context.work_folder, self, context)
        return {"sae_ids": [sae.id for sae in saes]}


@dataclass(frozen=True)
class DownloadSae:
    """SAEs of a repository on the Hub come into the library: `files` are the names of all that they
    consist of, at a `revision` (a commit's hash; empty: the newest). `label` is how the row and an
    SAE without a `name` are called. The rest is as in `ImportSae`."""

    repository: str
    revision: str
    files: list[str]
    label: str = ""
    model_id: int | None = None
    name: str = ""
    layer: int | None = None
    site: str | None = None

    kind: ClassVar[str] = "download_sae"
    lane: ClassVar[str] = "disk"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("download", 80), Phase("import", 20))

    def title(self, library: Library) -> str:
        return f"Import {self.name or self.label or self.repository} from the Hub"

    def run(self, context: JobContext) -> dict[str, Any]:
        from mistudio.credentials import access_for
        from mistudio.engine.hub.saes import download_saes

        # The repository's name is part of the path: Gemma Scope says by it which model it is for.
        folder = context.work_folder / "hub" / self.repository.split("/")[-1]
        origin = download_saes(
            self.repository,
            self.revision,
            self.files,
            folder,
            context.library.require_space,
            access_for(self.repository),
            Stage(context, "download"),
        )
        name = self.name or self.label or self.repository.split("/")[-1]
        job = ImportSae(str(folder), self.model_id, name, None, self.layer, self.site)
        stage = Stage(context, "import")
        saes = import_saes(context.library, context.work_folder, job, stage, origin)
        return {"sae_ids": [sae.id for sae in saes]}


# --- export -------------------------------------------------------------------------------------


def saes_of(library: Library, training_id: int | None, sae_id: int | None) -> list[Sae]:
    """The one SAE, or those of the run. NotFound where there are none."""
    saes = [library.saes.get(sae_id)] if sae_id is not None else []
    if not saes and training_id is not None:
        saes = library.saes.of_training(training_id)
    if not saes:
        raise NotFound("This run has no SAEs", next_step="Choose another run.")
    return saes


def sae_title(library: Library, sae: Sae) -> str:
    """What a person knows an SAE by: its name, or its run's and its place."""
    if sae.name:
        return sae.name
    training = library.trainings.find(sae.training_id) if sae.training_id else None
    return f"{training.name}, {sae.hook_point}" if training else sae.hook_point


def export(
    library: Library,
    saes: list[Sae],
    format: str,
    folder: Path,
    progress: Progress = SILENT,
) -> list[str]:
    """Write SAEs in a format that others read, complete or not at all, each read back and
    compared. Returns what was written, one folder or file each."""
    from mistudio.engine.sae.formats.writing import check_format, export_sae

    check_format(format)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidInput(
            "The target is not an empty folder",
            f"{folder} already holds something.",
            "Choose a new or empty folder.",
            field="folder",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    _clear_dead_partials(folder)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        written = []
        for number, sae in enumerate(saes):
            progress.report(number, len(saes))
            progress.check()
            written.append(export_sae(library.path(sae.folder), partial, format))
        progress.check()
        flush_tree(partial)
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [str(folder / place.relative_to(partial)) for place in written]


def _clear_dead_partials(folder: Path) -> None:
    """What exports to the same place left when their process was killed."""
    for partial in folder.parent.glob(f".{glob.escape(folder.name)}.partial-*"):
        owner = partial.name.rpartition("-")[2]
        if owner.isdigit() and (int(owner) == os.getpid() or not psutil.pid_exists(int(owner))):
            shutil.rmtree(partial, ignore_errors=True)


# --- import -------------------------------------------------------------------------------------


def import_saes(
    library: Library,
    work: Path,
    job: ImportSae,
    progress: Progress = SILENT,
    origin: dict[str, Any] | None = None,
) -> list[Sae]:
    """Read, check against the model, save in the library's own form, commit: all or none.

    The files are only read. Latents keep the unit that their own library gives them. `origin` says
    where files were fetched from that lie at `path` only for now.
    """
    from mistudio.engine.sae.formats.reading import find_saes

    path = Path(job.path).expanduser()
    found = find_saes(path, format=job.format)
    library.require_space(_bytes(found), "Importing these SAEs")
    if job.model_id is not None:
        library.models.get(job.model_id)  # a clear refusal before anything is read
    shutil.rmtree(work / "saes", ignore_errors=True)
    base = job.name or path.resolve().name
    sources: dict[str, Path] = {}
    rows: list[dict[str, Any]] = []
    for number, entry in enumerate(found):
        progress.check()
        progress.report(number, len(found))
        read = entry.read()
        model = _model_of(library, job, read)
        site = _site_of(job, read)
        _check_fit(model, read, site)
        name = base if len(found) == 1 else f"{base} {site.name}"
        folder = work / "saes" / str(number)
        provenance = _provenance(read, path, origin)
        _save(folder, read, site, model, provenance)
        target = library.new_folder("saes", name)
        sources[target] = folder
        rows.append(_row(library, read, site, model, target, name, provenance))
    with library.commit_all(sources):
        ids = [library.saes.add(**row) for row in rows]
    return [library.saes.get(sae_id) for sae_id in ids]


def _bytes(found: list[Found]) -> int:
    """Of the files that will be kept, in float32: twice what half-precision files take."""
    files = [
        file
        for entry in found
        for file in ([entry.path] if entry.path.is_file() else entry.path.rglob("*"))
        if file.suffix in (".safetensors", ".npz", ".pt", ".pth")
    ]
    return 2 * sum(file.stat().st_size for file in files)


def _model_of(library: Library, job: ImportSae, read: ImportedSae) -> Model:
    """The model that was named, else the one that the files name, else the only one there is."""
    if job.model_id is not None:
        return library.models.get(job.model_id)
    models = library.models.all()
    named = [m for m in models if same_name(read.model_name, m.name, m.origin)]
    candidates = named or models
    if len(candidates) == 1:
        return candidates[0]
    if not models:
        raise NotFound(
            "There is no model for this SAE",
            f"It belongs to {read.model_name or 'a model that its files do not name'}, and the "
            "library has no model yet.",
            "Add its model first (`mistudio model add`).",
        )
    raise InvalidInput(
        "Which model does this SAE belong to?",
        f"Its files name {read.model_name or 'none'}; the library has "
        f"{', '.join(f'{m.id} {m.name!r}' for m in candidates)}.",
        "Name the model (`--model M`).",
        field="model",
    )


def same_name(wanted: str, *names: str) -> bool:
    """Whether a model's name is the same but for its author, case and `-small`, as in gpt2."""

    def bare(name: str) -> str:
        return re.sub(r"-small$", "", name.rstrip("/").split("/")[-1].lower())

    return bool(wanted) and bare(wanted) in {bare(name) for name in names}


def _site_of(job: ImportSae, read: ImportedSae) -> Site:
    """Where the files say it belongs, else where the user says. A contradiction is refused."""
    from mistudio.engine.models.hooks import HookPoint
    from mistudio.engine.sae.site import Site

    known_layer = read.site.layer if read.site else read.layer
    if job.layer is not None and known_layer is not None and job.layer != known_layer:
        raise _contradiction(read, f"layer {known_layer}", f"layer {job.layer}")
    if read.site is not None:
        if job.site is not None and job.site != read.site.input.site:
            raise _contradiction(read, read.site.input.site, job.site)
        return read.site
    layer = job.layer if job.layer is not None else known_layer
    if layer is None or job.site is None:
        missing = [
            option
            for option, value in (("--layer N", layer), ("--site NAME", job.site))
            if value is None
        ]
        raise InvalidInput(
            "Where does this SAE belong?",
            f"{read.path} does not say which activations it reads.",
            f"Say it with {' and '.join(missing)}.",
            field="site" if job.site is None else "layer",
        )
    return Site.at(HookPoint(job.site, layer))


def _contradiction(read: ImportedSae, theirs: str, given: str) -> InvalidInput:
    return InvalidInput(
        "This SAE belongs elsewhere",
        f"{read.path} says {theirs}; {given} was asked for.",
        "Leave it out: the files know.",
        field="site",
    )


def _check_fit(model: Model, read: ImportedSae, site: Site) -> None:
    widths = (read.dictionary.d_in, read.dictionary.d_out)
    deepest = max(site.input.layer, site.output.layer)
    if why := misfit(model, widths, deepest, read.model_name):
        raise Incompatible(
            "This SAE belongs to another model",
            f"{read.path}: {why}",
            "Choose the model it was trained on, or add it first.",
        )


def misfit(model: Model, widths: Iterable[int], deepest: int | None, named: str = "") -> str:
    """Why an SAE of these widths at a layer (None: not known yet) is none of the model's; "" where
    it may be."""
    if set(widths) != {model.d_model}:
        return (
            f"It is for activations of {_enumerated(set(widths))} channels"
            f"{f' ({named})' if named else ''}; {model.name} has {count(model.d_model)}."
        )
    if deepest is not None and deepest >= model.n_layers:
        return f"It is for layer {deepest}; {model.name} has the layers 0 to {model.n_layers - 1}."
    return ""


def _enumerated(widths: set[int]) -> str:
    return " and ".join(count(width) for width in sorted(widths))


def _save(
    folder: Path, read: ImportedSae, site: Site, model: Model, provenance: dict[str, Any]
) -> None:
    from mistudio.engine.sae.files import save_sae
    from mistudio.jobs.training import public_name

    details = read.details
    context = details.get("context_size")
    save_sae(
        read.dictionary,
        folder,
        site=site,
        model_name=public_name(model),
        hf_hook_name=str(details.get("hf_hook_name") or ""),
        hf_hook_name_out=str(details.get("hf_hook_name_out") or ""),
        context=context if isinstance(context, int) and 0 < context <= 2**20 else 128,
        prepend_bos=bool(details.get("prepend_bos")),
        training_architecture=str(details.get("training_architecture") or ""),
        record={"provenance": provenance},
        version=mistudio.__version__,
        unit_decoder=False,
    )


def _provenance(read: ImportedSae, path: Path, origin: dict[str, Any] | None) -> dict[str, Any]:
    """Of a download the place in the repository, not the one it was fetched to."""
    place = str(read.path.resolve())
    if origin:
        place = read.path.resolve().relative_to(path.resolve()).as_posix()
    return {
        **(origin or {}),
        "path": place,
        "format": read.format,
        "model": read.model_name,
        "notes": list(read.notes),
        "details": read.details,
    }


def _row(
    library: Library,
    read: ImportedSae,
    site: Site,
    model: Model,
    target: str,
    name: str,
    provenance: dict[str, Any],
) -> dict[str, Any]:
    from mistudio.engine.sae.activation import TopK
    from mistudio.engine.sae.files import wiring_of

    activation = read.dictionary.activation
    trained_for = read.details.get("k")
    if isinstance(activation, TopK):
        k = float(activation.k)
    else:
        is_number = isinstance(trained_for, int | float) and trained_for > 0
        k = float(trained_for) if is_number and trained_for is not None else 0.0
    return {
        "training_id": None,
        "model_id": model.id,
        "hook_point": site.input.name,
        "hook_point_out": site.output.name,
        "layer": site.layer,
        "folder": target,
        "architecture": activation.name,
        "wiring": wiring_of(read.dictionary, site),
        "d_in": read.dictionary.d_in,
        "d_sae": read.dictionary.d_sae,
        "k": k,
        "name": _free_name(library, name),
        "source": "imported",
        "provenance": provenance,
    }


def _free_name(library: Library, name: str) -> str:
    """`name`, or with a number behind it where another imported SAE or a run has it."""
    taken = {sae.name.lower() for sae in library.saes.imported()}
    taken |= {training.name.lower() for training in library.trainings.all()}
    number, free = 2, name
    while free.lower() in taken:
        free, number = f"{name} ({number})", number + 1
    return free
