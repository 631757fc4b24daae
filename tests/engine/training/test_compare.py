"""Runs beside each other: what differs, what is fair, what is best; against plain counting."""

from __future__ import annotations

import itertools
import math
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from mistudio.engine.training.compare import (
    CONDITIONS,
    METRICS,
    History,
    Setting,
    best,
    comparable_groups,
    differing,
    effective,
    pareto_front,
    thinned,
    unfair,
)
from mistudio.engine.training.config import derive, parse

# --- settings -----------------------------------------------------------------------------------


def settings(d_in: int = 64, **config: Any) -> dict[str, Setting]:
    return effective(config, derive(parse(config), d_in))


def test_only_settings_that_differ_are_named() -> None:
    assert differing([settings(), settings()]) == []
    assert differing([settings(seed=1), settings(seed=2), settings(seed=1)]) == ["seed"]
    found = differing([settings(576, expansion=4), settings(576, expansion=8)])
    assert found == ["expansion", "width", "learning_rate"]  # what follows from it differs too


def test_what_was_left_open_tells_what_it_became() -> None:
    plan = derive(parse({}), 64)
    found = settings()
    assert found["learning_rate"] == Setting(plan.learning_rate, auto=True)
    assert found["width"] == Setting(512, auto=True)
    assert found["expansion"] == Setting(8.0)
    given = settings(width=512, learning_rate=plan.learning_rate)
    assert given["width"] == Setting(512) and given["expansion"] == Setting(8.0, auto=True)
    assert differing([found, given]) == []  # the same numbers, however they came about


def test_steps_decide_instead_of_tokens() -> None:
    found = settings(steps=300, batch_size=128)
    assert found["tokens"] == Setting(38_400, auto=True) and found["steps"] == Setting(300)


def test_a_setting_without_a_part_differs_from_one_that_has_it() -> None:
    priced, free = settings(sparsity="standard", l1_coefficient=0.04), settings()
    assert free["l1_coefficient"] == Setting(used=False)
    assert "l1_coefficient" in differing([priced, free])
    steered = settings(sparsity="standard")
    assert steered["l1_coefficient"] == Setting(None, auto=True)
    assert differing([priced, steered]) == ["l1_coefficient"]
    assert "l1_coefficient" in differing([steered, free])


def test_what_a_run_does_not_tell_is_no_difference() -> None:
    runs = [{"a": Setting(1)}, {"a": Setting(1), "b": Setting(1)}, {"b": Setting(2)}]
    assert differing(runs) == ["b"]


def test_differing_settings_are_those_of_a_pairwise_count() -> None:
    random_ = random.Random(0)
    for _ in range(300):
        runs = [
            {name: Setting(random_.randrange(2), random_.random() < 0.5) for name in "abcd"}
            for _ in range(random_.randrange(1, 5))
        ]
        pairs = list(itertools.combinations(runs, 2))
        wanted = [n for n in "abcd" if any(a[n].value != b[n].value for a, b in pairs)]
        assert differing(runs) == wanted


# --- best and Pareto ----------------------------------------------------------------------------


