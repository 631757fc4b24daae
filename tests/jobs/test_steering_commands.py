"""`steer` with every option, `calibrate`, `sweep`, `export-vector` as they are typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from journeys import road

from mistudio.library.library import Library

Say = Callable[..., dict[str, Any]]


@pytest.fixture
def say(library: Library, tmp_path: Path) -> Say:
    def run(*arguments: object) -> dict[str, Any]:
        file = tmp_path / "result.json"
        assert road.run_cli(library.root, *arguments, "--json", file) == 0
        return dict(json.loads(file.read_text(encoding="utf-8")))

    return run


def test_every_option_of_steer_reaches_the_request(say: Say, library: Library) -> None:
    found = say(
        "steer", "first", "--feature", "3:1.5:clamp", "--feature", 5, "--strength", "-1",
        "--scales", "0.5,1", "--control", "--scope", "chosen", "--positions", "1,2",
        "--keep-norm", "--top-k", 30, "--top-p", 0.9, "--repetition-penalty", 1.2, "--seed", 4,
        "--temperature", 0.9, "--max-tokens", 3, "--prompt", "The sea was",
    )  # fmt: skip
    request = library.generations.get(found["generation_id"]).request
    expected = {
        "features": [[3, 1.5, "clamp"], [5, -1.0, "add"]], "scales": [0.5, 1.0], "control": True,
        "scope": "chosen", "positions": [1, 2], "keep_norm": True, "top_k": 30, "top_p": 0.9,
        "repetition_penalty": 1.2, "seed": 4, "temperature": 0.9, "max_new_tokens": 3,
    }  # fmt: skip
    assert {name: request[name] for name in expected} == expected
    assert len(found["variants"]) == 3


def test_a_calibration_is_shown_and_kept(
    say: Say, library: Library, capsys: pytest.CaptureFixture[str]
) -> None:
    found = say("calibrate", "first", "--feature", 3, "--prompt", "The sea", "--max-tokens", 4)
    (one,) = found["calibrations"]
    kept = library.calibrations.of_feature(1, 3)
    assert kept is not None and one["curve"] == kept.curve
    assert f"Feature 3: recommended {kept.recommended:g}" in capsys.readouterr().out


def test_a_sweep_is_shown_kept_and_written(say: Say, library: Library, tmp_path: Path) -> None:
    found = say(
        "sweep", "first", "--feature", "3:2", "--strengths", "0.5,1", "--seeds", "0,1",
        "--at-layers", "1,2", "--prompt", "The sea", "--max-tokens", 3, "--to", tmp_path / "t.csv",
    )  # fmt: skip
    kept = library.experiments.get(found["experiment_id"])
    assert kept.result["rows"] == found["rows"]
    assert [(r["layer"], r["strength"]) for r in found["rows"]] == [
        (1, 0.5), (1, 1.0), (2, 0.5), (2, 1.0),
    ]  # fmt: skip
    assert len((tmp_path / "t.csv").read_text(encoding="utf-8").splitlines()) == 5


def test_a_vector_is_exported_of_features_and_of_a_generation(
    say: Say, library: Library, tmp_path: Path
) -> None:
    one, other = tmp_path / "one.gguf", tmp_path / "other.gguf"
    generation = library.generations.all()[0]
    assert generation.request["features"] == [[3, 1.0, "add"]]
    say("export-vector", "first", "--feature", "3:1", "--to", one)
    say("export-vector", "--generation", generation.id, "--to", other)
    assert one.read_bytes() == other.read_bytes()
    assert road.run_cli(library.root, "export-vector", "first", "--to", tmp_path / "x.gguf") == 1


@pytest.mark.parametrize("spec", ["x", "3:y", "3:1:shout"])
def test_a_feature_that_cannot_be_read_is_refused(library: Library, spec: str) -> None:
    steer = ("steer", "first", "--prompt", "a", "--feature", spec)
    assert road.run_cli(library.root, *steer) == 2
