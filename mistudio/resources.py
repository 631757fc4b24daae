"""Finding the files that ship with miStudio: sample text, icons, fonts."""

from __future__ import annotations

import sys
from pathlib import Path


def resource(*parts: str) -> Path:
    """The path of a shipped file, in a checkout, an installed wheel or a bundle."""
    package = Path(__file__).resolve().parent
    for base in (
        package.parent / "resources",
        package / "resources",
        Path(sys.prefix) / "share" / "mistudio" / "resources",
    ):
        path = base.joinpath(*parts)
        if path.exists():
            return path
    raise FileNotFoundError(2, "This file should have come with miStudio", "/".join(parts))
