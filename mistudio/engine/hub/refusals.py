"""What the Hub answers when it refuses, as sentences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mistudio.engine.hub.access import Access
from mistudio.errors import AccessDenied, Busy, NotFound, Offline, UserError


@dataclass(frozen=True)
class Subject:
    """What the Hub is asked about: `kind` is dataset or model, `name` owner/name; a search has no
    name."""

    kind: str = "dataset"
    name: str = ""

    def page(self, access: Access) -> str:
        """Its page, where terms are accepted."""
        prefix = "datasets/" if self.kind == "dataset" else ""
        return f"{access.endpoint}/{prefix}{self.name}"

    def __str__(self) -> str:
        return self.name or "The search"


class Refused(Exception):
    """The Hub (or who it sent us to) answered with an error. `message` is its own words."""

    def __init__(self, status: int, headers: Mapping[str, str], message: str, host: str) -> None:
        super().__init__(f"HTTP {status} from {host}")
        self.status, self.message, self.host = status, message, host
        self.code = headers.get("x-error-code", "")
        self.headers = headers


SIGN_IN = "Sign in: Settings, Hugging Face account (or `mistudio login`)."


def in_words(refused: Refused, subject: Subject, access: Access) -> UserError:
    """The user's form of a refusal that asking again would not change."""
    page = subject.page(access)
    said = f' It says: "{refused.message}"' if refused.message else ""
    status, code, kind = refused.status, refused.code, subject.kind
    if code == "GatedRepo":
        if access.token is None:
            return AccessDenied(
                f"This {kind} is gated",
                f"{subject} is given to people who are signed in and have accepted its terms.",
                f"Accept the terms at {page}, then sign in: {SIGN_IN.partition(': ')[2]}",
            )
        return AccessDenied(
            f"This {kind} is gated",
            f"{subject} asks for its terms to be accepted first, by the account that the access "
            f"token belongs to.{said}",
            f"Open {page}, accept the terms (some owners answer each request by hand), then try "
            "again.",
        )
    if code == "DisabledRepo":
        return AccessDenied(
            f"This {kind} is disabled", f"The Hub has closed {subject}.", "Choose another one."
        )
    if status == 404 and code == "RevisionNotFound":
        return NotFound(
            "No such revision",
            f"{subject} has no branch, tag or commit of this name.",
            f"Look at {page}/tree/main, or leave the revision empty.",
        )
    if status == 404 and code == "EntryNotFound":
        return NotFound(
            "The file is not there",
            f"{subject} does not have this file any more.",
            "Search for it again: the repository may have changed.",
        )
    if code == "RepoNotFound" or status == 404:
        hidden = "" if access.token else f" A private one is only seen when signed in. {SIGN_IN}"
        return NotFound(
            f"No such {kind} on the Hub",
            f"{subject} does not exist, or it is private and closed to "
            f"{'this account' if access.token else 'who is not signed in'}.",
            f"Check the spelling (owner/name).{hidden}",
        )
    if status == 401 and access.token is not None:
        return AccessDenied(
            "The access token is not accepted",
            f"The Hub refused it for {subject}.{said}",
            f"Make a new one at {access.endpoint}/settings/tokens (reading is enough), then enter "
            "it again.",
        )
    if status in (401, 403):
        what = "the access token does not allow it" if access.token else "nobody is signed in"
        return AccessDenied(
            "The Hub does not give access",
            f"{subject} was refused (HTTP {status}): {what}.{said}",
            f"See {page}. {SIGN_IN}"
            if access.token is None
            else f"See {page}, or use a token that may read it.",
        )
    return UserError(
        "The Hub refused the request",
        f"{subject}: HTTP {status} from {refused.host}.{said}",
        "Try again later; if it stays so, look at the Hub's status page.",
    )


def too_long(seconds: float, subject: Subject) -> UserError:
    return Busy(
        "The Hub asks to wait too long",
        f"{subject}: it limits requests and asks for {seconds:.0f} s more.",
        "Try again later; what was fetched is kept. Signed in, more requests are allowed.",
    )


def unreachable(reason: str, subject: Subject, fetched: bool = False) -> UserError:
    kept = " What was fetched is kept, and the next try goes on from there." if fetched else ""
    return Offline(
        "The Hub cannot be reached",
        f"{subject}: {reason}.{kept}",
        "Check the connection and try again, or add a file or folder from this computer.",
    )
