"""The one owner of the device: which models are in memory, and room for the next.

A model is loaded once and handed to whoever asks. Before another is loaded its plan says what it
needs; models that nobody has asked for longest make room, and where there is still too little the
load is refused with the figures. The compute lane runs one job at a time, so what a job holds is
never taken from under it by another job; a model that is unloaded while a job uses it goes when
that job lets go of it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import psutil

from mistudio import device
from mistudio.engine import garbage
from mistudio.engine.progress import SILENT, Progress
from mistudio.errors import CorruptFile
from mistudio.formatting import size
from mistudio.library.library import Library
from mistudio.library.records import Model
from mistudio.resources import resource

if TYPE_CHECKING:
    from mistudio.engine.models.custom_code import Consent
    from mistudio.engine.models.hf import PreTrainedTokenizerBase
    from mistudio.engine.models.hooks import HookedDecoder
    from mistudio.engine.models.memory import ModelPlan, Use
    from mistudio.engine.models.quality import DocumentLosses
    from mistudio.engine.sae.files import SavedSae
    from mistudio.engine.training.footprint import Machine

T = TypeVar("T")

_SAMPLE_TEXT = ("sample", "wikipedia_vital_intros.jsonl")


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory; `bytes` are those of its weights."""

    model_id: int
    name: str
    precision: str
    bytes: int
    decoder: HookedDecoder


_loading = threading.Lock()  # held while a model is loaded: two never load at once
_lock = threading.Lock()  # held for a moment, so that the window can always ask
_loaded: OrderedDict[tuple[str, str], LoadedModel] = OrderedDict()  # least recently asked for first


# --- asking -------------------------------------------------------------------------------------


def loaded_models() -> list[LoadedModel]:
    """What is in memory, most recently asked for first. Never waits."""
    with _lock:
        return list(reversed(_loaded.values()))


def loaded_bytes() -> int:
    """What the weights of the loaded models take."""
    return sum(entry.bytes for entry in loaded_models())


def loaded_model(
    library: Library,
    model_id: int,
    progress: Progress = SILENT,
    reference: DocumentLosses | None = None,
) -> HookedDecoder:
    """The model, from memory or loaded now. Raises `OutOfMemory` where it does not fit even with
    all others unloaded.

    The first time that a model is loaded quantised, its loss is measured beside the unquantised
    model's and kept in its record, so that nobody studies a broken model without being told;
    `reference` are the unquantised model's losses where the caller has them.
    """
    record: Model = library.models.get(model_id)
    key = (str(library.path(record.folder)), record.precision)
    with _loading:
        with _lock:
            if key in _loaded:
                _loaded.move_to_end(key)
                return _loaded[key].decoder
        record = library.models.get(model_id)
        precision = chosen_precision(library, record)
        if reference is None and _needs_judging(record, precision):
            reference = reference_losses(library, record, progress)
        _make_room(library, record, precision)
        decoder = _load(library, record, precision, progress)
        if _needs_judging(record, precision):
            record_quality(library, record, decoder, reference, progress)
        entry = LoadedModel(model_id, record.name, precision, _weight_bytes(decoder), decoder)
        with _lock:
            _loaded[key] = entry
        with suppress(CorruptFile):  # whoever needs it is told
            tokenizer_of(library, model_id, decoder)
        return decoder


def own_model(library: Library, model_id: int, progress: Progress = SILENT) -> HookedDecoder:
    """The model, freshly loaded for a caller who frees it by dropping it."""
    record: Model = library.models.get(model_id)
    with _loading:
        precision = chosen_precision(library, record)
        _make_room(library, record, precision)
        return _load(library, record, precision, progress)


def unload_model(model_id: int | None = None) -> None:
    """Free the memory of one model, or of all."""
    with _lock:
        for key in [k for k, e in _loaded.items() if model_id in (None, e.model_id)]:
            del _loaded[key]
    garbage.collect()
    device.give_back()


def precision_of(model: HookedDecoder) -> str:
    """What a loaded model is in, by our short names: "fp32" to "q2"."""
    from mistudio.engine.models import quantise

    return quantise.precision_of(model.model)


# --- what goes with a model ----------------------------------------------------------------------

_MOST_OF_A_KIND = 2
_companions: WeakKeyDictionary[HookedDecoder, OrderedDict[tuple[object, ...], Any]] = (
    WeakKeyDictionary()
)


