"""Selected features as one HTML file: opens from a disk, prints, needs nothing else.

It has no scripts, and forbids them: its content security policy allows the one style sheet in it
(by hash) and nothing besides. All text of tokens and of the user is escaped; characters that would
turn the direction of writing are told by their number.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from mistudio.engine.features.columns import BY_NAME
from mistudio.engine.features.exports.material import (
    NO,
    TOP,
    Context,
    Feature,
    Material,
    Weighed,
)
from mistudio.engine.features.exports.neuronpedia_a import bars_of
from mistudio.engine.progress import SILENT, Progress

LEVELS = 20  # shades of heat
SHOWN = (
    "density",
    "context_density",
    "max_activation",
    "mean_activation",
    "median_activation",
    "token_purity",
    "burst_length",
    "nearest_cosine",
    "logit_kurtosis",
    "input_score",
)
CHART = (440, 120)
_TURNING = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C}

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 32px 24px 64px; background: #fff;
  color: #0f172a; font: 16px/1.5 system-ui, "Segoe UI", "Noto Sans", sans-serif; }
h1 { font-size: 28px; margin: 0 0 4px; } h2 { font-size: 21px; margin: 0; }
h3 { font-size: 16px; margin: 20px 0 6px; }
p { margin: 4px 0; } a { color: #1d4ed8; }
.quiet { color: #475569; font-size: 14px; }
section { border-top: 2px solid #cbd5e1; margin-top: 36px; padding-top: 20px; }
.number { color: #047857; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 15px; }
th, td { text-align: left; padding: 3px 14px 3px 0; vertical-align: top; font-weight: 400; }
th { color: #475569; font-size: 14px; } td.right, th.right { text-align: right; }
.contents { width: 100%; } .contents tr + tr td { border-top: 1px solid #e2e8f0; }
.side { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr));
  column-gap: 32px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 8px;
  margin: 14px 0 0; }
.tiles div { background: #f1f5f9; border-radius: 6px; padding: 8px 12px; }
.tiles dt { color: #475569; font-size: 14px; } .tiles dd { margin: 0; font-size: 18px; }
.example { display: grid; grid-template-columns: 84px 1fr; border-top: 1px solid #e2e8f0;
  padding: 5px 0; break-inside: avoid; }
.text, code { font: 15px/1.75 ui-monospace, "Cascadia Mono", Menlo, "DejaVu Sans Mono", monospace; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.text span { border-radius: 3px; padding: 1px 0; }
.text .peak { font-weight: 700; text-decoration: underline; text-underline-offset: 3px; }
.text .unknown { color: #334155; }
svg { display: block; max-width: 100%; height: auto; }
.bar { fill: #059669; } .below { fill: #b91c1c; } .axis { stroke: #64748b; }
.tick { fill: #475569; font-size: 14px; }
@media print { body { max-width: none; padding: 0; font-size: 11pt; }
  section { break-before: page; border-top: 0; } a { color: inherit; text-decoration: none; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""


def _style() -> str:
    """The heat is emerald at an opacity of 5 to 100 %, as in the window."""
    shades = []
    for level in range(1, LEVELS + 1):
        share = level / LEVELS
        mixed = (round(255 + share * (tone - 255)) for tone in (52, 211, 153))
        shades.append(f".h{level} {{ background: #{''.join(f'{c:02x}' for c in mixed)}; }}")
    return _STYLE + "\n".join(shades) + "\n"


STYLE = _style()
_HASH = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
POLICY = f"default-src 'none'; style-src 'sha256-{_HASH}'; base-uri 'none'; form-action 'none'"


def write_page(
    material: Material, path: Path, title: str = "", when: str = "", progress: Progress = SILENT
) -> None:
    """Write the page; `when` says when it was made, as people read it."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(_beginning(material, title or "Features", when))
        for done, feature in enumerate(material, 1):
            progress.check()
            file.writelines(_section(feature, material))
            progress.report(done, len(material), phase="write")
        file.writelines(_method(material))
        file.write("</body>\n</html>\n")


