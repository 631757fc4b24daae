"""Which SAEs have features, or could: those of finished runs and imported ones."""

from __future__ import annotations

from dataclasses import dataclass

from mistudio.library.library import Library
from mistudio.library.records import Sae, Training
from mistudio.ui.times import clock_time
from mistudio.ui.training.form import encoder_of, encoder_title, point_title


@dataclass(frozen=True)
class SaeChoice:
    """An SAE as the combo lists it. An imported one has no `training` and no `dataset`; `several`:
    its run has others."""

    sae: Sae
    training: Training | None
    model: str
    dataset: str
    several: bool

    @property
    def title(self) -> str:
        if self.training is None:
            name = self.sae.name or encoder_title(self.sae.architecture, self.sae.wiring)
            when = clock_time(self.sae.created_at)
            return " • ".join([name, self.model, self.site, f"Imported {when}"])
        parts = [encoder_of(self.training.config), self.model, self.dataset]
        if self.several:
            parts.append(self.site)
        return " • ".join([*parts, f"Started {clock_time(self.training.created_at)}"])

    @property
    def site(self) -> str:
        wiring = self.sae.wiring
        if self.training is not None:
            wiring = str(self.training.config.get("wiring", ""))
        return point_title(self.sae.hook_point, wiring)


def choices(library: Library) -> list[SaeChoice]:
    """SAEs of finished runs, newest first, then imported ones."""
    models = {record.id: record.name for record in library.models.all()}
    datasets = {record.id: record.name for record in library.datasets.all()}
    found = []
    for training in library.trainings.all():
        saes = library.saes.of_training(training.id)
        found += [
            SaeChoice(
                sae,
                training,
                models.get(training.model_id, "deleted model"),
                datasets.get(training.dataset_id, "deleted dataset"),
                len(saes) > 1,
            )
            for sae in saes
        ]
    found += [
        SaeChoice(sae, None, models.get(sae.model_id, "deleted model"), "", False)
        for sae in library.saes.imported()
    ]
    return found