def kept_with(model: HookedDecoder, key: tuple[object, ...], make: Callable[[], T]) -> T:
    """What `make` gives, kept with the model while that is in memory: people steer with the same
    SAE, and type on. `key` begins with its kind; the last two of a kind stay."""
    with _lock:
        kept = _companions.setdefault(model, OrderedDict())
        if key in kept:
            kept.move_to_end(key)
            found: T = kept[key]
            return found
    made = make()
    with _lock:
        kept[key] = made
        same = [other for other in kept if other[0] == key[0]]
        for old in same[:-_MOST_OF_A_KIND]:
            del kept[old]
    return made


def tokenizer_of(
    library: Library, model_id: int, model: HookedDecoder | None
) -> PreTrainedTokenizerBase:
    """A model's tokenizer, kept where the model is loaded: to read it takes as long as to write a
    few tokens."""
    from mistudio.engine.models.loading import load_tokenizer

    folder = library.path(library.models.get(model_id).folder)
    if model is None:
        return load_tokenizer(folder)
    return kept_with(model, ("tokenizer", folder), lambda: load_tokenizer(folder))


def sae_of(library: Library, sae_id: int, model: HookedDecoder) -> SavedSae:
    """A saved SAE on the model's device."""
    from mistudio.engine.sae.files import load_sae

    folder = library.path(library.saes.get(sae_id).folder)

    def read() -> SavedSae:
        saved = load_sae(folder)
        return replace(saved, dictionary=saved.dictionary.to(model.device))

    return kept_with(model, ("SAE", folder), read)


# --- what fits ----------------------------------------------------------------------------------


def machine(library: Library) -> Machine:
    """This computer; what loaded models take counts as free."""
    import shutil

    from mistudio.engine.training.footprint import Machine

    found, memory = device.current(), psutil.virtual_memory()
    disk = shutil.disk_usage(library.root).free
    apart = found.kind == "cuda"
    here = Machine(found.memory, found.free, disk, memory.available if apart else None)
    return replace(here, memory_free=here.memory_free + loaded_bytes())


def chosen_precision(library: Library, record: Model) -> str:
    """What the record's precision means here: "auto" is the best that fits the device's memory."""
    from mistudio.engine.models.architecture import read_architecture
    from mistudio.engine.models.loading import resolve_precision
    from mistudio.engine.models.memory import best_fit

    kind = device.current().kind
    if record.precision != "auto":
        return resolve_precision(record.precision, kind)  # type: ignore[arg-type]
    architecture = read_architecture(library.path(record.folder))
    return best_fit(architecture, machine(library), device=kind).precision


def model_plans(
    library: Library, folder: Path, use: Use | None = None, training: float = 0.0
) -> tuple[ModelPlan, ...]:
    """The plans of a model folder at every precision on this computer, best first."""
    from mistudio.engine.models.architecture import read_architecture
    from mistudio.engine.models.memory import plan_all

    kind = device.current().kind
    return plan_all(
        read_architecture(folder), machine(library), use, device=kind, training=training
    )


def _make_room(library: Library, record: Model, precision: str) -> None:
    """Unload what was least recently asked for until the model fits."""
    from mistudio.engine.models.architecture import read_architecture
    from mistudio.engine.models.memory import Use, best_fit, plan_model

    kind = device.current().kind
    architecture = read_architecture(library.path(record.folder))
    least = Use(batch=1, logits=False)
    while True:
        free = device.current().free
        here = replace(machine(library), memory_free=free)
        plan = plan_model(architecture, precision, here, least, device=kind)
        if plan.fits:
            return
        with _lock:
            if not _loaded:
                break
            _loaded.popitem(last=False)
        garbage.collect()
        device.give_back()
    other = best_fit(architecture, here, least, device=kind)
    plan.require(
        f"Choose {other.precision.upper()}, which needs {size(other.memory)}, or close other "
        "programs."
        if other.fits
        else "Not even Q4 fits: choose a smaller model, or close other programs."
    )


def _load(library: Library, record: Model, precision: str, progress: Progress) -> HookedDecoder:
    from mistudio.engine.models import loading

    return loading.load_model(
        library.path(record.folder),
        precision,  # type: ignore[arg-type]
        device.current().kind,
        progress,
        consent_of(record),
    )


