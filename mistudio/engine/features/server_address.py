"""Where a server with a language model is, and whether that is this machine."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from mistudio.errors import InvalidInput


@dataclass(frozen=True)
class Address:
    """Where a server is: `path` is what its interface's paths begin with."""

    scheme: str
    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, text: str) -> Address:
        """Of `http://127.0.0.1:8080/v1`, `localhost:11434` and the like. InvalidInput else."""
        text = text.strip()
        try:
            parts = urlsplit(text if "://" in text else f"http://{text}")
            host, port = parts.hostname or "", parts.port
        except ValueError:
            host, port, parts = "", None, urlsplit("")
        unusual = parts.username or parts.password or parts.query or parts.fragment
        known = parts.scheme in ("http", "https") and re.fullmatch(r"[\w.:-]+", host)
        if not known or unusual:
            raise InvalidInput(
                "This is no server's address",
                f"{text!r} cannot be read as one.",
                "Type it as http://127.0.0.1:8080.",
                field="address",
            )
        path = parts.path.rstrip("/") or "/v1"
        return cls(parts.scheme, host, port or (443 if parts.scheme == "https" else 80), path)

    @property
    def is_loopback(self) -> bool:
        """Whether the name itself says that it is this machine; nothing is asked for that."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"
