"""What the user says about features: notes, labels, lists, views, scores, kept analyses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mistudio.errors import CorruptFile, InvalidInput
from mistudio.library.feature_index import FILE, FeatureIndex, IndexRow, build
from mistudio.library.features import FeatureNote
from mistudio.library.library import Change, Library
from tests.library.rows import (
    add_dataset,
    add_feature_run,
    add_model,
    add_tokenization,
    add_training,
)


def train(library: Library) -> int:
    dataset = add_dataset(library)
    return add_training(library, add_model(library), dataset, add_tokenization(library, dataset))


def add_sae(library: Library) -> int:
    return library.saes.of_training(train(library))[0].id


@pytest.fixture
def sae(library: Library) -> int:
    return add_sae(library)


def test_hiding_many_leaves_their_labels_and_stars(library: Library, sae: int) -> None:
    library.feature_notes.write(sae, 3, label="ships", starred=True)
    library.feature_notes.write_many(sae, np.array([3, 5]), hidden=True)
    assert library.feature_notes.of_sae(sae) == {
        3: FeatureNote(sae, 3, "ships", "", True, True),
        5: FeatureNote(sae, 5, "", "", False, True),
    }
    library.feature_notes.write_many(sae, [5], hidden=False)
    assert not library.feature_notes.of_sae(sae)[5].hidden


def test_a_typed_label_is_shown_and_kept_with_where_it_is_from(library: Library, sae: int) -> None:
    heard: list[Change] = []
    library.observe(heard.append)
    library.feature_labels.write_human(sae, 7, "ships")
    given = library.feature_labels.add(
        sae_id=sae, feature=7, text="boats", source="model", origin="tiny", score=0.4
    )
    assert [label.text for label in library.feature_labels.of_feature(sae, 7)] == ["boats", "ships"]
    assert library.feature_notes.of_sae(sae)[7].label == "ships"
    library.feature_labels.use(given)
    assert library.feature_notes.of_sae(sae)[7].label == "boats"
    assert {change.table for change in heard} == {"feature_labels", "feature_notes"}


def test_the_same_label_is_not_kept_twice_and_can_be_taken_away(library: Library, sae: int) -> None:
    for _ in range(2):
        library.feature_labels.write_human(sae, 7, "ships")
    assert len(library.feature_labels.of_sae(sae)) == 1
    library.feature_labels.write_human(sae, 7, "")
    assert library.feature_notes.of_sae(sae)[7].label == ""
    assert [label.text for label in library.feature_labels.of_sae(sae)] == ["ships"]


def test_lists_hold_features_of_several_saes_once(library: Library, sae: int) -> None:
    other = add_sae(library)
    number = library.feature_lists.add(name=" Months ", description="of the year")
    library.feature_lists.put(number, sae, np.array([4, 4, 2]))
    library.feature_lists.put(number, other, [4])
    assert library.feature_lists.get(number).name == "Months"
    assert library.feature_lists.members(number) == [(sae, 2), (sae, 4), (other, 4)]
    assert library.feature_lists.of_sae(number, sae) == [2, 4]
    assert [entry.id for entry in library.feature_lists.containing(other, 4)] == [number]
    library.feature_lists.take(number, sae, [2, 3])
    assert library.feature_lists.of_sae(number, sae) == [4]
    library.feature_lists.remove(number)
    assert library.rows("SELECT * FROM feature_list_items") == []


@pytest.mark.parametrize("name", ["", "  ", "Months"])
def test_a_list_needs_a_name_of_its_own(library: Library, name: str) -> None:
    library.feature_lists.add(name="Months")
    second = library.feature_lists.add(name="Days")
    with pytest.raises(InvalidInput):
        library.feature_lists.add(name=name)
    with pytest.raises(InvalidInput):
        library.feature_lists.rename(second, name)
    assert sorted(entry.name for entry in library.feature_lists.all()) == ["Days", "Months"]


def test_a_view_of_the_same_name_takes_the_place_of_the_old_one(library: Library) -> None:
    library.feature_views.save("Clear", {"sort": "score"})
    library.feature_views.save("Clear", {"sort": "density"})
    assert [(view.name, view.query) for view in library.feature_views.all()] == [
        ("Clear", {"sort": "density"})
    ]


def test_a_score_replaces_that_of_the_same_scorer_only(library: Library, sae: int) -> None:
    for scorer, accuracy in (("human", 0.5), ("model", 0.7), ("human", 0.9)):
        library.feature_scores.write(
            sae, 3, scorer, accuracy=accuracy, active=5, inactive=5, details={"seed": 1}
        )
    found = library.feature_scores.of_feature(sae, 3)
    assert [(one.scorer, one.accuracy) for one in found] == [("human", 0.9), ("model", 0.7)]
    assert found[0].details == {"seed": 1}
    assert found[0].low is None


def test_an_analysis_is_found_by_its_settings_and_goes_with_its_discovery(
    library: Library,
) -> None:
    training = train(library)
    run = add_feature_run(library, training)
    library.feature_analyses.put(run, 3, "ablation", {"n": 64, "mode": "zero"}, {"kl": 0.1})
    assert library.feature_analyses.get(run, 3, "ablation", {"mode": "zero", "n": 64}) == {
        "kl": 0.1
    }
    assert library.feature_analyses.get(run, 3, "ablation", {"mode": "zero", "n": 32}) is None
    assert library.feature_analyses.of_run(run, "ablation") == {3: {"kl": 0.1}}
    library.discard("trainings", training)
    assert library.rows("SELECT * FROM feature_analyses") == []


# --- the search index -----------------------------------------------------------------------------

ROWS = [
    IndexRow("the token “ships”", "ships Ship", "vessel sea", "The ship’s café is open"),
    IndexRow("words starting with “in”", "in inter", "side \ud83d", "in the harbour\0 of Paris"),
    IndexRow("", "", "", ""),
    IndexRow("contexts about music", "piano", "sea tune", "日本の音楽 in_harbour"),
]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> FeatureIndex:
    path = tmp_path_factory.mktemp("index with # and ? and %") / FILE
    build(path, ROWS)
    return FeatureIndex(path)


@pytest.mark.parametrize(
    ("text", "fields", "found"),
    [
        ("ship", None, [0]),
        ("SEA", None, [0, 3]),
        ("cafe", None, [0]),  # without its accent
        ("sea tu", None, [3]),  # every word, each from its beginning
        ("harbour", None, [1, 3]),
        ("in", ("tokens",), [1]),
        ("in", ("description", "context"), [1, 3]),
        ("日本", None, [3]),
        ('"ships" OR * NEAR(', None, []),  # no query language to break
        ('"ships" * (', None, [0]),
        ("", None, []),
        ("…", None, []),
        ("ship", (), []),
    ],
)
def test_search_finds_what_begins_with_every_word(
    index: FeatureIndex, text: str, fields: tuple[str, ...] | None, found: list[int]
) -> None:
    answer = index.search(text) if fields is None else index.search(text, fields)
    assert answer.tolist() == found


def test_what_is_no_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorruptFile):
        FeatureIndex(tmp_path / FILE)
    (tmp_path / FILE).write_bytes(b"SQLite format 3\0" + b"x" * 200)
    with pytest.raises(CorruptFile):
        FeatureIndex(tmp_path / FILE)
