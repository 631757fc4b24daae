"""What several commands need: finding what the user names, running a job here, options."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mistudio.errors import InvalidInput, NotFound
from mistudio.jobs.control import Control
from mistudio.jobs.job import can_go_on
from mistudio.library.library import Library

SITES = ("resid_pre", "resid_post", "mlp_in", "mlp_out", "attn_out")
RUN_HELP = "a run's name or number, an imported SAE's name, or sae:NUMBER"

Command = Callable[[argparse.Namespace, Library], "dict[str, Any]"]
Add = Callable[..., argparse.ArgumentParser]
"""`add(name, command, help, group)`: a command of its own, or one of a group."""


class Stopped(Exception):
    """The user pressed Ctrl-C and the job ended for it; `result` is what was kept."""

    def __init__(self, result: dict[str, Any] | None = None) -> None:
        self.result = result


class JobFailed(Exception):
    """A job ended with an error that its row holds."""

    def __init__(self, error: dict[str, Any]) -> None:
        self.error = error


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def not_negative(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is less than 0")
    return number


def add_sae_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--layer", type=int, help="which SAE, where the run has several")


def layers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as exc:
        raise InvalidInput(
            "Layers are numbers", f"{text!r} cannot be read.", "Write them as 10 or 10,20."
        ) from exc


def run_here(
    library: Library,
    job: Any,
    *,
    keep_on_stop: bool = False,
    quiet: bool = False,
    job_id: int | None = None,
) -> dict[str, Any]:
    """Submit (where it is not queued already) and run one job here, with progress and Ctrl-C; its
    result.

    Where `keep_on_stop` is set, the first Ctrl-C ends the work early and keeps it; the second
    throws it away.
    """
    from mistudio.jobs.job import run_job, submit
    from mistudio.terminal import ProgressLines

    control = Control()
    lines = ProgressLines()
    job_id = submit(library, job) if job_id is None else job_id
    with _interrupts(control, keep_on_stop):
        record = run_job(library, job, job_id, control, None if quiet else lines.show)
    if record.status == "finished":
        lines.finish_phase()
        return record.result
    lines.break_off()
    if can_go_on(library, record):
        print(f"`mistudio resume {record.id}` goes on from the last checkpoint.", file=sys.stderr)
    if record.status == "failed":
        raise JobFailed(record.error)
    raise Stopped


@contextmanager
def _interrupts(control: Control, keep: bool) -> Iterator[None]:
    def on_interrupt(signum: int, frame: object) -> None:
        if keep and not control.wants_finish:
            print("\nStopping; the SAE is kept. Ctrl-C again discards it.", file=sys.stderr)
            control.finish_early()
        else:
            control.cancel()

    def on_terminate(signum: int, frame: object) -> None:
        control.interrupt()  # the system shuts down: what can go on later is kept for that

    try:
        before = signal.signal(signal.SIGINT, on_interrupt)
    except ValueError:  # not the main thread: nobody can press Ctrl-C here
        yield
        return
    before_terminate = signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, before_terminate)


def find(table: Any, wanted: str) -> Any:
    """A record by its number or its name (the newest of several)."""
    if wanted.isdigit() and (record := table.find(int(wanted))):
        return record
    for record in table.all():
        if record.name.lower() == wanted.lower():
            return record
    names = ", ".join(f"{record.id} {record.name!r}" for record in table.all()) or "none yet"
    raise NotFound(
        f"No {table.noun} called {wanted!r}", f"The library has: {names}.", "Use a name or number."
    )


def find_saes(library: Library, wanted: str) -> tuple[str, list[Any]]:
    """(name, SAEs) of a run by number or name, of an imported SAE by name, or of `sae:NUMBER`."""
    from mistudio.jobs.saes import sae_title

    kind, _, number = wanted.partition(":")
    if kind == "sae" and number.isdigit():
        sae = library.saes.get(int(number))
        return sae_title(library, sae), [sae]
    try:
        training = find(library.trainings, wanted)
    except NotFound as exc:
        for sae in library.saes.imported():
            if sae.name.lower() == wanted.lower():
                return sae.name, [sae]
        names = ", ".join(f"sae:{sae.id} {sae.name!r}" for sae in library.saes.imported())
        if not names:
            raise
        raise NotFound(
            f"No run or imported SAE called {wanted!r}",
            f"{exc.what} Imported: {names}.",
            exc.next_step,
        ) from None
    saes = library.saes.of_training(training.id)
    if not saes:
        raise NotFound("This run has no SAEs", next_step="Choose another run.")
    return training.name, saes


def find_sae(library: Library, options: argparse.Namespace) -> Any:
    return one_of(find_saes(library, options.run)[1], options)


def one_of(saes: list[Any], options: argparse.Namespace) -> Any:
    """The SAE of the layer that was asked for, else the first."""
    chosen = [sae for sae in saes if options.layer in (None, sae.layer)]
    if not chosen:
        raise NotFound(
            "This run has no such layer",
            f"It has the layers {', '.join(str(sae.layer) for sae in saes)}.",
        )
    return chosen[0]
