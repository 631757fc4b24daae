"""`resume`, `checkpoints` and `job`: work that ended before it was done."""

from __future__ import annotations

import argparse
from typing import Any

from mistudio.cli.shared import Add, run_here
from mistudio.cli.training import trained
from mistudio.errors import InvalidInput, NotFound
from mistudio.formatting import number, size
from mistudio.jobs.job import can_go_on
from mistudio.library.library import Library


def add_commands(add: Add, commands: Any) -> None:
    resume = add("resume", _resume, "go on with a training or other work that was interrupted")
    resume.add_argument("job", type=int, nargs="?", help="default: the last one")
    resume.add_argument(
        "--step", type=int, metavar="N", help="from this checkpoint; later ones are deleted"
    )
    saved = add("checkpoints", _checkpoints, "what interrupted trainings can go on from")
    saved.add_argument("job", type=int, nargs="?", help="default: all")
    saved.add_argument("--delete", type=int, metavar="STEP", help="delete this one of the job")

    job = commands.add_parser("job", help="jobs that were interrupted").add_subparsers(
        required=True
    )
    sub = add(
        "retry",
        _job_retry,
        "run an interrupted, failed or stopped job again (a training goes on from its checkpoint)",
        job,
    )
    sub.add_argument("job", type=int)
    sub = add("dismiss", _job_dismiss, "put an ended job away", job)
    sub.add_argument("job", type=int)


def _resume(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    found = [record for record in library.jobs.resumable() if can_go_on(library, record)]
    if options.job is not None:
        library.jobs.get(options.job)
        found = [record for record in found if record.id == options.job]
    if not found:
        what = "No training with a checkpoint was interrupted."
        if options.job is not None:
            status = library.jobs.get(options.job).status
            what = f"Job {options.job} ({status}) has no checkpoint to go on from."
        raise NotFound(
            "There is nothing to go on with", what, "`mistudio checkpoints` lists what there is."
        )
    return _go_on(library, found[0], options.step)


def _go_on(library: Library, record: Any, step: int | None = None) -> dict[str, Any]:
    """Run a job again under its own number: it goes on from what it kept."""
    from mistudio.jobs.job import take_up
    from mistudio.jobs.kinds import job_from_row

    job = job_from_row(record.kind, record.params)
    take_up(library, record.id, step)
    if record.kind != "train":
        return run_here(library, job, job_id=record.id)
    return trained(library, run_here(library, job, keep_on_stop=True, job_id=record.id))


def _checkpoints(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.engine.training import checkpoints
    from mistudio.terminal import table

    if options.delete is not None:
        if options.job is None:
            raise InvalidInput("Which job's checkpoint?", "Name the job before --delete.")
        library.jobs.get(options.job)
        checkpoints.delete(library.checkpoint_folder(options.job), options.delete)
    jobs = library.jobs.all() if options.job is None else [library.jobs.get(options.job)]
    rows, total = [], 0
    for record in jobs:
        folder = library.checkpoint_folder(record.id)
        best = checkpoints.best(folder)
        for checkpoint in checkpoints.listing(folder):
            rows.append(
                {
                    "job": record.id,
                    "title": record.title,
                    "status": record.status,
                    "step": checkpoint.step,
                    "of": next(iter(checkpoint.run["plans"].values()))["steps"],
                    "loss": number(checkpoint.loss, 4),
                    "fvu": number(checkpoint.fvu, 3),
                    "best": "best" if best and best.step == checkpoint.step else "",
                    "kept": "until deleted" if checkpoint.kept else "",
                    "size": size(checkpoint.bytes),
                }
            )
            total += checkpoint.bytes
    print(table(rows, {key: key for key in rows[0]}) if rows else "No checkpoints.")
    if rows:
        print(f"{size(total)} in all.")
    return {"checkpoints": rows}


def _job_retry(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    from mistudio.jobs.kinds import job_from_row

    record = library.jobs.get(options.job)
    if record.active:
        raise InvalidInput("This job has not ended", f"Job {record.id} is {record.status}.")
    if can_go_on(library, record):
        return _go_on(library, record)
    job = job_from_row(record.kind, record.params)
    result = run_here(library, job, keep_on_stop=record.kind == "train")
    if record.status == "interrupted":
        library.jobs.move(record.id, ("interrupted",), "cancelled")
    print(f"{record.title}: done.")
    return result


def _job_dismiss(options: argparse.Namespace, library: Library) -> dict[str, Any]:
    record = library.jobs.get(options.job)
    if record.active:
        raise InvalidInput("This job has not ended", f"Job {record.id} is {record.status}.")
    library.jobs.remove(record.id)
    return {"job_id": record.id}
