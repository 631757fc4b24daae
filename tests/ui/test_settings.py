"""Settings: one table, one file, and no way to lose either."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mistudio.errors import InvalidInput
from mistudio.settings import SETTINGS, Settings


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.key)
def test_every_default_is_a_value_that_can_be_used(setting) -> None:  # type: ignore[no-untyped-def]
    assert setting.problem(setting.default) == ""
    assert setting.label and setting.help and setting.group


def test_a_value_comes_back_at_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / "config" / "settings.json"
    first = Settings(path)
    heard: list[str] = []
    first.observe(heard.append)
    first.set("text_size", 125)
    first.set("text_size", 125)
    assert heard == ["text_size"]
    assert Settings(path).get("text_size") == 125
    assert [entry.name for entry in path.parent.iterdir()] == ["settings.json"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("text_size", 99), ("text_size", 1000), ("text_size", "big"), ("text_size", True),
     ("token_colours", "pink"), ("notify", 1)],
)  # fmt: skip
def test_a_value_that_cannot_be_used_is_refused(tmp_path: Path, key: str, value: object) -> None:
    settings = Settings(tmp_path / "settings.json")
    with pytest.raises(InvalidInput) as refused:
        settings.set(key, value)
    assert refused.value.field == key
    assert not (tmp_path / "settings.json").exists()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"version": 99, "values": {}}', '{"version": 1, "values": []}', "\0\0"],
)
def test_a_broken_file_is_kept_and_defaults_hold(tmp_path: Path, content: str) -> None:
    path = tmp_path / "settings.json"
    path.write_text(content)
    settings = Settings(path)
    assert settings.get("text_size") == 100
    assert settings.problem
    assert (tmp_path / "settings.json.bak").read_text() == content


def test_unknown_and_unusable_values_are_left_out_and_the_rest_holds(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    values = {"text_size": 120, "theme": "pink", "notify": "yes"}
    path.write_text(json.dumps({"version": 1, "values": values}))
    settings = Settings(path)
    assert settings.get("text_size") == 120
    assert settings.get("notify") is True
    assert "theme" in settings.problem and "notify" in settings.problem
    assert (tmp_path / "settings.json.bak").exists()
