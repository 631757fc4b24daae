"""The command line: what each command prints, writes and answers, and how it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from journeys import road

from mistudio import __version__
from mistudio.library.library import Library


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return road.built_once(tmp_path_factory)


@pytest.fixture
def root(built: Path, tmp_path: Path) -> Path:
    """A library with dataset `small`, the tiny model and the finished run `first`."""
    return road.copy_of(built, tmp_path)


@pytest.fixture(scope="session")
def mistudio(tmp_path_factory: pytest.TempPathFactory) -> road.Children:
    return road.children_once(tmp_path_factory)


class Result:
    def __init__(self, code: int, out: str, err: str, report: Any) -> None:
        self.code, self.out, self.err, self.json = code, out, err, report


Run = Callable[..., Result]


@pytest.fixture
def run(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """`mistudio --library ROOT ... --json FILE`, in this process."""

    def do(*arguments: object, library: Path = root) -> Result:
        report = tmp_path / "report.json"
        report.unlink(missing_ok=True)
        capsys.readouterr()
        code = road.run_cli(library, *arguments, "--json", report)
        out, err = capsys.readouterr()
        written = json.loads(report.read_text(encoding="utf-8")) if report.exists() else None
        return Result(code, out, err, written)

    return do


def refused(run: Run, root: Path, words: str, *arguments: object) -> Result:
    """Exit code 1, a sentence on stderr, no traceback, and the library as it was."""
    before = road.contents(root)
    result = run(*arguments)
    assert result.code == 1
    assert words in result.err, result.err
    assert "Traceback" not in result.err
    assert result.json is None
    assert road.contents(root) == before
    return result


# --- what can be asked ----------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["before", "after"])
def test_the_library_may_be_named_before_or_after_the_command(
    tmp_path: Path, own_home: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from mistudio import cli

    named = ["--library", str(tmp_path / "mine"), "--json", str(tmp_path / "a.json")]
    assert cli.run([*named, "list"] if place == "before" else ["list", *named]) == 0
    assert str(tmp_path / "mine") in capsys.readouterr().out
    assert (tmp_path / "a.json").is_file()
    assert not (own_home / "library.db").exists()


def test_without_a_name_the_library_is_the_users(
    own_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mistudio import cli

    assert cli.run(["list"]) == 0
    assert f"Library: {own_home}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from mistudio import cli

    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"miStudio {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("juggle",),
        ("train", "--model", "a"),
        ("dataset",),
        ("steer", "1", "--feature", "x", "--strength", "1", "--prompt", "p"),
        ("features", "1", "--sort", "beauty"),
        ("model", "add", "x", "--precision", "fp8"),
        ("export", "1", "--to", "x", "--format", "onnx"),
        ("train", "--model", "a", "--dataset", "b", "--layers", "1", "--site", "nowhere"),
        ("list", "--nonsense"),
    ],
)
def test_bad_usage_is_2_and_says_what_is_possible(
    arguments: tuple[str, ...], own_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mistudio import cli

    assert cli.run(list(arguments)) == 2
    assert "usage: mistudio" in capsys.readouterr().err
    assert not own_home.exists()


def test_every_command_of_the_house_has_a_help_page(capsys: pytest.CaptureFixture[str]) -> None:
    from mistudio import cli

    commands = ("demo", "doctor", "list", "dataset add", "model add", "train", "discover")
    for command in (*commands, "features", "steer", "export", "import", "sae remove", "job retry"):
        assert cli.run([*command.split(), "--help"]) == 0
        out = capsys.readouterr().out
        assert "--library DIR" in out and "--json FILE" in out


def test_answers_go_to_stdout_and_progress_to_stderr(
    root: Path, mistudio: road.Children, tmp_path: Path
) -> None:
    text = road.write_texts(tmp_path / "some.jsonl", 20)
    child = mistudio.run("--library", root, "dataset", "add", text)
    assert child.wait() == 0
    assert child.out.startswith("Dataset 2: some, 20 documents")
    assert "read" in child.err and "100 %" in child.err


# --- each command ---------------------------------------------------------------------------------


def test_list_shows_what_the_library_holds(run: Run) -> None:
    result = run("list")
    assert result.code == 0
    assert set(result.json) == {"models", "datasets", "tokenizers", "runs", "imported", "jobs"}
    assert result.json["models"][0]["name"] == road.MODEL.name
    assert result.json["datasets"][0]["documents"] == "120"
    (row,) = result.json["runs"]
    assert (row["name"], row["layer"], row["latents"]) == ("first", 1, 128)
    assert (row["status"], row["features"]) == ("completed", "yes")
    for heading in ("Models", "Datasets", "Tokenizers", "Runs", "Imported", "Jobs"):
        assert f"\n{heading}\n" in result.out


def test_list_of_an_empty_library_says_none(run: Run, tmp_path: Path) -> None:
    result = run("list", library=tmp_path / "new")
    kinds = ("models", "datasets", "tokenizers", "runs", "imported", "jobs")
    assert result.out.count("none") == len(kinds)
    assert result.json == {kind: [] for kind in kinds}


def test_dataset_add_and_remove(run: Run, root: Path, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("id,notes\n1,Call me Ishmael.\n2,\n3,Some years ago\n")
    result = run("dataset", "add", path, "--text-column", "notes", "--name", "Whale")
    assert result.code == 0
    assert result.json == {
        "dataset_id": 2,
        "skipped": 0,
        "skipped_rows": [],
        "rejected": {
            "rows": 0,
            "files": 0,
            "first": [],
            "replaced": 0,
            "encodings": {"UTF-8": 1},
            "left_out": [],
        },
        "documents": 2,
        "characters": 30,
    }
    assert "Dataset 2: Whale, 2 documents, 30 characters" in result.out
    removed = run("dataset", "remove", "whale")
    assert (removed.code, removed.json) == (0, {"dataset_id": 2})
    assert len(list((root / "trash").iterdir())) == 1


def test_bad_rows_are_left_out_where_asked_and_said(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": "a"}\nbroken\n')
    result = run("dataset", "add", path, "--skip-bad-rows")
    assert result.json["skipped_rows"] == ["some.jsonl:2"]
    assert "(1 bad rows left out)" in result.out


def test_what_was_guessed_replaced_or_left_out_is_printed(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_bytes("für immer".encode("cp1252"))
    (folder / "b.jsonl").write_text('{"text": "b"}\nbroken\n')
    (folder / "c.txt").write_text("")
    result = run("dataset", "add", folder, "--skip-bad-rows")
    assert "left out: b.jsonl, line 2: column 1: Expecting value." in result.out
    assert "encoding: Windows-1252 (guessed) (another: --encoding)" in result.out
    assert "1 empty file was left out." in result.out


def test_a_dataset_may_be_limited_or_kept_in_place(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": "a"}\n' * 20)
    result = run("dataset", "add", path, "--max-documents", 7)
    assert (result.json["documents"], result.json["characters"]) == (7, 7)
    assert run("dataset", "add", path, "--max-bytes", 5).json["documents"] == 5
    kept = run("dataset", "add", path, "--keep-in-place", "--encoding", "utf-8")
    assert "the first 20 documents" in kept.out


def test_model_add_and_remove(run: Run) -> None:
    result = run("model", "add", road.MODEL, "--precision", "bf16")
    assert result.json == {"model_id": 2, "name": road.MODEL.name, "parameters": 857_216}
    assert "857.2K parameters, 4 layers, width 128" in result.out
    assert run("model", "remove", 2).json == {"model_id": 2}


def test_what_a_run_depends_on_is_not_removed(run: Run, root: Path) -> None:
    refused(run, root, "1 run, 1 extraction and 1 feature run use this dataset", *_rm("dataset"))
    refused(run, root, "1 run, 1 extraction and 1 SAE use this model", *_rm("model"))


def _rm(kind: str) -> tuple[str, ...]:
    return kind, "remove", "1"


def test_train_writes_the_measures_of_every_sae(run: Run, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**road.QUICK, "k": 99, "tokens": 2000}))
    train = ("train", "--model", 1, "--dataset", "small", "--layers", "2,0", "--site", "mlp_out")
    result = run(*train, "--config", config, "--set", "k=4", "--name", "mine")
    assert result.code == 0
    assert result.json["run"] == "mine"
    assert result.json["status"] == "completed"
    assert [row["hook_point"] for row in result.json["saes"]] == [
        "blocks.0.hook_mlp_out",
        "blocks.2.hook_mlp_out",
    ]
    for row in result.json["saes"]:
        assert {
            "sae_id",
            "l0",
            "explained_variance",
            "dead_share",
            "tokens",
            "ce_clean",
            "ce_sae",
            "ce_zero",
            "ce_loss_score",
        } <= set(row)
    assert result.out.startswith("Run 2: mine (completed)")
    assert "target 4" in result.out  # --set is stronger than --config


def test_discover_counts_the_features_of_every_sae(run: Run) -> None:
    result = run("discover", "first", "--max-tokens", 1000, "--top-k", 3)
    assert result.code == 0
    (row,) = result.json["feature_runs"]
    assert set(row) == {
        "sae_id", "feature_run_id", "alive", "scored", "interpretable", "total", "tokens",
    }  # fmt: skip
    assert result.json["run"] == "first"
    assert row["total"] == 128
    assert f"{row['alive']} of 128 features fired" in result.out
    assert 0 <= row["interpretable"] <= row["scored"] <= row["alive"]


def test_steer_writes_both_texts_and_what_changed(run: Run) -> None:
    steer = ("steer", "first", "--feature", 3, "--strength", 2, "--prompt", "The sea")
    result = run(*steer, "--max-tokens", 6, "--temperature", 0)
    assert result.code == 0
    assert set(result.json) == {
        "feature",
        "strength",
        "unsteered",
        "steered",
        "unsteered_ids",
        "steered_ids",
        "kl_per_token",
        "perplexity_ratio",
        "word_overlap",
        "variants",
        "generation_id",
    }
    assert result.json["kl_per_token"] > 0
    assert f"Unsteered: {result.json['unsteered']}" in result.out
    still = run(*steer[:5], 0, *steer[6:], "--max-tokens", 6)
    assert still.json["steered_ids"] == still.json["unsteered_ids"]
    assert still.json["kl_per_token"] == 0


def test_export_names_its_folders(run: Run, tmp_path: Path) -> None:
    result = run("export", "first", "--format", "saelens", "--to", tmp_path / "out")
    assert result.json == {"format": "saelens", "folders": [str(tmp_path / "out" / road.POINT)]}
    assert result.out.strip() == result.json["folders"][0]
    assert (tmp_path / "out" / road.POINT / "cfg.json").is_file()


def test_a_report_cannot_be_lost_to_a_bad_place(run: Run, root: Path, tmp_path: Path) -> None:
    from mistudio import cli

    before = road.contents(root)
    for place in (tmp_path, tmp_path / "no" / "such" / "folder.json"):
        code = cli.run(["--library", str(root), "dataset", "add", "sample", "--json", str(place)])
        assert code == 1
    assert road.contents(root) == before


# --- features -------------------------------------------------------------------------------------


@pytest.fixture
def columns(root: Path) -> Iterator[dict[str, np.ndarray]]:
    """The feature table, read with numpy alone."""
    (row,) = road.rows(root, "SELECT folder FROM feature_runs")
    yield {path.stem: np.load(path) for path in (root / row["folder"]).rglob("*.npy")}


@pytest.mark.parametrize(
    "column",
    ["density", "context_density", "max_activation", "mean_activation", "top_token_share"],
)
def test_features_are_sorted_by_any_column(
    run: Run, columns: dict[str, np.ndarray], column: str
) -> None:
    result = run("features", "first", "--sort", column, "--top", 7)
    assert result.code == 0
    assert set(result.json) == {"sae_id", "tokens", "matching", "features"}
    alive = columns["density"] > 0
    assert result.json["matching"] == alive.sum()
    values = np.where(alive, columns[column], -1.0)
    expected = values[np.argsort(-values, kind="stable")[:7]]
    shown = [row["feature"] for row in result.json["features"]]
    assert np.array_equal(values[shown], expected)
    for row in result.json["features"]:
        for name in ("density", "max_activation", "top_token_share"):
            assert row[name] == pytest.approx(float(columns[name][row["feature"]]))
        assert row["description"]


def test_features_by_number_and_at_most_so_many(run: Run, columns: dict[str, np.ndarray]) -> None:
    alive = np.flatnonzero(columns["density"] > 0)
    result = run("features", "first", "--sort", "id", "--top", 11)
    assert [row["feature"] for row in result.json["features"]] == alive[:11].tolist()
    assert len(run("features", "first", "--top", 100_000).json["features"]) == len(alive)
    none = run("features", "first", "--top", 0)
    assert (none.code, none.json["features"]) == (0, [])


@pytest.mark.parametrize("top", [-1, -100])
def test_fewer_than_no_features_is_bad_usage(run: Run, top: int) -> None:
    assert run("features", "first", "--top", top).code == 2


def test_features_are_searched_in_tokens_and_labels(
    run: Run, root: Path, columns: dict[str, np.ndarray]
) -> None:
    from mistudio.engine.models.loading import load_tokenizer

    tokenizer = load_tokenizer(road.MODEL)

    def has(feature: int, word: str) -> bool:
        ids = columns["logit_ids"][feature, 0]
        return any(tokenizer.decode([int(i)]).strip().lower().startswith(word) for i in ids)

    promoting = {f for f in np.flatnonzero(columns["density"] > 0).tolist() if has(f, "th")}
    result = run("features", "first", "--search", "TH", "--top", 1000)
    found = {row["feature"] for row in result.json["features"]}
    assert promoting and promoting <= found

    result = run("features", "first", "--search", "xylophones", "--top", 1000)
    assert (result.code, result.json["features"]) == (0, [])
    labelled = int(np.flatnonzero(columns["density"] > 0)[5])
    assert run("feature", "label", "first", labelled, "Xylophones!").code == 0
    again = run("features", "first", "--search", "xylo", "--top", 1000)
    assert [row["feature"] for row in again.json["features"]] == [labelled]
    assert again.json["features"][0]["label"] == "Xylophones!"
    assert run("feature", "label", "first", labelled).code == 0
    assert run("features", "first", "--search", "xylo").json["features"] == []


def test_features_are_chosen_by_ranges(run: Run, columns: dict[str, np.ndarray]) -> None:
    alive = columns["density"] > 0
    middle = float(np.median(columns["density"][alive]))
    low = float(np.quantile(columns["max_activation"][alive], 0.3))
    expected = alive & (columns["density"] >= middle) & (columns["max_activation"] <= low)
    result = run(
        "features", "first", "--top", 1000, "--where", f"density={middle}..", "--where",
        f"max_activation=..{low}", "--sort", "density", "--ascending",
    )  # fmt: skip
    shown = [row["feature"] for row in result.json["features"]]
    assert set(shown) == set(np.flatnonzero(expected).tolist())
    assert 0 < len(shown) < alive.sum()
    assert (np.diff(columns["density"][shown]) >= 0).all()


@pytest.mark.parametrize("text", ["density", "density=0.1", "density=a..b", "beauty=0..1"])
def test_a_range_that_cannot_be_read_is_refused(run: Run, text: str) -> None:
    result = run("features", "first", "--where", text)
    assert result.code == 1
    assert "COLUMN=LOW..HIGH" in result.err or "The columns are" in result.err


def test_one_feature_is_shown_in_full(run: Run, columns: dict[str, np.ndarray]) -> None:
    feature = int(columns["n_active"].argmax())
    result = run("feature", "show", "first", feature, "--examples", 3)
    assert result.code == 0
    assert result.json["statistics"]["n_active"] == columns["n_active"][feature]
    assert len(result.json["examples"]) == 3
    peak = result.json["examples"][0]["activation"]
    assert peak == pytest.approx(float(columns["max_activation"][feature]), rel=1e-3)
    assert "Nearest decoder" in result.out and f"#{feature}" in result.out
    missing = run("feature", "show", "first", 100_000)
    assert missing.code == 1 and "numbered from 0" in missing.err


def test_a_feature_is_ablated_beside_random_directions(run: Run, columns: Any) -> None:
    feature = int(columns["n_active"].argmax())
    result = run("feature", "ablate", "first", feature, "--contexts", 4, "--controls", 2)
    assert result.code == 0
    assert result.json["active"]["feature"]["tokens"] > 0
    assert "random directions of the same size" in result.out


def test_features_are_exported(run: Run, tmp_path: Path, columns: Any) -> None:
    target = tmp_path / "features.csv"
    assert run("feature", "export", "first", "--features", "0-9", "--to", target).code == 0
    assert len(target.read_text(encoding="utf-8").splitlines()) == 11
    again = run("feature", "export", "first", "--to", target)
    assert again.code == 1 and str(target) in again.err


def test_a_text_is_probed(run: Run) -> None:
    result = run("feature", "probe", "first", "The ships sailed to Paris in 1905.", "--top", 4)
    assert result.code == 0
    rows = result.json["features"]
    assert len(rows) == 4
    assert [row["activation"] for row in rows] == sorted(
        (row["activation"] for row in rows), reverse=True
    )
    assert all(row["token"] in result.json["tokens"] for row in rows)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("has: 1 'small'", ("dataset", "remove", "smal")),
        ("has: 1 'tiny-llama-0.9m'", ("model", "remove", "gpt5")),
        ("has: 1 'first'", ("discover", "last")),
        ("has: 1 'first'", ("features", "99")),
        ("has the layers 1", ("features", "first", "--layer", "2")),
        ("No job with number 99", ("job", "retry", "99")),
        ("No job with number 99", ("job", "dismiss", "99")),
        ("--set takes KEY=VALUE", "train --set k"),
        ("no option 'kk'", "train --set kk=3"),
        ("must be between 1 and 4096; it is 0", "train --set k=0"),
        ("got 'many'", "train --set k=many"),
        ("'a,b' cannot be read", "train --layers a,b"),
        ("has the layers 0 to 3; 4 was asked for", "train --layers 1,4"),
        ("has the layers 0 to 3; 99 was asked for", "train --layers 99 --source store"),
        ("-1 is not a layer number", "train --layers=-1"),
        ("No layer chosen", "train --layers ,"),
        ("is neither a folder here nor", ("model", "add", "./nowhere/at/all")),
        ("There is nothing at", ("dataset", "add", "/nowhere/at/all.txt")),
        ("must be between 0 and 2; it is 9", "steer --temperature 9"),
        ("500", "steer --feature 500"),
        ("top k must be between 1 and 1,000; it is 0", ("discover", "first", "--top-k", "0")),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_sentence(
    run: Run, root: Path, words: str, arguments: str | tuple[str, ...]
) -> None:
    if isinstance(arguments, str):
        command, *given = arguments.split()
        required = {
            "train": ["--model", "1", "--dataset", "1", "--layers", "1"],
            "steer": ["first", "--feature", "1", "--strength", "1", "--prompt", "Hello"],
        }[command]
        arguments = (command, *required, *given)
    refused(run, root, words, *arguments)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{not json", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[1, 2]", "holds a list"),
        (b'{"k": [8]}', "k in"),
        (b'{"k": null}', "got 'auto'"),
        (b'{"k": "eight"}', "got 'eight'"),
        (b'{"tokens": 10}', "must be between"),
        (None, "No such file or directory"),
        ("folder", "Is a directory"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_refused(
    run: Run, root: Path, tmp_path: Path, content: bytes | str | None, words: str
) -> None:
    path = tmp_path / "config.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        path.mkdir()
    train = ("train", "--model", 1, "--dataset", 1, "--layers", 1)
    refused(run, root, words, *train, "--config", path)


def _empty_file(folder: Path) -> tuple[object, ...]:
    (folder / "a.txt").touch()
    return "dataset", "add", folder / "a.txt"


def _binary_file(folder: Path) -> tuple[object, ...]:
    (folder / "a.txt").write_bytes(bytes(range(256)))
    return "dataset", "add", folder / "a.txt"


def _broken_line(folder: Path) -> tuple[object, ...]:
    """Broken beyond what has been written already."""
    path = road.write_texts(folder / "a.jsonl", 400)
    path.write_text(path.read_text(encoding="utf-8") + '{"text": "cut', encoding="utf-8")
    return "dataset", "add", path


def _empty_texts(folder: Path) -> tuple[object, ...]:
    (folder / "a.jsonl").write_text('{"text": ""}\n{"text": "  "}\n')
    return "dataset", "add", folder / "a.jsonl"


def _empty_weights(folder: Path) -> tuple[object, ...]:
    shutil.copytree(road.MODEL, folder / "model")
    (folder / "model" / "model.safetensors").chmod(0o644)
    (folder / "model" / "model.safetensors").write_bytes(b"")
    return "model", "add", folder / "model"


def _cut_weights(folder: Path) -> tuple[object, ...]:
    _empty_weights(folder)
    whole = (road.MODEL / "model.safetensors").read_bytes()
    (folder / "model" / "model.safetensors").write_bytes(whole[:-1000])
    return "model", "add", folder / "model"


def _bert(folder: Path) -> tuple[object, ...]:
    shutil.copytree(road.MODEL, folder / "model")
    (folder / "model" / "config.json").chmod(0o644)
    config = {"architectures": ["BertForMaskedLM"], "model_type": "bert"}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    return "model", "add", folder / "model"


def _no_tokenizer(folder: Path) -> tuple[object, ...]:
    shutil.copytree(road.MODEL, folder / "model")
    (folder / "model" / "tokenizer.json").unlink()
    return "model", "add", folder / "model"


def _empty_folder(folder: Path) -> tuple[object, ...]:
    (folder / "model").mkdir()
    return "model", "add", folder / "model"


def _a_file_as_model(folder: Path) -> tuple[object, ...]:
    (folder / "model.gguf").write_bytes(b"GGUF")
    return "model", "add", folder / "model.gguf"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_empty_file, ("a.txt has 0 bytes", "Choose a file with text")),
        (_binary_file, ("This is not a text file", "Choose a text file")),
        (_broken_line, ("a.jsonl, line 401: column 10", "--skip-bad-rows")),
        (_empty_texts, ("Every row or paragraph is empty", "another text column")),
        (_empty_weights, ("model.safetensors: it is empty (0 bytes)", "Download")),
        (_cut_weights, ("model.safetensors: it has", "Download")),
        (_bert, ("BertForMaskedLM is an encoder", "decoder-only language models")),
        (_no_tokenizer, ("No tokenizer in this folder", "Download")),
        (_empty_folder, ("The folder is empty", "Choose a model's folder")),
        (_a_file_as_model, ("is not readable as GGUF", "Fetch it again")),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_bad_input_is_refused_with_what_and_what_next_and_leaves_the_library_as_it_was(
    run: Run,
    root: Path,
    tmp_path: Path,
    make: Callable[[Path], tuple[object, ...]],
    words: tuple[str, str],
) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    what, next_step = words
    result = refused(run, root, what, *make(folder))
    assert next_step in result.err
    assert len(result.err.strip().splitlines()) == 3  # title, what, what next


def test_a_library_that_cannot_be_read_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "library.db").write_text("this was never a database " * 100)
    result = run("list", library=tmp_path / "broken")
    assert result.code == 1
    assert "The library's database cannot be read" in result.err
    (tmp_path / "file").write_text("x")
    result = run("list", library=tmp_path / "file")
    assert (result.code, "must be a folder" in result.err) == (1, True)


# --- no room --------------------------------------------------------------------------------------

LIMITED = {
    "dataset": lambda folder: ("dataset", "add", road.write_texts(folder / "big.jsonl", 1500)),
    "model": lambda folder: ("model", "add", road.MODEL),
    "extract": lambda folder: (
        *("train", "--model", "1", "--dataset", "1", "--layers", "2,3"),
        *("--source", "store", *road.quick_options()),
    ),
    "train": lambda folder: (
        *("train", "--model", "1", "--dataset", "1", "--layers", "1", "--source", "stream"),
        *(*road.quick_options(), "--set", "expansion=32", "--set", "tokens=1024"),
    ),
    "discover": lambda folder: ("discover", "first", "--top-k", "100"),
}


def _put_something_large_beside_the_sae(root: Path) -> None:
    (sae,) = road.rows(root, "SELECT folder FROM saes")
    (root / sae["folder"] / "notes.bin").write_bytes(b"0" * 1_500_000)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no RLIMIT_FSIZE")
@pytest.mark.parametrize("work", LIMITED)
def test_a_file_that_may_not_grow_ends_in_a_sentence_and_leaves_the_library_as_it_was(
    work: str, root: Path, tmp_path: Path, mistudio: road.Children
) -> None:
    arguments = LIMITED[work](tmp_path)
    _put_something_large_beside_the_sae(root)
    before = road.contents(root)
    size = max(path.stat().st_size for path in root.glob("library.db*"))
    room = {"discover": 200_000, "extract": 1_000_000}.get(work, 60_000)
    limit = max(size + room, 120_000)
    child = mistudio.run("--library", root, *arguments, limit=limit)
    assert child.wait() == 1, child.out
    assert "Traceback" not in child.err, child.err
    assert any(words in child.err for words in ("too large", "disk is full", "size limit"))
    assert "aise the limit" in child.err or "Free some space" in child.err
    assert road.contents(root) == before
    assert not (tmp_path / "out").exists()
    (job,) = road.rows(root, "SELECT status FROM jobs ORDER BY id DESC LIMIT 1")
    assert job["status"] == "failed"
    road.check_whole(root)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 20 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("only root on Linux can mount a small disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(place)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path, leave: int) -> None:
    with (disk / "ballast").open("wb") as ballast:
        ballast.write(b"0" * (shutil.disk_usage(disk).free - leave))


@pytest.mark.parametrize("work", ["discover", "train"])
def test_a_full_disk_ends_in_a_sentence_and_leaves_the_library_as_it_was(
    work: str, built: Path, small_disk: Path, tmp_path: Path, mistudio: road.Children
) -> None:
    root = small_disk / "library"
    shutil.copytree(built, root)
    _put_something_large_beside_the_sae(root)
    mistudio.run("--library", root, "list")
    fill(small_disk, leave=300_000)
    before = road.contents(root)
    arguments = LIMITED[work](small_disk)
    child = mistudio.run("--library", root, *arguments)
    assert child.wait() == 1, child.out
    assert "Traceback" not in child.err, child.err
    # A discovery needs so much that it is refused before it begins.
    said = {"discover": "Not enough disk space", "train": "disk is full"}
    assert said[work] in child.err, child.err
    assert "Free some space" in child.err
    assert road.contents(root) == before
    assert not (small_disk / "out").exists()
    (small_disk / "ballast").unlink()
    assert road.rows(root, "PRAGMA integrity_check")[0]["integrity_check"] == "ok"
    assert mistudio.run("--library", root, "list").wait() == 0


def test_a_disk_without_any_room_ends_in_a_sentence(
    built: Path, small_disk: Path, tmp_path: Path, mistudio: road.Children
) -> None:
    root = small_disk / "library"
    shutil.copytree(built, root)
    fill(small_disk, leave=0)
    text = road.write_texts(tmp_path / "some.jsonl", 3)
    child = mistudio.run("--library", root, "dataset", "add", text)
    assert child.wait() == 1
    assert "Traceback" not in child.err, child.err
    assert "disk is full" in child.err or "disk may be full" in child.err, child.err


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    small_disk: Path, tmp_path: Path, mistudio: road.Children
) -> None:
    root = small_disk / "library"
    mistudio.run("--library", root, "list")
    before = road.contents(root)
    text = road.write_texts(tmp_path / "big.jsonl", 2000)
    with text.open("ab") as file:
        file.write(text.read_bytes() * 10)
    child = mistudio.run("--library", root, "dataset", "add", text)
    assert child.wait() == 1
    assert "Not enough disk space" in child.err
    assert "Adding big.jsonl needs" in child.err and "MB are free" in child.err
    assert road.contents(root) == before


# --- doctor and jobs ------------------------------------------------------------------------------


def findings(result: Result) -> list[dict[str, Any]]:
    return [finding for finding in result.json["findings"] if not finding["ok"]]


def test_doctor_finds_nothing_wrong_with_a_whole_library(run: Run) -> None:
    result = run("doctor")
    assert findings(result) == []
    assert (result.code, result.json["healthy"]) == (0, True)
    areas = {finding["area"] for finding in result.json["findings"]}
    assert {"device", "memory", "versions", "window", "disk", "library", "jobs"} <= areas
    assert "All is well." in result.out


def test_doctor_finds_a_missing_folder_and_says_how_to_mend_it(run: Run, root: Path) -> None:
    (sae,) = road.rows(root, "SELECT folder FROM saes")
    shutil.rmtree(root / sae["folder"])
    result = run("doctor")
    assert (result.code, result.json["healthy"]) == (1, False)
    (finding,) = findings(result)
    assert finding["text"] == f"saes 1: its folder {sae['folder']} is missing"
    assert "Put the folder back" in finding["mend"]
    assert "MEND  library" in result.out


def test_doctor_finds_an_interrupted_job_that_can_be_retried_or_dismissed(
    run: Run, root: Path
) -> None:
    for _ in range(2):
        library = Library(root)
        job = library.jobs.submit("discover", "Discover", "compute", {"sae_id": 1, "top_k": 2})
        library.jobs.update(job, owner="1:0", status="running")
        library.close()
        (finding,) = findings(run("doctor"))
        assert finding["text"] == f"Discover (job {job}) was interrupted"
        assert f"mistudio job retry {job}" in finding["mend"]
        assert run("list").json["jobs"][0]["status"] == "interrupted"
        if "dismissed" not in locals():
            dismissed = run("job", "dismiss", job)
            assert dismissed.json == {"job_id": job}
            assert road.rows(root, "SELECT * FROM jobs WHERE id = ?", job) == []
    retried = run("job", "retry", job)
    assert (retried.code, retried.json["alive"] > 0) == (0, True)
    assert run("doctor").code == 0
    assert run("list").json["jobs"] == []


def test_a_failed_job_is_listed_and_can_be_run_again_or_put_away(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "late.txt"
    assert run("dataset", "add", path).code == 1
    (row,) = run("list").json["jobs"]
    assert row["status"] == "failed"
    path.write_text("Now there is text here.")
    again = run("job", "retry", row["id"])
    assert (again.code, again.json["dataset_id"]) == (0, 2)
    assert run("job", "dismiss", row["id"]).code == 0
    assert run("list").json["jobs"] == []


def test_the_job_of_a_run_can_be_put_away_and_the_run_stays(run: Run, root: Path) -> None:
    (job,) = road.rows(root, "SELECT id FROM jobs WHERE kind = 'train'")
    assert run("job", "dismiss", job["id"]).code == 0
    assert run("list").json["runs"][0]["name"] == "first"


def test_a_job_that_runs_is_not_retried(run: Run, root: Path) -> None:
    library = Library(root)
    job = library.jobs.submit("discover", "Discover", "compute", {"sae_id": 1})
    refused(run, root, f"Job {job} is queued", "job", "retry", job)
    refused(run, root, f"Job {job} is queued", "job", "dismiss", job)
    library.close()


def test_a_reader_that_stops_reading_is_no_error(root: Path) -> None:
    command = [sys.executable, "-m", "mistudio", "--library", str(root), "list"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=road.ROOT)
    assert child.stdout and child.stderr
    child.stdout.close()
    err = child.stderr.read()
    child.stderr.close()
    assert child.wait() == 0
    assert err == b""


def test_dataset_is_renamed_and_its_provenance_written(
    run: Run, root: Path, tmp_path: Path
) -> None:
    assert run("dataset", "rename", "small", "Another name").json["name"] == "Another name"
    target = tmp_path / "record.json"
    result = run("dataset", "provenance", "Another name", "--out", target)
    assert result.code == 0 and json.loads(target.read_text(encoding="utf-8")) == result.json
    assert result.json["provenance"]["sha256"] and result.json["tokenizations"]
    refused(run, root, "name is empty", "dataset", "rename", "Another name", "  ")


def test_model_show_and_check_tell_what_a_model_needs_and_what_quantising_costs(run: Run) -> None:
    shown = run("model", "show", road.MODEL)
    assert "857,216 parameters, 4 layers of 128 channels" in shown.out
    assert [row["precision"] for row in shown.json["plans"]] == [
        "fp32", "bf16", "fp16", "q8", "q4", "q2"
    ]  # fmt: skip
    added = run("model", "add", road.MODEL, "--precision", "q4")
    quality = added.json["quality"]
    assert quality["precision"] == "q4" and f"{quality['verdict'].upper()}: Q4" in added.out
    assert "nats per token; difference" in added.out
    assert run("model", "check", added.json["model_id"]).json["quality"] == quality
