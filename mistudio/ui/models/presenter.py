"""What the Models tab shows and does; no widgets, so tests need no window."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PySide6.QtCore import QObject, Signal

from mistudio import formatting
from mistudio.engine.models.methods import still_holds
from mistudio.errors import InvalidInput, UserError, explain
from mistudio.library.jobs import JobRecord
from mistudio.library.library import Library
from mistudio.library.records import Extraction, Model
from mistudio.ui.services import Services

log = logging.getLogger(__name__)

SAMPLE_ABOUT = "SmolLM2-135M-Instruct: 93 MB download, 260 MB on disk"
QUANTISED = ("q8", "q4", "q2")

# Sites as the form offers them; their names come from `engine.models.hooks`, which needs torch.
EXTRACTED_SITES = (
    ("resid_post", "Residual Stream"),
    ("mlp_out", "MLP Output"),
    ("attn_out", "Attention Output"),
    ("mlp_in", "MLP Input"),
)
SITE_SUFFIXES = {"mlp_in": "mlp.hook_in"}
HOOK_POINTS = (
    ("hook_resid_pre", "Residual stream before the block"),
    ("hook_attn_out", "What attention adds"),
    ("mlp.hook_in", "What enters the MLP, after its norm"),
    ("hook_mlp_out", "What the MLP adds"),
    ("hook_resid_post", "Residual stream after the block"),
)
_POINT = re.compile(r"blocks\.(\d+)\.(.+)")
_SITE_TITLES = {
    "hook_resid_pre": "Residual Stream (before)",
    "hook_resid_post": "Residual Stream",
    "mlp.hook_in": "MLP Input",
    "hook_mlp_out": "MLP Output",
    "hook_attn_out": "Attention Output",
}
KINDS = ("add_model", "extract", "check_quality")
_FAILED_SHOWN = 3


# --- texts ----------------------------------------------------------------------------------------


def point_name(site: str, layer: int) -> str:
    """`blocks.3.hook_resid_post`; only for the sites that can be extracted here."""
    return f"blocks.{layer}.{SITE_SUFFIXES.get(site, f'hook_{site}')}"


def layer_of(point: str) -> int:
    match = _POINT.fullmatch(point)
    return int(match[1]) if match else -1


def site_title(point: str) -> str:
    match = _POINT.fullmatch(point)
    return _SITE_TITLES.get(match[2], match[2]) if match else point


def points_text(points: Sequence[str]) -> str:
    """`Layers 1, 3 • Residual Stream`."""
    layers = sorted({layer_of(point) for point in points})
    sites = dict.fromkeys(
        _SITE_TITLES.get(match[2], match[2])
        for point in points
        if (match := _POINT.fullmatch(point))
    )
    word = "Layer" if len(layers) == 1 else "Layers"
    return f"{word} {', '.join(map(str, layers))} • {', '.join(sites)}"


def precision_text(precision: str) -> str:
    return "auto precision" if precision == "auto" else precision.upper()


# --- the page's state -----------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelItem:
    """A model with its extractions, newest first, and the names of their datasets."""

    model: Model
    extractions: tuple[Extraction, ...]
    datasets: tuple[str, ...]


@dataclass(frozen=True)
class Memory:
    """What a model's precision means here, and its memory at that precision in bytes."""

    precision: str
    weights: int
    in_use: float
    fits: bool


def memory_of(library: Library, models: Sequence[Model]) -> dict[int, Memory]:
    """By model; imports torch, so never in the window's thread. One that cannot be read is left
    out: what is wrong with it is said where it is used."""
    from mistudio import device
    from mistudio.engine.models.architecture import read_architecture
    from mistudio.engine.models.memory import plan_model
    from mistudio.jobs.loaded import chosen_precision, machine

    found, kind = {}, device.current().kind
    for model in models:
        try:
            architecture = read_architecture(library.path(model.folder))
            precision = chosen_precision(library, model)
        except (UserError, OSError) as exc:
            log.warning("%s cannot be planned for: %s", model.name, exc)
            continue
        plan = plan_model(architecture, precision, machine(library), device=kind)
        found[model.id] = Memory(precision, plan.weights, plan.memory, plan.fits)
    return found


@dataclass(frozen=True)
class Verdict:
    """What quantising did to a model, in words; `about` tells how it was measured. `warning` is
    for verdicts that must not be overlooked, else empty."""

    text: str
    tone: str
    about: str
    measured: bool = True
    warning: str = ""


_WORDS = {
    "faithful": ("as good as unquantised", "emerald"),
    "usable": ("a little worse than unquantised", "blue"),
    "degraded": ("clearly worse than unquantised", "yellow"),
    "destroyed": ("destroyed by quantising", "red"),
    "unreadable": ("cannot be judged", "yellow"),
}


