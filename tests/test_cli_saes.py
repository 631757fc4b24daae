"""`mistudio import`, `export` and what else takes an SAE by name, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from journeys import road

from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.sae.activation import TopK
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.files import save_sae
from mistudio.engine.sae.formats.reading import read_sae
from mistudio.engine.sae.site import Site


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return road.built_once(tmp_path_factory)


@pytest.fixture
def root(built: Path, tmp_path: Path) -> Path:
    return road.copy_of(built, tmp_path)


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A SAELens folder of the tiny model's width, with its module's name."""
    draw = torch.Generator().manual_seed(0)
    dictionary = Dictionary(
        torch.randn(64, 128, generator=draw),
        torch.zeros(64),
        torch.randn(64, 128, generator=draw),
        torch.zeros(128),
        TopK(4),
    )
    site = Site.at(HookPoint("resid_post", 2))
    save_sae(
        dictionary, tmp_path / "theirs", site=site, model_name="x", hf_hook_name="model.layers.2"
    )
    return tmp_path / "theirs"


def run(root: Path, tmp_path: Path, *arguments: object) -> tuple[int, Any]:
    report = tmp_path / "report.json"
    report.unlink(missing_ok=True)
    code = road.run_cli(root, *arguments, "--json", report)
    return code, json.loads(report.read_text()) if report.exists() else None


def test_import_list_export_and_remove(
    root: Path, tmp_path: Path, theirs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, result = run(root, tmp_path, "import", theirs, "--name", "Theirs", "--model", "1")
    assert code == 0
    (row,) = result["saes"]
    assert (row["name"], row["format"], row["wiring"]) == ("Theirs", "saelens", "sae")
    assert "Theirs, 64 latents (topk)" in capsys.readouterr().out
    _, listed = run(root, tmp_path, "list")
    assert [(r["name"], r["reads"]) for r in listed["imported"]] == [
        ("Theirs", "blocks.2.hook_resid_post")
    ]
    for number, named in enumerate(("theirs", f"sae:{row['sae_id']}")):
        target = tmp_path / f"out{number}"
        code, result = run(root, tmp_path, "export", named, "--to", target, "--format", "sparsify")
        assert code == 0 and result["format"] == "sparsify"
        assert result["folders"] == [str(target / "layers.2")]
        assert read_sae(target)[0].format == "sparsify"
    code, _ = run(root, tmp_path, "sae", "remove", "Theirs")
    assert code == 0
    assert run(root, tmp_path, "list")[1]["imported"] == []


def test_a_run_is_exported_in_every_format_it_fits(root: Path, tmp_path: Path) -> None:
    for format in ("saelens", "safetensors"):
        target = tmp_path / format
        code, result = run(root, tmp_path, "export", "first", "--to", target, "--format", format)
        assert code == 0 and len(result["folders"]) == 1
    code, _ = run(root, tmp_path, "export", "first", "--to", tmp_path / "x", "--layer", "1")
    assert code == 0


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("does not exist", ("import", "nowhere")),
        ("'onnx' is not known", ("import", "{theirs}", "--format", "onnx")),
        ("has: 1 'tiny-llama-0.9m'", ("import", "{theirs}", "--model", "gpt5")),
        ("says layer 2; layer 1 was asked for", ("import", "{theirs}", "--layer", "1")),
        ("No SAE with number 9", ("export", "sae:9", "--to", "x")),
        ("only TopK", ("export", "first", "--to", "{out}", "--format", "sparsify")),
        ("has the layers 1", ("export", "first", "--to", "{out}", "--layer", "3")),
        ("belongs to a run", ("sae", "remove", "1")),
        ("'last'", ("sae", "remove", "last")),
    ],
)
def test_refusals_are_sentences_and_leave_all_as_it_was(
    root: Path,
    tmp_path: Path,
    theirs: Path,
    capsys: pytest.CaptureFixture[str],
    words: str,
    arguments: tuple[str, ...],
) -> None:
    before = road.contents(root)
    filled = [a.format(theirs=theirs, out=tmp_path / "out") for a in arguments]
    code, result = run(root, tmp_path, *filled)
    err = capsys.readouterr().err
    assert (code, result) == (1, None)
    assert words in err and "Traceback" not in err
    assert road.contents(root) == before


def test_bad_usage_of_import(own_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mistudio import cli

    assert cli.run(["import"]) == 2
    assert cli.run(["import", "x", "--site", "nowhere"]) == 2
    assert "usage: mistudio" in capsys.readouterr().err


def test_an_imported_sae_is_found_by_name_where_a_run_is_asked_for(
    root: Path, tmp_path: Path, theirs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(root, tmp_path, "import", theirs)[0] == 0
    capsys.readouterr()
    assert run(root, tmp_path, "features", "theirs")[0] == 1
    assert "no discovery pass" in capsys.readouterr().err
    assert run(root, tmp_path, "discover", "theirs", "--max-tokens", "1000")[0] == 1
    assert "Name a dataset" in capsys.readouterr().err
    code, result = run(
        root, tmp_path, "discover", "theirs", "--max-tokens", "1000", "--dataset", "small"
    )
    assert code == 0 and result["run"] == "theirs"
    code, result = run(root, tmp_path, "features", "theirs", "--top", "3")
    assert code == 0 and result["matching"] > 0
    assert run(root, tmp_path, "discover", "nobody")[0] == 1
    assert "'theirs'" in capsys.readouterr().err