def consent_of(record: Model) -> Consent | None:
    """What was consented to when the model was added, where it brings its own program."""
    from mistudio.engine.models.custom_code import Consent

    return Consent.from_dict(record.provenance.get("code"))


def _weight_bytes(decoder: HookedDecoder) -> int:
    return sum(weight.numel() * weight.element_size() for weight in decoder.model.parameters())


# --- what quantising costs ----------------------------------------------------------------------


def quality_of(record: Model, precision: str) -> dict[str, Any] | None:
    """What was measured of the model at this precision (`quality.Quality`), or None; what was
    measured of another method of as many bits does not count."""
    from mistudio.engine.models.methods import still_holds

    found: dict[str, Any] | None = record.provenance.get("quality", {}).get(precision)
    return found if found is not None and still_holds(found, precision) else None


def _needs_judging(record: Model, precision: str) -> bool:
    from mistudio.engine.models.loading import QUANTISED

    return precision in QUANTISED and quality_of(record, precision) is None


def forget_quality(library: Library, model_id: int, precision: str) -> None:
    """So that it is measured anew."""
    provenance = library.models.get(model_id).provenance
    known = {key: value for key, value in provenance.get("quality", {}).items() if key != precision}
    library.models.update(model_id, provenance={**provenance, "quality": known})


def sample_texts(number: int) -> list[str]:
    """So many of the shipped introductions, evenly spread over all of them."""
    import json

    with resource(*_SAMPLE_TEXT).open(encoding="utf-8") as file:
        lines = file.readlines()
    stride = max(1, len(lines) // number)
    return [json.loads(line)["text"] for line in islice(lines, 0, None, stride)]


def reference_losses(
    library: Library, record: Model, progress: Progress = SILENT
) -> DocumentLosses | None:
    """Of the unquantised model, at the best precision that fits, on the CPU where the device is too
    small; None where it fits nowhere. The model is freed again."""
    from mistudio.engine.models import loading
    from mistudio.engine.models.architecture import read_architecture
    from mistudio.engine.models.memory import Use, plan_model

    folder = library.path(record.folder)
    architecture = read_architecture(folder)
    places = dict.fromkeys((device.current().kind, "cpu"))
    use = Use(batch=1)
    for kind in places:
        natural = loading.resolve_precision("auto", kind)
        for precision in dict.fromkeys((natural, "bf16")):
            free = device.current("cpu").free if kind == "cpu" else device.current().free
            here = replace(machine(library), memory_free=free)
            if plan_model(architecture, precision, here, use, device=kind).fits:
                decoder = loading.load_model(
                    folder,
                    precision,  # type: ignore[arg-type]
                    kind,
                    progress,
                    consent_of(record),
                )
                try:
                    return _losses(decoder, folder, progress)
                finally:
                    del decoder
                    garbage.collect()
                    device.give_back()
    return None


def _losses(decoder: HookedDecoder, folder: Path, progress: Progress) -> DocumentLosses:
    from mistudio.engine.models.loading import load_tokenizer
    from mistudio.engine.models.quality import DOCUMENTS, document_losses

    texts = sample_texts(DOCUMENTS + DOCUMENTS // 8)  # some are too short
    return document_losses(decoder, load_tokenizer(folder), texts, progress=progress)


def record_quality(
    library: Library,
    record: Model,
    decoder: HookedDecoder,
    reference: DocumentLosses | None,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Measure a quantised model beside the unquantised one's losses and keep the result in the
    model's record, under the precision. Where there is no reference, that is what is kept."""
    from mistudio.engine.models.methods import method_of
    from mistudio.engine.models.quality import compare

    precision = precision_of(decoder)
    if reference is None:
        found: dict[str, Any] = {
            "precision": precision,
            "method": method_of(precision),
            "verdict": "not measured",
            "sentence": f"What {precision.upper()} costs was not measured: the unquantised model "
            "does not fit into this computer's memory.",
        }
    else:
        quantised = _losses(decoder, library.path(record.folder), progress)
        found = compare(quantised, reference, decoder.vocab_size).as_dict()
    now = library.models.get(record.id).provenance
    known = {**now.get("quality", {}), precision: found}
    library.models.update(record.id, provenance={**now, "quality": known})
    return found
