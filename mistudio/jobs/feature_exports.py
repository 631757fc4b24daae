"""Exporting features of a discovery: jobs that write files outside of the library."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import mistudio
from mistudio.engine.progress import SILENT, Progress
from mistudio.errors import DiskFull, InvalidInput, NotFound
from mistudio.formatting import count, size
from mistudio.jobs.control import Phase
from mistudio.jobs.features import newest_run, open_features
from mistudio.jobs.job import JobContext
from mistudio.jobs.models import loaded_model
from mistudio.jobs.saes import sae_title
from mistudio.jobs.stages import Stage
from mistudio.library.library import Library
from mistudio.library.records import FeatureRun

if TYPE_CHECKING:
    import numpy as np

    from mistudio.engine.features.exports.material import Material, Said
    from mistudio.engine.features.store import FeatureStore

SAMPLED = 6  # features that a size is estimated from


@dataclass(frozen=True)
class Format:
    """What can be written: a file with `suffix`, or a folder where that is empty."""

    title: str
    suffix: str
    text: str
    contexts: bool = False  # whole contexts can be asked for
    neuronpedia: bool = False  # it has a source set's name


FORMATS = {
    "csv": Format("CSV", ".csv", "One row a feature: all statistics, labels, notes, tokens."),
    "parquet": Format("Parquet", ".parquet", "The same, with types and units, for pandas and R."),
    "json": Format("JSON", ".json", "Everything, with examples and their activations.", True),
    "html": Format("Web page", ".html", "One page to read, print and send, without scripts.", True),
    "neuronpedia_a": Format(
        "SAEDashboard batches", "", "Batch files as SAEDashboard writes them.", True, True
    ),
    "neuronpedia_b": Format(
        "Neuronpedia import", "", "A directory as Neuronpedia's bulk import reads it.", True, True
    ),
}


@dataclass(frozen=True)
class ExportFeatures:
    """The features of an SAE's newest discovery are written to `target`, which must not be there.

    `features` says which, as in "0-99,205" (empty: all). `title` heads a page, `set_name` and
    `suffix` are Neuronpedia's for the SAE; `vectors` sends decoder directions along.
    """

    sae_id: int
    target: str
    format: str
    features: str = ""
    title_text: str = ""
    set_name: str = ""
    suffix: str = ""
    creator: str = ""
    vectors: bool = False

    kind: ClassVar[str] = "export_features"
    lane: ClassVar[str] = "disk"
    phases: ClassVar[tuple[Phase, ...]] = (Phase("write"),)
    whole: ClassVar[bool] = False

    def title(self, library: Library) -> str:
        run = newest_run(library, self.sae_id)
        n = len(parse_features(self.features, run.n_features))
        what = FORMATS[self.format].title if self.format in FORMATS else self.format
        return f"Export {count(n)} {'feature' if n == 1 else 'features'} as {what}"

    def run(self, context: JobContext) -> dict[str, Any]:
        return {"path": str(export_features(context.library, self, context))}


@dataclass(frozen=True)
class ExportWholeContexts(ExportFeatures):
    """As `ExportFeatures`, with the activations on the whole contexts of all examples, which takes
    another pass of the model over their text."""

    kind: ClassVar[str] = "export_feature_contexts"
    lane: ClassVar[str] = "compute"
    phases: ClassVar[tuple[Phase, ...]] = (
        Phase("load model", 5),
        Phase("contexts", 70),
        Phase("write", 25),
    )
    whole: ClassVar[bool] = True

    def run(self, context: JobContext) -> dict[str, Any]:
        from mistudio.engine.features.exports.whole import GatheredWindows

        material, run = opened(context.library, self)
        check(context.library, self, material)
        windows = _gathered(context, material, run)
        assert isinstance(windows, GatheredWindows)
        stage = Stage(context, "write")
        return {"path": str(_write(self, replace(material, whole=windows), stage))}


def export_features(library: Library, job: ExportFeatures, progress: Progress = SILENT) -> Path:
    """Write what the job asks for, whole or not at all; returns its target."""
    material, _ = opened(library, job)
    check(library, job, material)
    return _write(job, material, progress)


def check(library: Library, job: ExportFeatures, material: Material) -> None:
    """Refuse what cannot be, before anything is done."""
    from mistudio.engine.features.exports.writing import check_target

    target = Path(job.target).expanduser()
    check_target(target, folder=not FORMATS[job.format].suffix)
    _require_space(target, _estimated(job, material))


def _require_space(target: Path, needed: int) -> None:
    import shutil

    place = target.parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed * 1.1:
        raise DiskFull(
            "Not enough disk space",
            f"This export will take about {size(needed)}; {size(free)} are free at {place}.",
            "Choose fewer features, another format, or another disk.",
        )


# --- which features -------------------------------------------------------------------------------


def parse_features(text: str, n_features: int) -> list[int]:
    """`0-99,205` as numbers, ascending and each once; all for an empty text. Raises InvalidInput
    for what is none, or no feature of a dictionary with so many."""
    if not text.strip():
        return list(range(n_features))
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            numbers = range(int(first), int(last if dash else first) + 1)
        except ValueError:
            raise InvalidInput(
                "These are no features",
                f"{part.strip()!r} is no number or range.",
                "Write them like 0-99,205.",
                field="features",
            ) from None
        if not numbers or numbers[0] < 0 or numbers[-1] >= n_features:
            raise InvalidInput(
                "There is no such feature",
                f"{part.strip()} was asked for; features are 0 to {n_features - 1}.",
                field="features",
            )
        found.update(numbers)
    return sorted(found)


def write_features(features: Iterable[int]) -> str:
    """What `parse_features` reads, short: numbers that follow each other as a range."""
    parts: list[list[int]] = []
    for number in sorted(set(features)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in parts)


# --- what is read ---------------------------------------------------------------------------------


def opened(library: Library, job: ExportFeatures) -> tuple[Material, FeatureRun]:
    """What the export reads, from the newest discovery of the job's SAE."""
    import numpy as np

    from mistudio.engine.features.exports.material import Material, Origin
    from mistudio.engine.features.exports.texts import TokenTexts
    from mistudio.engine.models.loading import load_tokenizer
    from mistudio.engine.sae.files import load_sae

    if job.format not in FORMATS:
        raise InvalidInput(
            "Unknown export format",
            f"{job.format!r} is not known.",
            f"Use one of {', '.join(FORMATS)}.",
            field="format",
        )
    run = newest_run(library, job.sae_id)
    sae = library.saes.get(job.sae_id)
    features = np.array(parse_features(job.features, run.n_features), np.int64)
    if not len(features):
        raise NotFound("There is nothing to export", "No features are chosen.")
    store, tokens = open_features(library, run)
    model = library.models.get(sae.model_id)
    tokenizer = load_tokenizer(library.path(model.folder))
    dataset = library.datasets.find(library.tokenizations.get(run.tokenization_id).dataset_id)
    origin = Origin(
        model=model.name,
        sae=sae_title(library, sae),
        layer=sae.layer,
        hook_point=sae.hook_point,
        dataset=dataset.name if dataset else "",
        d_model=model.d_model,
        layers=model.n_layers,
        instruct=model.name.lower().endswith(("-it", "-instruct", "-chat")),
        version=mistudio.__version__,
    )
    directions = None
    if FORMATS[job.format].neuronpedia:
        decoder = load_sae(library.path(sae.folder)).dictionary.decoder.float().numpy()
        directions = decoder.__getitem__
    material = Material(
        store,
        tokens,
        TokenTexts(tokenizer),
        origin,
        features,
        said_of(library, job.sae_id),
        describe=_describer(store, tokens, tokenizer),
        directions=directions,
    )
    return material, run


