"""Where features come from: the SAEs of completed runs, and imported ones, that were discovered."""

from __future__ import annotations

from dataclasses import dataclass

from mistudio.library.library import Library
from mistudio.library.records import Sae
from mistudio.ui.times import clock_time
from mistudio.ui.training.form import encoder_of, encoder_title

_SITE_MEANINGS = {
    "hook_resid_pre": "residual stream before the block",
    "hook_resid_post": "residual stream after the block",
    "mlp.hook_in": "input of the MLP",
    "hook_mlp_out": "output of the MLP",
    "hook_attn_out": "output of attention",
}


@dataclass(frozen=True)
class Source:
    """An SAE whose features are known. `title`: `{encoder} SAE • {model} • {dataset}`, as presets
    show it; `menu_text` says when it began, too, as does `trained_on`."""

    sae: Sae
    run_id: int
    title: str
    menu_text: str
    trained_on: str
    model: str
    model_layers: int
    median_norm: float | None

    @property
    def layer_text(self) -> str:
        """`Layer 12 of 0 to 29 • residual stream after the block`."""
        suffix = self.sae.hook_point.split(".", 2)[-1]
        where = _SITE_MEANINGS.get(suffix, suffix)
        return f"Layer {self.sae.layer} of 0 to {self.model_layers - 1} • {where}"

    @property
    def in_residual_stream(self) -> bool:
        """Whether its directions mean the same after every block."""
        return self.sae.hook_point_out.split(".", 2)[-1] in ("hook_resid_pre", "hook_resid_post")


def sources(library: Library) -> list[Source]:
    """Every SAE with a discovery pass, those of the newest training first."""
    newest: dict[int, int] = {}
    for run in library.feature_runs.all():
        newest.setdefault(run.sae_id, run.id)
    found = []
    for sae in library.saes.all():
        if sae.id in newest:
            found.append(_source(library, sae, newest[sae.id]))
    return found


def _source(library: Library, sae: Sae, run_id: int) -> Source:
    model = library.models.get(sae.model_id)
    training = library.trainings.find(sae.training_id) if sae.training_id else None
    encoder = encoder_title(sae.architecture, sae.wiring)
    dataset, started, siblings = sae.name, sae.created_at, 1
    if training is not None:
        encoder = encoder_of(training.config)
        record = library.datasets.find(training.dataset_id)
        dataset = record.name if record else ""
        job = library.jobs.find(training.job_id) if training.job_id else None
        started = (job.started_at if job else None) or training.created_at
        siblings = len(library.saes.of_training(training.id))
    title = " • ".join([encoder, model.name] + ([dataset] if dataset else []))
    layer = [f"layer {sae.layer}"] if siblings > 1 else []
    verb = "Imported" if training is None else "Started"
    median = sae.metrics.get("median_norm")
    return Source(
        sae=sae,
        run_id=run_id,
        title=title,
        menu_text=" • ".join([title, *layer, f"{verb} {clock_time(started)}"]),
        trained_on=" • ".join([*([dataset] if dataset else []), f"{verb} {clock_time(started)}"]),
        model=model.name,
        model_layers=model.n_layers,
        median_norm=float(median) if median else None,
    )
