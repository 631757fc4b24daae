"""Strengths and measures as people read them: three units of strength, three digits of a number."""

from __future__ import annotations

from mistudio import formatting

STRONGEST = 5.0  # in multiples of a feature's largest activation
NEW_STRENGTH = 2.0  # of a feature that another tab sends here
NOTHING = "—"


def coefficient(strength: float, max_activation: float | None) -> float | None:
    """What is added along the feature's unit direction."""
    return None if max_activation is None else strength * max_activation


def percent_of_norm(length: float | None, median_norm: float | None) -> float | None:
    """The length of what is added in % of the layer's median norm."""
    if length is None or not median_norm:
        return None
    return 100.0 * abs(length) / median_norm


def exists(value: float | None) -> bool:
    """Whether there is such a number: not None, NaN or infinite."""
    return value is not None and value == value and abs(value) != float("inf")


def significant(value: float | None, digits: int = 3) -> str:
    """Three significant digits, never in scientific notation; an em dash where there is none."""
    if value is None or not exists(value):
        return NOTHING
    if value == 0:
        return "0"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    if whole:
        return formatting.number(value, max(0, digits - whole))
    if abs(value) < 0.0001:
        return f"{'-' if value < 0 else ''}<0.0001"
    return f"{value:#.{digits}g}" if abs(value) >= 0.001 else f"{value:.4f}"


def signed(value: float | None) -> str:
    """`+2.30`, `-0.41`; no decimals where they would mean nothing."""
    if value is None or not exists(value):
        return NOTHING
    return f"{value:+,.{2 if abs(value) < 1000 else 0}f}"


def share(value: float | None) -> str:
    return formatting.percent(value) if exists(value) else NOTHING