def _beginning(material: Material, title: str, when: str) -> Iterable[str]:
    meta, origin = material.store.meta, material.origin
    n = len(material)
    yield (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{_text(title)}</h1>\n"
    )
    facts = [
        f"{n:,} {'feature' if n == 1 else 'features'} of {meta.n_features:,} of {origin.sae}",
        f"{origin.hook_point} of {origin.model}",
        f"over {meta.tokens:,} tokens in {meta.contexts:,} contexts of {origin.dataset}",
    ]
    yield f"<p>{_text('; '.join(facts))}.</p>\n"
    made = f"Written by miStudio {origin.version}".strip() + (f", {when}" if when else "")
    yield f'<p class="quiet">{_text(made)}.</p>\n'
    yield '<h3>Contents</h3>\n<table class="contents"><thead><tr><th class="right">Feature</th>'
    yield '<th>Label or description</th><th class="right">Density</th></tr></thead><tbody>\n'
    for feature in material.each(NO):
        yield (
            f'<tr><td class="right"><a href="#f{feature.index}">#{feature.index}</a></td>'
            f"<td>{_text(_name(feature))}</td>"
            f'<td class="right">{_density(feature)}</td></tr>\n'
        )
    yield "</tbody></table>\n"


def _name(feature: Feature) -> str:
    return feature.said.label or feature.description or "—"


def _section(feature: Feature, material: Material) -> Iterable[str]:
    said = feature.said
    star = " ★" if said.starred else ""
    yield f'<section id="f{feature.index}">\n<h2><span class="number">#{feature.index}</span> '
    yield f"{_text(_name(feature))}{star}</h2>\n"
    if said.label and feature.description:
        yield f'<p class="quiet">By rule: {_text(feature.description)}</p>\n'
    if said.lists:
        yield f'<p class="quiet">In the lists: {_text(", ".join(said.lists))}</p>\n'
    if said.note:
        yield f"<p>{_text(said.note)}</p>\n"
    if not feature.alive:
        yield f"<p>It fired on none of the {material.store.meta.tokens:,} tokens.</p>\n"
    yield from _scores(feature)
    yield from _tiles(feature)
    yield '<div class="side">\n<div>'
    yield from _activations(feature)
    yield "</div>\n<div>"
    yield from _logit_lens(feature)
    yield "</div>\n</div>\n"
    yield from _examples(feature)
    yield "</section>\n"


def _scores(feature: Feature) -> Iterable[str]:
    rows = []
    if not math.isnan(accuracy := feature.number("score_accuracy")):
        rows.append(
            (
                "Rule",
                accuracy,
                feature.number("score_low"),
                feature.number("score_high"),
                feature.number("score_contexts"),
            )
        )
    for score in feature.said.scores:
        low = math.nan if score.low is None else score.low
        high = math.nan if score.high is None else score.high
        n = float(score.active + score.inactive)
        rows.append((score.scorer.capitalize(), score.accuracy, low, high, n))
    if not rows:
        return
    yield (
        "<h3>How well one can tell where it is active</h3>\n<table><thead><tr><th>Scorer</th>"
        '<th class="right">Balanced accuracy</th><th class="right">95 % interval</th>'
        '<th class="right">Contexts</th></tr></thead><tbody>\n'
    )
    for name, accuracy, low, high, n in rows:
        yield (
            f'<tr><td>{_text(name)}</td><td class="right">{_number(accuracy, 2)}</td>'
            f'<td class="right">{_number(low, 2)} to {_number(high, 2)}</td>'
            f'<td class="right">{n:,.0f}</td></tr>\n'
        )
    yield "</tbody></table>\n"
    yield '<p class="quiet">0.5 is what guessing gets.</p>\n'


def _tiles(feature: Feature) -> Iterable[str]:
    yield '<dl class="tiles">\n'
    for name in SHOWN:
        if name not in feature.statistics:
            continue
        column = BY_NAME[name]
        value = _density(feature) if name == "density" else _number(feature.number(name))
        if name == "context_density" and not math.isnan(feature.number(name)):
            value = f"{100 * feature.number(name):.3g} %"
        yield (
            f'<div title="{escape(column.definition)}"><dt>{escape(column.label)}</dt>'
            f"<dd>{value}</dd></div>\n"
        )
    yield "</dl>\n"


def _activations(feature: Feature) -> Iterable[str]:
    n = int(feature.number("n_active") or 0)
    yield f"<h3>Activations of {n:,} active tokens</h3>\n"
    centres, counts = bars_of(feature)
    if not counts:
        yield "<p>—</p>\n"
        return
    half = (centres[1] - centres[0]) / 2
    yield _chart(
        counts, float(centres[0] - half), float(centres[-1] + half), "Histogram of activations"
    )
    if feature.tokens:
        yield '<table><thead><tr><th>Fires on</th><th class="right">times</th>'
        yield '<th class="right">of its occurrences</th></tr></thead><tbody>\n'
        for token in feature.tokens[:8]:
            share = 100 * token.count / max(token.occurrences, 1)
            about = "at least " if token.error else ""
            yield (
                f'<tr><td><code>{_token(token.text)}</code></td><td class="right">{about}'
                f'{token.count:,}</td><td class="right">{share:.3g} % of {token.occurrences:,}'
                "</td></tr>\n"
            )
        yield "</tbody></table>\n"


