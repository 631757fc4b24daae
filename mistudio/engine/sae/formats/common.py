"""What the readers of foreign SAE files share: safe loading, shapes, names of places, refusals.

Nothing is unpickled: torch files are read with `weights_only`, numpy files without pickle.
"""

from __future__ import annotations

import errno
import json
import os
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.sae.dictionary import Dictionary
from mistudio.engine.sae.site import Site
from mistudio.errors import CorruptFile, Incompatible, InvalidInput, NotFound, UserError, explain

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class ImportedSae:
    """A dictionary read from someone's files.

    `site` is None where the files do not say where it belongs; `layer` is what they say even
    then. `notes` tell in plain words what was folded, dropped or taken for granted. `details` are
    the files' own facts (context_size, prepend_bos, k, ...), plain JSON.
    """

    dictionary: Dictionary
    site: Site | None
    format: str
    path: Path
    layer: int | None = None
    model_name: str = ""
    notes: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


# --- reading files ------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; CorruptFile where it is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:  # also bytes that are not UTF-8
        raise damaged(path, str(exc)) from exc
    if not isinstance(value, dict):
        raise damaged(path, f"it holds a {type(value).__name__}, not an object")
    return value


def read_safetensors(path: Path) -> Tensors:
    """Every tensor of a safetensors file, as stored."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_names(path: Path) -> set[str]:
    """The names of a safetensors file's tensors."""
    with _opened(path) as file:
        return set(file.keys())


def read_header(path: Path) -> dict[str, str]:
    """The metadata strings of a safetensors file."""
    with _opened(path) as file:
        return dict(file.metadata() or {})


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as exc:
        known = explain(exc)
        raise known if known is not None else damaged(path, str(exc)) from exc


def read_torch(path: Path) -> dict[str, Any]:
    """The dict in a file of `torch.save`. Its pickle may build tensors and plain containers only;
    whatever else it asks for is refused, not run."""
    try:
        with warnings.catch_warnings():  # old files warn about their own storage classes
            warnings.simplefilter("ignore")
            value = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as exc:  # a broken pickle can fail in any way
        # torch reports a zip archive that is cut short as "invalid argument".
        if isinstance(exc, OSError) and exc.errno != errno.EINVAL:
            raise
        raise _refused_pickle(path, str(exc)) from exc
    if not isinstance(value, dict):
        raise damaged(path, f"it holds a {type(value).__name__}, not a dict of tensors")
    return value


def _refused_pickle(path: Path, message: str) -> UserError:
    asked = re.search(r"GLOBAL ([\w.]+)", message)
    if asked is None and "TorchScript" not in message:
        return damaged(path, "it is cut short, or was not written by torch.save")
    what = f"it asks for {asked[1]}" if asked else "it is a TorchScript program"
    return _holds_code(path, what, "ask for a safetensors file, or torch.save of a state_dict")


def _holds_code(path: Path, what: str, instead: str) -> Incompatible:
    return Incompatible(
        "This file holds code, not only numbers",
        f"Opening {path} in full could run anything: {what}. miStudio reads only numbers.",
        f"Choose another file of this SAE, or {instead}.",
    )


