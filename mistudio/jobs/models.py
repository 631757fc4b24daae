"""Jobs on models: bring one into the library; the one model kept loaded."""

from __future__ import annotations

import gc
import shutil
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mistudio import device
from mistudio.engine.progress import SILENT, Progress
from mistudio.errors import InvalidInput
from mistudio.jobs.control import Phase
from mistudio.jobs.job import JobContext
from mistudio.jobs.stages import Stage
from mistudio.library.library import Library
from mistudio.library.records import Model

if TYPE_CHECKING:
    from mistudio.engine.models.hooks import HookedDecoder, HookPoint

SAMPLE = "sample"
SAMPLE_NAME = "SmolLM2-135M-Instruct"
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class AddModel:
    """A model comes into the library: `source` is "sample", a local Hugging Face folder, or a
    repository on the Hub such as `EleutherAI/pythia-70m`."""

    source: str
    precision: str = "auto"

    kind: ClassVar[str] = "add_model"
    lane: ClassVar[str] = "disk"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("import"),)

    def title(self, library: Library) -> str:
        name = SAMPLE_NAME if self.source == SAMPLE else Path(self.source).name
        return f"Add the model {name}"

    def run(self, context: JobContext) -> dict[str, Any]:
        stage = Stage(context, "import", IMPORT_PARTS)
        model_id = add_model(
            context.library, context.work_folder, self.source, self.precision, stage
        )
        return {"model_id": model_id}


IMPORT_PARTS = {
    "Downloading the sample model": (0.0, 0.25),
    "Unpacking the model": (0.25, 0.3),
    "Converting the model": (0.3, 0.85),
    "Checking the model": (0.85, 1.0),
    "Copying the model": (0.0, 0.9),
    "Downloading the model": (0.0, 0.95),
}


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


def add_model(library: Library, work: Path, source: str, precision: str, progress: Progress) -> int:
    """Check, copy or make, then commit. The sample is added only once."""
    from mistudio.engine import hub
    from mistudio.engine.models import loading, sample

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
    if source == SAMPLE:
        for model in library.models.all("source = 'sample'"):
            return model.id
        library.require_space(600_000_000, "Making the sample model")
        provenance: dict[str, Any] = dict(
            sample.make_sample_model(folder, work / "download", progress)
        )
        kind, name, origin = "sample", SAMPLE_NAME, provenance["source"]
    elif path.exists():
        loading.check_folder(path)
        _copy_model(library, path, folder, progress)
        kind, name, origin = "local", path.resolve().name, str(path.resolve())
        provenance = {"source": f"local folder {path.resolve()}"}
    elif hub.is_repository_id(source):
        provenance = hub.download_model(source, folder, library.require_space, progress)
        kind, name, origin = "hub", source.split("/")[-1], source
    else:
        raise InvalidInput(
            "There is no such model",
            f"{source!r} is neither a folder here nor a Hugging Face repository id.",
            "Give the path of a model folder, an id such as EleutherAI/pythia-70m, or `sample`.",
            field="source",
        )
    loading.check_folder(folder)
    return _commit_model(library, folder, kind, name, origin, precision, provenance)


def _copy_model(library: Library, source: Path, folder: Path, progress: Progress) -> None:
    """Only what a model needs: configuration, tokenizer, safetensors."""
    wanted = (".json", ".safetensors", ".model", ".txt", ".jinja")
    files = [f for f in sorted(source.iterdir()) if f.is_file() and f.suffix in wanted]
    total = sum(file.stat().st_size for file in files)
    library.require_space(total, f"Copying {source.name}")
    done = 0
    for file in files:
        with file.open("rb") as reader, (folder / file.name).open("wb") as writer:
            while block := reader.read(8 * 1024**2):
                progress.check()
                writer.write(block)
                done += len(block)
                progress.report(done, total, phase="Copying the model")


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


# --- the loaded model ---------------------------------------------------------------------------


_lock = threading.Lock()
_loaded: tuple[tuple[str, str], HookedDecoder] | None = None


def loaded_model(library: Library, model_id: int, progress: Progress = SILENT) -> HookedDecoder:
    """The model, kept in memory until another one is asked for. One at a time, as the compute
    lane runs one job at a time."""
    global _loaded
    record: Model = library.models.get(model_id)
    key = (str(library.path(record.folder)), record.precision)
    with _lock:
        if _loaded is None or _loaded[0] != key:
            _loaded = None
            gc.collect()
            _loaded = (key, own_model(library, model_id, progress))
        return _loaded[1]


def loaded_bytes() -> int:
    """What the weights of the loaded model take."""
    with _lock:
        if _loaded is None:
            return 0
        network = _loaded[1].model
    return sum(weight.numel() * weight.element_size() for weight in network.parameters())


def own_model(library: Library, model_id: int, progress: Progress = SILENT) -> HookedDecoder:
    """The model, freshly loaded for a caller who frees it by dropping it."""
    from mistudio.engine.models import loading

    record: Model = library.models.get(model_id)
    return loading.load_model(
        library.path(record.folder),
        record.precision,  # type: ignore[arg-type]
        device.current().kind,
        progress,
    )


def unload_model() -> None:
    """Free the model's memory."""
    global _loaded
    with _lock:
        _loaded = None
    gc.collect()
    device.give_back()


def precision_of(model: HookedDecoder) -> str:
    """The precision a loaded model computes in, by our short names."""
    return {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}.get(
        str(model.dtype), str(model.dtype)
    )
