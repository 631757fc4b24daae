"""What was found out by steering: how far single features go, and experiments."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mistudio.errors import InvalidInput
from mistudio.library.table import Table, now


@dataclass(frozen=True)
class Calibration:
    """How strongly one feature can be steered by one method, as `jobs/calibrating.py` measured it.

    Strengths are multiples of the feature's largest activation. `recommended` is the largest up to
    which the text stays as good as unsteered and at which the feature's own tokens become likelier,
    0.0 where there is none; `s_max` the first at which the text breaks, None where none of those
    tried does. `site` is {"hook_point", "layer"}. `curve`:

        tried           [{strength, tokens, kl, kl_worst, perplexity_ratio, distinct_ratio,
                        own_share, own_probability, own_probability_unsteered, zone}], weakest
                        first: those of `engine/steering/calibration.Tried`, and "green", "amber"
                        or "red"
        safe            the largest strength up to which the text stays as good
        suppress        the same for negative strengths: {tried, recommended, safe, s_max}, or None
        own_share       of the unsteered text, None where the feature has no tokens of its own
        own_tokens      ids of the feature's own tokens (those that its direction promotes most)
        output_score    {score, probability, rank}: whether the feature steers; None where unknown
        max_activation  of which the strengths are multiples
        percent_of_norm what strength 1 adds, in percent of the site's median norm; None where that
                        depends on the text
        prompts         the texts that were continued
        new_tokens      by so many tokens each
    """

    sae_id: int
    feature: int
    method: str
    site: dict[str, Any]
    recommended: float
    s_max: float | None
    curve: dict[str, Any]
    created_at: str

    def tried(self, sign: int = 1) -> list[dict[str, Any]]:
        """The rows of the curve of positive, or (-1) of negative strengths, weakest first."""
        part = self.curve if sign > 0 else self.curve.get("suppress") or {}
        return list(part.get("tried", ()))

    def zone(self, strength: float) -> str | None:
        """ "green", "amber" or "red": that of the weakest tried strength which is no weaker, so
        never better than measured; 0 is green. None beyond what was tried, unless it broke."""
        if strength == 0:
            return "green"
        rows = self.tried(1 if strength > 0 else -1)
        for row in rows:
            if abs(strength) <= abs(row["strength"]) + 1e-9:
                return str(row["zone"])
        return "red" if rows and rows[-1]["zone"] == "red" else None

    def zones(self, least: float = -5.0, most: float = 5.0) -> list[tuple[float, float, str]]:
        """What a slider from `least` to `most` shows: stretches (from, to, zone) in order; where
        nothing was measured there is none."""
        edges = {0.0, least, most}
        edges.update(
            float(row["strength"])
            for sign in (-1, 1)
            for row in self.tried(sign)
            if least < row["strength"] < most
        )
        found: list[tuple[float, float, str]] = []
        for start, end in pairwise(sorted(edges)):
            zone = self.zone(end if end > 0 else start)
            if zone is None:
                continue
            if found and found[-1][1:] == (start, zone):
                start = found.pop()[0]
            found.append((start, end, zone))
        return found


@dataclass(frozen=True)
class Experiment:
    """A sweep, a batch of prompts or a layer study: what was asked for and what came out, as plain
    data (`jobs/experiments.py` says what is in it)."""

    id: int
    name: str
    kind: str
    request: dict[str, Any]
    result: dict[str, Any]
    created_at: str


class Calibrations(Table[Calibration]):
    """Keyed by (SAE, feature, method), so its own few queries."""

    name, noun, record = "feature_calibrations", "calibration", Calibration

    def of_sae(self, sae_id: int) -> dict[tuple[int, str], Calibration]:
        """By (feature, method)."""
        rows = self._library.rows(
            "SELECT * FROM feature_calibrations WHERE sae_id = ? ORDER BY feature, method",
            (sae_id,),
        )
        return {(row["feature"], row["method"]): self._decode(row) for row in rows}

    def of_feature(self, sae_id: int, feature: int, method: str = "add") -> Calibration | None:
        rows = self._library.rows(
            "SELECT * FROM feature_calibrations WHERE sae_id = ? AND feature = ? AND method = ?",
            (sae_id, feature, method),
        )
        return self._decode(rows[0]) if rows else None

    def write(
        self,
        sae_id: int,
        feature: int,
        method: str = "add",
        *,
        site: dict[str, Any],
        recommended: float,
        s_max: float | None,
        curve: dict[str, Any],
    ) -> None:
        """Keep a calibration; an earlier one of the same feature and method is replaced."""
        row: dict[str, object] = {
            "sae_id": sae_id,
            "feature": int(feature),
            "method": method,
            "site": site,
            "recommended": recommended,
            "s_max": s_max,
            "curve": curve,
            "created_at": now(),
        }
        with self._library.transaction():
            self._library.execute(
                f"INSERT OR REPLACE INTO feature_calibrations ({', '.join(row)}) "
                f"VALUES ({', '.join('?' for _ in row)})",
                self._encode(row),
            )
            self._library.note_change(self.name, sae_id)


class Experiments(Table[Experiment]):
    name, noun, record = "experiments", "experiment", Experiment

    def of_sae(self, sae_id: int) -> list[Experiment]:
        """Those that steer features of this SAE, newest first."""
        return self.all("json_extract(request, '$.sae_id') = ?", (sae_id,))

    def rename(self, experiment_id: int, name: str) -> None:
        name = " ".join(name.split())
        if not name:
            raise InvalidInput("An experiment needs a name", "The name is empty.", field="name")
        self.get(experiment_id)
        self.update(experiment_id, name=name)