def read_npz(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of an npz file; object arrays, which are pickles, are refused."""
    if not zipfile.is_zipfile(path):
        raise damaged(path, "it is cut short, or is no npz file")
    try:
        with np.load(path, allow_pickle=False) as data:
            return {name: data[name] for name in data.files}
    except (ValueError, EOFError, KeyError, AttributeError, zipfile.BadZipFile, zlib.error) as exc:
        if "pickle" in str(exc).lower():
            what = "an array of Python objects"
            raise _holds_code(path, f"it has {what}", "ask for plain arrays") from exc
        raise damaged(path, str(exc)) from exc


# --- shapes -------------------------------------------------------------------------------------


def fit(
    path: Path,
    tensors: Mapping[str, Any],
    shapes: Mapping[str, Sequence[str]],
    *,
    optional: Iterable[str] = (),
    ignored: Iterable[str] = (),
) -> tuple[Tensors, dict[str, int]]:
    """The named tensors as float32, and the size of each axis that `shapes` names by letter.

    The first tensor that names an axis sets its size. CorruptFile for one that is missing, has
    another shape or is not finite; Incompatible for one that is not known: it may change what the
    dictionary computes.
    """
    sizes: dict[str, int] = {}
    found: Tensors = {}
    for name, axes in shapes.items():
        tensor = tensors.get(name)
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, Tensor):
            raise damaged(path, f"{name} is missing")
        if tensor.ndim != len(axes):
            raise damaged(path, f"{name} has {tensor.ndim} axes instead of {len(axes)}")
        want = tuple(
            sizes.setdefault(axis, size) for axis, size in zip(axes, tensor.shape, strict=True)
        )
        if tuple(tensor.shape) != want:
            raise CorruptFile(
                "The SAE's weights do not fit together",
                f"{path}: {name} should be {list(want)}, found {list(tensor.shape)}.",
                "Export or download it again.",
            )
        found[name] = finite(path, name, tensor)
    unknown = sorted(set(tensors) - set(shapes) - set(ignored))
    if unknown:
        raise Incompatible(
            "This SAE holds weights that miStudio does not know",
            f"{path} has {', '.join(map(str, unknown))}; without them it would compute something "
            "else.",
            "Convert it with the library that wrote it, or choose another SAE.",
        )
    return found, sizes


def finite(path: Path, name: str, tensor: Tensor) -> Tensor:
    """`tensor` as float32; CorruptFile where it is no number or infinite."""
    if tensor.is_complex() or tensor.is_quantized or tensor.is_sparse:
        raise damaged(path, f"{name} is not a plain array of numbers")
    numbers = tensor.detach().float().contiguous()
    if not bool(numbers.isfinite().all()):
        raise damaged(path, f"{name} holds values that are not finite")
    return numbers


def whole_number(path: Path, name: str, value: Any, low: int = 0, high: int | None = None) -> int:
    """`value` as an int between `low` and `high`; CorruptFile otherwise."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise damaged(path, f"{name} is {value!r}")
    if high is not None and value > high:
        raise damaged(path, f"{name} is {value}, more than {high}")
    return value


# --- places and names ---------------------------------------------------------------------------


def spelled_out(path: Path) -> Path:
    """`path` from the root, links left as they are: a download cache's files are links whose
    targets have lost their folders' names."""
    return Path(os.path.abspath(path))


def point_named(name: Any, path: Path) -> HookPoint:
    """The hook point that a foreign file names TransformerLens' way."""
    try:
        return HookPoint.parse(str(name))
    except InvalidInput as exc:
        raise unknown_place(path, str(name)) from exc


def unknown_place(path: Path, name: str) -> Incompatible:
    return Incompatible(
        "This SAE reads a place that miStudio cannot reach",
        f"{path} belongs to {name}.",
        "miStudio reads the residual stream before and after a block, what enters and leaves its "
        "MLP, and what leaves its attention.",
    )


# --- refusals -----------------------------------------------------------------------------------


def damaged(path: Path, why: str) -> CorruptFile:
    return CorruptFile(
        "The SAE's files are damaged",
        f"{path}: {why.rstrip('.')}.",
        "Export or download them again.",
    )


def cannot_read(path: Path, why: str, next_step: str = "Choose another SAE.") -> Incompatible:
    return Incompatible("This kind of SAE cannot be read", f"{path}: {why}", next_step)


def not_here(path: Path, what: str) -> NotFound:
    return NotFound("This is not an SAE folder", f"{path} has no {what}.", "Choose another folder.")


def plain(details: Mapping[str, Any]) -> dict[str, Any]:
    """What of `details` JSON can hold; the rest is left out."""
    kept = {}
    for name, value in details.items():
        if value is None or isinstance(value, str | bool | int | float):
            kept[str(name)] = value
    return kept
