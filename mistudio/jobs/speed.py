"""The job that measures how fast a training would go, in about two seconds beside loading.

It runs in the lane of whatever uses the device: never beside a training. What it found stays in
its row, and whoever asks for the same run again finds it there by `speed_key`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mistudio.engine.training.config import Plan, TrainingConfig, derive, parse
from mistudio.jobs.control import Phase
from mistudio.jobs.job import JobContext
from mistudio.jobs.stages import Stage
from mistudio.library.library import Library

if TYPE_CHECKING:
    from mistudio.engine.datasets.tokens import TokenStore

KIND = "measure"
KEPT = 50  # rows; older measurements are forgotten
SAMPLE_TEXTS = 400  # of the shipped ones, where the dataset is not tokenised for the model yet

# What a run's speed depends on, beside the model and its sites.
_CONFIG = (
    "sparsity", "wiring", "skip", "skip_rank", "k", "optimizer", "auxk", "mixed_precision",
    "gradient_accumulation", "context", "anneal_share",
)  # fmt: skip


def speed_key(model_id: int, hook_points: list[str], plan: Plan) -> dict[str, Any]:
    """Everything that a run's tokens per second depend on here, but for the precision in which
    its model is loaded: two runs of one key go equally fast."""
    config = asdict(plan.config)
    return {
        "model_id": model_id,
        "hook_points": sorted(hook_points),
        "d_sae": plan.d_sae,
        "batch_size": plan.batch_size,
        **{name: config[name] for name in _CONFIG},
    }


def key_of(library: Library, params: dict[str, Any]) -> dict[str, Any] | None:
    """The key of a job's `params` (of `Measure` or `Train`); None where its model is gone or its
    options are of another version."""
    from mistudio.errors import UserError

    model = library.models.find(params.get("model_id") or 0)
    if model is None:
        return None
    try:
        plan = derive(parse(params.get("config", {})), model.d_model)
    except UserError:
        return None
    return speed_key(model.id, list(params.get("hook_points", [])), plan)


def earlier(library: Library, key: dict[str, Any]) -> dict[str, Any] | None:
    """What was measured last for this key (`Measure.run`), with `measured_at`; or None."""
    for row in library.jobs.all("kind = ? AND status = 'finished'", (KIND,)):
        if row.result.get("key") == key:
            return {**row.result, "measured_at": row.ended_at}
    return None


def forget_old(library: Library) -> None:
    """Drop rows of measurements that were stopped or failed, and all but the newest `KEPT`."""
    rows = library.jobs.all("kind = ?", (KIND,))
    good = [row for row in rows if row.status == "finished"]
    for row in rows:
        if not row.active and row not in good[:KEPT]:
            library.jobs.remove(row.id)


@dataclass(frozen=True)
class Measure:
    """How fast a training of these settings would go. The fields are those of `Train`."""

    model_id: int
    dataset_id: int
    hook_points: list[str]
    config: dict[str, Any] = field(default_factory=dict)

    kind: ClassVar[str] = KIND
    lane: ClassVar[str] = "compute"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("load model", 20), Phase("measure", 2))

    def title(self, library: Library) -> str:
        return f"Measure the speed of a training on {library.models.get(self.model_id).name}"

    def run(self, context: JobContext) -> dict[str, Any]:
        """The row's result: `engine.training.measuring.Speeds`, the `key`, the `precision` in
        which the model was loaded, the `device`, and whether the `text` was the dataset's own."""
        from mistudio import device
        from mistudio.engine.training.measuring import measure_speeds
        from mistudio.engine.training.run import sites_of
        from mistudio.jobs.models import check_layers, loaded_model, parse_points, precision_of

        library = context.library
        check_layers(library, self.model_id, self.hook_points)
        config: TrainingConfig = parse(self.config)
        model = loaded_model(library, self.model_id, Stage(context, "load model"))
        context.report(0, 1, phase="measure")
        store, own = self._text(library, context.work_folder)
        speeds = measure_speeds(
            model,
            store.train,
            sites_of(parse_points(self.hook_points), config),
            config,
            progress=context,
        )
        return {
            **speeds.as_dict(),
            "key": key_of(library, asdict(self)),
            "precision": precision_of(model),
            "device": device.current().name,
            "text": "dataset" if own else "sample",
        }

    def _text(self, library: Library, work: Path) -> tuple[TokenStore, bool]:
        """The dataset's tokens for this model where they are there, else the shipped texts':
        tokenising a dataset may take longer than the whole training."""
        from mistudio.engine.datasets.documents import Document
        from mistudio.engine.datasets.token_writer import write_token_store
        from mistudio.engine.datasets.tokenizers import hash_tokenizer
        from mistudio.engine.datasets.tokens import TokenStore
        from mistudio.engine.models import loading
        from mistudio.jobs.loaded import sample_texts
        from mistudio.jobs.tokenizing import PACKED, find_tokenization, tokenizer_path

        folder = tokenizer_path(library, self.model_id, None)
        wanted = hash_tokenizer(folder)
        context = parse(self.config).context
        if found := find_tokenization(library, self.dataset_id, wanted, PACKED):
            store = TokenStore(library.path(found.folder))
            if store.train.n_windows(context):
                return store, True
        tokenizer = loading.load_tokenizer(folder)
        write_token_store(
            [Document(text) for text in sample_texts(SAMPLE_TEXTS)],
            tokenizer,
            work / "tokens",
            bos_id=loading.adds_bos(tokenizer),
            separator_id=loading.separator_id(tokenizer),
            special_ids=sorted(loading.special_ids(tokenizer)),
            tokenizer_hash=wanted,
        )
        return TokenStore(work / "tokens"), False
