"""Which files are which configuration and split: as `datasets` says, without asking anybody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mistudio.engine.hub.layout import resolve
from mistudio.engine.hub.repository import RemoteFile

SHARDS = [f"data/{split}-0000{n}-of-00002.parquet" for split in ("train", "test") for n in (0, 1)]

LAYOUTS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "shards": (SHARDS, {}),
    "one file": (["texts.jsonl"], {}),
    "by name": (["train.csv", "validation.csv", "my_test_set.csv", "LICENSE.txt"], {}),
    "by folder": (["a/train/x.jsonl", "a/train/y.jsonl", "a/dev/z.jsonl"], {}),
    "no split": (["a.txt", "b/c.txt"], {}),
    "hidden": (["x.jsonl", ".hidden.jsonl", ".git/y.jsonl", "__pycache__/z.jsonl"], {}),
    "about": (["data.json", "config.json", "README.md"], {}),
    "card list": (["a.csv", "b.csv"], {"configs": [{"config_name": "x", "data_files": "a.csv"},
                                                   {"config_name": "y", "data_files": ["b.csv"]}]}),
    "card splits": (
        ["en/a.jsonl", "en/b.jsonl", "de/a.jsonl"],
        {"configs": [
            {"config_name": "en", "default": True, "data_files": [
                {"split": "train", "path": "en/a*"}, {"split": "test", "path": ["en/b.jsonl"]}]},
            {"config_name": "de", "data_files": [{"split": "train", "path": "de/*.jsonl"}]}]},
    ),
    "card folder": (
        ["en/train.jsonl", "en/test.jsonl", "de/train.jsonl"],
        {"configs": [{"config_name": "en", "data_dir": "en"},
                     {"config_name": "de", "data_dir": "de"}]},
    ),
    "default by name": (
        ["a.csv", "b.csv"],
        {"configs": [{"config_name": "default", "data_files": "a.csv"},
                     {"config_name": "other", "data_files": "b.csv"}]},
    ),
    "info names it": (["a.csv"], {"dataset_info": {"config_name": "plain"}}),
}  # fmt: skip


def ours(names: list[str], card: dict[str, Any]) -> dict[str, dict[str, list[str]]]:
    layout = resolve([RemoteFile(name, 1) for name in sorted(names)], card)
    return {
        config.name: {split.name: [file.name for file in split.files] for split in config.splits}
        for config in layout.configs
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_files_as_load_dataset_takes(name: str, tmp_path: Path) -> None:
    """Against `datasets` itself, on a folder with the same names."""
    import yaml
    from datasets import get_dataset_config_names, load_dataset_builder

    names, card = LAYOUTS[name]
    for file in names:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"PAR1")
    if card:
        (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    theirs: dict[str, dict[str, list[str]]] = {}
    for config in get_dataset_config_names(str(tmp_path)):
        builder = load_dataset_builder(str(tmp_path), config, cache_dir=str(tmp_path / "cache"))
        theirs[config] = {
            str(split): [Path(file).relative_to(tmp_path).as_posix() for file in files]
            for split, files in builder.config.data_files.items()
        }
    found = ours(names, card)
    assert list(theirs) == list(found) or theirs.keys() == found.keys()
    for config, splits in theirs.items():
        assert found[config] == splits


def test_the_default_configuration() -> None:
    def default(name: str) -> str | None:
        names, card = LAYOUTS[name]
        return resolve([RemoteFile(file, 1) for file in names], card).default

    assert default("card splits") == "en"
    assert default("default by name") == "default"
    assert default("card list") is None
    assert default("one file") == "default"
    assert default("info names it") == "default"


def test_rows_and_columns_come_from_the_card() -> None:
    card = {
        "dataset_info": {
            "features": [
                {"name": "text", "dtype": "string"},
                {"name": "label", "dtype": {"class_label": {"names": {"0": "a"}}}},
                {"name": "turns", "list": [{"name": "role", "dtype": "string"}]},
                {"name": "tags", "sequence": "string"},
            ],
            "splits": [{"name": "train", "num_bytes": 10, "num_examples": 7}],
            "dataset_size": 10,
        }
    }
    [config] = resolve([RemoteFile("train.parquet", 5)], card).configs
    assert [split.rows for split in config.splits] == [7]
    assert config.columns == (
        ("text", "string"), ("label", "class_label"), ("turns", "list"), ("tags", "list of string")
    )  # fmt: skip
    assert (config.bytes, config.dataset_bytes) == (5, 10)


@pytest.mark.parametrize(
    "card",
    [
        {"configs": "x"}, {"configs": [1, {}]}, {"dataset_info": 3}, {"dataset_info": [None]},
        {"configs": [{"config_name": "a", "data_files": 5}]},
        {"configs": [{"config_name": "a", "data_files": [{"split": 1}]}]},
        {"dataset_info": {"splits": 3, "features": {"a": 1}}},
    ],
)  # fmt: skip
def test_a_card_that_makes_no_sense_breaks_nothing(card: dict[str, Any]) -> None:
    resolve([RemoteFile("train.jsonl", 1)], card)


def test_names_that_look_like_patterns_are_names() -> None:
    assert ours(["a[1].jsonl", "b?.jsonl"], {}) == {
        "default": {"train": ["a[1].jsonl", "b?.jsonl"]}
    }
