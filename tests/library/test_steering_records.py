"""Calibrations and experiments: kept, replaced, deleted along; what a slider shows of them."""

from __future__ import annotations

from typing import Any

import pytest

from mistudio.errors import InvalidInput
from mistudio.library.library import Change, Library
from mistudio.library.steering import Calibration
from tests.library.rows import (
    add_dataset,
    add_model,
    add_tokenization,
    add_training,
)

SITE = {"hook_point": "blocks.2.hook_resid_post", "layer": 2}


@pytest.fixture
def sae(library: Library) -> int:
    dataset = add_dataset(library)
    training = add_training(
        library, add_model(library), dataset, add_tokenization(library, dataset)
    )
    return library.saes.of_training(training)[0].id


def curve(**zones: str) -> dict[str, Any]:
    """`_05="green"` for strength 0.5; a leading `n` for negative ones."""
    rows = {1: [], -1: []}
    for name, zone in zones.items():
        sign = -1 if name.startswith("n") else 1
        strength = sign * int(name[1:]) / 10
        rows[sign].append({"strength": strength, "zone": zone})
    suppress = {"tried": rows[-1], "recommended": 0.0, "s_max": None}
    return {"tried": rows[1], "suppress": suppress if rows[-1] else None}


def test_a_calibration_is_kept_and_replaced_by_the_next(library: Library, sae: int) -> None:
    heard: list[Change] = []
    library.observe(heard.append)
    write = library.calibrations.write
    write(sae, 3, site=SITE, recommended=1.5, s_max=None, curve=curve(_05="green"))
    write(sae, 3, "clamp", site=SITE, recommended=0.0, s_max=2.0, curve=curve(_20="red"))
    write(sae, 3, site=SITE, recommended=2.0, s_max=5.0, curve=curve(_20="green", _50="red"))
    found = library.calibrations.of_sae(sae)
    assert set(found) == {(3, "add"), (3, "clamp")}
    kept = found[3, "add"]
    assert (kept.recommended, kept.s_max, kept.site) == (2.0, 5.0, SITE)
    assert kept.curve == curve(_20="green", _50="red")
    assert library.calibrations.of_feature(sae, 3, "clamp") == found[3, "clamp"]
    assert library.calibrations.of_feature(sae, 4) is None
    assert heard == [Change("feature_calibrations", frozenset({sae}))] * 3


def test_calibrations_go_with_their_sae_and_experiments_stay(library: Library, sae: int) -> None:
    library.calibrations.write(sae, 3, site=SITE, recommended=1, s_max=None, curve=curve())
    library.experiments.add(
        name="How far", kind="sweep", request={"sae_id": sae}, result={"rows": [1.5]}
    )
    other = library.experiments.add(name="x", kind="sweep", request={"sae_id": 99}, result={})
    (mine,) = library.experiments.of_sae(sae)
    assert (mine.name, mine.result) == ("How far", {"rows": [1.5]})
    library.discard("trainings", library.saes.get(sae).training_id or 0)
    assert library.calibrations.of_sae(sae) == {}
    assert [row.id for row in library.experiments.all()] == [other, mine.id]


def test_an_experiment_needs_a_name(library: Library) -> None:
    number = library.experiments.add(name="x", kind="sweep", request={}, result={})
    library.experiments.rename(number, "  How   far ")
    assert library.experiments.get(number).name == "How far"
    with pytest.raises(InvalidInput, match="name is empty"):
        library.experiments.rename(number, "  ")


def calibrated(values: dict[str, Any]) -> Calibration:
    return Calibration(1, 3, "add", SITE, 1.0, None, values, "")


def test_a_zone_is_never_better_than_the_next_strength_that_was_tried() -> None:
    one = calibrated(curve(_05="green", _10="green", _20="amber", _30="red", n10="amber"))
    assert [one.zone(s) for s in (0.0, 0.4, 1.0, 1.1, 2.5, 4.9)] == [
        "green", "green", "green", "amber", "red", "red",
    ]  # fmt: skip
    assert [one.zone(s) for s in (-0.3, -1.0, -1.1)] == ["amber", "amber", None]
    assert one.zones() == [
        (-1.0, 0.0, "amber"),
        (0.0, 1.0, "green"),
        (1.0, 2.0, "amber"),
        (2.0, 5.0, "red"),
    ]
    assert one.zones(0.0, 1.5) == [(0.0, 1.0, "green"), (1.0, 1.5, "amber")]
    short = calibrated(curve(_05="green"))
    assert short.zones() == [(0.0, 0.5, "green")]
    assert calibrated(curve()).zones() == []
