"""A calibration in words: what one found, and what is known while one runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mistudio import formatting
from mistudio.jobs.control import Snapshot
from mistudio.library.steering import Calibration
from mistudio.ui.steering.request import Chosen
from mistudio.ui.steering.units import NOTHING, exists, share, significant

# A zone's word, its tone, what it means.
ZONES = {
    "green": ("Safe", "emerald", "the text reads as the unsteered one does"),
    "amber": ("Strong", "yellow", "the text changes more than its content"),
    "red": ("Breaks", "red", "the text repeats itself"),
}


@dataclass(frozen=True)
class Calibrating:
    """A calibration that is under way: what it is of, how far it is and what is known so far."""

    method: str
    percent: int
    text: str
    so_far: Calibration


def calibrating(
    chosen: Chosen,
    snapshot: Snapshot | None,
    known: dict[int, list[dict[str, Any]]],
    waits_for: str,
) -> Calibrating:
    """`known` holds the rows so far by sign and takes those of the snapshot, which has only those
    of the sign that is being tried."""
    rows = snapshot.metrics.get("tried") if snapshot else None
    if rows:
        known[1 if rows[0]["strength"] > 0 else -1] = list(rows)
    curve = {"tried": known.get(1, []), "suppress": {"tried": known.get(-1, [])}}
    so_far = Calibration(chosen.sae_id, chosen.feature, chosen.method, {}, 0.0, None, curve, "")
    percent = int(100 * snapshot.fraction) if snapshot else 0
    if waits_for:
        text = f"Waits for “{waits_for}” to end…"
    elif snapshot is None or not known:
        text = "Calibrating: loading the model…"
    else:
        left = f", {_about(snapshot.remaining)} left" if snapshot.remaining else ""
        sides = [_so_far(known[sign]) for sign in (1, -1) if sign in known]
        text = f"Calibrating: {percent} %{left} • so far {', '.join(sides)}"
    return Calibrating(chosen.method, percent, text, so_far)


def _about(seconds: float) -> str:
    """In steps of five seconds, so that the text does not flicker."""
    whole = max(5, 5 * round(seconds / 5))
    return f"about {whole} s" if whole < 60 else f"about {formatting.duration(whole)}"


def _so_far(rows: list[dict[str, Any]]) -> str:
    safe = 0.0
    for row in rows:
        if row["zone"] != "green":
            break
        safe = row["strength"]
    broken = next((row["strength"] for row in rows if row["zone"] == "red"), None)
    told = f"safe up to {safe:+g} × max" if safe else f"nothing safe from {rows[0]['strength']:+g}"
    return told if broken is None else f"{told}, breaks from {broken:+g} on"


# --- what was found -------------------------------------------------------------------------------


def recommended(calibration: Calibration | None, strength: float) -> float:
    """The recommended strength, of the sign of `strength` where there is one; 0 for none."""
    if calibration is None:
        return 0.0
    up = calibration.recommended
    down = (calibration.curve.get("suppress") or {}).get("recommended") or 0.0
    return (down or up) if strength < 0 else (up or down)


def range_text(calibration: Calibration | None) -> str:
    if calibration is None:
        return f"Safe strength: {NOTHING} (not measured)"
    curve = calibration.curve
    up = _side_text({**curve, "recommended": calibration.recommended, "s_max": calibration.s_max})
    down = curve.get("suppress")
    return f"Amplified • {up}\nSuppressed • {_side_text(down)}" if down else up


def _side_text(side: Mapping[str, Any]) -> str:
    """One sign's: what is recommended or why nothing is, and where the text breaks."""
    rows, best, safe = side.get("tried", ()), side.get("recommended"), side.get("safe")
    if best:
        row: Mapping[str, Any] = next((r for r in rows if r["strength"] == best), {})
        told = f"Recommended: {best:+g} × max{_likelier(row)}"
    elif safe:
        wanted = "likelier" if safe > 0 else "less likely"
        told = f"Safe up to {safe:+g} × max, but its own tokens do not become {wanted}"
    else:
        told = "No strength that was tried is safe"
    if side.get("s_max") is None:
        return f"{told} • breaks at none that was tried"
    return f"{told} • breaks from {side['s_max']:+g} on"


def _likelier(row: Mapping[str, Any]) -> str:
    after, before = row.get("own_probability"), row.get("own_probability_unsteered")
    if not before or after is None or not exists(after) or not exists(before):
        return ""
    return f" (its own tokens {significant(after / before, 2)} times as likely)"


def range_tip(calibration: Calibration | None, strength: float) -> str:
    """With what was measured at the strengths of the sign of `strength`."""
    if calibration is None:
        return "Calibrate finds how strongly this feature can be steered before the text breaks."
    prompts = len(calibration.curve.get("prompts", ()))
    tokens_each = calibration.curve.get("new_tokens", NOTHING)
    rows = (strength < 0 and calibration.tried(-1)) or calibration.tried()
    return "\n".join(
        [
            f"Measured over {prompts} neutral prompts, {tokens_each} tokens each, at every "
            "strength:",
            *(_row_text(row) for row in rows),
            *(f"{word}: {meaning}." for word, _, meaning in ZONES.values()),
            "Safe keeps KL ≤ 0.5 nats per token, distinct bigrams ≥ 85 % and perplexity ≤ 3 times "
            "those of the unsteered text.",
            "Recommended is the largest strength well within that at which the model gives the "
            "feature's own tokens (the 20 it promotes most) at least 5 % more probability than "
            "without steering, on the same text; 5 % less where the feature is suppressed.",
        ]
    )


def _percent(probability: float | None) -> str:
    return NOTHING if probability is None else f"{significant(100 * probability, 2)} %"


def _row_text(row: Mapping[str, Any]) -> str:
    parts = [f"{row['strength']:+g} × max: {ZONES[row['zone']][0]}"]
    if row.get("kl") is not None:
        parts.append(f"KL {significant(row['kl'])}")
    if row.get("distinct_ratio") is not None:
        parts.append(f"distinct bigrams {share(row['distinct_ratio'])}")
    if row.get("perplexity_ratio") is not None:
        parts.append(f"perplexity × {significant(row['perplexity_ratio'])}")
    if row.get("own_probability") is not None:
        before = _percent(row.get("own_probability_unsteered"))
        parts.append(f"own tokens {_percent(row['own_probability'])} (unsteered {before})")
    return " • ".join(parts)
