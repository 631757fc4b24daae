"""The command line: the very jobs that the window runs, without the window.

One module per group of commands; each adds its own to the parser with `add_commands`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from mistudio import __version__, paths
from mistudio.cli import datasets, features, general, jobs, models, saes, steering, training
from mistudio.cli.general import show_results, window_arguments
from mistudio.cli.shared import Command, JobFailed, Stopped
from mistudio.errors import InvalidInput, UserError, explain
from mistudio.library.library import Library

DONE, FAILED, BAD_USAGE, STOPPED = 0, 1, 2, 130


def run(arguments: list[str]) -> int:
    """Parse, do, and return the exit code."""
    from mistudio.engine.training import distributed

    return _first_of_many(arguments) if distributed.launched() else _command(arguments)


def _first_of_many(arguments: list[str]) -> int:
    """As one of the processes that `torchrun` or `accelerate launch` started: the first does what
    was typed, the others help it to train."""
    from mistudio import bootstrap
    from mistudio.engine.training import distributed
    from mistudio.jobs.assist import assist

    bootstrap.prepare()
    try:
        world = distributed.from_environment()
    except UserError as exc:
        _print_error({"title": exc.title, "what": exc.what, "next_step": exc.next_step})
        return FAILED
    if isinstance(world, distributed.Processes) and world.rank:
        return assist(world)
    code = _command(arguments)
    if code == DONE:
        world.leave()
    return code  # where it is another, the others end because this process does


def _command(arguments: list[str]) -> int:
    from mistudio.engine.training import distributed

    parser = _parser()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as exit:
        return int(exit.code or 0)
    if options.command is None or options.command == "app":
        if distributed.launched():
            print("The window needs one process: start it without a launcher.", file=sys.stderr)
            return BAD_USAGE
        from mistudio.app import main as window

        return window([*window_arguments(options)])
    from mistudio import bootstrap, logs

    bootstrap.prepare()
    logs.set_up()
    try:
        _check_json(options)
        library = Library(options.library or paths.default_library())
        result = options.do(options, library)
        _write_json(options, result)
        if options.command == "demo":
            return show_results(options, result)
        return DONE if result.get("healthy", True) else FAILED
    except Stopped as stopped:
        if stopped.result is not None:
            _write_json(options, stopped.result)
        print("Stopped.", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return STOPPED
    except JobFailed as failure:
        _print_error(failure.error)
        return FAILED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as exc:
        known = explain(exc)
        if known is None:
            raise
        _print_error({"title": known.title, "what": known.what, "next_step": known.next_step})
        return FAILED


def _check_json(options: argparse.Namespace) -> None:
    """Refuse a place for the result before hours of work lead to it."""
    if options.json and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        raise InvalidInput(
            "The JSON file cannot be written there",
            f"{options.json} is a folder, or its folder does not exist.",
            "Name a file in an existing folder.",
        )


def _write_json(options: argparse.Namespace, result: dict[str, Any]) -> None:
    if not options.json:
        return
    partial = options.json.with_name(options.json.name + ".partial")
    partial.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(partial, options.json)


def _print_error(error: dict[str, Any]) -> None:
    print(f"{error['title']}.", file=sys.stderr)
    for key in ("what", "next_step"):
        if error.get(key):
            print(f"  {error[key]}", file=sys.stderr)
    if error.get("traceback"):
        print(error["traceback"], file=sys.stderr)


# --- what can be typed --------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    # Both may stand before or after the command: a command's own copy must not set a default, or
    # it would undo what stood before.
    common = _common_options(argparse.SUPPRESS)
    parser = argparse.ArgumentParser(
        prog="mistudio",
        description="Look inside a language model. Without a command the window opens.",
        parents=[_common_options(None)],
    )
    parser.add_argument("--version", action="version", version=f"miStudio {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, do: Command, help: str, group: Any = commands) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = group.add_parser(
            name, help=help, description=help, parents=[common]
        )
        sub.set_defaults(do=do)
        return sub

    commands.add_parser("app", help="open the window", parents=[common])
    for group in (general, datasets, models, training, features, steering, saes, jobs):
        group.add_commands(add, commands)
    return parser


def _common_options(default: Any) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--library", type=Path, metavar="DIR", default=default, help="library folder"
    )
    options.add_argument(
        "--json", type=Path, metavar="FILE", default=default, help="also write the result as JSON"
    )
    return options
