"""What a training job needs of this computer, before it starts."""

from __future__ import annotations

import shutil
from dataclasses import replace

import psutil

from mistudio import device
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.models.loading import ModelSummary, resolve_precision
from mistudio.engine.training.config import TrainingConfig
from mistudio.engine.training.cost import WEIGHT_BYTES, DeviceSpeed, model_shape, probe_device
from mistudio.engine.training.footprint import Machine, RunShape
from mistudio.engine.training.planning import RunPlan, plan_run, planned_sites
from mistudio.jobs.models import loaded_bytes
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
    shape = model_shape(summary, WEIGHT_BYTES[_precision(model)])
    places = [(point.layer, point.site) for point in points]
    run = RunShape(shape, planned_sites(config, places, model.d_model), source=source)
    speed: DeviceSpeed | None = probe_device(device.current().kind) if timed else None
    return plan_run(run, machine(library), speed)


def machine(library: Library) -> Machine:
    """This computer; what a model that is loaded already takes counts as free."""
    found, memory = device.current(), psutil.virtual_memory()
    disk = shutil.disk_usage(library.root).free
    apart = found.kind == "cuda"
    here = Machine(found.memory, found.free, disk, memory.available if apart else None)
    return replace(here, memory_free=here.memory_free + loaded_bytes())


def _precision(model: Model) -> str:
    return resolve_precision(model.precision, device.current().kind)  # type: ignore[arg-type]
