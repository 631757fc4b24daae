"""What the Models tab shows and does; no widgets, so tests need no window."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PySide6.QtCore import QObject, Signal

from mistudio import formatting
from mistudio.errors import InvalidInput, UserError, explain
from mistudio.library.jobs import JobRecord
from mistudio.library.library import Library
from mistudio.library.records import Dataset, Extraction, Model
from mistudio.ui.services import Services
from mistudio.ui.times import seconds_between

PRECISIONS = (
    ("auto", "Auto (best for this machine)"),
    ("fp32", "FP32"),
    ("bf16", "BF16"),
    ("fp16", "FP16"),
    ("q8", "Q8 (8-bit)"),
    ("q4", "Q4 (4-bit)"),
    ("q2", "Q2 (2-bit)"),
)
QUANTISED = ("q8", "q4", "q2")
QUANTISED_REASON = "Quantised loading is not in this version"

# Sites as the form offers them; their names come from `engine.models.hooks`, which needs torch.
EXTRACTED_SITES = (
    ("resid_post", "Residual Stream"),
    ("mlp_out", "MLP Output"),
    ("attn_out", "Attention Output"),
)
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
KINDS = ("add_model", "extract")
MOST_BLOCKS = 40  # lines of the architecture viewer; more would be one widget too many each
_FAILED_SHOWN = 3


# --- texts ----------------------------------------------------------------------------------------


def point_name(site: str, layer: int) -> str:
    """`blocks.3.hook_resid_post`; only for the sites that can be extracted here."""
    return f"blocks.{layer}.hook_{site}"


def layer_of(point: str) -> int:
    match = _POINT.fullmatch(point)
    return int(match[1]) if match else -1


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


def heads_text(summary: dict[str, Any]) -> str:
    """`9 (3 KV)`; without the second number where every head has keys of its own."""
    heads, kv = summary.get("n_heads") or 0, summary.get("n_kv_heads") or 0
    if not heads:
        return "—"
    return f"{heads}" if kv in (0, heads) else f"{heads} ({kv} KV)"


@dataclass(frozen=True)
class Module:
    """One line of the architecture viewer."""

    index: str
    kind: str
    details: str


def modules(summary: dict[str, Any], head_dim: int | None) -> list[Module]:
    """The parts of a decoder in the order of its forward pass, from what its files say."""
    width, vocabulary = summary["d_model"], summary["vocab_size"]
    heads, kv = summary["n_heads"], summary["n_kv_heads"]
    attention = f"Attention: {heads} heads"
    if kv != heads:
        attention += f", {kv} key/value heads"
    if head_dim:
        attention += f" × {head_dim} dims"
    block = f"{attention} | MLP: {width} → {summary['d_mlp']} → {width}"
    output = f"Shape {width} × {vocabulary}"
    if summary["tied_embeddings"]:
        output += ", tied to the embedding (counted once)"
    count = summary["n_layers"]
    lines = [Module("0", "Embedding", f"Shape {vocabulary} × {width}")]
    if count <= MOST_BLOCKS:
        lines += [Module(str(i + 1), f"TransformerBlock_{i}", block) for i in range(count)]
    else:
        lines.append(Module("1", "TransformerBlock_0", block))
        lines.append(Module("…", f"_1 to _{count - 2}", "The same"))
        lines.append(Module(str(count), f"TransformerBlock_{count - 1}", block))
    lines.append(Module(str(count + 1), "FinalNorm", f"Shape {width}"))
    lines.append(Module(str(count + 2), "Output", output))
    return lines


def read_head_dim(folder: Path, summary: dict[str, Any]) -> int | None:
    """Width of one attention head: what config.json says, else the usual share of the model's."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
        stated = config.get("head_dim") or (config.get("text_config") or {}).get("head_dim")
    except (OSError, ValueError, AttributeError):
        stated = None
    if isinstance(stated, int):
        return stated
    heads = summary.get("n_heads") or 0
    return summary["d_model"] // heads if heads and summary["d_model"] % heads == 0 else None


