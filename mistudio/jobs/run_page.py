"""The record of a run as a page to print: HTML that needs nothing else, with the curves drawn in.

No scripts, no links, no pictures from elsewhere; every text of the record is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from mistudio import formatting

# name -> label, what it is, unit, and the measure that holds its sample size ("" where none).
_MEASURES: tuple[tuple[str, str, str, str, str], ...] = (
    ("explained_variance", "Explained variance", "1 - FVU", "share", "tokens"),
    ("fvu", "FVU", "Fraction of variance unexplained: E|y - y^|^2 / (E|y|^2 - |E y|^2), of targets "
     "y and reconstructions y^", "share", "tokens"),
    ("l0", "L0", "Mean number of active latents per token", "latents", "tokens"),
    ("dead_share", "Dead", "Share of latents that fired on none of the tokens", "share", "tokens"),
    ("dense_share", "Dense", "Share of latents that fired on more than a tenth of the tokens",
     "share", "tokens"),
    ("cosine", "Cosine", "Mean cosine between target and reconstruction", "", "tokens"),
    ("l1", "L1", "Mean sum of the latents' activations, in the dictionary's unit", "", "tokens"),
    ("mse", "MSE", "E|y - y^|^2, summed over channels", "", "tokens"),
    ("l2_ratio", "L2 ratio", "Mean |y^| / |y|", "", "tokens"),
    ("reconstruction_bias", "Bias", "E|y^|^2 / E[y . y^]: 1 is unbiased, below 1 shrunk", "",
     "tokens"),
    ("fvu_p50", "FVU, median", "Median over tokens of |y - y^|^2 / V", "share", "tokens"),
    ("fvu_p90", "FVU, 90 %", "90th percentile over tokens of |y - y^|^2 / V", "share", "tokens"),
    ("fvu_p99", "FVU, 99 %", "99th percentile over tokens of |y - y^|^2 / V", "share", "tokens"),
    ("fvu_of_skip", "FVU beside the skip", "FVU of what the skip leaves to the latents", "share",
     "tokens"),
    ("explained_variance_legacy", "Explained variance (SAELens, older)", "Mean over tokens of 1 - "
     "|y - y^|^2 / |y - mean of its batch|^2; only to compare with published numbers", "share",
     "tokens"),
    ("explained_variance_about_zero", "Explained variance (SAEBench)", "Relative nearly to zero, "
     "not to the mean; only to compare with published numbers", "share", "tokens"),
    ("ce_clean", "CE clean", "Next-token cross-entropy of the untouched model", "nats",
     "loss_tokens"),
    ("ce_sae", "CE with the SAE", "The same with the reconstruction in the site's place", "nats",
     "loss_tokens"),
    ("ce_zero", "CE zero", "The same with zero in the site's place", "nats", "loss_tokens"),
    ("ce_mean", "CE mean", "The same with the site's mean in its place", "nats", "loss_tokens"),
    ("ce_increase", "CE increase", "CE with the SAE - CE clean", "nats", "loss_tokens"),
    ("ce_increase_error", "Standard error of that", "Windows taken as independent", "nats",
     "loss_tokens"),
    ("ce_loss_score", "CE recovered", "(CE zero - CE with the SAE) / (CE zero - CE clean)", "share",
     "loss_tokens"),
    ("ce_loss_score_mean", "CE recovered (mean)", "The same with CE mean for CE zero", "share",
     "loss_tokens"),
    ("kl", "KL", "E KL(p clean || p with the SAE) over the vocabulary", "nats", "loss_tokens"),
    ("kl_zero", "KL zero", "The same for zero in the site's place", "nats", "loss_tokens"),
    ("kl_score", "KL recovered", "(KL zero - KL) / KL zero", "share", "loss_tokens"),
    ("train_fvu", "FVU, last batch", "On the last batch that was learnt from", "share",
     "batch_size"),
    ("median_norm", "Median norm", "Median |x| of what is read; positions above ten times of it "
     "are left out", "", ""),
    ("revived", "Re-initialised", "Silent latents that were started anew, all in all", "latents",
     ""),
    ("learning_rate", "Learning rate", "Peak of the schedule", "", ""),
)  # fmt: skip

DEFINITIONS: dict[str, dict[str, str]] = {
    name: {"label": label, "definition": text, "unit": unit, "sample": sample}
    for name, label, text, unit, sample in _MEASURES
}
_MAIN = ("explained_variance", "fvu", "l0", "dead_share", "ce_loss_score", "ce_increase", "kl")
_CURVES = (
    ("loss", "Loss", "of each logged batch", ()),
    ("fvu", "FVU", "of each logged batch", ()),
    ("l0", "L0", "active latents per token, of each logged batch", ()),
    ("heldout_fvu", "FVU on held-out text", "judged on the way", ()),
)
_COLUMNS = 4  # sites side by side in the table of all measures
POINTS = 400  # of a curve on paper
_INKS = ("#047857", "#1d4ed8", "#b91c1c", "#7e22ce", "#a16207", "#475569")
_DASHES = ("", "6 3", "2 3", "8 3 2 3")
_DASH = "—"
_TEXT = 99  # columns of a table without numbers

_STYLE = """
@page { size: A4; margin: 16mm 14mm; }
* { box-sizing: border-box; }
body { font: 14px/1.45 -apple-system, "Segoe UI", "Inter", "Helvetica Neue", Arial, sans-serif;
  color: #0f172a; background: #ffffff; max-width: 900px; margin: 24px auto; padding: 0 16px; }
h1 { font-size: 24px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 28px 0 8px; border-bottom: 1px solid #cbd5e1; padding-bottom: 4px;
  break-after: avoid; }
h3 { font-size: 15px; margin: 16px 0 6px; break-after: avoid; }
p { margin: 4px 0; }
.about { color: #334155; }
table { border-collapse: collapse; width: 100%; margin: 8px 0; }
th, td { text-align: left; padding: 4px 8px; border-bottom: 1px solid #e2e8f0;
  vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 600; color: #1e293b; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
td.n { white-space: nowrap; }
td.s, th.s { min-width: 10em; }
tr { break-inside: avoid; }
code { font: 13px/1.4 ui-monospace, "SF Mono", "Cascadia Mono", Consolas, monospace;
  overflow-wrap: anywhere; }
figure { margin: 12px 0; break-inside: avoid; }
figcaption { color: #334155; }
svg { width: 100%; height: auto; display: block; }
svg text { font: 13px -apple-system, "Segoe UI", "Inter", Arial, sans-serif; fill: #1e293b; }
ul { margin: 4px 0; padding-left: 20px; }
dl { margin: 8px 0; } dt { font-weight: 600; } dd { margin: 0 0 6px 0; color: #334155; }
@media print { body { margin: 0; padding: 0; max-width: none; font-size: 11pt; } }
"""


def page(record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """A whole HTML document. `rows` are the run's metric history (a site and a step each); what a
    record of an older version lacks is an em dash."""
    name = str(record.get("name") or "Run")
    parts = [
        _head(record, name),
        _results(record),
        _history(record, rows),
        _configuration(record),
        _origins(record),
        _happened(record),
        _all_measures(record),
        _definitions(record),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(name)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, parts))
        + "\n</body>\n</html>\n"
    )


# --- parts of the page ----------------------------------------------------------------------------


def _head(record: Mapping[str, Any], name: str) -> str:
    model, dataset = _dict(record, "model"), _dict(record, "dataset")
    versions = _dict(record, "versions")
    about = " • ".join(
        filter(
            None,
            (
                f"{_text(model.get('name'))} + {_text(dataset.get('name'))}",
                _text(record.get("status")),
                _text(record.get("written_at"), ""),
                f"miStudio {_text(versions.get('mistudio'))}",
            ),
        )
    )
    facts = (
        ("Tokens learnt from", _count(record.get("tokens"))),
        ("Layers", _count(len(_dict(record, "sites")) or None)),
        ("Seed", _count(record.get("seed"))),
        ("Time in all", _seconds(record.get("wall_seconds"))),
        ("Of that learning", _seconds(record.get("training_seconds"))),
        ("Speed", _unit(_number(record.get("tokens_per_second"), 0), "tokens/s")),
        ("Device", _text(record.get("device"))),
    )
    return (
        f'<h1>{escape(name)}</h1>\n<p class="about">Record of a training run. {escape(about)}</p>\n'
        + _table((), [[escape(label), escape(value)] for label, value in facts])
    )


def _results(record: Mapping[str, Any]) -> str:
    sites = _dict(record, "sites")
    if not sites:
        return ""
    heads = ["Site", "Latents", "Target L0"] + [DEFINITIONS[name]["label"] for name in _MAIN]
    body = [
        [
            f"<code>{escape(str(site))}</code>",
            _count(_get(row, "d_sae")),
            _measure("k", _get(row, "k")),
            *(_measure(name, _get(row, name)) for name in _MAIN),
        ]
        for site, row in sites.items()
    ]
    first = next(iter(sites.values()))
    sizes = (
        f"On {_count(_get(first, 'tokens'))} held-out tokens; cross-entropy (CE, KL: nats) over "
        f"{_count(_get(first, 'loss_tokens'))} held-out predictions. Definitions stand at the end."
    )
    return f'<h2>Results</h2>\n{_table(heads, body, 1)}\n<p class="about">{escape(sizes)}</p>'


def _history(record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    found = [
        figure
        for key, title, about, _ in _CURVES
        if (figure := _figure(rows, list(_dict(record, "sites")), key, title, about))
    ]
    return "<h2>The training</h2>\n" + "\n".join(found) if found else ""


def _configuration(record: Mapping[str, Any]) -> str:
    given = _dict(_dict(record, "configuration"), "given") or _dict(_dict(record, "job"), "config")
    derived = _dict(_dict(record, "configuration"), "derived")
    first: Any = next(iter(derived.values()), {})
    lines = [[f"<code>{escape(str(name))}</code>", _code(value)] for name, value in given.items()]
    text = "<h2>Configuration</h2>\n<h3>As it was given</h3>\n"
    text += _table((), lines) if lines else "<p>Nothing: all defaults.</p>"
    settled = _dict(first, "config") if isinstance(first, Mapping) else {}
    rest = {name: value for name, value in settled.items() if name not in given}
    if rest:
        text += "\n<h3>By default</h3>\n<p>" + ", ".join(
            f"<code>{escape(str(name))} = {_json(value)}</code>" for name, value in rest.items()
        )
        text += "</p>"
    if derived:
        names = [name for name in first if name != "config" and not isinstance(first[name], dict)]
        body = [
            [f"<code>{escape(str(site))}</code>"]
            + [_code(_get(plan, name), bare=True) for name in names]
            for site, plan in derived.items()
        ]
        text += "\n<h3>What it became, for each site</h3>\n" + _columns(["Site", *names], body)
    return text


def _columns(heads: list[str], body: list[list[str]]) -> str:
    """A wide table stood on its side, `_COLUMNS` sites at a time: paper is narrow."""
    text = []
    for start in range(0, len(body), _COLUMNS):
        part = body[start : start + _COLUMNS]
        lines = [
            [escape(head), *(row[place] for row in part)]
            for place, head in enumerate(heads)
            if place
        ]
        text.append(_table([heads[0], *(row[0] for row in part)], lines, 1, escaped=True))
    return "\n".join(text)


def _origins(record: Mapping[str, Any]) -> str:
    model, dataset = _dict(record, "model"), _dict(record, "dataset")
    tokens = _dict(record, "tokenization")
    lines = [
        ("Model", model.get("name")),
        ("Model's origin", model.get("origin")),
        ("Model's revision", model.get("revision")),
        ("Precision", model.get("precision")),
        ("Quantised by", model.get("quantised_by")),
        ("Dataset", dataset.get("name")),
        ("Dataset's origin", dataset.get("origin")),
        ("Dataset's revision", dataset.get("revision")),
        ("Dataset's SHA-256", dataset.get("sha256")),
        ("Tokenizer's SHA-256", record.get("tokenizer_hash")),
        ("Tokens to learn from", _count(tokens.get("train_tokens"))),
        ("Tokens held out", _count(tokens.get("heldout_tokens"))),
        ("Activations", record.get("source")),
        ("Processes", record.get("processes")),
    ]
    body = [[escape(label), f"<code>{escape(_text(value))}</code>"] for label, value in lines]
    for file in model.get("files") or ():
        if isinstance(file, Mapping):
            body.append(
                [
                    f"SHA-256 of <code>{escape(_text(file.get('name')))}</code>",
                    f"<code>{escape(_text(file.get('sha256')))}</code>",
                ]
            )
    text = "<h2>Where it comes from</h2>\n" + _table((), body)
    points = [point for point in record.get("hook_points") or () if isinstance(point, Mapping)]
    if points:
        body = [
            [
                f"<code>{escape(_text(point.get(key)))}</code>"
                for key in ("reads", "writes", "module")
            ]
            for point in points
        ]
        text += "\n" + _table(["Reads", "Reconstructs", "Module"], body)
    versions = ", ".join(f"{key} {value}" for key, value in _dict(record, "versions").items())
    return text + f"\n<p>Versions: {escape(versions or _DASH)}</p>"


def _happened(record: Mapping[str, Any]) -> str:
    lines = [_event(event) for event in record.get("events") or () if isinstance(event, Mapping)]
    lines += [str(note) for note in record.get("notes") or ()]
    if not lines:
        return "<h2>On the way</h2>\n<p>It was neither interrupted nor taken back.</p>"
    return "<h2>On the way</h2>\n<ul>" + "".join(f"<li>{escape(x)}</li>" for x in lines) + "</ul>"


def _event(event: Mapping[str, Any]) -> str:
    step, before = _count(event.get("step")), _count(event.get("from_step"))
    at = _text(event.get("at"))
    if event.get("event") == "rolled back":
        return f"{at}: taken back from step {before} to step {step}."
    if event.get("event") == "went on":
        return f"{at}: went on from step {step} (it had reached {before})."
    return f"{at}: {_text(event.get('event'))} at step {step}."


def _all_measures(record: Mapping[str, Any]) -> str:
    sites = list(_dict(record, "sites").items())
    if not sites:
        return ""
    names = [name for name in DEFINITIONS if any(_get(row, name) is not None for _, row in sites)]
    body = [
        [f"<code>{escape(str(site))}</code>", *(_measure(name, _get(row, name)) for name in names)]
        for site, row in sites
    ]
    heads = ["Measure", *(DEFINITIONS[name]["label"] for name in names)]
    return "<h2>All measures</h2>\n" + _columns(heads, body)


def _definitions(record: Mapping[str, Any]) -> str:
    first: Any = next(iter(_dict(record, "sites").values()), {})
    lines = []
    for name, entry in DEFINITIONS.items():
        sample = _get(first, entry["sample"]) if entry["sample"] else None
        tail = f" On {_count(sample)} tokens." if sample else ""
        unit = f" [{entry['unit']}]" if entry["unit"] else ""
        lines.append(
            f"<dt>{escape(entry['label'])}{escape(unit)} <code>{name}</code></dt>"
            f"<dd>{escape(entry['definition'])}.{escape(tail)}</dd>"
        )
    return "<h2>Definitions</h2>\n<dl>" + "\n".join(lines) + "</dl>"


# --- curves ---------------------------------------------------------------------------------------


def _figure(
    rows: Sequence[Mapping[str, Any]], sites: Sequence[str], key: str, title: str, about: str
) -> str:
    lines = {site: points for site in _sites(rows, sites) if (points := series(rows, site, key))}
    if not lines:
        return ""
    total = sum(len(points) for points in lines.values())
    return (
        f"<figure>{curve({site: thinned(points) for site, points in lines.items()}, title)}"
        f"<figcaption>{escape(title)}: {escape(about)}; {total:,} measurements"
        f"{' (fewer are drawn; peaks are kept)' if _thinned(lines) else ''}.</figcaption></figure>"
    )


def _thinned(lines: Mapping[str, Sequence[object]]) -> bool:
    return any(len(points) > POINTS for points in lines.values())


def _sites(rows: Sequence[Mapping[str, Any]], sites: Sequence[str]) -> list[str]:
    return list(dict.fromkeys([*sites, *(str(row.get("site")) for row in rows)]))


def series(rows: Iterable[Mapping[str, Any]], site: str, key: str) -> list[tuple[float, float]]:
    """(step, value) of a site, without what is missing or not a number."""
    found = []
    for row in rows:
        step, value = row.get("step"), row.get(key)
        if row.get("site") == site and _is_number(step) and _is_number(value):
            found.append((float(step), float(value)))  # type: ignore[arg-type]
    return found


def thinned(points: Sequence[tuple[float, float]], most: int = POINTS) -> list[tuple[float, float]]:
    """At most `most` points in their order: the lowest and highest of each stretch, so that peaks
    stay, and both ends."""
    if len(points) <= most:
        return list(points)
    stretches = max(1, (most - 2) // 2)
    kept = {0, len(points) - 1}
    for number in range(stretches):
        span = range(number * len(points) // stretches, (number + 1) * len(points) // stretches)
        kept.add(min(span, key=lambda place: points[place][1]))
        kept.add(max(span, key=lambda place: points[place][1]))
    return [points[place] for place in sorted(kept)]


def curve(lines: Mapping[str, Sequence[tuple[float, float]]], title: str) -> str:
    """An SVG of curves over steps; the value axis is logarithmic where values differ by more than
    a factor of 20."""
    wide, high, left, right, top, bottom = 760, 250, 66, 12, 12, 40
    legend = 20 * -(-len(lines) // 3)
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    low, peak = min(ys), max(ys)
    logarithmic = low > 0 and peak / low > 20
    bend = math.log10 if logarithmic else float
    y0, y1 = (bend(low), bend(peak)) if logarithmic else (min(0.0, low), peak)
    y1 = y1 if y1 > y0 else y0 + 1.0
    x0, x1 = min(xs), max(max(xs), min(xs) + 1)

    def place(x: float, y: float) -> str:
        across = left + (x - x0) / (x1 - x0) * (wide - left - right)
        down = top + (1 - (bend(y) - y0) / (y1 - y0)) * (high - top - bottom)
        return f"{across:.1f},{down:.1f}"

    parts = [
        f'<svg viewBox="0 0 {wide} {high + legend}" role="img" '
        f'aria-label="{escape(title, quote=True)} over steps">'
    ]
    for value in _ticks(y0, y1, logarithmic):
        y = top + (1 - (value - y0) / (y1 - y0)) * (high - top - bottom)
        shown = 10**value if logarithmic else value
        parts.append(f'<line x1="{left}" x2="{wide - right}" y1="{y:.1f}" y2="{y:.1f}" '
                     f'stroke="#cbd5e1"/><text x="{left - 6}" y="{y + 4:.1f}" '
                     f'text-anchor="end">{shown:,.4g}</text>')  # fmt: skip
    for value in _ticks(x0, x1, False):
        x = left + (value - x0) / (x1 - x0) * (wide - left - right)
        parts.append(f'<text x="{x:.1f}" y="{high - bottom + 18}" text-anchor="middle">'
                     f"{value:,.0f}</text>")  # fmt: skip
    scale = " (logarithmic)" if logarithmic else ""
    parts.append(
        f'<text x="{(left + wide) / 2:.0f}" y="{high - 4}" text-anchor="middle">step — '
        f"{escape(title)}{scale}</text>"
    )
    for number, (site, points) in enumerate(lines.items()):
        look = _look(number)
        path = " ".join(place(x, y) for x, y in points)
        parts.append(f'<polyline fill="none" {look} points="{path}"/>')
        x, y = left + number % 3 * 232, high + 14 + number // 3 * 20
        parts.append(f'<line x1="{x}" x2="{x + 28}" y1="{y - 4}" y2="{y - 4}" {look}/>'
                     f'<text x="{x + 34}" y="{y}">{escape(site)}</text>')  # fmt: skip
    return "".join([*parts, "</svg>"])


def _look(number: int) -> str:
    """Lines differ by dashes too: not everyone prints in colour."""
    ink = _INKS[number % len(_INKS)]
    dash = _DASHES[number // len(_INKS) % len(_DASHES)] if number >= len(_INKS) else ""
    return f'stroke="{ink}" stroke-width="1.4"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _ticks(low: float, high: float, logarithmic: bool, wanted: int = 5) -> list[float]:
    """Round values from `low` to `high`."""
    if logarithmic:
        powers = range(math.floor(low), math.ceil(high) + 1)
        every = -(-len(powers) // 8)
        factors = (1, 2, 5) if high - low < 3 else (1,)
        found = [n + math.log10(f) for n in powers if n % every == 0 for f in factors]
        return [value for value in found if low - 1e-9 <= value <= high + 1e-9]
    rough = (high - low) / wanted
    unit = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next(unit * n for n in (1, 2, 5, 10) if unit * n >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


# --- values as text -------------------------------------------------------------------------------


def _table(
    heads: Sequence[str], body: Sequence[Sequence[str]], text: int = _TEXT, escaped: bool = False
) -> str:
    """Rows of escaped cells; from column `text` on they are numbers, at the right."""

    def cell(kind: str, place: int, value: str) -> str:
        look = "" if text == _TEXT else ' class="n"' if place >= text else ' class="s"'
        return f"<{kind}{look}>{value}</{kind}>"

    head = "".join(cell("th", n, x if escaped else escape(x)) for n, x in enumerate(heads))
    lines = ("".join(cell("td", n, x) for n, x in enumerate(row)) for row in body)
    return (
        "<table>"
        + (f"<thead><tr>{head}</tr></thead>" if heads else "")
        + "<tbody>"
        + "".join(f"<tr>{line}</tr>" for line in lines)
        + "</tbody></table>"
    )


def _measure(name: str, value: object) -> str:
    unit = DEFINITIONS.get(name, {}).get("unit")
    if not _is_number(value):
        return _DASH
    number = float(value)  # type: ignore[arg-type]
    if unit == "share":
        return formatting.percent(number, 2)
    if unit == "latents" or name == "k":
        return f"{number:,.1f}".removesuffix(".0")
    return f"{number:,.4g}"


def _code(value: object, bare: bool = False) -> str:
    text = _json(value)
    return text if bare else f"<code>{text}</code>"


def _json(value: object) -> str:
    if value is None:
        return _DASH
    if isinstance(value, float):
        return escape(f"{value:,.6g}")
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return escape(str(value))


def _get(row: object, name: str) -> Any:
    return row.get(name) if isinstance(row, Mapping) else None


def _dict(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = row.get(name)
    return dict(found) if isinstance(found, Mapping) else {}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _text(value: object, otherwise: str = _DASH) -> str:
    return otherwise if value is None or value == "" else str(value)


def _count(value: object) -> str:
    return formatting.count(float(value)) if _is_number(value) else _DASH  # type: ignore[arg-type]


def _number(value: object, decimals: int) -> str:
    return formatting.number(float(value), decimals) if _is_number(value) else _DASH  # type: ignore[arg-type]


def _unit(text: str, unit: str) -> str:
    return text if text == _DASH else f"{text} {unit}"


def _seconds(value: object) -> str:
    return formatting.duration(float(value)) if _is_number(value) else _DASH  # type: ignore[arg-type]