def verdict_of(model: Model, precision: str) -> Verdict | None:
    """None where the precision is not a quantised one; an em dash where nothing was measured."""
    if precision not in QUANTISED:
        return None
    found = model.provenance.get("quality", {}).get(precision)
    name = precision.upper()
    if not found or not still_holds(found, precision):
        return Verdict(
            f"{name} quality: —",
            "slate",
            f"What {name} costs this model has not been measured yet. It is measured when the "
            "model is first loaded, or now with Measure.",
            False,
        )
    sentence, verdict = str(found.get("sentence", "")), str(found.get("verdict", ""))
    words, tone = _WORDS.get(verdict, ("not measured", "slate"))
    about, text = [sentence], f"{name}: {words}"
    if found.get("method"):
        about.append(f"{name} is {found['method']}.")
    if isinstance(found.get("delta"), int | float):
        text += f" (ΔCE {found['delta']:+.3f})"
        about.append(
            f"ΔCE {found['delta']:+.4f} ± {found['error']:.4f} (standard error by document): "
            f"cross-entropy {found['ce']:.3f} against {found['ce_reference']:.3f} nats per token "
            f"of the model at {found['reference'].upper()}; n = "
            f"{formatting.count(found['tokens'])} tokens in {found['documents']} documents."
        )
    bad = verdict in ("degraded", "destroyed", "unreadable")
    return Verdict(text, tone, "\n".join(about), verdict in _WORDS, f"⚠ {sentence}" if bad else "")