# --- the page's state -----------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelItem:
    """A model with its extractions, newest first, and the names of their datasets."""

    model: Model
    extractions: tuple[Extraction, ...]
    datasets: tuple[str, ...]


class ModelsPresenter(QObject):
    """The list of models, their extractions, and the jobs that make either."""

    models_changed = Signal()
    jobs_changed = Signal()

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
        active = [job for job in self._services.jobs.active() if job.kind in KINDS]
        ended = library.jobs.all(
            "kind IN ('add_model', 'extract') "
            "AND id > (SELECT COALESCE(MAX(id), 0) - 100 FROM jobs)"
        )
        failed, seen = [], []
        for job in ended:
            bad = job.status in ("failed", "interrupted")
            again = (job.kind, job.params) in seen
            seen.append((job.kind, job.params))
            if bad and not again and job.id not in self.dismissed:
                failed.append(job)
        return sorted([*active, *failed[:_FAILED_SHOWN]], key=lambda job: job.id)

    # --- commands -------------------------------------------------------------------------------

    def add(self, source: str, precision: str = "auto") -> int:
        """Queue a job that adds a model. InvalidInput where the text cannot be one."""
        from mistudio.jobs.kinds import AddModel

        return self._services.jobs.submit(AddModel(checked_source(source), precision))

    def add_sample(self) -> int:
        from mistudio.jobs.kinds import AddModel

        return self._services.jobs.submit(AddModel("sample"))

    def run_again(self, job: JobRecord) -> int:
        job_id = self._services.jobs.retry(job)
        self.dismiss(job.id)
        return job_id

    def dismiss(self, job_id: int) -> None:
        self.dismissed.add(job_id)
        self.jobs_changed.emit()

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


def checked_source(text: str) -> str:
    """A folder's absolute path or a repository id; InvalidInput with a sentence for the form."""
    from mistudio.engine.hub import is_repository_id

    text = text.strip()
    if not text:
        raise InvalidInput("Nothing given", "Type a repository or choose a folder.", field="source")
    path = Path(text).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if path.is_file():
        raise InvalidInput(
            "This is a file",
            f"{path.name} is a file.",
            "Choose the folder that holds it: config.json, tokenizer and weights lie together.",
            field="source",
        )
    local = text[0] in "/~.\\" or re.match(r"[A-Za-z]:[\\/]", text)
    if local or not is_repository_id(text):
        raise InvalidInput(
            "There is no such model",
            f"There is no folder {text}." if local else f"“{text}” names no folder here.",
            "Check the path." if local else "A repository is written owner/name.",
            field="source",
        )
    return text


# --- extraction -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExtractionPlan:
    """What an extraction would take. `exact` is False where the dataset has not been tokenised for
    the model yet: tokens and bytes are upper bounds then. `refusal` says why it cannot start."""

    tokens: int
    exact: bool
    bytes: int
    free: int
    seconds: float | None = None
    refusal: str = ""


@dataclass(frozen=True)
class ExtractionForm:
    """What the dialog asks for."""

    dataset_id: int
    hook_points: tuple[str, ...]
    max_tokens: int = 500_000
    context: int = 128
    batch_windows: int = 8


