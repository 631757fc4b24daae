"""Where a training job takes its activations from: a model beside it, a store, or both in turns."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistudio import device
from mistudio.engine.progress import Progress
from mistudio.errors import InvalidInput
from mistudio.jobs.models import loaded_model, own_model, unload_model
from mistudio.library.library import Library
from mistudio.library.records import Extraction, Tokenization

if TYPE_CHECKING:
    from mistudio.engine.activations.source import ActivationSource
    from mistudio.engine.datasets.tokens import TokenStore
    from mistudio.engine.models.hooks import HookPoint

# What a job may ask for. "auto": stored activations where it names some, else the model beside
# the training; where memory is too small for both, they take turns.
SOURCES = ("auto", "stream", "extract", "hybrid")
PHASE_TOKENS = 1_000_000  # of a hybrid, at most
LEAST_TOKENS = 20_000  # in smaller portions the model is loaded more than it is used
HELDOUT_TOKENS = 65_536  # stored at least, where there are so many


@dataclass(frozen=True)
class Origin:
    """`kind`: "stored" (an extraction of the library), "stream", "extract" or "hybrid". The last
    two store `phase_tokens` at a time in the run's own folder; "extract" does so once."""

    kind: str
    phase_tokens: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def takes_turns(self) -> bool:
        return self.kind in ("extract", "hybrid")


@dataclass(frozen=True)
class Text:
    """What is to be read: a model over a token store at some points, for so many tokens."""

    library: Library
    model_id: int
    tokenization: Tokenization
    points: tuple[HookPoint, ...]
    context: int
    tokens: int

    @property
    def store(self) -> TokenStore:
        from mistudio.engine.datasets.tokens import TokenStore

        return TokenStore(self.library.path(self.tokenization.folder))

    @property
    def heldout(self) -> int:
        """How many held-out tokens to store."""
        return min(len(self.store.heldout), max(HELDOUT_TOKENS, self.tokens // 16))


def choose(text: Text, wanted: str, extraction_id: int | None) -> Origin:
    """The origin that a job's `source` means. InvalidInput where it means none."""
    if wanted not in SOURCES:
        raise InvalidInput(
            "Unknown source of activations",
            f"{wanted!r} is not one of {', '.join(SOURCES)}.",
            field="source",
        )
    if extraction_id is not None:
        return Origin("stored")
    if wanted in ("extract", "hybrid"):
        return in_turns(text, wanted)
    return Origin("stream")


def in_turns(text: Text, kind: str, or_less: bool = False) -> Origin:
    """How much to store at a time: for "extract" all that the run needs, and where there is no
    room for that either DiskFull or, with `or_less`, "hybrid": any useful portion."""
    each = _bytes_per_token(text)
    # Special tokens and outliers are read and not kept.
    whole = min(len(text.store.train), round(1.1 * text.tokens) + 16 * text.context)
    room = int(shutil.disk_usage(text.library.root).free / 2 / each) - text.heldout
    if kind == "extract" and not (or_less and room < whole):
        text.library.require_space((whole + text.heldout) * each, "Storing the activations")
        return Origin("extract", whole)
    portion = min(whole, PHASE_TOKENS, room)
    if portion < min(whole, LEAST_TOKENS):
        text.library.require_space(4 * LEAST_TOKENS * each, "Storing activations in portions")
    return Origin("hybrid", portion)


def open_source(
    text: Text, origin: Origin, extraction_id: int | None, folder: Path, progress: Progress
) -> ActivationSource:
    """`folder` is the run's own; `progress` shows what happens before the training."""
    from mistudio.engine.activations.hybrid import HybridActivations
    from mistudio.engine.activations.source import LiveActivations
    from mistudio.engine.activations.store import StoredActivations

    kind = device.current().kind
    if origin.kind == "stored":
        extraction = _extraction(text, extraction_id)
        stored = StoredActivations(text.library.path(extraction.folder), kind)
        return stored.select(text.points)
    if origin.takes_turns:
        unload_model()  # the one that is kept would stay in memory beside the training
        return HybridActivations(
            lambda: own_model(text.library, text.model_id),
            text.store,
            text.points,
            text.context,
            folder / "activations",
            origin.phase_tokens,
            heldout_tokens=text.heldout,
            device=kind,
            progress=progress,
        )
    model = loaded_model(text.library, text.model_id, progress)
    for point in text.points:
        model.check_point(point)
    return LiveActivations(model, text.store, text.points, text.context)


def _bytes_per_token(text: Text) -> int:
    from mistudio.engine.activations.store import estimate_bytes

    d_model = text.library.models.get(text.model_id).d_model
    return estimate_bytes(1, [d_model] * len(text.points))


def _extraction(text: Text, extraction_id: int | None) -> Extraction:
    assert extraction_id is not None
    extraction: Extraction = text.library.extractions.get(extraction_id)
    same = extraction.model_id == text.model_id
    if not same or extraction.tokenization_id != text.tokenization.id:
        raise InvalidInput(
            "These activations belong to another model or dataset",
            f"Extraction {extraction.id} was made from other inputs.",
            "Choose activations of this model and dataset, or stream them.",
            field="extraction_id",
        )
    missing = [point.name for point in text.points if point.name not in extraction.hook_points]
    if missing:
        raise InvalidInput(
            "These activations lack a layer",
            f"{', '.join(missing)} is not among {', '.join(extraction.hook_points)}.",
            "Extract that layer too, or stream from the model.",
            field="layers",
        )
    return extraction
