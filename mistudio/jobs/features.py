"""The discovery job: from a trained dictionary to a store of features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mistudio.engine.progress import Progress
from mistudio.errors import InvalidInput, NotFound
from mistudio.jobs.control import Phase
from mistudio.jobs.job import JobContext
from mistudio.jobs.models import loaded_model
from mistudio.jobs.saes import sae_title
from mistudio.jobs.stages import Stage
from mistudio.jobs.tokenizing import tokenize
from mistudio.library.library import Library
from mistudio.library.records import Extraction, FeatureRun, Sae, Tokenization

if TYPE_CHECKING:
    from mistudio.engine.activations.source import TokenRows
    from mistudio.engine.datasets.tokens import TokenSplit
    from mistudio.engine.features.store import FeatureStore
    from mistudio.engine.models.hooks import HookedDecoder, HookPoint

DISCOVER_PARTS = {"examples": (0.0, 0.85), "logit lens": (0.85, 1.0)}


@dataclass(frozen=True)
class Discover:
    """Top examples, densities and logit-lens tokens of every latent of one SAE.

    `dataset_id` is the text to look through: its run's own where it is None, which an imported
    SAE does not have.
    """

    sae_id: int
    max_tokens: int = 500_000
    top_k: int = 20
    dataset_id: int | None = None

    kind: ClassVar[str] = "discover"
    lane: ClassVar[str] = "compute"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("load model", 5), Phase("discover", 100))

    def title(self, library: Library) -> str:
        sae = library.saes.get(self.sae_id)
        return f"Discover features of {sae.hook_point} ({sae.d_sae:,} latents)"

    def run(self, context: JobContext) -> dict[str, Any]:
        sae = context.library.saes.get(self.sae_id)
        model = loaded_model(context.library, sae.model_id, Stage(context, "load model"))
        run = discover(
            context.library,
            context.work_folder,
            self,
            model,
            Stage(context, "discover", DISCOVER_PARTS),
        )
        return {"feature_run_id": run.id, "alive": run.summary["alive"]}


def discover(
    library: Library, work: Path, job: Discover, model: HookedDecoder, progress: Progress
) -> FeatureRun:
    """One pass over the training split: from stored activations where the run has them, else
    from the model. A new run of the same SAE stands beside the old one."""
    from mistudio.engine.datasets.tokens import TokenStore
    from mistudio.engine.features import discovery
    from mistudio.engine.sae.files import load_sae

    for value, name, largest in (
        (job.top_k, "top_k", 1000),
        (job.max_tokens, "max_tokens", 10**12),
    ):
        if not 1 <= value <= largest:
            raise InvalidInput(
                "A discovery setting is out of range",
                f"{name.replace('_', ' ')} must be between 1 and {largest:,}; it is {value:,}.",
                field=name,
            )
    sae = library.saes.get(job.sae_id)
    tokenization = _text_of(library, work, sae, job.dataset_id, progress)
    tokens = TokenStore(library.path(tokenization.folder)).train
    saved = load_sae(library.path(sae.folder))
    context = int(saved.metadata.get("context_size", 128))
    extraction = _extraction(library, sae, tokenization)
    rows, total = _rows(
        library, extraction, tokens, saved.hook_point, model, context, job, progress
    )
    folder = work / "features"
    meta = discovery.discover(
        rows,
        saved.dictionary.to(model.device),
        tokens,
        folder,
        model=model,
        hook_point=saved.hook_point,
        context=context,
        total_tokens=total,
        top_k=job.top_k,
        progress=progress,
    )
    target = library.new_folder("features", sae_title(library, sae))
    with library.commit(folder, target):
        run_id = library.feature_runs.add(
            sae_id=sae.id,
            tokenization_id=tokenization.id,
            folder=target,
            n_features=meta.n_features,
            tokens=meta.tokens,
            summary={**meta.statistics, "contexts": meta.contexts, "top_k": meta.top_k},
        )
        library.note_change("saes", sae.id)
    return library.feature_runs.get(run_id)


def open_features(library: Library, run: FeatureRun) -> tuple[FeatureStore, TokenSplit]:
    """A run's store and the tokens its examples lie in."""
    from mistudio.engine.datasets.tokens import TokenStore
    from mistudio.engine.features.store import FeatureStore

    store = FeatureStore(library.path(run.folder))
    tokenization = library.tokenizations.get(run.tokenization_id)
    return store, TokenStore(library.path(tokenization.folder)).split(store.meta.split)


def newest_run(library: Library, sae_id: int) -> FeatureRun:
    run = library.feature_runs.newest_of_sae(sae_id)
    if run is None:
        raise NotFound(
            "No features yet",
            "This SAE has no discovery pass.",
            "Run Discover Features (`mistudio discover RUN`) first.",
        )
    return run


def _text_of(
    library: Library, work: Path, sae: Sae, dataset_id: int | None, progress: Progress
) -> Tokenization:
    """The tokens to look through: of the dataset that was named, else of the SAE's run."""
    if dataset_id is not None:
        return tokenize(library, work, dataset_id, sae.model_id, progress)
    if sae.training_id is None:
        raise NotFound(
            "This SAE has no text of its own",
            "It was not trained in this library.",
            "Name a dataset to look through (`--dataset D`).",
        )
    training = library.trainings.get(sae.training_id)
    return library.tokenizations.get(training.tokenization_id)


def _extraction(library: Library, sae: Sae, tokenization: Tokenization) -> Extraction | None:
    """The stored activations that the SAE learnt from, if they are of this text."""
    training = library.trainings.find(sae.training_id) if sae.training_id else None
    if training is None or training.extraction_id is None:
        return None
    extraction = library.extractions.find(training.extraction_id)
    same = extraction is not None and extraction.tokenization_id == tokenization.id
    return extraction if same else None


def _rows(
    library: Library,
    extraction: Extraction | None,
    tokens: TokenSplit,
    point: HookPoint,
    model: HookedDecoder,
    context: int,
    job: Discover,
    progress: Progress,
) -> tuple[Iterator[TokenRows], int]:
    import numpy as np

    from mistudio.engine.activations.source import calibrate_medians, token_rows
    from mistudio.engine.activations.store import StoredActivations

    if extraction is not None:
        stored = StoredActivations(library.path(extraction.folder))
        if stored.meta.context == context:
            total = min(job.max_tokens, stored.meta.tokens["train"])
            rows = stored.token_rows("train", point, progress)
            return _limited(rows, job.max_tokens), total
    available = tokens.n_windows(context)
    n_windows = max(1, min(available, job.max_tokens // context))
    order = np.unique(np.linspace(0, available - 1, n_windows).astype(np.int64))
    median = calibrate_medians(model, tokens, (point,), context)[point]
    return (
        token_rows(model, tokens, point, median, order, context, progress=progress),
        n_windows * context,
    )


def _limited(rows: Iterator[TokenRows], limit: int) -> Iterator[TokenRows]:
    seen = 0
    for chunk in rows:
        yield chunk
        seen += len(chunk.windows)
        if seen >= limit:
            return
