"""A model that might be added: what it is and what it would take here, before it is fetched."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mistudio import formatting
from mistudio.errors import Incompatible, UnsupportedModel, UserError
from mistudio.library.library import Library

if TYPE_CHECKING:
    from mistudio.engine.hub import Access, HubModel
    from mistudio.engine.models.architecture import Architecture
    from mistudio.engine.models.custom_code import OwnCode
    from mistudio.engine.models.memory import ModelPlan

UNUSED_CODE = (
    "it brings a program of its own, which is not run: transformers knows this architecture itself"
)


@dataclass(frozen=True)
class Fit:
    """What one model takes on this computer's device at every precision, best first.

    `best` is what "auto" means; `refused` says why the device cannot run a precision at all;
    `free` and `total` are bytes of the device's memory.
    """

    architecture: Architecture
    plans: tuple[ModelPlan, ...]
    best: str
    refused: dict[str, str]
    device: str
    free: int
    total: int

    def plan(self, precision: str) -> ModelPlan:
        wanted = self.best if precision == "auto" else precision
        return next(plan for plan in self.plans if plan.precision == wanted)

    def cannot_run(self, precision: str) -> str:
        """Why this computer can never run it so; empty where it may (perhaps not now)."""
        if reason := self.refused.get(precision):
            return reason
        plan = self.plan(precision)
        if plan.memory * 1.1 > self.total:
            return (
                f"Needs {formatting.size(plan.memory)}; {self.device} has "
                f"{formatting.size(self.total)} in all."
            )
        return ""


@dataclass(frozen=True)
class Candidate:
    """`source` as the form names it; `fetch` in bytes are what is downloaded or copied. `code` is
    the program that the model brings and needs, if it does: it must be consented to."""

    source: str
    name: str
    fit: Fit
    fetch: int
    disk_free: int
    facts: tuple[str, ...]
    page: str = ""
    gated: str = ""
    code: OwnCode | None = None

    @property
    def disk_short(self) -> bool:
        return self.disk_free < self.fetch * 1.1  # as Library.require_space will judge


def fit_of(library: Library, architecture: Architecture) -> Fit:
    """Imports torch: never in the window's thread."""
    from mistudio import device
    from mistudio.engine.models.memory import best_fit, plan_all
    from mistudio.jobs.loaded import machine

    here, found = machine(library), device.current()
    return Fit(
        architecture,
        plan_all(architecture, here, device=found.kind),
        best_fit(architecture, here, device=found.kind).precision,
        refused_precisions(found.kind),
        found.name,
        here.memory_free,
        here.memory_total,
    )


def refused_precisions(kind: str | None = None) -> dict[str, str]:
    """The precisions that this computer's device cannot run, with the reason."""
    from mistudio import device
    from mistudio.engine.models.quantise import SCHEMES, require_backend

    refused = {}
    for precision in SCHEMES:
        try:
            require_backend(precision, kind or device.current().kind)
        except Incompatible as exc:
            refused[precision] = f"{exc.what} {exc.next_step}".strip()
    return refused


def consider(library: Library, source: str, access: Access | None = None) -> Candidate:
    """Look at a folder, a GGUF file or a repository; nothing is kept. UserError where it is no
    model that can be used here."""
    path = Path(source)
    if path.is_dir():
        return _folder(library, path)
    if path.is_file():
        return _gguf(library, path)
    return _repository(library, source, access)


def _folder(library: Library, path: Path) -> Candidate:
    from mistudio.engine.models.architecture import read_architecture
    from mistudio.engine.models.custom_code import brings_unused_code
    from mistudio.engine.models.loading import check_folder, describe, read_config
    from mistudio.jobs.models import code_of

    code = code_of(str(path))
    check_folder(path, own_code=code is not None)
    summary = describe(path)
    fit = fit_of(library, read_architecture(path))
    facts = [f"stored as {', '.join(summary.dtypes)}"]
    if brings_unused_code(read_config(path)):
        facts.append(UNUSED_CODE)
    return _candidate(
        library, str(path), path.name, fit, summary.bytes_on_disk, tuple(facts), code=code
    )


def _gguf(library: Library, path: Path) -> Candidate:
    from mistudio.engine.models.architecture import read_architecture
    from mistudio.engine.models.gguf import write_gguf_config

    with tempfile.TemporaryDirectory() as folder:
        write_gguf_config(path, Path(folder))
        fit = fit_of(library, read_architecture(Path(folder)))
    facts = (f"GGUF file of {formatting.size(path.stat().st_size)}", "converted to 16-bit weights")
    return _candidate(library, str(path), path.stem, fit, 2 * fit.architecture.parameters, facts)


def _repository(library: Library, name: str, access: Access | None) -> Candidate:
    from mistudio.engine.hub import model_code, model_info
    from mistudio.engine.models.architecture import describe_architecture
    from mistudio.engine.models.custom_code import needs_code
    from mistudio.engine.models.loading import parse_config

    info = model_info(name, access=access)
    if info.problem:
        raise UnsupportedModel(
            "This repository has no model that can be used",
            f"{name}: {info.problem}",
            "Choose another repository; many have a converted copy.",
        )
    code = None
    if needs_code(parse_config(info.config)):
        code = model_code(name, info.revision, access)
    fit = fit_of(library, describe_architecture(info.config, info.tensors))
    return _candidate(
        library, name, name.split("/")[-1], fit, info.bytes, _hub_facts(info, fit),
        page=info.page, gated=info.gated, code=code,
    )  # fmt: skip


def _hub_facts(info: HubModel, fit: Fit) -> tuple[str, ...]:
    from mistudio.engine.models.custom_code import brings_unused_code
    from mistudio.engine.models.loading import parse_config

    facts = [f"stored as {', '.join(info.dtypes)}"] if info.dtypes else []
    facts.append(f"licence: {info.licence or 'not stated'}")
    if brings_unused_code(parse_config(info.config)):
        facts.append(UNUSED_CODE)
    if info.parameters and abs(info.parameters / fit.architecture.parameters - 1) > 0.1:
        facts.append(
            f"its files hold {formatting.short_count(info.parameters)} numbers, its configuration "
            f"asks for {formatting.short_count(fit.architecture.parameters)}"
        )
    if info.gated:
        facts.append("gated: accept its terms on its page, then give your access token")
    return tuple(facts)


def _candidate(
    library: Library, source: str, name: str, fit: Fit, fetch: int, facts: tuple[str, ...],
    page: str = "", gated: str = "", code: OwnCode | None = None,
) -> Candidate:  # fmt: skip
    free = shutil.disk_usage(library.root).free
    return Candidate(source, name, fit, fetch, free, facts, page, gated, code)


def why_not(candidate: Candidate, precision: str) -> UserError | None:
    """Why adding it at this precision would end in nothing that can be used here; None where it
    should work."""
    if candidate.disk_short:
        return UserError(
            "Not enough disk space",
            f"{candidate.name} takes {formatting.size(candidate.fetch)} and a tenth more as "
            f"headroom; {formatting.size(candidate.disk_free)} are free where the library lies.",
            "Free some space first.",
        )
    plan = candidate.fit.plan(precision)
    if plan.fits:
        return None
    best = candidate.fit.plan("auto")
    return UserError(
        "It does not fit into memory now",
        f"At {plan.precision.upper()} it needs {formatting.size(plan.memory)} with a tenth in "
        f"reserve, and {formatting.size(plan.free)} are free.",
        f"{best.precision.upper()} fits: {formatting.size(best.memory)}."
        if best.fits
        else "Close other programs, or choose a smaller model.",
    )