def _logit_lens(feature: Feature) -> Iterable[str]:
    yield "<h3>Logit lens</h3>\n"
    if feature.logits is None or not feature.promoted:
        yield "<p>It does not apply to what this SAE reconstructs.</p>\n"
        return
    low, high, counts = feature.logits.low, feature.logits.high, feature.logits.counts
    yield _chart(
        counts.tolist(), low, high, f"Histogram of the logits of {counts.sum():,} tokens", True
    )
    yield '<table><thead><tr><th>Promotes</th><th class="right">logit</th><th>Suppresses</th>'
    yield '<th class="right">logit</th></tr></thead><tbody>\n'
    pairs = zip(feature.promoted[:10], feature.suppressed[:10], strict=True)
    for more, less in pairs:
        yield f"<tr>{_logit(more)}{_logit(less)}</tr>\n"
    yield "</tbody></table>\n"


def _logit(weighed: Weighed) -> str:
    sign = "+" if weighed.logit > 0 else "−"
    return (
        f'<td><code>{_token(weighed.text)}</code></td><td class="right">{sign}'
        f"{abs(weighed.logit):.2f}</td>"
    )


# --- examples -------------------------------------------------------------------------------------


def _examples(feature: Feature) -> Iterable[str]:
    maximum = feature.number("max_activation")
    top = [context for context in feature.contexts if context.group == TOP]
    if not top:
        return
    n = f"{len(top)} strongest examples" if len(top) > 1 else "The strongest example"
    yield f"<h3>{n[0].upper()}{n[1:]}</h3>\n"
    for context in top:
        yield _example(context, maximum)
    spread: dict[int, list[Context]] = {}
    for context in feature.contexts:
        if context.group != TOP:
            spread.setdefault(context.decile, []).append(context)
    if spread:
        yield "<h3>Examples of every tenth of its activations, strongest first</h3>\n"
        if not all(context.known for part in spread.values() for context in part):
            yield (
                '<p class="quiet">Of these only the activation of the marked token is kept, that '
                "of its neighbours is not.</p>\n"
            )
    for decile, contexts in sorted(spread.items(), reverse=True):
        low, high = feature.decile_edges[decile : decile + 2]
        yield f'<p class="quiet">{_number(low)} to {_number(high)}</p>\n'
        for context in contexts:
            yield _example(context, maximum)


def _example(context: Context, maximum: float) -> str:
    parts = []
    for place, (text, value) in enumerate(zip(context.texts, context.values, strict=True)):
        kinds = []
        if (level := _level(float(value), maximum)) > 0:
            kinds.append(f"h{level}")
        if place == context.peak:
            kinds.append("peak")
        shown = _token(text)
        if not kinds:
            parts.append(shown)
            continue
        told = f' title="{_number(float(value))}"' if value > 0 else ""
        parts.append(f'<span class="{" ".join(kinds)}"{told}>{shown}</span>')
    unknown = "" if context.known else " unknown"
    return (
        f'<div class="example"><span class="number">{_number(context.activation)}</span>'
        f'<span class="text{unknown}" dir="auto">{"".join(parts)}</span></div>\n'
    )


def _level(activation: float, maximum: float) -> int:
    """0 where inactive, else 1 to `LEVELS`: 0.05 + 0.95 log10(1 + 9 a / max), 1 at most."""
    if not activation > 0 or not maximum > 0:
        return 0
    heat = min(0.05 + 0.95 * math.log10(1 + 9 * activation / maximum), 1.0)
    return max(1, round(heat * LEVELS))


def _token(text: str) -> str:
    """A token's text with its line breaks to be seen."""
    return _text(text.replace("\r", "␍").replace("\n", "↵\n").replace("\t", "⇥\t"))


def _text(text: str) -> str:
    return escape("".join(_shown(c) for c in text))


def _shown(character: str) -> str:
    code = ord(character)
    if code in _TURNING or 0xD800 <= code <= 0xDFFF or code == 0xFEFF:
        return f"<U+{code:04X}>"
    if code < 0x20 and character not in "\n\t":
        return chr(0x2400 + code)
    return f"<U+{code:04X}>" if 0x7F <= code < 0xA0 else character


# --- numbers and charts ---------------------------------------------------------------------------


