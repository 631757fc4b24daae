"""Lights and warnings: each says the right level at its limits, and why."""

from __future__ import annotations

from typing import Any

import pytest

from mistudio.engine.training.verdict import Watch, lights

GOOD = {"fvu": 0.2, "l0": 32.0, "dead_share": 0.001, "ce_loss_score": 0.98}


def light(name: str, metrics: dict[str, Any], k: float = 32, **config: Any) -> Any:
    return next(entry for entry in lights(GOOD | metrics, k, config) if entry.name == name)


def test_a_good_dictionary_is_green_and_needs_nothing() -> None:
    found = lights(GOOD, 32, {})
    assert [entry.name for entry in found] == ["FVU", "L0", "Dead share", "CE loss recovered"]
    assert {entry.level for entry in found} == {"good"}
    assert {entry.remedy for entry in found} == {""}


@pytest.mark.parametrize(
    ("name", "key", "good", "fair", "poor"),
    [
        ("FVU", "fvu", 0.25, 0.26, 0.51),
        ("L0", "l0", 35.1, 35.3, 49.0),
        ("L0", "l0", 28.9, 28.7, 15.0),
        ("Dead share", "dead_share", 0.01, 0.011, 0.11),
        ("CE loss recovered", "ce_loss_score", 0.95, 0.94, 0.79),
    ],
)
def test_levels_change_at_their_limits(
    name: str, key: str, good: float, fair: float, poor: float
) -> None:
    for level, value in (("good", good), ("fair", fair), ("poor", poor)):
        found = light(name, {key: value})
        assert found.level == level, (name, value)
        assert bool(found.remedy) == (level != "good")
        assert found.value == value and "good:" in found.why


def test_the_remedy_fits_the_cause() -> None:
    assert "learning rate" in light("FVU", {"fvu": 1.2}).remedy
    assert "L1" in light("FVU", {"fvu": 0.6}, l1_coefficient=5.0).remedy
    assert "more tokens" in light("FVU", {"fvu": 0.6}).remedy
    assert "care for dead latents" in light("Dead share", {"dead_share": 0.3}, auxk=False).remedy
    assert "rate" in light("Dead share", {"dead_share": 0.3}, learning_rate=1e-5).remedy
    assert "another layer" in light("CE loss recovered", {"ce_loss_score": 0.5}).remedy
    both = {"ce_loss_score": 0.5, "fvu": 0.6}
    assert "FVU first" in light("CE loss recovered", both).remedy


def test_what_was_not_measured_has_no_light() -> None:
    assert lights({}, 32, {}) == []
    assert [entry.name for entry in lights(GOOD, 0, {})] == [
        "FVU", "Dead share", "CE loss recovered",
    ]  # fmt: skip


def run(n: int, **values: Any) -> list[dict[str, Any]]:
    """Rows of every tenth step; a value may be a function of the step."""
    default = {"fvu": lambda step: 0.2 + 10 / step, "l0": 32.0, "dead": 0}
    rows = []
    for step in range(10, 10 * n + 1, 10):
        given = {k: v(step) if callable(v) else v for k, v in (default | values).items()}
        rows.append({"step": step, **given})
    return rows


def ask(rows: list[dict[str, Any]], priced: bool = False) -> Any:
    return Watch("L1", steps=1000, d_sae=1000, k=32, priced=priced).add(rows)


def test_a_sound_run_is_left_alone_at_every_moment() -> None:
    rows = run(100)
    watch = Watch("L1", steps=1000, d_sae=1000, k=32, priced=True)
    assert all(watch.add([row]) is None for row in rows)


def test_failing_runs_are_told_early() -> None:
    assert ask(run(9, fvu=3.0)) is None  # not judged yet
    assert "worse than the mean" in ask(run(12, fvu=3.0)).why
    assert "worse than the mean" in ask(run(12, fvu=float("nan"))).why
    rising = ask(run(60, fvu=lambda step: 0.3 if step < 300 else 0.9))
    assert rising is not None and "rises" in rising.why
    assert ask(run(20, dead=700)) is None
    assert "70%" in ask(run(30, dead=700)).why
    assert ask(run(60, l0=500.0)) is None  # a fixed number of active latents is never priced
    assert "500 latents" in ask(run(60, l0=500.0), priced=True).why
