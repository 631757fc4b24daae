"""What the other processes do where `torchrun` or `accelerate launch` started several.

The first process runs the command: it owns the library, its jobs and its files. The others wait
for a training to begin, are told which folders it reads, and take part in it. They open no
library and write nothing.
"""

from __future__ import annotations

import logging
import signal
import sys
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistudio import device
from mistudio.engine.progress import Cancelled
from mistudio.engine.training import distributed
from mistudio.engine.training.distributed import Processes, World
from mistudio.errors import InvalidInput, ProcessLost, explain
from mistudio.jobs.loaded import consent_of

if TYPE_CHECKING:
    from mistudio.engine.activations.source import ActivationSource
    from mistudio.engine.training.checkpoints import Checkpoint
    from mistudio.jobs.sources import Origin, Text

DONE, FAILED = 0, 1


@dataclass(frozen=True)
class Order:
    """A training that all processes take part in, as JSON. Folders must be where all of them can
    read: on several machines, on a shared disk. `stored` is empty where activations are streamed,
    `resume` where the training begins. `code` is the consent to run the model's own program, empty
    where it has none."""

    config: dict[str, Any]
    points: list[str]
    model: str
    precision: str
    tokens: str
    stored: str
    resume: str
    new_stream: bool
    code: dict[str, Any]


def call(
    text: Text,
    origin: Origin,
    extraction_id: int | None,
    config: dict[str, Any],
    resume: Checkpoint | None,
    new_stream: bool,
) -> World:
    """The first process calls the others to a training. The processes that then take part in it.

    Raises InvalidInput where the activations come in a way that only one process can use.
    """
    world = distributed.current()
    if world.size == 1:
        return world
    if origin.takes_turns:
        raise InvalidInput(
            "Model and training cannot take turns in several processes",
            f"{world.size} processes were started.",
            "Store the activations first (--source store), stream them (--source stream), or "
            "start one process.",
            field="source",
        )
    library = text.library
    model = library.models.get(text.model_id)
    stored = ""
    if extraction_id is not None:
        stored = str(library.path(library.extractions.get(extraction_id).folder))
    order = Order(
        config,
        [point.name for point in text.points],
        str(library.path(model.folder)),
        model.precision,
        str(library.path(text.tokenization.folder)),
        stored,
        str(resume.folder) if resume else "",
        new_stream,
        consent.as_dict() if (consent := consent_of(model)) else {},
    )
    world.told(asdict(order))
    return world


def assist(world: Processes) -> int:
    """The whole life of a process that is not the first; its exit code."""
    logging.getLogger().addHandler(logging.NullHandler())
    # Ctrl-C and the system's end reach all processes: the first one decides what comes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda signum, frame: world.dismiss())
    import mistudio.engine.training.run  # noqa: F401  (seconds, while the first one prepares)

    try:
        for order in world.orders():
            _take_part(Order(**order), world)
    except ProcessLost:
        world.linger()
        return FAILED
    except Exception as exc:
        _give_up(world, exc)
        return FAILED
    return DONE


def _take_part(order: Order, world: World) -> None:
    from mistudio.engine.training import checkpoints
    from mistudio.engine.training.config import TrainingConfig
    from mistudio.engine.training.run import train

    resume = checkpoints.load(Path(order.resume)) if order.resume else None
    source = _source(order)
    config = TrainingConfig(**order.config)
    with suppress(Cancelled):  # in all of them at once; the first one knows what for
        train(source, config, resume=resume, new_stream=order.new_stream, world=world)


def _source(order: Order) -> ActivationSource:
    """As `jobs/sources.py` opens it for the first process."""
    from mistudio.engine.activations.source import LiveActivations
    from mistudio.engine.activations.store import StoredActivations
    from mistudio.engine.datasets.tokens import TokenStore
    from mistudio.engine.models.custom_code import Consent
    from mistudio.engine.models.hooks import HookPoint
    from mistudio.engine.models.loading import load_model

    kind = device.current().kind
    points = tuple(HookPoint.parse(name) for name in order.points)
    if order.stored:
        return StoredActivations(Path(order.stored), kind).select(points)
    model = load_model(
        Path(order.model),
        order.precision,  # type: ignore[arg-type]
        kind,
        consent=Consent.from_dict(order.code),
    )
    context = int(order.config["context"])
    return LiveActivations(model, TokenStore(Path(order.tokens)), points, context)


def _give_up(world: Processes, exc: Exception) -> None:
    """The first process says why the run ends; where it cannot be reached, this one does."""
    known = explain(exc)
    if known is None:
        traceback.print_exc()
    if not world.fail(str(known or f"{type(exc).__name__}: {exc}")) and known is not None:
        print(f"Process {world.rank}: {known}", file=sys.stderr)
