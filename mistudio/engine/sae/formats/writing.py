"""Exporting: one saved SAE in a format that another library reads, read back and compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from mistudio.engine.sae.files import OURS, SavedSae, load_sae
from mistudio.engine.sae.formats import plain, saelens, sparsify
from mistudio.engine.sae.formats.common import read_json
from mistudio.engine.sae.formats.compare import check_same_function
from mistudio.engine.sae.formats.reading import Found
from mistudio.errors import Incompatible, InvalidInput

EXPORT_FORMATS = (saelens.NAME, sparsify.NAME, plain.NAME)


def check_format(format: str) -> None:
    """InvalidInput for a format that nothing can be written in."""
    if format not in EXPORT_FORMATS:
        raise InvalidInput(
            "Unknown export format",
            f"{format!r} is not known.",
            f"Use one of {', '.join(f'`{name}`' for name in EXPORT_FORMATS)}.",
            field="format",
        )


def export_sae(source: Path, folder: Path, format: str) -> Path:
    """Write the SAE saved in `source` below `folder`; returns its own folder or file.

    Raises Incompatible, with the reason and what to do, for what the format cannot hold, and
    RuntimeError where what was written reads back as another function.
    """
    check_format(format)
    saved = load_sae(source)
    folder.mkdir(parents=True, exist_ok=True)
    want = saved.dictionary
    if format == plain.NAME:
        place = plain.write(want, folder, site=saved.site, metadata=_header(saved.metadata))
    else:
        want = saelens.without_centring(want)
        write = _write_saelens if format == saelens.NAME else _write_sparsify
        place = write(source, saved, folder)
    again = Found(place, format).read()
    check_same_function(want, again.dictionary, place)
    if again.site is not None and again.site != saved.site and format != sparsify.NAME:
        raise RuntimeError(f"The SAE in {place} reads back as one of {again.site}")
    return place


def _write_saelens(source: Path, saved: SavedSae, folder: Path) -> Path:
    """A copy of the library's own folder where SAELens would read that as it is, else a folder in
    SAELens' terms with the same metadata, frequencies and record."""
    config, tensors = saelens.to_saelens(saved.dictionary, saved.site)
    stored = read_json(source / saelens.CONFIG)
    metadata = stored.pop("metadata")
    as_it_is = stored == config
    place = folder / saved.site.name
    place.mkdir(parents=True, exist_ok=True)
    copied = (saelens.CONFIG, saelens.WEIGHTS) if as_it_is else ()
    for name in (*copied, saelens.SPARSITY, OURS):
        if (source / name).is_file():
            shutil.copyfile(source / name, place / name)
    if not as_it_is:
        save_file(tensors, place / saelens.WEIGHTS)
        text = json.dumps({**config, "metadata": metadata}, indent=1)
        (place / saelens.CONFIG).write_text(text, encoding="utf-8")
    return place


def _write_sparsify(source: Path, saved: SavedSae, folder: Path) -> Path:
    sparsify.representable(saved.dictionary, saved.site)  # the reason that no module would mend
    module_path = str(saved.metadata.get("hf_hook_name") or "")
    if not module_path:
        raise Incompatible(
            "This SAE's module is not known",
            f"{source} does not say which of the model's modules it belongs to, by which sparsify "
            "names its folders.",
            "Export it as `saelens` or `safetensors`.",
        )
    return sparsify.write(
        saved.dictionary,
        folder,
        site=saved.site,
        module_path=module_path,
        module_path_out=str(saved.metadata.get("hf_hook_name_out") or ""),
    )


def _header(metadata: dict[str, Any]) -> dict[str, Any]:
    wanted = ("model_name", "hf_hook_name", "hf_hook_name_out", "context_size", "prepend_bos")
    return {name: metadata[name] for name in wanted if metadata.get(name) not in (None, "")}
