"""The whole road, as someone at a terminal walks it."""

from __future__ import annotations

import json
from pathlib import Path

from journeys import road


def test_from_a_text_file_to_steered_text_and_an_export(
    tmp_path: Path, mistudio: road.Children
) -> None:
    root, report = tmp_path / "library", tmp_path / "report.json"

    def run(*arguments: object) -> dict:
        child = mistudio.run("--library", root, *arguments, "--json", report)
        assert child.wait() == 0, child.err
        assert "Traceback" not in child.err
        return json.loads(report.read_text(encoding="utf-8"))

    text = road.write_texts(tmp_path / "encyclopedia.jsonl", 200)
    dataset = run("dataset", "add", text)
    assert dataset["documents"] == 200
    model = run("model", "add", road.MODEL, "--precision", "fp32")
    assert model["parameters"] == 857_216
    run_ = run(
        "train",
        *("--model", model["name"], "--dataset", "encyclopedia", "--layers", "1,2"),
        *("--set", "tokens=30000", "--set", "batch_size=512", "--set", "expansion=2"),
        *("--set", "k=16", "--name", "whole road", "--source", "stream"),
    )
    assert [sae["hook_point"] for sae in run_["saes"]] == [
        "blocks.1.hook_resid_post",
        "blocks.2.hook_resid_post",
    ]
    for sae in run_["saes"]:
        assert sae["explained_variance"] > 0.6
        assert abs(sae["l0"] / 16 - 1) < 0.1
        assert sae["dead_share"] < 0.15
        assert sae["ce_loss_score"] > 0.6
    found = run("discover", "whole road", "--top-k", 10)
    assert all(row["alive"] > 0.85 * row["total"] for row in found["feature_runs"])
    features = run("features", "whole road", "--layer", 2, "--sort", "max_activation", "--top", 3)
    assert len(features["features"]) == 3
    feature = features["features"][0]["feature"]
    steered = run(
        "steer",
        *("whole road", "--layer", 2, "--feature", feature, "--strength", 2),
        *("--prompt", "The whale", "--max-tokens", 12),
    )
    assert steered["steered"] != steered["unsteered"]
    assert steered["kl_per_token"] > 0
    exported = run("export", "whole road", "--to", tmp_path / "saes")
    for folder in exported["folders"]:
        assert (Path(folder) / "cfg.json").is_file()
    listed = run("list")
    assert [row["name"] for row in listed["runs"]] == ["whole road"] * 2
    assert run("doctor")["healthy"]
    road.check_whole(root)