def _density(feature: Feature) -> str:
    density = feature.number("density")
    return "—" if math.isnan(density) else f"{100 * density:.3g} %"


def _number(value: float, decimals: int | None = None) -> str:
    if math.isnan(value):
        return "—"
    text = f"{value:.3g}" if decimals is None else f"{value:.{decimals}f}"
    return text.replace("-", "−")


def _chart(counts: Sequence[int], low: float, high: float, name: str, signed: bool = False) -> str:
    """Bars of equal width from `low` to `high`; `signed`: those below 0 in another colour."""
    width, height = CHART
    most = max(max(counts), 1)
    step = width / len(counts)
    bars = []
    for place, count in enumerate(counts):
        if count:
            tall = max(1.0, (height - 4) * count / most)
            centre = low + (place + 0.5) * (high - low) / len(counts)
            kind = "below" if signed and centre < 0 else "bar"
            bars.append(
                f'<rect class="{kind}" x="{place * step:.1f}" y="{height - tall:.1f}" '
                f'width="{max(step - 1, 0.5):.1f}" height="{tall:.1f}"/>'
            )
    told = f"{name}, from {_number(low)} to {_number(high)}; the highest bar is {most:,}"
    return (
        f'<svg viewBox="0 0 {width} {height + 22}" width="{width}" height="{height + 22}" '
        f'role="img" aria-label="{escape(told)}"><title>{escape(told)}</title>{"".join(bars)}'
        f'<line class="axis" x1="0" y1="{height}" x2="{width}" y2="{height}"/>'
        f'<text class="tick" x="0" y="{height + 17}">{_number(low)}</text>'
        f'<text class="tick" x="{width}" y="{height + 17}" text-anchor="end">{_number(high)}'
        "</text></svg>\n"
    )


# --- how it was made ------------------------------------------------------------------------------


def _method(material: Material) -> Iterable[str]:
    meta = material.store.meta
    excluded = meta.exclusions
    norm = excluded.get("norm_above_medians")
    tokens = ["the first token of a context", "special tokens"]
    if norm:
        tokens.append(f"tokens whose norm is over {norm:g} times the layer's median")
    once = "at most one of each context" if meta.one_per_context else "any number of a context"
    yield '<section id="method">\n<h2>How these numbers were made</h2>\n'
    notes = [
        f"Every statistic is over the {meta.tokens:,} tokens that count, of {meta.contexts:,} "
        f"contexts of {meta.context} tokens. {', '.join(tokens)} never count.".replace(
            ". the", ". The"
        ),
        f"The strongest examples are exact: of all tokens the {meta.top_k} on which the feature is "
        f"most active, {once}. The darker a token, the more active the feature (by the logarithm "
        "of the share of its maximum); the underlined token is the one the example is of, and its "
        "activation stands in front.",
        "Examples of the tenths are drawn at random from the active tokens of that tenth.",
        "The histogram of activations is counted in 4 bins an octave and, with the deciles, drawn "
        "in 50 of equal width.",
        "The logit lens multiplies the feature's direction with the final norm's gain and the "
        "unembedding, less the mean over the vocabulary: what it says directly about the next "
        "token, later layers apart.",
    ]
    if "score_accuracy" in material.store.columns:
        notes.append(
            "Balanced accuracy of the rule is measured on contexts of documents that the rule was "
            "not made from, half of them with, half without activations; what the rules of other "
            "features get on the same contexts is taken off."
        )
    yield from (f"<p>{_text(note)}</p>\n" for note in notes)
    yield "<h3>Definitions</h3>\n<table><tbody>\n"
    for name in SHOWN:
        if name in material.store.columns:
            column = BY_NAME[name]
            unit = f" ({column.unit})" if column.unit else ""
            yield (
                f"<tr><td>{escape(column.label + unit)}</td><td>{escape(column.definition)}</td>"
                "</tr>\n"
            )
    yield "</tbody></table>\n<h3>Provenance</h3>\n<table><tbody>\n"
    for key, value in _provenance(material).items():
        yield f"<tr><td>{_text(key)}</td><td><code>{_text(str(value))}</code></td></tr>\n"
    yield "</tbody></table>\n</section>\n"


def _provenance(material: Material) -> dict[str, Any]:
    meta, origin = material.store.meta, material.origin
    told = {"model": origin.model, "SAE": origin.sae, "dataset": origin.dataset}
    return {
        **told,
        "split": meta.split,
        "seed": meta.seed,
        "median norm": float(f"{np.float64(meta.median_norm):.6g}"),
        **{name: value for name, value in meta.provenance.items() if name not in told},
    }
