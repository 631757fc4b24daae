"""Jobs on models: bring one into the library, judge what quantising costs it."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mistudio.engine.progress import Progress
from mistudio.errors import InvalidInput
from mistudio.jobs.control import Phase
from mistudio.jobs.job import JobContext
from mistudio.jobs.loaded import (
    chosen_precision,
    forget_quality,
    loaded_bytes,
    loaded_model,
    loaded_models,
    own_model,
    precision_of,
    quality_of,
    record_quality,
    reference_losses,
    unload_model,
)
from mistudio.jobs.stages import Stage
from mistudio.library.library import Library

if TYPE_CHECKING:
    from mistudio.engine.hub import Access
    from mistudio.engine.models.architecture import Architecture
    from mistudio.engine.models.custom_code import Consent, OwnCode
    from mistudio.engine.models.hooks import HookPoint

__all__ = [
    "PRECISIONS",
    "SAMPLE",
    "SAMPLE_NAME",
    "AddModel",
    "CheckQuality",
    "add_model",
    "check_layers",
    "code_of",
    "loaded_bytes",
    "loaded_model",
    "loaded_models",
    "own_model",
    "parse_points",
    "precision_of",
    "unload_model",
]

SAMPLE = "sample"
SAMPLE_NAME = "SmolLM2-135M-Instruct"
PRECISIONS = ("auto", "fp32", "bf16", "fp16", "q8", "q4", "q2")


@dataclass(frozen=True)
class AddModel:
    """A model comes into the library: `source` is "sample", a local Hugging Face folder, a GGUF
    file, or a repository on the Hub such as `EleutherAI/pythia-70m`."""

    source: str
    precision: str = "auto"
    code: dict[str, Any] = field(default_factory=dict)
    """What was consented to (`custom_code.Consent`) of a model that brings its own program; empty:
    such a model is refused."""

    kind: ClassVar[str] = "add_model"
    lane: ClassVar[str] = "disk"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("import"),)

    def title(self, library: Library) -> str:
        name = SAMPLE_NAME if self.source == SAMPLE else Path(self.source).name
        return f"Add the model {name}"

    def run(self, context: JobContext) -> dict[str, Any]:
        stage = Stage(context, "import", IMPORT_PARTS)
        model_id = add_model(
            context.library, context.work_folder, self.source, self.precision, stage, self.code
        )
        return {"model_id": model_id}


_ADAPTER = "adapter_config.json"  # transformers would load the model that it names instead
IMPORT_PARTS = {
    "Downloading the sample model": (0.0, 0.25),
    "Unpacking the model": (0.25, 0.3),
    "Converting the model": (0.3, 0.85),
    "Checking the model": (0.85, 1.0),
    "Copying the model": (0.0, 0.6),
    "Downloading the model": (0.0, 0.85),
}


@dataclass(frozen=True)
class CheckQuality:
    """What quantising costs a model is measured on sample text, beside the unquantised model; the
    result is kept in its record. The model stays loaded."""

    model_id: int

    kind: ClassVar[str] = "check_quality"
    lane: ClassVar[str] = "compute"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("measure"),)

    def title(self, library: Library) -> str:
        model = library.models.get(self.model_id)
        return f"Compare {model.name} at {model.precision.upper()} with the unquantised model"

    def run(self, context: JobContext) -> dict[str, Any]:
        from mistudio.engine.models.loading import QUANTISED

        library, stage = context.library, Stage(context, "measure")
        record = library.models.get(self.model_id)
        precision = chosen_precision(library, record)
        if precision not in QUANTISED:
            raise InvalidInput(
                "This model is not quantised",
                f"{record.name} is loaded at {precision.upper()}: there is nothing to compare.",
                "Add it again at Q8, Q4 or Q2.",
            )
        reference = reference_losses(library, record, stage)
        forget_quality(library, self.model_id, precision)
        decoder = loaded_model(library, self.model_id, stage, reference)
        found = quality_of(library.models.get(self.model_id), precision)
        if found is None:  # it was loaded already
            found = record_quality(library, record, decoder, reference, stage)
        return {"model_id": self.model_id, "quality": found}


def parse_points(names: list[str]) -> tuple[HookPoint, ...]:
    """Hook points from their names, shallowest first, each once."""
    from mistudio.engine.models.hooks import HookPoint

    if not names:
        raise InvalidInput(
            "No layer chosen", next_step="Choose at least one layer.", field="layers"
        )
    return tuple(sorted({HookPoint.parse(name) for name in names}))


def check_layers(library: Library, model_id: int, names: list[str]) -> None:
    """Refuse layers that the model does not have, before any work is done for them."""
    model = library.models.get(model_id)
    for point in parse_points(names):
        if point.layer >= model.n_layers:
            raise InvalidInput(
                "The model has no such layer",
                f"{model.name} has the layers 0 to {model.n_layers - 1}; {point.layer} was asked "
                "for.",
                "Choose among these.",
                field="layers",
            )


def add_model(
    library: Library,
    work: Path,
    source: str,
    precision: str,
    progress: Progress,
    code: dict[str, Any] | None = None,
) -> int:
    """Check, copy or make, then commit. The sample is added only once. `code` is the consent to run
    the model's own program, where it brings one and needs it."""
    from mistudio.engine import hub
    from mistudio.engine.models import architecture, checks, gguf, loading, sample
    from mistudio.engine.models.custom_code import Consent

    if precision not in PRECISIONS:
        raise InvalidInput(
            "Unknown precision",
            f"{precision!r} is not one of {', '.join(PRECISIONS)}.",
            field="precision",
        )
    folder = work / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = Path(source).expanduser()
    copied: dict[str, tuple[int, str]] = {}
    consent = Consent.from_dict(code)
    if source == SAMPLE:
        for model in library.models.all("source = 'sample'"):
            return model.id
        library.require_space(600_000_000, "Making the sample model")
        provenance: dict[str, Any] = dict(
            sample.make_sample_model(folder, work / "download", progress)
        )
        kind, name, origin = "sample", SAMPLE_NAME, provenance["source"]
    elif path.is_file():
        kind, name, origin = "local", path.stem, str(path.resolve())
        provenance = gguf.import_gguf(path, folder, library.require_space, progress)
    elif path.exists():
        loading.check_folder(path, own_code=consent is not None)
        checks.check_sizes(path)
        copied = _copy_model(library, path, folder, progress, consent)
        kind, name, origin = "local", path.resolve().name, str(path.resolve())
        provenance = {"source": f"local folder {path.resolve()}"}
    elif hub.is_repository_id(source):
        provenance = hub.download_model(
            source, folder, library.require_space, progress, consent=consent
        )
        kind, name, origin = "hub", source.split("/")[-1], source
    else:
        raise InvalidInput(
            "There is no such model",
            f"{source!r} is neither a folder here nor a GGUF file nor a Hugging Face id.",
            "Give the path of a model folder or GGUF file, an id such as EleutherAI/pythia-70m, or "
            "`sample`.",
            field="source",
        )
    loading.check_folder(folder, own_code=consent is not None)
    # Built without weights: numbers that fit no model, and a tokenizer of another one, show here.
    found = architecture.read_architecture(folder)
    checks.check_tokenizer(folder, found.vocab_size)
    if consent is not None:
        consent = _tried(folder, consent, found)
    checks.check_tensors(folder, found, consent)
    files = checks.check_weights(folder, progress)
    checks.verify(folder, copied, files)
    provenance["weights"] = [asdict(file) for file in files]
    if consent is not None:
        provenance["code"] = consent.as_dict()
    return _commit_model(library, folder, kind, name, origin, precision, provenance)