def _describer(
    store: FeatureStore, tokens: Any, tokenizer: Any
) -> Callable[[np.ndarray], Sequence[str]]:
    """Descriptions by rule; "" for what never fired, and for all of a discovery without rules."""
    from mistudio.engine.features.rules import Vocabulary
    from mistudio.engine.features.score import Scores, rule_descriptions

    scores = Scores.read(store)
    if scores is None:
        return lambda features: [""] * len(features)
    vocabulary = Vocabulary.of(tokenizer, max(tokens.meta.vocab_size, len(tokenizer)))

    def described(features: np.ndarray) -> Sequence[str]:
        return list(rule_descriptions(store, scores, vocabulary, features.tolist()))

    return described


def said_of(library: Library, sae_id: int) -> dict[int, Said]:
    """What the user and models said about features of one SAE, by feature."""
    from mistudio.engine.features.exports.material import Label, OtherScore, Said

    labels: dict[int, list[Label]] = {}
    for entry in library.feature_labels.of_sae(sae_id):
        labels.setdefault(entry.feature, []).append(Label(entry.text, entry.source, entry.origin))
    scores: dict[int, list[OtherScore]] = {}
    for score in library.feature_scores.of_sae(sae_id):
        scores.setdefault(score.feature, []).append(
            OtherScore(
                score.scorer, score.accuracy, score.low, score.high, score.active, score.inactive
            )
        )
    lists: dict[int, list[str]] = {}
    for entry_list in library.feature_lists.all():
        for feature in library.feature_lists.of_sae(entry_list.id, sae_id):
            lists.setdefault(feature, []).append(entry_list.name)
    notes = library.feature_notes.of_sae(sae_id)
    found = {}
    for feature in {*labels, *scores, *lists, *notes}:
        note = notes.get(feature)
        found[feature] = Said(
            label=note.label if note else "",
            note=note.note if note else "",
            starred=bool(note and note.starred),
            hidden=bool(note and note.hidden),
            lists=tuple(sorted(lists.get(feature, []))),
            labels=tuple(labels.get(feature, [])),
            scores=tuple(scores.get(feature, [])),
        )
    return found


