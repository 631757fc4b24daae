"""Checkpoints that a person chose stay, can be gone back to and can be deleted; how often a run
saves can change while it runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mistudio.engine.activations.store import StoredActivations, extract
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.progress import Interrupted, RolledBack, Silent
from mistudio.engine.training import checkpoints
from mistudio.engine.training.checkpoints import AutoSave
from mistudio.engine.training.config import TrainingConfig
from mistudio.engine.training.run import Saving, train
from mistudio.errors import CorruptFile, NotFound

POINT = HookPoint("resid_post", 1)
SMALL = TrainingConfig(
    steps=20, batch_size=128, expansion=2, k=3, context=64, dead_window=1000, autosave_minutes=0
)


@pytest.fixture(scope="module")
def stored(tiny, tokens, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("activations")
    extract(tiny, tokens, (POINT,), folder, max_tokens=6_000, context=64)
    return folder


def save(
    folder: Path, step: int, score: float | None = None, kept: bool = False
) -> checkpoints.Checkpoint:
    site = {"weights": torch.full((3, 5), float(step))}
    return checkpoints.save(folder, step, [("blocks.0", site)], {}, {"score": score}, kept=kept)


def steps(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in checkpoints.listing(folder)]


def test_what_a_person_saved_stays_beside_the_newest(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoints, "MOST_BYTES", 0)
    for step in range(1, 9):
        save(tmp_path, step, kept=step in (2, 5))
    assert steps(tmp_path) == [8, 7, 6, 5, 2]
    found = {c.step: c.kept for c in checkpoints.listing(tmp_path)}
    assert found == {8: False, 7: False, 6: False, 5: True, 2: True}
    assert checkpoints.load(tmp_path / "step-00000005").kept


def test_more_are_kept_where_they_are_small_and_never_more_bytes_than_promised(
    tmp_path, monkeypatch
) -> None:
    for step in range(1, 9):
        each = save(tmp_path, step).bytes
    assert steps(tmp_path) == [8, 7, 6, 5, 4]
    monkeypatch.setattr(checkpoints, "MOST_BYTES", 4 * each + each // 2)
    save(tmp_path, 10)
    assert steps(tmp_path) == [10, 8, 7, 6]
    assert checkpoints.most_kept(each) == 4
    assert checkpoints.most_kept(10 * checkpoints.MOST_BYTES) == checkpoints.KEPT + 1


def test_a_checkpoint_that_is_picked_stays_and_is_whole(tmp_path, monkeypatch) -> None:
    save(tmp_path, 1)
    assert checkpoints.pick(tmp_path, 1).step == 1
    monkeypatch.setattr(checkpoints, "MOST_BYTES", 0)
    for step in range(2, 9):
        save(tmp_path, step)
    assert steps(tmp_path) == [8, 7, 6, 1]
    with pytest.raises(NotFound, match="there are: 8, 7, 6, 1"):
        checkpoints.pick(tmp_path, 5)
    path = tmp_path / "step-00000001" / "blocks.0" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptFile):
        checkpoints.pick(tmp_path, 1)
    assert steps(tmp_path) == [8, 7, 6, 1]


def test_rewinding_removes_later_ones_damaged_ones_too(tmp_path) -> None:
    for step in (2, 4, 6, 8):
        save(tmp_path, step)
    (tmp_path / "step-00000008" / "run.json").write_text("{")
    with pytest.raises(NotFound):
        checkpoints.rewind(tmp_path, 3)
    assert steps(tmp_path) == [6, 4, 2]
    checkpoints.rewind(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000004"]
    assert checkpoints.newest(tmp_path)[0].step == 4


def test_rewinding_that_is_cut_off_leaves_a_run_that_can_go_on(tmp_path, monkeypatch) -> None:
    for step in (2, 4, 6, 8):
        save(tmp_path, step)
    real, gone = checkpoints._drop, []

    def killed(folder: Path) -> None:
        if gone:
            raise KeyboardInterrupt
        gone.append(folder.name)
        real(folder)

    monkeypatch.setattr(checkpoints, "_drop", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.rewind(tmp_path, 2)
    assert gone == ["step-00000008"]
    assert checkpoints.newest(tmp_path)[0].step == 6


def test_one_is_deleted_and_no_other(tmp_path) -> None:
    for step in (2, 4, 6):
        save(tmp_path, step, kept=step == 4)
    checkpoints.delete(tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000006"]
    with pytest.raises(NotFound):
        checkpoints.delete(tmp_path, 4)


def test_what_a_row_shows_is_in_the_checkpoint(stored, tmp_path) -> None:
    rows: list[dict] = []
    config = replace(SMALL, autosave_steps=10)
    train(StoredActivations(stored), config, record=rows.append, saving=Saving(tmp_path))
    last, ten, *_ = checkpoints.listing(tmp_path)
    assert (last.step, ten.step) == (20, 10)
    assert ten.loss == next(row["loss"] for row in rows if row["step"] == 9)
    assert ten.fvu == next(row["heldout_fvu"] for row in rows if row["step"] == 9)
    assert ten.at and ten.at.endswith("+00:00")
    assert ten.bytes == sum(p.stat().st_size for p in ten.folder.rglob("*.safetensors"))


def test_how_often_it_saves_may_change_while_it_runs(stored, tmp_path) -> None:
    saved: list[int] = []
    auto: list[AutoSave | None] = [None]

    def hear(checkpoint: checkpoints.Checkpoint) -> None:
        saved.append(checkpoint.step)
        auto[0] = AutoSave(7, 0) if checkpoint.step < 12 else AutoSave(None, 0)

    saving = Saving(tmp_path, auto=lambda: auto[0], saved=hear)
    train(StoredActivations(stored), replace(SMALL, autosave_steps=4), saving=saving)
    assert saved == [4, 7, 14, 20]


def test_what_was_asked_for_is_kept_and_its_failure_told(stored, tmp_path, monkeypatch) -> None:
    asked = iter([False] * 4 + [True] + [False] * 4 + [True] + [False] * 30)
    saved: list[tuple[int, bool]] = []
    failed: list[tuple[str, bool]] = []
    saving = Saving(
        tmp_path,
        wants_save=lambda: next(asked),
        saved=lambda c: saved.append((c.step, c.kept)),
        failed=lambda why, wanted: failed.append((why, wanted)),
    )
    real = checkpoints.save

    def full(folder, step, *rest, **options):
        if step == 10:
            raise OSError(28, "No space left on device")
        return real(folder, step, *rest, **options)

    monkeypatch.setattr(checkpoints, "save", full)
    train(StoredActivations(stored), SMALL, saving=saving)
    assert saved == [(5, True), (20, False)]
    assert failed == [("The disk is full", True)]


class GoesBackAfter(Silent):
    def __init__(self, step: int, error: type[Exception]) -> None:
        self.step, self.done, self.error = step, -1, error

    def check(self) -> None:
        if self.done >= self.step:
            raise self.error

    def report(self, done, total=None, phase=None, **metrics) -> None:
        self.done = done if phase == "train" else -1


def test_a_run_that_goes_back_saves_nothing_on_its_way(stored, tmp_path) -> None:
    config = replace(SMALL, autosave_steps=4)
    with pytest.raises(RolledBack):
        train(
            StoredActivations(stored),
            config,
            progress=GoesBackAfter(10, RolledBack),
            saving=Saving(tmp_path),
        )
    assert steps(tmp_path) == [8, 4]


def test_a_checkpoint_that_was_deleted_is_written_again_when_the_application_quits(
    stored, tmp_path
) -> None:
    config = replace(SMALL, autosave_steps=6)

    def hear(checkpoint: checkpoints.Checkpoint) -> None:
        if checkpoint.step == 12 and not deleted:
            deleted.append(12)
            checkpoints.delete(tmp_path, 12)

    deleted: list[int] = []
    with pytest.raises(Interrupted):
        train(
            StoredActivations(stored),
            config,
            progress=GoesBackAfter(12, Interrupted),
            saving=Saving(tmp_path, saved=hear),
        )
    assert deleted == [12]
    assert steps(tmp_path) == [12, 6]
