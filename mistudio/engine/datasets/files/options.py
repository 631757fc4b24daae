"""How files are read, and what was left out: plain data that a record can keep."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from mistudio.engine.datasets.documents import Limit
from mistudio.errors import InvalidInput

# One row (a line of JSON, a row of a table, an item of a JSON list) may hold as much; plain text
# has no such bound, because it is cut between paragraphs. Memory stays at a few times this.
MAX_ROW = 16 * 1024**2
KEPT_ROWS = 50  # so many bad rows are named; all are counted


@dataclass(frozen=True)
class ReadOptions:
    """What the user chose. `text_column` and `encoding` None: found out from each file."""

    text_column: str | None = None
    bad_rows: str = "refuse"  # or "skip"
    max_documents: int | None = None
    max_bytes: int | None = None  # of text, in UTF-8
    encoding: str | None = None

    def __post_init__(self) -> None:
        if self.bad_rows not in ("refuse", "skip"):
            raise InvalidInput(
                "Bad rows are refused or skipped",
                f"{self.bad_rows!r} is neither.",
                field="bad_rows",
            )

    @property
    def limit(self) -> Limit:
        return Limit(self.max_documents, self.max_bytes)

    @property
    def skips(self) -> bool:
        return self.bad_rows == "skip"

    def as_json(self) -> dict[str, Any]:
        """Only what differs from the defaults."""
        defaults = asdict(DEFAULTS)
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ReadOptions:
        """Fields that another version added are ignored."""
        return cls(**{name: values[name] for name in asdict(cls()) if name in values})


DEFAULTS = ReadOptions()


@dataclass(frozen=True)
class BadRow:
    """A row that could not be read. `line` is the line in the file, or the number of the row in a
    file that has no lines; 0: the whole file."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass
class Rejected:
    """What reading left out or changed, filled while it goes on."""

    rows: int = 0
    files: int = 0  # that could not be read, where others of the folder could
    first: list[BadRow] = field(default_factory=list)
    replaced: int = 0  # byte sequences that were no character of the file's encoding
    encodings: Counter[str] = field(default_factory=Counter)  # its name -> files
    left_out: list[str] = field(default_factory=list)  # sentences about what was not read

    def add(self, row: BadRow) -> None:
        if row.line:
            self.rows += 1
        else:
            self.files += 1
        if len(self.first) < KEPT_ROWS:
            self.first.append(row)

    def as_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "files": self.files,
            "first": [asdict(row) for row in self.first],
            "replaced": self.replaced,
            "encodings": dict(self.encodings),
            "left_out": list(self.left_out),
        }


def megabytes(n_bytes: float) -> str:
    """A size as people read it, in units of 1000: `0.4 MB`, `17 MB`, `3.2 GB`."""
    if n_bytes >= 1e9:
        return f"{n_bytes / 1e9:,.1f} GB"
    return f"{n_bytes / 1e6:.0f} MB" if n_bytes >= 1e7 else f"{n_bytes / 1e6:.1f} MB"