def dominated(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether b beats a."""
    return b[0] <= a[0] and b[1] <= a[1] and b != a


def test_the_front_is_that_of_every_pair() -> None:
    random_ = random.Random(1)
    for _ in range(500):
        points = [
            (float(random_.randrange(6)), random_.randrange(6) / 4)
            for _ in range(random_.randrange(12))
        ]
        wanted = {i for i, a in enumerate(points) if not any(dominated(a, b) for b in points)}
        front = pareto_front(points)
        assert set(front) == wanted and len(front) == len(wanted)
        assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


def test_points_without_numbers_are_on_no_front() -> None:
    assert pareto_front([(None, 0.1), (3.0, math.nan), (4.0, 0.2), (math.inf, 0.0)]) == [2]


def test_the_best_is_marked_where_a_direction_is_better() -> None:
    assert best([0.3, 0.1, None, 0.1, math.nan], "low") == {1, 3}
    assert best([0.3, 0.1, 0.2], "high") == {0}
    assert best([0.3, 0.1], "") == best([0.3, None], "low") == best([0.3, 0.3], "high") == set()


def test_l0_and_sample_sizes_have_no_better_direction() -> None:
    neutral = {metric.name for metric in METRICS if not metric.better}
    assert neutral == {"l0", "l2_ratio", "tokens", "loss_tokens"}


def test_metrics_are_those_that_the_evaluation_records() -> None:
    from dataclasses import fields

    from mistudio.engine.sae.loss import LossRecovered
    from mistudio.engine.sae.metrics import ReconstructionQuality

    recorded = {f.name for f in fields(ReconstructionQuality)} | {
        "loss_tokens" if f.name == "tokens" else f.name for f in fields(LossRecovered)
    }
    assert {metric.name for metric in METRICS} <= recorded
    assert {metric.sample for metric in METRICS} <= recorded


# --- fairness -----------------------------------------------------------------------------------

SAME = {condition.name: 1 for condition in CONDITIONS}


@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda condition: condition.name)
def test_each_condition_that_differs_is_named(condition: Any) -> None:
    assert unfair([SAME, dict(SAME)]) == []
    assert unfair([SAME, {**SAME, condition.name: 2}]) == [condition]
    assert unfair([SAME, {**SAME, condition.name: None}]) == []  # not known to differ


def test_groups_share_model_and_hook_points() -> None:
    subjects = [SAME, {**SAME, "reads": 2}, {**SAME, "context": 64}, {**SAME, "model": 2},
                {**SAME, "reads": 2}, {**SAME, "writes": 2}]  # fmt: skip
    assert comparable_groups(subjects) == [[0, 2], [1, 4], [3], [5]]


# --- histories ----------------------------------------------------------------------------------


def a_row(step: int, site: str = "a", **more: Any) -> dict[str, Any]:
    return {"site": site, "step": step, "tokens": 10 * (step + 1), "tokens_per_second": 5.0,
            "loss": 1 / (step + 1), "fvu": 0.5, "l0": 8.0, "dead": step, **more}  # fmt: skip


def test_a_history_keeps_every_row_of_each_site() -> None:
    history = History({"a": 100, "b": 50})
    history.add(a_row(step, site) for step in range(5000) for site in "ab")
    assert history.n_rows == 10_000 and history.sites == ["a", "b"]
    for site, latents in (("a", 100), ("b", 50)):
        x, y = history.curve(site, "dead_share", "step")
        assert x.tolist() == list(range(5000))
        assert y.tolist() == [step / latents for step in range(5000)]
    x, _ = history.curve("a", "loss", "seconds")
    assert x[:2].tolist() == [2.0, 4.0]  # 10 and 20 tokens at 5 a second
    assert history.curve("a", "loss", "tokens")[0][-1] == 50_000


def test_rows_that_lack_a_value_leave_no_point() -> None:
    history = History(10)
    history.add([a_row(0), a_row(1, loss=math.nan), a_row(2, heldout_fvu=0.4), {"step": 3},
                 a_row(4, tokens=None, tokens_per_second=0)])  # fmt: skip
    assert history.curve("a", "loss", "step")[0].tolist() == [0, 2, 4]
    assert history.curve("a", "loss", "seconds")[0].tolist() == [2.0, 6.0]
    assert history.curve("a", "heldout_fvu", "step")[1].tolist() == [0.4]
    assert history.curve("elsewhere", "loss", "step")[0].size == 0


@pytest.mark.parametrize("n", [3, 10, 11, 999, 5003])
def test_a_thinned_curve_has_its_ends_and_its_extremes(n: int) -> None:
    rng = np.random.default_rng(n)
    x, y = np.arange(n, dtype=float), rng.normal(size=n)
    most = 10
    a, b = thinned(x, y, most)
    assert len(a) <= most and (np.diff(a) > 0).all()
    assert all(y[int(place)] == value for place, value in zip(a, b, strict=True))
    assert (a[0], a[-1]) == (0, n - 1)
    assert (b.min(), b.max()) == (y.min(), y.max())
    if n > most:
        for part in np.array_split(np.arange(n), 2):  # not only the last points
            assert len(set(part.tolist()) & set(a.astype(int).tolist())) >= 3


def test_comparing_needs_neither_torch_nor_qt() -> None:
    code = (
        "import sys, mistudio.engine.training.compare; "
        "assert not {'torch', 'PySide6'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
