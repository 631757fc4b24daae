"""SAEs that were not trained here, as the Training tab deals with them; no widgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PySide6.QtCore import QObject, Signal

from mistudio.engine.progress import Cancelled
from mistudio.errors import InvalidInput
from mistudio.library.records import Model, Sae
from mistudio.ui.hub.asking import Answer, ask
from mistudio.ui.services import Services
from mistudio.ui.training.imported import Imported

if TYPE_CHECKING:
    from mistudio.engine.hub import Found
    from mistudio.engine.hub.saes import HubSae, HubSaes
    from mistudio.jobs.sae_preview import SeenSae

INTAKE_KINDS = ("import_sae", "download_sae", "measure_sae")
MOST_PEEKED = 12  # of a repository's SAEs, before they are fetched


@dataclass(frozen=True)
class Place:
    """Where what was seen would come from: a path here, or files of a repository."""

    path: str = ""
    repository: str = ""
    revision: str = ""
    files: tuple[str, ...] = ()
    label: str = ""

    @property
    def on_hub(self) -> bool:
        return bool(self.repository)


@dataclass(frozen=True)
class Choices:
    """What the user says about what was seen; None leaves it to the files."""

    model: Model | None = None
    layer: int | None = None
    site: str | None = None
    name: str = ""


def blocker(seen: Sequence[SeenSae], choices: Choices, on_hub: bool) -> str:
    """Why these cannot be imported as they are; "" where they can."""
    if not seen:
        return "Choose a file, a folder or a repository first."
    for one in seen:
        if one.problem:
            rest = " Choose one of the others by itself." if len(seen) > 1 else ""
            return f"{one.place}: {one.problem}{rest}"
    if choices.model is None:
        return "Choose the model that it belongs to. Where it is not in the list, add it first."
    for one in seen:
        if why := one.misfit(choices.model, choices.layer):
            return f"{one.place}: {why}" if len(seen) > 1 else why
    open_ones = [one for one in seen if not one.reads]
    if not open_ones or on_hub:  # the files of a download say it when they are read
        return ""
    if len(open_ones) < len(seen):
        return "Some of these say where they belong and some do not: import them one by one."
    if choices.site is None:
        return "Its files do not say which activations it reads: choose the hook point."
    if choices.layer is None and any(one.layer is None for one in open_ones):
        return "Its files do not name a layer: choose it."
    return ""


def placing(
    seen: Sequence[SeenSae], choices: Choices, on_hub: bool
) -> tuple[int | None, str | None]:
    """The layer and the site to hand to the job: only what the files leave open, since the job
    refuses to contradict them. Of a download a layer is only guessed by the name of its folder:
    with a site that was chosen it is handed over too."""
    if any(one.reads for one in seen):
        return None, None
    named = {one.layer for one in seen if one.layer is not None}
    if on_hub:
        guessed = named.pop() if len(named) == 1 and choices.site is not None else None
        return (choices.layer if choices.layer is not None else guessed), choices.site
    return (None if named else choices.layer), choices.site


class Intake(QObject):
    """The imported SAEs of the library, and what can be done with them."""

    changed = Signal()

    def __init__(self, services: Services, parent: QObject | None = None) -> None:
        super().__init__(parent)
        self._services = services
        services.changes.changed.connect(self._on_changes_changed)

    # --- the list -------------------------------------------------------------------------------

    def imported(self) -> list[Imported]:
        library = self._services.library
        saes = library.saes.imported()
        if not saes:
            return []
        models = {record.id: record.name for record in library.models.all()}
        datasets = tuple(library.datasets.all())
        discovered = {row["sae_id"] for row in library.rows("SELECT sae_id FROM feature_runs")}
        busy: dict[int, list[tuple[str, int]]] = {}
        for job in self._services.jobs.active():
            if job.kind in ("discover", "measure_sae"):
                busy.setdefault(job.params.get("sae_id", 0), []).append((job.kind, job.id))
        return [
            Imported(
                sae,
                models.get(sae.model_id, "deleted model"),
                datasets,
                sae.id in discovered,
                tuple(busy.get(sae.id, ())),
            )
            for sae in saes
        ]

    def models(self) -> list[Model]:
        return self._services.library.models.all()

    # --- commands -------------------------------------------------------------------------------

    def bring_in(self, place: Place, seen: Sequence[SeenSae], choices: Choices) -> int:
        """Queue the import; the id of its job. InvalidInput where it cannot start."""
        from mistudio.jobs.saes import DownloadSae, ImportSae

        if why := blocker(seen, choices, place.on_hub):
            raise InvalidInput("This cannot be imported", why)
        assert choices.model
        layer, site = placing(seen, choices, place.on_hub)
        if place.on_hub:
            download = DownloadSae(
                place.repository,
                place.revision,
                list(place.files),
                place.label,
                choices.model.id,
                choices.name,
                layer,
                site,
            )
            return self._services.jobs.submit(download)
        return self._services.jobs.submit(
            ImportSae(place.path, choices.model.id, choices.name, None, layer, site)
        )

    def measure(self, sae_id: int, dataset_id: int) -> int:
        from mistudio.jobs.sae_measuring import MeasureSae

        return self._services.jobs.submit(MeasureSae(sae_id, dataset_id))

    def discover(self, sae_id: int, dataset_id: int) -> int:
        from mistudio.jobs.features import Discover

        return self._services.jobs.submit(Discover(sae_id, dataset_id=dataset_id))

    def export(self, sae: Sae, parent: Path) -> Path:
        """Queue the export into a new folder inside `parent`; returns that folder."""
        from mistudio.jobs.saes import Export

        slug = "".join(c if c.isalnum() or c in "._-" else "-" for c in sae.name).strip("-.")
        slug = slug or f"sae-{sae.id}"
        target, number = parent / slug, 2
        while target.exists():
            target, number = parent / f"{slug}-{number}", number + 1
        self._services.jobs.submit(Export(None, str(target), sae_id=sae.id))
        return target

    def delete_refusal(self, sae: Sae) -> str:
        """Why an SAE cannot be deleted now; empty where it can."""
        users = [
            job.title for job in self._services.jobs.active() if job.params.get("sae_id") == sae.id
        ]
        return f"A job uses it: {', '.join(users)}. Wait for it or cancel it." if users else ""

    def delete(self, sae: Sae) -> None:
        """Move it and its features to the trash."""
        if refusal := self.delete_refusal(sae):
            raise InvalidInput("This SAE is in use", refusal)
        self._services.library.discard("saes", sae.id)

    def _on_changes_changed(self, table: str, ids: frozenset[int]) -> None:
        if table in ("jobs", "saes", "feature_runs", "models", "datasets"):
            self.changed.emit()


# --- questions, asked in the background -----------------------------------------------------------


def answered(number: int, function: Callable[[], Any]) -> Answer:
    """What `function` gives or raises, with the number of the question: an older one's failure is
    no more to be shown than its answer."""
    try:
        return Answer(number, function())
    except Exception as exc:
        return Answer(number, exc)


def look_here(path: str, stopped: Callable[[], bool]) -> list[SeenSae]:
    from mistudio.jobs.sae_preview import look

    def check() -> None:
        if stopped():
            raise Cancelled

    return look(Path(path).expanduser(), check)


def search_hub(text: str, token: str) -> list[Found]:
    from mistudio.engine.hub.saes import search_saes

    found: list[Found] = ask(0, "", token, lambda access: search_saes(text, access=access)).value
    return found


def look_at_repository(name: str, token: str) -> HubSaes:
    from mistudio.engine.hub.saes import sae_repository

    found: HubSaes = ask(0, name, token, lambda access: sae_repository(name, access=access)).value
    return found


def peek_at(repository: HubSaes, saes: Sequence[HubSae], token: str) -> list[SeenSae]:
    from mistudio.engine.hub.saes import peek
    from mistudio.jobs.sae_preview import seen_on_hub

    name, revision = repository.repository, repository.revision

    def look(access: Any) -> list[SeenSae]:
        return [seen_on_hub(sae, peek(name, revision, sae, access)) for sae in saes]

    seen: list[SeenSae] = ask(0, name, token, look).value
    return seen
