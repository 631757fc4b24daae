"""The job that judges an SAE as the end of a training does: on held-out text of a dataset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mistudio import device
from mistudio.engine.progress import Progress
from mistudio.jobs.control import Phase
from mistudio.jobs.job import JobContext
from mistudio.jobs.models import loaded_model, precision_of
from mistudio.jobs.saes import sae_title
from mistudio.jobs.stages import Stage
from mistudio.jobs.tokenizing import tokenize
from mistudio.library.library import Library
from mistudio.library.records import Sae, Tokenization

if TYPE_CHECKING:
    from mistudio.engine.models.hooks import HookedDecoder

PARTS = {"judge": (0.0, 0.6)}
ROWS = 2048


@dataclass(frozen=True)
class MeasureSae:
    """The metrics of one SAE on the held-out text of a dataset, kept in its row beside what they
    were measured on (`measured`). An older measurement is replaced."""

    sae_id: int
    dataset_id: int
    loss_tokens: int = 8192

    kind: ClassVar[str] = "measure_sae"
    lane: ClassVar[str] = "compute"
    phases: ClassVar[tuple[Phase, ...]] = (
        Phase("tokenize", 10),
        Phase("load model", 10),
        Phase("measure", 100),
    )

    def title(self, library: Library) -> str:
        return f"Measure {sae_title(library, library.saes.get(self.sae_id))}"

    def run(self, context: JobContext) -> dict[str, Any]:
        library = context.library
        sae = library.saes.get(self.sae_id)
        tokens = tokenize(
            library,
            context.work_folder,
            self.dataset_id,
            sae.model_id,
            Stage(context, "tokenize"),
        )
        model = loaded_model(library, sae.model_id, Stage(context, "load model"))
        metrics = measure(library, sae, tokens, model, self, Stage(context, "measure", PARTS))
        library.saes.update(sae.id, metrics=metrics)
        return {"sae_id": sae.id, "fvu": metrics["fvu"], "l0": metrics["l0"]}


def measure(
    library: Library,
    sae: Sae,
    tokenization: Tokenization,
    model: HookedDecoder,
    job: MeasureSae,
    progress: Progress,
) -> dict[str, Any]:
    """Reconstruction on the whole held-out split, and what the SAE costs the model on a part of
    it: the same functions, and so the same definitions, as at the end of a training."""
    from mistudio.engine.activations.source import LiveActivations
    from mistudio.engine.datasets.tokens import TokenStore
    from mistudio.engine.sae.files import load_sae
    from mistudio.engine.sae.loss import loss_recovered
    from mistudio.engine.training.finish import judge

    saved = load_sae(library.path(sae.folder))
    dictionary, site = saved.dictionary.to(model.device), saved.site
    context = int(saved.metadata.get("context_size", 128))
    store = TokenStore(library.path(tokenization.folder))
    source = LiveActivations(model, store, site.points, context)
    meter = judge(source, {site: dictionary}, len(store.heldout), ROWS, progress)[site]
    loss = loss_recovered(
        model,
        store.heldout,
        site,
        dictionary,
        source.medians,
        context=context,
        max_tokens=job.loss_tokens,
        progress=progress,
    )
    dataset = library.datasets.get(job.dataset_id)
    return {
        **meter.result().as_dict(),
        **{
            f"loss_{name}" if name == "tokens" else name: value
            for name, value in loss.as_dict().items()
        },
        "median_norm": source.medians[site.input],
        "measured": {
            "dataset_id": dataset.id,
            "dataset": dataset.name,
            "tokenization_id": tokenization.id,
            "tokenizer_hash": tokenization.tokenizer_hash,
            "context": context,
            "precision": precision_of(model),
            "versions": device.versions(),
            "device": device.current().name,
        },
    }
