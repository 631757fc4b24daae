"""What a training job needs of this computer, before it starts."""

from __future__ import annotations

from mistudio import device
from mistudio.engine.models.architecture import read_architecture
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.models.loading import QUANTISED, ModelSummary
from mistudio.engine.models.memory import plan_model, shape_of
from mistudio.engine.training.config import TrainingConfig
from mistudio.engine.training.cost import (
    WEIGHT_BYTES,
    DeviceSpeed,
    ModelShape,
    model_shape,
    probe_device,
)
from mistudio.engine.training.footprint import RunShape
from mistudio.engine.training.planning import RunPlan, plan_run, planned_sites
from mistudio.jobs.loaded import chosen_precision, machine
from mistudio.library.library import Library
from mistudio.library.records import Model


def planned(
    library: Library,
    model_id: int,
    points: tuple[HookPoint, ...],
    config: TrainingConfig,
    source: str,
    *,
    timed: bool = False,
) -> RunPlan | None:
    """The plan of a run that reads `points`, from `source` "stream", "extract", "hybrid" or
    "stored". `timed` measures the device (under a second). None where the model's row does not
    say enough about it (one of an older version)."""
    model = library.models.get(model_id)
    try:
        summary = ModelSummary(**model.summary)
    except TypeError:
        return None
    shape = _shape(library, model, summary)
    places = [(point.layer, point.site) for point in points]
    run = RunShape(shape, planned_sites(config, places, model.d_model), source=source)
    speed: DeviceSpeed | None = probe_device(device.current().kind) if timed else None
    return plan_run(run, machine(library), speed)


def _shape(library: Library, model: Model, summary: ModelSummary) -> ModelShape:
    precision = chosen_precision(library, model)
    if precision not in QUANTISED:
        return model_shape(summary, WEIGHT_BYTES[precision])
    kind = device.current().kind
    architecture = read_architecture(library.path(model.folder))
    return shape_of(
        architecture, plan_model(architecture, precision, machine(library), device=kind)
    )
