"""Times of the library's rows (ISO 8601, UTC) as people read them."""

from __future__ import annotations

from datetime import datetime


def clock_time(stamp: str) -> str:
    """`today 14:05`, or `21 Nov 14:05`, in local time."""
    moment = datetime.fromisoformat(stamp).astimezone()
    if moment.date() == datetime.now().astimezone().date():
        return f"today {moment:%H:%M}"
    return f"{moment.day} {moment:%b %H:%M}"


def seconds_between(start: str | None, end: str | None) -> float | None:
    if not start or not end:
        return None
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
