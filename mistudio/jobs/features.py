"""The discovery jobs: from trained dictionaries to stores of features."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import mistudio
from mistudio.engine.progress import Progress
from mistudio.errors import Incompatible, InvalidInput, NotFound, OutOfMemory
from mistudio.formatting import size
from mistudio.jobs.control import Phase
from mistudio.jobs.feature_finishing import finish_store
from mistudio.jobs.job import JobContext
from mistudio.jobs.models import loaded_model
from mistudio.jobs.saes import sae_title
from mistudio.jobs.stages import Stage, Within
from mistudio.jobs.tokenizing import tokenize
from mistudio.library.library import Library, flush_tree
from mistudio.library.records import Extraction, FeatureRun, Sae, Tokenization

if TYPE_CHECKING:
    import numpy as np

    from mistudio.engine.datasets.tokens import TokenSplit
    from mistudio.engine.features.discovery import Subject
    from mistudio.engine.features.passing import Passage
    from mistudio.engine.features.store import FeatureStore
    from mistudio.engine.models.hooks import HookedDecoder

DISCOVER_PARTS = {
    "examples": (0.0, 0.75),
    "logit lens": (0.75, 0.8),
    "directions": (0.8, 0.87),
    "scores": (0.87, 0.95),
    "search index": (0.95, 1.0),
}
KEPT = "step-discovery"  # in a job's checkpoint folder
MEMORY_SHARE = 0.8  # of what is free
FINISHED_BYTES = 2_000  # a feature: neighbours, scores, the search index


@dataclass(frozen=True)
class Discover:
    """Top examples, statistics and logit-lens tokens of every latent of one SAE.

    `dataset_id` is the text to look through: its run's own where it is None, which an imported
    SAE does not have. At most `max_tokens` of it are read, of its first `max_documents` documents
    where those are given. Interrupted, it goes on from what it last saved.
    """

    sae_id: int
    max_tokens: int = 500_000
    top_k: int = 20
    dataset_id: int | None = None
    max_documents: int | None = None
    one_per_context: bool = True
    seed: int = 0

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
            context.library.checkpoint_folder(context.job_id) / KEPT,
        )
        return {"feature_run_id": run.id, "alive": run.summary["alive"]}


@dataclass(frozen=True)
class DiscoverRun:
    """As `Discover`, for all SAEs of a training in one pass over its text: the model runs once."""

    training_id: int
    max_tokens: int = 500_000
    top_k: int = 20
    max_documents: int | None = None
    one_per_context: bool = True
    seed: int = 0

    kind: ClassVar[str] = "discover_run"
    lane: ClassVar[str] = "compute"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("load model", 5), Phase("discover", 100))

    def title(self, library: Library) -> str:
        training = library.trainings.get(self.training_id)
        n = len(_saes_of(library, self.training_id))
        return f"Discover features of {training.name} ({n} {'SAE' if n == 1 else 'SAEs'})"

    def run(self, context: JobContext) -> dict[str, Any]:
        library = context.library
        training = library.trainings.get(self.training_id)
        model = loaded_model(library, training.model_id, Stage(context, "load model"))
        runs = discover_all(
            library,
            context.work_folder,
            _saes_of(library, self.training_id),
            library.tokenizations.get(training.tokenization_id),
            self,
            model,
            Stage(context, "discover", None),
            library.checkpoint_folder(context.job_id) / KEPT,
        )
        return {
            "feature_run_ids": [run.id for run in runs],
            "alive": sum(run.summary["alive"] for run in runs),
        }


def _saes_of(library: Library, training_id: int) -> list[Sae]:
    saes = library.saes.all("training_id = ?", (training_id,))
    if not saes:
        raise NotFound(
            "This run has no SAEs",
            "They were deleted.",
            "Train again, or choose another run.",
        )
    return sorted(saes, key=lambda sae: (sae.layer, sae.id))


def discover(
    library: Library,
    work: Path,
    job: Discover,
    model: HookedDecoder,
    progress: Progress,
    keep: Path | None = None,
) -> FeatureRun:
    """One pass over the training split: from stored activations where the run has them, else
    from the model. A new run of the same SAE stands beside the old one. In `keep` lies what an
    interrupted one goes on from."""
    _check(job)
    sae = library.saes.get(job.sae_id)
    tokenization = _text_of(library, work, sae, job.dataset_id, progress)
    (run,) = discover_all(library, work, [sae], tokenization, job, model, progress, keep)
    return run


def discover_all(
    library: Library,
    work: Path,
    saes: Sequence[Sae],
    tokenization: Tokenization,
    job: Discover | DiscoverRun,
    model: HookedDecoder,
    progress: Progress,
    keep: Path | None = None,
) -> list[FeatureRun]:
    """As `discover`, for several SAEs of one model and one text: in one pass where their memory
    allows, else in as few as it takes. All of their runs appear, or none.

    Raises OutOfMemory where even one alone does not fit, DiskFull where their files would not.
    """
    _check(job)
    finished = _Discovery(library, work, saes, tokenization, job, model, progress, keep).run()
    targets = {sae.id: library.new_folder("features", sae_title(library, sae)) for sae in saes}
    runs = []
    with library.commit_all({targets[number]: folder for number, folder in finished.items()}):
        for sae in saes:
            runs.append(_add_run(library, sae, tokenization, targets[sae.id]))
            library.note_change("saes", sae.id)
    return [library.feature_runs.get(number) for number in runs]


def _add_run(library: Library, sae: Sae, tokenization: Tokenization, folder: str) -> int:
    import numpy as np

    from mistudio.engine.features.score import INTERPRETABLE
    from mistudio.engine.features.store import FeatureStore

    store = FeatureStore(library.path(folder))
    meta, low = store.meta, np.asarray(store.columns["score_low"])
    counts = {
        "scored": int((~np.isnan(low)).sum()),
        "interpretable": int((low >= INTERPRETABLE).sum()),
    }
    return library.feature_runs.add(
        sae_id=sae.id,
        tokenization_id=tokenization.id,
        folder=folder,
        n_features=meta.n_features,
        tokens=meta.tokens,
        summary={**meta.statistics, **counts, "contexts": meta.contexts, "top_k": meta.top_k},
    )


def _check(job: Discover | DiscoverRun) -> None:
    for value, name, largest in (
        (job.top_k, "top_k", 1000),
        (job.max_tokens, "max_tokens", 10**12),
        (1 if job.max_documents is None else job.max_documents, "max_documents", 10**12),
    ):
        if not 1 <= value <= largest:
            raise InvalidInput(
                "A discovery setting is out of range",
                f"{name.replace('_', ' ')} must be between 1 and {largest:,}; it is {value:,}.",
                field=name,
            )


class _Discovery:
    """Dictionaries of one model and text, cut into passes by memory; `run` gives the folder of
    each finished store by its SAE's id.

    In `keep`: `groups.json`, which SAEs share a pass; `pass-<n>`, the state of an unfinished one;
    `finished/<sae id>`, whole stores.
    """

    def __init__(
        self,
        library: Library,
        work: Path,
        saes: Sequence[Sae],
        tokenization: Tokenization,
        job: Discover | DiscoverRun,
        model: HookedDecoder,
        progress: Progress,
        keep: Path | None,
    ) -> None:
        from mistudio.engine.datasets.tokens import TokenStore
        from mistudio.engine.features.discovery import Options
        from mistudio.engine.sae.files import load_sae

        self._library, self._job, self._model, self._progress = library, job, model, progress
        self._saes = {sae.id: sae for sae in saes}
        self._tokenization = tokenization
        self._tokens = TokenStore(library.path(tokenization.folder)).train
        self._keep, self._base = keep, keep or work / "features"
        first = load_sae(library.path(saes[0].folder))
        self._context = int(first.metadata.get("context_size", 128))
        self.options = Options(top_k=job.top_k, one_per_context=job.one_per_context, seed=job.seed)

    def run(self) -> dict[int, Path]:
        groups = self._groups()
        for number, group in enumerate(groups):
            if not all(self._finished(sae_id).exists() for sae_id in group):
                progress = self._progress
                if len(groups) > 1:
                    progress = Within(progress, number, len(groups))
                self._pass(number, groups, progress)
        return {sae_id: self._finished(sae_id) for sae_id in self._saes}

    def _finished(self, sae_id: int) -> Path:
        return self._base / "finished" / str(sae_id)

    def _pass(self, number: int, groups: list[list[int]], progress: Progress) -> None:
        from mistudio.engine.features.discovery import discover
        from mistudio.engine.models.loading import load_tokenizer

        group, part = groups[number], self._base / "part"
        shutil.rmtree(part, ignore_errors=True)
        subjects = [self._subject(sae_id, part / str(sae_id)) for sae_id in group]
        record = self._library.models.get(self._saes[group[0]].model_id)
        state = self._base / f"pass-{number}"
        passage = self._passage(subjects)
        if self._keep:  # from here on there is something to go on from
            self._remember(groups)
        tokenizer = load_tokenizer(self._library.path(record.folder))
        discover(
            passage,
            subjects,
            model=self._model,
            tokenizer=tokenizer,
            options=self.options,
            keep=state if self._keep else None,
            progress=progress,
        )
        for subject in subjects:
            finish_store(subject.folder, passage.tokens, tokenizer, subject.dictionary, progress)
        for sae_id in group:
            target = self._finished(sae_id)
            flush_tree(part / str(sae_id))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(part / str(sae_id), target)
        shutil.rmtree(state, ignore_errors=True)

    def _subject(self, sae_id: int, folder: Path) -> Subject:
        from mistudio.engine.features.discovery import Subject, digest
        from mistudio.engine.sae.files import load_sae

        sae = self._saes[sae_id]
        saved = load_sae(self._library.path(sae.folder))
        dictionary = saved.dictionary.to(self._model.device)
        model = self._library.models.get(sae.model_id)
        provenance = {
            "model": model.name,
            "precision": model.precision,
            "sae": digest(dictionary),
            "version": mistudio.__version__,
        }
        return Subject(str(sae_id), saved.site, dictionary, folder, provenance)

    def _passage(self, subjects: Sequence[Subject]) -> Passage:
        from mistudio.engine.activations.store import StoredActivations
        from mistudio.engine.features.passing import LivePassage, StoredPassage, choose_windows

        job, points = self._job, tuple(sorted({subject.site.input for subject in subjects}))
        found = [_extraction(self._library, sae, self._tokenization) for sae in self._saes.values()]
        extraction = found[0]
        if extraction is not None and all(other == extraction for other in found):
            stored = StoredActivations(self._library.path(extraction.folder))
            if stored.meta.context == self._context and set(points) <= set(stored.points):
                return StoredPassage(
                    stored, self._tokens, points, job.max_tokens, job.max_documents
                )
        windows = choose_windows(self._tokens, self._context, job.max_tokens, job.max_documents)
        return LivePassage(self._model, self._tokens, points, windows, self._context)

    # --- memory ---------------------------------------------------------------------------------

    def _groups(self) -> list[list[int]]:
        """Which SAEs share a pass; the same when the job goes on."""
        path = self._base / "groups.json"
        wanted = sorted(self._saes)
        if self._keep and path.exists():
            try:
                found: list[list[int]] = json.loads(path.read_text(encoding="utf-8"))
                if sorted(sae_id for group in found for sae_id in group) == wanted:
                    return found
            except (ValueError, TypeError):
                pass  # written anew below, and what lies there is checked for what it is of
        shutil.rmtree(self._base / "finished", ignore_errors=True)
        return self._by_memory()

    def _remember(self, groups: list[list[int]]) -> None:
        self._base.mkdir(parents=True, exist_ok=True)
        path = self._base / "groups.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(groups), encoding="utf-8")
        os.replace(part, path)

    def _by_memory(self) -> list[list[int]]:
        import psutil

        free = int(psutil.virtual_memory().available * MEMORY_SHARE)
        groups: list[list[int]] = []
        for sae_id in self._saes:
            if not groups or self._needs([*groups[-1], sae_id])[0] > free:
                groups.append([])
            groups[-1].append(sae_id)
        for group in groups:
            needed = self._needs(group)[0]
            if needed > free:
                raise OutOfMemory(
                    "Not enough memory",
                    f"Discovering these features needs {size(needed)} beside the loaded model; "
                    f"{size(free)} can be used.",
                    "Keep fewer top examples, or close other programs.",
                )
        disk = self._needs(list(self._saes))[1]
        self._library.require_space(disk, "Keeping these features")
        return groups

    def _needs(self, group: Sequence[int]) -> tuple[int, int]:
        """(memory, disk) in bytes; disk includes the state of an unfinished pass."""
        from mistudio.engine.features.discovery import plan

        widths = []
        for sae_id in group:
            sae = self._saes[sae_id]
            widths.append((sae.d_sae, sae.d_in, sae.d_in))
        needed = plan(
            widths,
            context=self._context,
            windows=self._tokens.n_windows(self._context),
            vocabulary=self._tokens.meta.vocab_size,
            options=self.options,
        )
        states = (
            2 * needed.memory["gathered"] if self._keep else 0
        )  # the old until the new is whole
        added = FINISHED_BYTES * sum(width[0] for width in widths)
        return needed.memory_bytes, needed.disk + states + added


def open_features(library: Library, run: FeatureRun) -> tuple[FeatureStore, TokenSplit]:
    """A run's store and the tokens its examples lie in."""
    from mistudio.engine.datasets.tokens import TokenStore
    from mistudio.engine.features.store import FeatureStore

    store = FeatureStore(library.path(run.folder))
    tokenization = library.tokenizations.get(run.tokenization_id)
    return store, TokenStore(library.path(tokenization.folder)).split(store.meta.split)


def describe_features(library: Library, run: FeatureRun, features: Sequence[int]) -> list[str]:
    """What the rules say of some features; "" for what never fired, and for all of a discovery
    by a version that made no rules."""
    store = open_features(library, run)[0]
    return [store.description(feature) if store.described else "" for feature in features]


def search_features(library: Library, run: FeatureRun, text: str) -> np.ndarray:
    """int32: the features whose description, tokens, promoted tokens or examples hold every word
    of `text`, or whose label or note contains it. Incompatible where the discovery has no index
    (made by an earlier version)."""
    import numpy as np

    from mistudio.library.feature_index import FILE, FeatureIndex

    path = library.path(run.folder) / FILE
    if not path.exists():
        raise Incompatible(
            "This discovery cannot be searched",
            "It was made by an earlier version and has no index.",
            "Discover the features of this SAE again.",
        )
    index = FeatureIndex(path)
    try:
        found = index.search(text)
    finally:
        index.close()
    wanted = text.strip().casefold()
    own = [
        note.feature
        for note in library.feature_notes.of_sae(run.sae_id).values()
        if wanted in f"{note.label}\n{note.note}".casefold() and note.feature < run.n_features
    ]
    return np.union1d(found, np.array(own, np.int32)).astype(np.int32)


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