class ExtractPresenter(QObject):
    """The plan of an extraction of one model, and starting it."""

    plan_ready = Signal(object)
    plan_failed = Signal(object)

    def __init__(self, services: Services, model: Model, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._services = services
        self.model = model
        self._wanted: ExtractionForm | None = None
        self._busy = False

    def exists(self) -> bool:
        return self._services.library.models.find(self.model.id) is not None

    def datasets(self) -> list[Dataset]:
        return self._services.library.datasets.all()

    def running_job(self) -> JobRecord | None:
        """An extraction of this model that this process runs or queues."""
        for job in self._services.jobs.active():
            if job.kind == "extract" and job.params.get("model_id") == self.model.id:
                return job if self._services.jobs.owns(job.id) else None
        return None

    def plan(self, form: ExtractionForm) -> None:
        """Work the plan out in the background; `plan_ready` brings (form, plan). While one is
        worked out, only the newest of later forms is kept."""
        self._wanted = form
        if not self._busy:
            self._next_plan()

    def _next_plan(self) -> None:
        form, self._wanted = self._wanted, None
        if form is None:
            return
        self._busy = True
        library, model = self._services.library, self.model
        self._services.background.run(
            lambda: (form, plan_extraction(library, model, form)), self._on_planned, self._on_failed
        )

    def _on_planned(self, result: tuple[ExtractionForm, ExtractionPlan]) -> None:
        self._busy = False
        if self._wanted is None:
            self.plan_ready.emit(result)
        else:
            self._next_plan()

    def _on_failed(self, error: Exception) -> None:
        self._busy = False
        if self._wanted is None:
            self.plan_failed.emit(error)
        else:
            self._next_plan()

    def start(self, form: ExtractionForm) -> int:
        from mistudio.jobs.kinds import Extract

        return self._services.jobs.submit(
            Extract(
                model_id=self.model.id,
                dataset_id=form.dataset_id,
                hook_points=list(form.hook_points),
                max_tokens=form.max_tokens,
                context=form.context,
                batch_windows=form.batch_windows,
            )
        )


def plan_extraction(library: Library, model: Model, form: ExtractionForm) -> ExtractionPlan:
    """Tokens, disk and time of an extraction; imports torch, so never in the GUI thread."""
    from mistudio.engine.activations.store import estimate_bytes
    from mistudio.engine.datasets.tokenizers import hash_tokenizer
    from mistudio.engine.datasets.tokens import TokenStore
    from mistudio.jobs.tokenizing import PACKED

    dataset = library.datasets.get(form.dataset_id)
    wanted = hash_tokenizer(library.path(model.folder))
    found = [
        tokenization
        for tokenization in library.tokenizations.of_dataset(dataset.id)
        if tokenization.tokenizer_hash == wanted and tokenization.settings == PACKED.key()
    ]
    refusal = ""
    if found:
        tokens = min(form.max_tokens, found[0].tokens)
        store = TokenStore(library.path(found[0].folder))
        try:
            store.train.require_windows(form.context, 8, "Extraction")
            store.heldout.require_windows(form.context, 2, "Judging the result")
        except InvalidInput as exc:
            refusal = f"{exc.what} {exc.next_step}"
    else:
        tokens = min(form.max_tokens, dataset.bytes)  # a token is at least a byte
    needed = estimate_bytes(tokens, [model.d_model] * len(form.hook_points))
    free = shutil.disk_usage(library.root).free
    if free < needed * 1.1:  # as Library.require_space will judge
        refusal = (
            f"Not enough disk space: {formatting.size(needed)} are needed and a tenth more as "
            f"headroom, {formatting.size(free)} are free where the library lies. Choose fewer "
            "tokens or layers, or free some space."
        )
    return ExtractionPlan(
        tokens, bool(found), needed, free, _seconds(library, model, form, tokens), refusal
    )


def _seconds(library: Library, model: Model, form: ExtractionForm, tokens: int) -> float | None:
    """By the speed of this model's last extraction; a forward pass ends at the deepest layer."""
    for job in library.jobs.all("kind = 'extract' AND status = 'finished'"):
        took = seconds_between(job.started_at, job.ended_at)
        if job.params.get("model_id") != model.id or not took or not job.result.get("tokens"):
            continue
        before = 1 + max(layer_of(point) for point in job.params["hook_points"])
        now = 1 + max((layer_of(point) for point in form.hook_points), default=0)
        return took * tokens / job.result["tokens"] * now / before
    return None


def problem_of(error: Exception) -> UserError:
    """An error for a panel: known ones in their words, a bug with its name."""
    return explain(error) or UserError(
        "Something went wrong inside miStudio",
        f"{type(error).__name__}: {error}",
        "Please report it.",
    )
