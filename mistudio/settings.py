"""Every setting, declared once: the settings dialog, the checks and the help come from this table.

A JSON file in the configuration folder; free of Qt.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistudio.errors import InvalidInput
from mistudio.paths import config_folder

log = logging.getLogger(__name__)

VERSION = 1


@dataclass(frozen=True)
class Setting:
    """`minimum`/`maximum` bound a number; `choices` are (value, label) pairs. A `hidden` one is
    changed where it is used and not on the settings page."""

    key: str
    type: type
    default: Any
    label: str
    help: str
    group: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[tuple[Any, str], ...] = ()
    unit: str = ""
    needs_restart: bool = False
    hidden: bool = False

    def problem(self, value: object) -> str:
        """Why a value cannot be used; empty where it can."""
        # bool is an int to Python, but not to a person
        if type(value) is not self.type and not (self.type is float and type(value) is int):
            return f"{self.label} must be {_TYPE_NAMES[self.type]}."
        if self.choices and value not in [choice for choice, _ in self.choices]:
            return f"{self.label} must be one of {', '.join(str(c) for c, _ in self.choices)}."
        if isinstance(value, int | float) and not isinstance(value, bool):
            if self.minimum is not None and value < self.minimum:
                return f"{self.label} must be at least {self.minimum:g}{self.unit}."
            if self.maximum is not None and value > self.maximum:
                return f"{self.label} must be at most {self.maximum:g}{self.unit}."
        return ""


_TYPE_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "on or off"}

SETTINGS: tuple[Setting, ...] = (
    Setting(
        "library", str, "", "Library folder",
        "Where datasets, models and runs are kept. Empty: the usual place for your system. "
        "A library that is named at the start comes before it.",
        "General", needs_restart=True,
    ),
    Setting(
        "threads", int, 0, "CPU threads",
        "Threads for computing; 0 takes every core, which the window does not feel.",
        "General", minimum=0, maximum=512, needs_restart=True,
    ),
    Setting(
        "text_size", int, 100, "Text size",
        "Size of all text, in percent.",
        "Appearance", minimum=100, maximum=150, unit=" %", needs_restart=True,
    ),
    Setting(
        "token_colours", str, "emerald", "Token heat colours",
        "How strongly a feature fires on a token. The second map keeps its order for every kind of "
        "colour vision.",
        "Appearance",
        choices=(("emerald", "Emerald"), ("safe", "Blue to yellow (colour-blind safe)")),
    ),
    Setting(
        "offline", bool, False, "Work offline",
        "Never ask the Hugging Face Hub, whatever is clicked. Otherwise it is asked only when you "
        "search it or download from it, and nothing is ever sent by itself.",
        "Hugging Face account",
    ),
    Setting(
        "notify", bool, True, "Tell me when long jobs end",
        "A system notification when a job ends while the window is in the background.",
        "Notifications",
    ),
    Setting(
        "notify_after", int, 30, "Only for jobs longer than",
        "Shorter jobs end silently.",
        "Notifications", minimum=0, maximum=3600, unit=" s",
    ),
    Setting(
        "describer_address", str, "", "Describing server",
        "Address of a server with a language model that describes features.",
        "Features", hidden=True,
    ),
    Setting(
        "describer_model", str, "", "Describing model",
        "Which of that server's models describes features.",
        "Features", hidden=True,
    ),
    Setting(
        "describer_confirmed", str, "", "Confirmed server",
        "The address beyond this machine that text may be sent to.",
        "Features", hidden=True,
    ),
)  # fmt: skip

_BY_KEY = {setting.key: setting for setting in SETTINGS}


class Settings:
    """The chosen values. Reading never fails: a broken file is kept as .bak and defaults hold."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or config_folder() / "settings.json"
        self.problem = ""  # what was wrong with the file, for the window to tell
        self._listeners: list[Callable[[str], None]] = []
        self._values = self._read()

    def get(self, key: str) -> Any:
        return self._values.get(key, _BY_KEY[key].default)

    def set(self, key: str, value: Any) -> None:
        """Check, keep and write at once. InvalidInput where the value cannot be used."""
        setting = _BY_KEY[key]
        if problem := setting.problem(value):
            raise InvalidInput("This setting cannot be used", problem, "", field=key)
        if self.get(key) == value:
            return
        self._values[key] = value
        self._write()
        for listener in list(self._listeners):
            listener(key)

    def observe(self, listener: Callable[[str], None]) -> None:
        """Call `listener(key)` after a setting changed."""
        self._listeners.append(listener)

    def unobserve(self, listener: Callable[[str], None]) -> None:
        if listener in self._listeners:
            self._listeners.remove(listener)

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            values = content["values"]
            if content["version"] > VERSION:
                raise ValueError(f"written by a newer miStudio (version {content['version']})")
            if not isinstance(values, dict):
                raise TypeError("`values` is not an object")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as exc:
            self._keep_broken_file(f"{type(exc).__name__}: {exc}")
            return {}
        good = {k: v for k, v in values.items() if k in _BY_KEY and not _BY_KEY[k].problem(v)}
        if len(good) < len(values):
            self._keep_broken_file(
                f"unknown or unusable: {', '.join(sorted(set(values) - set(good)))}"
            )
        return good

    def _keep_broken_file(self, problem: str) -> None:
        self.problem = problem
        backup = self.path.with_suffix(".json.bak")
        log.warning("Settings: %s; the file is kept as %s", problem, backup.name)
        try:
            backup.write_bytes(self.path.read_bytes())
        except OSError as exc:
            log.warning("The broken settings could not be kept: %s", exc)

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"version": VERSION, "values": self._values}, indent=2, sort_keys=True)
        handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=".settings-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