def code_of(source: str, access: Access | None = None) -> OwnCode | None:
    """The Python program that a folder or a repository brings and needs, to be looked at; nothing
    is kept or run. None where it needs none. Raises `UnsupportedModel` where it cannot be used."""
    from mistudio.engine import hub
    from mistudio.engine.models import custom_code, loading

    path = Path(source).expanduser()
    if path.is_dir():
        if not custom_code.needs_code(loading.read_config(path)):
            return None
        return custom_code.read_folder(path, f"folder {path.resolve()}")
    if source == SAMPLE or path.is_file():
        return None
    info = hub.model_info(source, access=access)
    if not info.config or not custom_code.needs_code(loading.parse_config(info.config)):
        return None
    return hub.model_code(source, info.revision, access)


def _tried(folder: Path, consent: Consent, found: Architecture) -> Consent | None:
    """The consent, where the model in the work folder needs its own program: then it is the one
    that was consented to, it builds here (without weights), and builds what the files hold."""
    from mistudio.engine.models import custom_code, loading

    if not custom_code.needs_code(loading.read_config(folder)):
        for name in consent.files:  # transformers has its own: these would only lie there
            (folder / name).unlink(missing_ok=True)
        return None
    custom_code.try_building(folder, consent, found.n_layers, found.vocab_size)
    return consent


def _copy_model(
    library: Library, source: Path, folder: Path, progress: Progress, consent: Consent | None
) -> dict[str, tuple[int, str]]:
    """Only what a model needs: configuration, tokenizer, safetensors, and the Python files that
    were consented to. Size and SHA-256 of each file as it was read."""
    from mistudio.engine.models.custom_code import check_link
    from mistudio.engine.models.loading import MODEL_FILES

    program = consent.files if consent else {}
    files = [
        f
        for f in sorted(source.iterdir())
        if (f.suffix in MODEL_FILES and f.name != _ADAPTER) or f.name in program
    ]
    for file in files:
        check_link(source, file)
    files = [f for f in files if f.is_file()]
    total = sum(file.stat().st_size for file in files)
    library.require_space(total, f"Copying {source.name}")
    done = 0
    read = {}
    for file in files:
        digest = hashlib.sha256()
        with file.open("rb") as reader, (folder / file.name).open("wb") as writer:
            while block := reader.read(8 * 1024**2):
                progress.check()
                writer.write(block)
                digest.update(block)
                done += len(block)
                progress.report(done, total, phase="Copying the model")
        read[file.name] = file.stat().st_size, digest.hexdigest()
    return read


def _commit_model(
    library: Library,
    folder: Path,
    kind: str,
    name: str,
    origin: str,
    precision: str,
    provenance: dict[str, Any],
) -> int:
    from mistudio.engine.models import loading

    summary = loading.describe(folder)
    target = library.new_folder("models", name)
    with library.commit(folder, target):
        return library.models.add(
            name=name,
            source=kind,
            origin=origin,
            folder=target,
            precision=precision,
            n_layers=summary.n_layers,
            d_model=summary.d_model,
            parameters=summary.parameters,
            bytes=summary.bytes_on_disk,
            summary=asdict(summary),
            provenance=provenance,
        )
