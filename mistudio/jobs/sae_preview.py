"""What an import would bring in, before anything is: of files here, or of a repository's SAE."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mistudio.errors import InvalidInput, explain
from mistudio.jobs.saes import misfit, same_name
from mistudio.library.records import Model

if TYPE_CHECKING:
    from mistudio.engine.hub.saes import HubSae, Peek


@dataclass(frozen=True)
class SeenSae:
    """One SAE as its files describe it. `reads` and `writes` are hook points, "" where the files
    do not say; `layer` is what they say even then. Sizes are 0 where they are not known yet.
    `channels`: widths of which one must be the model's, where only shapes were seen. `problem`:
    why it cannot be imported at all; else empty."""

    place: str
    format: str
    bytes: int
    d_in: int = 0
    d_out: int = 0
    d_sae: int = 0
    architecture: str = ""
    k: float = 0.0
    reads: str = ""
    writes: str = ""
    layer: int | None = None
    deepest: int | None = None
    model_name: str = ""
    notes: tuple[str, ...] = ()
    channels: frozenset[int] = frozenset()
    problem: str = ""

    def misfit(self, model: Model, layer: int | None = None) -> str:
        """Why it cannot belong to this model (at the layer that was chosen where the files name
        none); "" where it may."""
        deepest = self.deepest if self.deepest is not None else self.layer
        deepest = deepest if deepest is not None else layer
        if self.d_in:
            return misfit(model, {self.d_in, self.d_out}, deepest, self.model_name)
        if self.channels and model.d_model not in self.channels:
            return f"None of its arrays has the {model.d_model:,} channels of {model.name}."
        return misfit(model, {model.d_model}, deepest)


def look(path: Path, check: Callable[[], None] = lambda: None) -> list[SeenSae]:
    """Every SAE at or below `path`, read one after the other and let go again. Raises UserError
    where there is none; one that cannot be read has its `problem`. `check` is called between
    them and may raise to stop."""
    from mistudio.engine.sae.formats.reading import find_saes

    seen = []
    for found in find_saes(path):
        check()
        seen.append(_seen(found, path))
    return seen


def _seen(found: Any, root: Path) -> SeenSae:
    from mistudio.engine.sae.activation import TopK
    from mistudio.engine.sae.formats.common import spelled_out

    # Not resolved: the files of a download cache are links out of their folder.
    inside = spelled_out(found.path).relative_to(spelled_out(root.expanduser())).as_posix()
    place = found.path.name if inside == "." else inside
    size = _size(found.path)
    try:
        read = found.read()
    except Exception as exc:
        known = explain(exc)
        if known is None:
            raise
        return SeenSae(place, found.format, size, problem=f"{known.title}. {known.what}")
    dictionary, site = read.dictionary, read.site
    trained_for = read.details.get("k")
    k = dictionary.activation.k if isinstance(dictionary.activation, TopK) else trained_for
    return SeenSae(
        place=place,
        format=read.format,
        bytes=size,
        d_in=dictionary.d_in,
        d_out=dictionary.d_out,
        d_sae=dictionary.d_sae,
        architecture=dictionary.activation.name,
        k=float(k) if isinstance(k, int | float) and not isinstance(k, bool) and k > 0 else 0.0,
        reads=site.input.name if site else "",
        writes=site.output.name if site else "",
        layer=site.layer if site else read.layer,
        deepest=max(site.input.layer, site.output.layer) if site else read.layer,
        model_name=read.model_name,
        notes=read.notes,
    )


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def seen_on_hub(sae: HubSae, peek: Peek) -> SeenSae:
    """As far as the configuration and the shapes tell; the rest shows when it is read."""
    from mistudio.engine.models.hooks import HookPoint

    inside = peek.config.get("metadata")
    config = {**peek.config, **inside} if isinstance(inside, dict) else peek.config
    named = str(config.get("hook_name") or config.get("hook_point_in") or config.get("hook_point")
                or "")  # fmt: skip
    reads, layer = "", None
    if named:
        try:
            point = HookPoint.parse(named)
        except InvalidInput:
            point = None
        if point is not None:
            reads, layer = point.name, point.layer
    if layer is None and (found := re.search(r"(?:layers?|blocks|h)[._/-]?(\d+)", sae.place)):
        layer = int(found[1])
    sizes = {size for shape in peek.shapes.values() for size in shape if size > 1}
    return SeenSae(
        place=sae.place or sae.weights.name,
        format=sae.format,
        bytes=sae.bytes,
        d_in=_whole(config.get("d_in")),
        d_out=_whole(config.get("d_out")) or _whole(config.get("d_in")),
        d_sae=_whole(config.get("d_sae") or config.get("num_latents")),
        architecture=str(config.get("architecture") or config.get("activation") or ""),
        k=float(_whole(config.get("k"))),
        reads=reads,
        writes=reads,
        layer=layer,
        model_name=str(config.get("model_name") or ""),
        channels=frozenset(sizes),
    )


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def guess_model(seen: Sequence[SeenSae], models: Iterable[Model]) -> Model | None:
    """The one model that the files name, else the only one that they all fit; None where there is
    no telling."""
    there = list(models)
    names = {one.model_name for one in seen if one.model_name}
    named = [m for m in there if any(same_name(name, m.name, m.origin) for name in names)]
    if len(names) == 1 and named:
        fitting = [m for m in named if not any(one.misfit(m) for one in seen)]
        return fitting[0] if fitting else named[0]
    fitting = [m for m in there if not any(one.misfit(m) for one in seen)]
    return fitting[0] if len(fitting) == 1 else None