class ModelsPresenter(QObject):
    """The list of models, their extractions, and the jobs that make either."""

    models_changed = Signal()
    jobs_changed = Signal()
    loaded_changed = Signal()
    memory_known = Signal(object)

    def __init__(self, services: Services, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._services = services
        self.dismissed: set[int] = set()
        services.changes.changed.connect(self._on_changes_changed)

    def items(self) -> list[ModelItem]:
        """Every model, newest first."""
        library = self._services.library
        names = {
            row["id"]: row["name"]
            for row in library.rows(
                "SELECT t.id, d.name FROM tokenizations t JOIN datasets d ON d.id = t.dataset_id"
            )
        }
        items = []
        for model in library.models.all():
            extractions = tuple(library.extractions.of_model(model.id))
            datasets = tuple(names.get(e.tokenization_id, "") for e in extractions)
            items.append(ModelItem(model, extractions, datasets))
        return items

    def has_sample(self) -> bool:
        return bool(self._services.library.models.all("source = 'sample'"))

    def jobs(self) -> list[JobRecord]:
        """Active jobs of this tab, and the last ones that ended badly and were neither run again
        nor dismissed; oldest first."""
        library = self._services.library
        active = [
            job
            for job in self._services.jobs.active()
            if job.kind in KINDS and not job.params.get("plan_only")
        ]
        ended = library.jobs.all(
            "kind IN ('add_model', 'extract', 'check_quality') "
            "AND id > (SELECT COALESCE(MAX(id), 0) - 100 FROM jobs)"
        )
        failed, seen = [], []
        for job in ended:
            bad = job.status in ("failed", "interrupted")
            # Rows of earlier versions lack the settings that came later, which say nothing there.
            work = job.kind, {name: value for name, value in job.params.items() if value != {}}
            again = work in seen
            seen.append(work)
            told = job.params.get("plan_only")  # by the dialog that asked for it
            if bad and not again and not told and job.id not in self.dismissed:
                failed.append(job)
        return sorted([*active, *failed[:_FAILED_SHOWN]], key=lambda job: job.id)

    # --- commands -------------------------------------------------------------------------------

    def add(self, source: str, precision: str = "auto", code: dict[str, Any] | None = None) -> int:
        """Queue a job that adds a model. `code` is the consent to run its own program. InvalidInput
        where the text cannot be a model."""
        from mistudio.jobs.kinds import AddModel

        return self._services.jobs.submit(AddModel(checked_source(source), precision, code or {}))

    def add_sample(self) -> int:
        from mistudio.jobs.kinds import AddModel

        return self._services.jobs.submit(AddModel("sample"))

    def run_again(self, job: JobRecord) -> int:
        """An extraction that kept finished blocks goes on with them, under its own number."""
        if self._services.jobs.can_go_on(job):
            return self._services.jobs.go_on(job)
        job_id = self._services.jobs.retry(job)
        self.dismiss(job.id)
        return job_id

    def dismiss(self, job_id: int) -> None:
        """Put away; what an interrupted extraction kept is freed."""
        self.dismissed.add(job_id)
        self._services.library.drop_checkpoints(job_id)
        self.jobs_changed.emit()

    # --- memory and quality ---------------------------------------------------------------------

    def loaded(self) -> dict[int, int]:
        """Bytes of the weights that are in memory, by model."""
        from mistudio.jobs.loaded import loaded_models

        found: dict[int, int] = {}
        for entry in loaded_models():
            found[entry.model_id] = found.get(entry.model_id, 0) + entry.bytes
        return found

    def unload(self, model_id: int) -> None:
        """Free a model's memory; one that a job uses goes when that job lets go of it."""
        from mistudio.jobs.loaded import unload_model

        self._services.background.run(lambda: unload_model(model_id), self._on_unloaded)

    def _on_unloaded(self, result: object) -> None:
        self.loaded_changed.emit()

    def measure_quality(self, model_id: int) -> int:
        """Queue the job that compares a quantised model with the unquantised one."""
        from mistudio.jobs.kinds import CheckQuality

        return self._services.jobs.submit(CheckQuality(model_id))

    def ask_memory(self, models: Sequence[Model]) -> None:
        """Work out what these models take here; `memory_known` brings {model id: Memory}."""
        library = self._services.library
        self._services.background.run(
            lambda: memory_of(library, models), self._on_memory_known, self._on_memory_failed
        )

    def _on_memory_known(self, found: dict[int, Memory]) -> None:
        self.memory_known.emit(found)

    def _on_memory_failed(self, error: Exception) -> None:
        log.warning("What the models take of memory is not known: %s", error)

    def delete_refusal(self, model_id: int) -> str:
        """Why a model cannot be deleted; empty where it can."""
        library = self._services.library
        uses = [
            counted(len(found), noun)
            for noun, found in (
                ("training run", library.trainings.all("model_id = ?", (model_id,))),
                ("extraction", library.extractions.of_model(model_id)),
                ("SAE", library.saes.all("model_id = ?", (model_id,))),
            )
            if found
        ]
        if uses:
            return f"It is used by {' and '.join(uses)}. Delete those first."
        if any(job.params.get("model_id") == model_id for job in self._services.jobs.active()):
            return "A job uses it now. Wait for it, or stop it first."
        return ""

    def delete(self, model_id: int) -> None:
        """Move a model to the trash. InvalidInput where it is in use."""
        if refusal := self.delete_refusal(model_id):
            raise InvalidInput("This model is in use", refusal)
        self._services.library.discard("models", model_id)

    def extraction_refusal(self, extraction_id: int) -> str:
        """Why an extraction cannot be deleted; empty where it can."""
        library = self._services.library
        runs = library.trainings.all("extraction_id = ?", (extraction_id,))
        if runs:
            names = ", ".join(f"“{run.name}”" for run in runs[:3])
            return f"{counted(len(runs), 'training run')} learnt from it: {names}. Delete it first."
        active = self._services.jobs.active()
        if any(job.params.get("extraction_id") == extraction_id for job in active):
            return "A training uses it now. Wait for it, or stop it first."
        return ""

    def delete_extraction(self, extraction_id: int) -> None:
        if refusal := self.extraction_refusal(extraction_id):
            raise InvalidInput("These activations are in use", refusal)
        self._services.library.discard("extractions", extraction_id)

    def _on_changes_changed(self, table: str, ids: frozenset[int]) -> None:
        if table in ("models", "extractions"):
            self.models_changed.emit()
        elif table == "jobs":
            self.jobs_changed.emit()


def counted(n: int, noun: str) -> str:
    return f"{formatting.count(n)} {noun}{'' if n == 1 else 's'}"


def is_local(text: str) -> bool:
    """Whether a text names a folder or a file here rather than a repository."""
    local = bool(text) and (text[0] in "/~.\\" or re.match(r"[A-Za-z]:[\\/]", text) is not None)
    return local or text.lower().endswith(".gguf") or (bool(text) and Path(text).is_dir())


def checked_source(text: str) -> str:
    """The absolute path of a folder or GGUF file, or a repository id; InvalidInput with a sentence
    for the form."""
    from mistudio.engine.hub import is_repository_id

    text = text.strip()
    if not text:
        raise InvalidInput("Nothing given", "Type a repository or choose a folder.", field="source")
    path = Path(text).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return str(path.resolve())
        raise InvalidInput(
            "This is no model",
            f"{path.name} is neither a model's folder nor a GGUF file.",
            "Choose the folder that holds it: config.json, tokenizer and weights lie together.",
            field="source",
        )
    local = is_local(text)
    if local or not is_repository_id(text):
        raise InvalidInput(
            "There is no such model",
            f"There is nothing at {text}."
            if local
            else f"“{text}” names nothing on this computer.",
            "Check the path." if local else "A repository is written owner/name.",
            field="source",
        )
    return text


def problem_of(error: Exception) -> UserError:
    """An error for a panel: known ones in their words, a bug with its name."""
    return explain(error) or UserError(
        "Something went wrong inside miStudio",
        f"{type(error).__name__}: {error}",
        "Please report it.",
    )
