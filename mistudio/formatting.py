"""Sizes, counts and times as people read them; the only place that formats them."""

from __future__ import annotations


def size(n_bytes: float) -> str:
    """1024-based, two decimals without trailing zeros: `2.3 GB`."""
    value = float(n_bytes)
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(value) < 1024 or unit == "TB":
            break
        value /= 1024
    text = f"{value:.0f}" if unit == "B" else f"{value:.2f}".rstrip("0").rstrip(".")
    return f"{text} {unit}"


def short_size(n_bytes: float) -> str:
    """1024-based, two or three digits: `412 MB`, `1.2 GB`; for what changes while one looks."""
    value = float(n_bytes)
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if abs(value) < 999.5 or unit == "TB":
            break
        value /= 1024
    decimals = 0 if unit == "B" or abs(value) >= 9.95 else 1
    return f"{value:.{decimals}f}".removesuffix(".0") + f" {unit}"


def transfer(done: float, total: float | None = None, speed: float | None = None) -> str:
    """`412 MB of 1.2 GB, 38 MB/s, 21 s left`; `speed` in bytes per second, None where it is not
    known. At a speed of zero no time is promised."""
    told = [short_size(done) + (f" of {short_size(total)}" if total else "")]
    if speed is not None:
        told.append(f"{short_size(speed)}/s")
        if total and speed >= 1:
            left = max(0.0, total - done) / speed
            told.append(f"{f'{max(1, round(left))} s' if left < 60 else duration(left)} left")
    return ", ".join(told)


def count(n: float) -> str:
    """Thousands with commas: `5,234,567`."""
    return f"{n:,.0f}"


def short_count(n: float) -> str:
    """`134.5M`, `4.6K`: for parameters and tokens where room is short."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(n) >= limit * 0.9995:
            return f"{n / limit:.1f}".removesuffix(".0") + unit
    return f"{n:.0f}"


def duration(seconds: float | None) -> str:
    """`45 s`, `3 min 05 s`, `2 h 10 min`; an em dash where unknown."""
    if seconds is None:
        return "—"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def percent(share: float | None, decimals: int = 1) -> str:
    """A share in 0..1 as `87.3%`; an em dash where there is none."""
    return "—" if share is None else f"{share * 100:.{decimals}f}%"


def number(value: float | None, decimals: int = 2) -> str:
    """A plain number; an em dash where there is none or it is not finite."""
    if value is None or value != value or value in (float("inf"), float("-inf")):
        return "—"
    return f"{value:,.{decimals}f}"
