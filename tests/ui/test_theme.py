"""The look: contrast, fonts, icons, and a style sheet without holes."""

from __future__ import annotations

import re
from typing import Any

import pytest
from PySide6.QtCore import QSize
from PySide6.QtGui import QFont, QFontInfo, QFontMetrics
from PySide6.QtWidgets import QApplication

from mistudio.resources import resource
from mistudio.ui.theme import fonts, icons, tokens
from mistudio.ui.theme.style import style_sheet
from mistudio.ui.widgets import token_strip


@pytest.mark.parametrize(("what", "text", "background"), tokens.TEXT_PAIRS)
def test_text_meets_wcag_aa(what: str, text: str, background: str) -> None:
    assert tokens.contrast(text, background) >= 4.5, what


@pytest.mark.parametrize(("what", "edge", "background"), tokens.EDGE_PAIRS)
def test_edges_that_must_be_seen_have_three_to_one(what: str, edge: str, background: str) -> None:
    assert tokens.contrast(edge, background) >= 3.0, what


def test_contrast_agrees_with_known_values() -> None:
    assert tokens.contrast("#000000", "#FFFFFF") == pytest.approx(21.0)
    assert tokens.contrast("#767676", "#FFFFFF") == pytest.approx(4.54, abs=0.01)
    assert tokens.contrast("#FFFFFF", "#059669") == pytest.approx(3.77, abs=0.01)


@pytest.mark.parametrize("colour_map", token_strip.COLOUR_MAPS)
@pytest.mark.parametrize("surface", [tokens.CARD, tokens.DIALOG, tokens.TILE, tokens.LIST_ROW])
def test_token_text_is_readable_at_every_heat(colour_map: str, surface: str) -> None:
    for step in range(1, 201):
        behind = token_strip.heat_colour(step / 200, surface, colour_map)
        assert tokens.contrast(token_strip.ink_on(behind), behind) >= 4.5
    assert tokens.contrast(tokens.TEXT, surface) >= 4.5


def test_safe_map_gets_lighter_all_the_way() -> None:
    steps = [
        tokens.luminance(token_strip.heat_colour(i / 50, tokens.CARD, "safe")) for i in range(1, 51)
    ]
    assert steps == sorted(steps)


def test_every_colour_of_the_style_sheet_comes_from_the_tokens(themed: QApplication) -> None:
    sheet = style_sheet()
    assert "$" not in sheet
    known = {value.upper() for value in vars(tokens).values() if isinstance(value, str)}
    known |= {colour.upper() for tone in tokens.TONES.values() for colour in tone}
    assert {colour.upper() for colour in re.findall(r"#[0-9A-Fa-f]{6}", sheet)} <= known


def test_style_sheet_names_only_files_that_ship(themed: QApplication) -> None:
    for path in re.findall(r'url\("([^"]+)"\)', style_sheet()):
        assert resource("icons", "controls", path.rsplit("/", 1)[-1]).exists()


def test_fonts_are_the_shipped_ones_and_have_weights(themed: QApplication) -> None:
    assert QFontInfo(fonts.sans()).family() == "Inter"
    assert QFontInfo(fonts.mono()).family() == "JetBrains Mono"
    widths = {
        QFontMetrics(fonts.sans(32, weight)).horizontalAdvance("Hamburgefonstiv")
        for weight in (QFont.Weight.Normal, QFont.Weight.Medium, QFont.Weight.DemiBold)
    }
    assert len(widths) == 3
    for licence in ("Inter-OFL.txt", "JetBrainsMono-OFL.txt"):
        assert "SIL OPEN FONT LICENSE" in resource("fonts", licence).read_text("utf-8")


def test_missing_fonts_fall_back_to_the_system(
    themed: QApplication, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def missing(*parts: str) -> None:
        raise FileNotFoundError(2, "missing", parts[-1])

    monkeypatch.setattr(fonts, "resource", missing)
    fonts.load()
    assert "a system font is used" in caplog.text
    assert QFontInfo(fonts.sans()).pixelSize() == 16


def test_text_size_scales_every_size(themed: QApplication) -> None:
    try:
        fonts.load(1.5)
        assert fonts.px(14) == 21
        assert "font-size: 21px" in style_sheet()
    finally:
        fonts.load(1.0)


@pytest.mark.parametrize("ratio", [1.0, 1.5, 2.0])
def test_icons_take_their_colour_and_are_sharp(themed: QApplication, ratio: float) -> None:
    picture = icons.pixmap("circle-stop", "#FF0000", 20, ratio)
    assert picture.size() == QSize(round(20 * ratio), round(20 * ratio))
    image = picture.toImage()
    colours = {
        image.pixelColor(x, y).name()
        for x in range(image.width())
        for y in range(image.height())
        if image.pixelColor(x, y).alpha() == 255
    }
    assert colours == {"#ff0000"}


def test_every_icon_that_the_code_names_ships() -> None:
    import ast
    from pathlib import Path

    import mistudio.ui

    shipped = {path.stem for path in resource("icons", "lucide").glob("*.svg")}
    calls = {"picture", "icon", "pixmap", "Button", "IconButton", "EmptyState", "Card", "set_icon"}
    for file in Path(mistudio.ui.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name not in calls:
                continue
            place = {"Button": 2, "Card": 1}.get(name, 0)
            if len(node.args) > place and isinstance(node.args[place], ast.Constant):
                icon = node.args[place].value
                assert icon is None or icon in shipped, f"{file.name}: {icon}"
