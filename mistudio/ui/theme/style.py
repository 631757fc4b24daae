"""The one style sheet: shapes (radius, padding, borders, focus) over the palette's colours.

Widgets say what they are by dynamic properties, never by a style sheet of their own:
`variant` of a button, `role` of a text, `tone` (see tokens.TONES), `surface` of a frame.
"""

from __future__ import annotations

from importlib import resources
from string import Template

from mistudio.resources import resource
from mistudio.ui.theme import fonts, tokens


def style_sheet() -> str:
    """The template `style.qss` with the tokens filled in."""
    template = resources.files("mistudio.ui.theme").joinpath("style.qss").read_text("utf-8")
    colours = {name: value for name, value in vars(tokens).items() if isinstance(value, str)}
    sizes = {
        "small": f"{fonts.px(tokens.TEXT_SMALL)}px",
        "body": f"{fonts.px(tokens.TEXT_BODY)}px",
        "card": f"{fonts.px(tokens.TEXT_CARD)}px",
        "stat": f"{fonts.px(tokens.TEXT_STAT)}px",
        "heading": f"{fonts.px(tokens.TEXT_HEADING)}px",
        "radius": f"{tokens.RADIUS}px",
        "mono": f'"{fonts.MONO}", "DejaVu Sans Mono", monospace',
        "controls": resource("icons", "controls").as_posix(),
    }
    sheet = Template(template).substitute({**colours, **sizes})
    return sheet + "".join(_tone_rules(*item) for item in tokens.TONES.items())


def _tone_rules(tone: str, colours: tuple[str, str, str]) -> str:
    text, fill, edge = colours
    return (
        f'QLabel[tone="{tone}"] {{ color: {text}; }}\n'
        f'QLabel[role="badge"][tone="{tone}"] {{ background: {fill}; border-color: {edge}; }}\n'
        f'QFrame[surface="note"][tone="{tone}"] {{ background: {fill}; border-color: {edge}; }}\n'
        f'QProgressBar[tone="{tone}"]::chunk {{ background: {text}; }}\n'
    )
