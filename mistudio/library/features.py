"""What the user says about features, and what was found out about single ones.

Statistics of all features of a dictionary are not here: they lie as arrays in the discovery's
folder. These tables hold only the features that somebody touched.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mistudio.errors import InvalidInput
from mistudio.library.table import Table, now


@dataclass(frozen=True)
class FeatureNote:
    """What the user wrote about one feature of one SAE. `label` is the one that is shown."""

    sae_id: int
    feature: int
    label: str
    note: str
    starred: bool
    hidden: bool = False


@dataclass(frozen=True)
class FeatureLabel:
    """One of the labels that a feature has been given. `source` is "human", "rule", "model" or
    "imported"; `origin` names the model or the file. `score`, `low`, `high`: how well it tells
    where the feature is active, where that was measured (`details` says how)."""

    id: int
    sae_id: int
    feature: int
    text: str
    source: str
    origin: str
    score: float | None
    low: float | None
    high: float | None
    details: dict[str, Any]
    created_at: str


@dataclass(frozen=True)
class FeatureList:
    """A list of features of any SAEs."""

    id: int
    name: str
    description: str
    created_at: str


@dataclass(frozen=True)
class SavedView:
    """What the feature table shows, under a name; `query` belongs to the table."""

    id: int
    name: str
    query: dict[str, Any]
    created_at: str


@dataclass(frozen=True)
class FeatureScore:
    """How well one can tell where a feature is active, by another scorer than the rule:
    "embedding", "model" or "human". `active` and `inactive` are the contexts that were tried."""

    sae_id: int
    feature: int
    scorer: str
    accuracy: float
    low: float | None
    high: float | None
    active: int
    inactive: int
    details: dict[str, Any] = field(default_factory=dict)
    created_at: str = ""


class FeatureNotes(Table[FeatureNote]):
    """Labels, notes, stars, what is hidden. Keyed by (SAE, feature), so its own few queries."""

    name, noun, record = "feature_notes", "feature note", FeatureNote

    def of_sae(self, sae_id: int) -> dict[int, FeatureNote]:
        rows = self._library.rows("SELECT * FROM feature_notes WHERE sae_id = ?", (sae_id,))
        return {row["feature"]: self._decode(row) for row in rows}

    def of_feature(self, sae_id: int, feature: int) -> FeatureNote | None:
        rows = self._library.rows(
            "SELECT * FROM feature_notes WHERE sae_id = ? AND feature = ?", (sae_id, feature)
        )
        return self._decode(rows[0]) if rows else None

    def write(
        self,
        sae_id: int,
        feature: int,
        *,
        label: str | None = None,
        note: str | None = None,
        starred: bool | None = None,
        hidden: bool | None = None,
    ) -> None:
        """Set the given fields, keep the others."""
        given: dict[str, object] = {
            "label": label,
            "note": note,
            "starred": starred,
            "hidden": hidden,
        }
        self._write(sae_id, (feature,), given)

    def write_many(
        self,
        sae_id: int,
        features: Iterable[int],
        *,
        starred: bool | None = None,
        hidden: bool | None = None,
    ) -> None:
        """Star or hide many at once: all or none."""
        self._write(sae_id, features, {"starred": starred, "hidden": hidden})

    def _write(self, sae_id: int, features: Iterable[int], given: dict[str, object]) -> None:
        values = {name: value for name, value in given.items() if value is not None}
        with self._library.transaction():
            for feature in features:
                self._library.execute(
                    "INSERT OR IGNORE INTO feature_notes (sae_id, feature) VALUES (?, ?)",
                    (sae_id, int(feature)),
                )
                for name, value in values.items():
                    self._library.execute(
                        f"UPDATE feature_notes SET {name} = ? WHERE sae_id = ? AND feature = ?",
                        (value, sae_id, int(feature)),
                    )
            self._library.note_change(self.name, sae_id)


class FeatureLabels(Table[FeatureLabel]):
    name, noun, record = "feature_labels", "label", FeatureLabel

    def of_feature(self, sae_id: int, feature: int) -> list[FeatureLabel]:
        """Newest first."""
        return self.all("sae_id = ? AND feature = ?", (sae_id, feature))

    def of_sae(self, sae_id: int) -> list[FeatureLabel]:
        return self.all("sae_id = ?", (sae_id,))

    def add(self, **values: object) -> int:
        """As every table's; a label that is there already (same text from the same source) is
        replaced."""
        key = {"origin": "", **{name: values[name] for name in ("sae_id", "feature", "source")}}
        key |= {name: values[name] for name in ("origin", "text") if name in values}
        with self._library.transaction():
            condition = " AND ".join(f"{name} = ?" for name in key)
            self._library.execute(
                f"DELETE FROM feature_labels WHERE {condition}", tuple(key.values())
            )
            number = super().add(**values)
            self._library.note_change("feature_notes", _int(values["sae_id"]))
        return number

    def use(self, label_id: int) -> None:
        """Make it the label that is shown."""
        label = self.get(label_id)
        self._library.feature_notes.write(label.sae_id, label.feature, label=label.text)

    def write_human(self, sae_id: int, feature: int, text: str) -> None:
        """A label that the user typed; "" takes the shown label away and keeps the others."""
        with self._library.transaction():
            if text:
                self.add(sae_id=sae_id, feature=feature, text=text, source="human")
            self._library.feature_notes.write(sae_id, feature, label=text)


class FeatureLists(Table[FeatureList]):
    name, noun, record = "feature_lists", "list", FeatureList

    def add(self, **values: object) -> int:
        values["name"] = self._free(str(values.get("name", "")))
        return super().add(**values)

    def rename(self, list_id: int, name: str) -> None:
        self.update(list_id, name=self._free(name, but=list_id))

    def _free(self, name: str, but: int = 0) -> str:
        name = name.strip()
        if not name:
            raise InvalidInput("A list needs a name", "The name is empty.", field="name")
        if self.all("name = ? AND id <> ?", (name, but)):
            raise InvalidInput(
                "There is such a list already", f"Its name is {name!r}.", "Choose another name."
            )
        return name

    def members(self, list_id: int) -> list[tuple[int, int]]:
        """(SAE, feature) of each."""
        rows = self._library.rows(
            "SELECT sae_id, feature FROM feature_list_items WHERE list_id = ? "
            "ORDER BY sae_id, feature",
            (list_id,),
        )
        return [(row["sae_id"], row["feature"]) for row in rows]

    def of_sae(self, list_id: int, sae_id: int) -> list[int]:
        """The features of one SAE that are in the list."""
        return [feature for sae, feature in self.members(list_id) if sae == sae_id]

    def containing(self, sae_id: int, feature: int) -> list[FeatureList]:
        """The lists that a feature is in."""
        return self.all(
            "id IN (SELECT list_id FROM feature_list_items WHERE sae_id = ? AND feature = ?)",
            (sae_id, feature),
        )

    def put(self, list_id: int, sae_id: int, features: Iterable[int]) -> None:
        """Add features; those that are in it stay once."""
        self._change(
            "INSERT OR IGNORE INTO feature_list_items (list_id, sae_id, feature) VALUES (?, ?, ?)",
            list_id,
            sae_id,
            features,
        )

    def take(self, list_id: int, sae_id: int, features: Iterable[int]) -> None:
        """Take features out of it."""
        self._change(
            "DELETE FROM feature_list_items WHERE list_id = ? AND sae_id = ? AND feature = ?",
            list_id,
            sae_id,
            features,
        )

    def _change(self, sql: str, list_id: int, sae_id: int, features: Iterable[int]) -> None:
        self.get(list_id)
        with self._library.transaction():
            for feature in features:
                self._library.execute(sql, (list_id, sae_id, int(feature)))
            self._library.note_change(self.name, list_id)


class FeatureViews(Table[SavedView]):
    name, noun, record = "feature_views", "view", SavedView

    def save(self, name: str, query: dict[str, Any]) -> int:
        """Under a name; one of that name is replaced."""
        name = name.strip()
        if not name:
            raise InvalidInput("A view needs a name", "The name is empty.", field="name")
        with self._library.transaction():
            for old in self.all("name = ?", (name,)):
                self.remove(old.id)
            return self.add(name=name, query=query)


class FeatureScores(Table[FeatureScore]):
    name, noun, record = "feature_scores", "score", FeatureScore

    def of_feature(self, sae_id: int, feature: int) -> list[FeatureScore]:
        return self._where("sae_id = ? AND feature = ?", (sae_id, feature))

    def of_sae(self, sae_id: int) -> list[FeatureScore]:
        return self._where("sae_id = ?", (sae_id,))

    def write(self, sae_id: int, feature: int, scorer: str, **values: object) -> None:
        """Keep a score; an earlier one of the same scorer is replaced."""
        row = {"sae_id": sae_id, "feature": feature, "scorer": scorer, **values}
        row.setdefault("created_at", now())
        with self._library.transaction():
            self._library.execute(
                f"INSERT OR REPLACE INTO feature_scores ({', '.join(row)}) "
                f"VALUES ({', '.join('?' for _ in row)})",
                self._encode(row),
            )
            self._library.note_change(self.name, sae_id)

    def _where(self, condition: str, params: Sequence[object]) -> list[FeatureScore]:
        rows = self._library.rows(
            f"SELECT * FROM feature_scores WHERE {condition} ORDER BY feature, scorer",
            tuple(params),
        )
        return [self._decode(row) for row in rows]


class FeatureAnalyses:
    """Results of analyses of single features that cost forward passes, by what they are of."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def get(
        self, feature_run_id: int, feature: int, kind: str, params: dict[str, Any]
    ) -> dict[str, Any] | None:
        rows = self._library.rows(
            "SELECT result FROM feature_analyses WHERE feature_run_id = ? AND feature = ? "
            "AND kind = ? AND params = ?",
            (feature_run_id, feature, kind, _key(params)),
        )
        return json.loads(rows[0]["result"]) if rows else None

    def of_run(self, feature_run_id: int, kind: str) -> dict[int, dict[str, Any]]:
        """The newest result of a kind of every feature that has one."""
        rows = self._library.rows(
            "SELECT feature, result FROM feature_analyses WHERE feature_run_id = ? AND kind = ? "
            "ORDER BY created_at",
            (feature_run_id, kind),
        )
        return {row["feature"]: json.loads(row["result"]) for row in rows}

    def put(
        self,
        feature_run_id: int,
        feature: int,
        kind: str,
        params: dict[str, Any],
        result: dict[str, Any],
    ) -> None:
        run = self._library.feature_runs.get(feature_run_id)
        with self._library.transaction():
            self._library.execute(
                "INSERT OR REPLACE INTO feature_analyses "
                "(feature_run_id, feature, kind, params, result, created_at) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (feature_run_id, feature, kind, _key(params), json.dumps(result), now()),
            )
            self._library.note_change("feature_analyses", run.sae_id)


def _key(params: dict[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)


def _int(value: object) -> int:
    assert isinstance(value, int)
    return value