def _gathered(context: JobContext, material: Material, run: FeatureRun) -> Any:
    """Activations on whole windows, from the model."""
    from mistudio.engine.features.exports.whole import GatheredWindows, Wanted
    from mistudio.engine.features.passing import LivePassage
    from mistudio.engine.sae.files import load_sae

    library, store = context.library, material.store
    sae = library.saes.get(run.sae_id)
    model = loaded_model(library, sae.model_id, Stage(context, "load model"))
    saved = load_sae(library.path(sae.folder))
    point = saved.site.input
    wanted = Wanted(store, material.features, material.per_decile)
    length = store.meta.context
    folder = context.work_folder / "contexts"
    windows = GatheredWindows(folder, material.features, length)
    if len(wanted.windows):
        passage = LivePassage(
            model,
            material.tokens,
            (point,),
            wanted.windows,
            length,
            medians={point: store.meta.median_norm or math.inf},
        )
        dictionary = saved.dictionary.to(model.device)
        windows.gather(passage, point, dictionary, wanted, Stage(context, "contexts"))
    return windows


# --- writing --------------------------------------------------------------------------------------


def _write(job: ExportFeatures, material: Material, progress: Progress) -> Path:
    from mistudio.engine.features.exports.writing import appearing

    target = Path(job.target).expanduser()
    with appearing(target, folder=not FORMATS[job.format].suffix) as place:
        _written(job, material, place, progress)
    return target


def _written(job: ExportFeatures, material: Material, place: Path, progress: Progress) -> None:
    from mistudio.engine.features.exports import neuronpedia_a, neuronpedia_b, page, tables

    naming = neuronpedia_a.Naming(set_name(job, material), job.suffix, job.vectors)
    if job.format == "csv":
        tables.write_csv(material, place, progress)
    elif job.format == "parquet":
        tables.write_parquet(material, place, progress)
    elif job.format == "json":
        tables.write_json(material, place, progress)
    elif job.format == "html":
        when = f"{datetime.now():%d %B %Y}"
        page.write_page(material, place, job.title_text, when, progress)
    elif job.format == "neuronpedia_a":
        neuronpedia_a.write(material, place, naming, progress)
    else:
        release = neuronpedia_b.Release(naming.set_name, job.title_text, job.creator)
        neuronpedia_b.write(material, place, naming, release, progress)


def set_name(job: ExportFeatures, material: Material) -> str:
    """Neuronpedia's name for the source set: the one that was given, or site and width."""
    site = material.origin.hook_point.rpartition("hook_")[2].replace("_", "-")
    return job.set_name or f"{site}-{len(material.store)}"


def estimated_bytes(library: Library, job: ExportFeatures) -> int:
    """About how large the export will be: a few of its features are written and measured."""
    return _estimated(job, opened(library, job)[0])


def _estimated(job: ExportFeatures, material: Material) -> int:
    import numpy as np

    n = len(material.features)
    places = np.unique(np.linspace(0, n - 1, min(SAMPLED, n)).astype(int))
    sample = replace(
        material,
        features=material.features[places],
        whole=_PeaksAlone() if job.whole else None,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sample"
        if not FORMATS[job.format].suffix:
            path.mkdir()
        _written(job, sample, path, SILENT)
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        return math.ceil(sum(file.stat().st_size for file in files) * n / len(places))


class _PeaksAlone:
    """Whole windows of which nothing is known but the peak: as long as they will be."""

    def of(self, feature: int) -> dict[int, tuple[list[int], list[float]]]:
        return {}
