"""Models from the Hugging Face Hub: which files, how large, and a download that can be stopped."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mistudio.engine.progress import SILENT, Progress
from mistudio.errors import NotFound, Offline, UnsupportedModel, UserError

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_WANTED = re.compile(
    r"(model.*\.safetensors|model\.safetensors\.index\.json|config\.json|generation_config\.json|"
    r"tokenizer.*|special_tokens_map\.json|vocab\.json|merges\.txt|chat_template\.jinja|.*\.model)"
)


def is_repository_id(text: str) -> bool:
    """Whether the text has the form owner/name."""
    return bool(_REPOSITORY.fullmatch(text))


def download_model(
    repository: str,
    folder: Path,
    require_space: Callable[[int, str], None],
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Fetch a model's safetensors, configuration and tokenizer; returns its provenance.

    Repositories with only pickled weights are refused before anything is fetched.
    """
    from huggingface_hub import HfApi

    with explained(repository):
        info = HfApi().model_info(repository, files_metadata=True)
    files = {
        entry.rfilename: entry.size or 0
        for entry in info.siblings or []
        if _WANTED.fullmatch(entry.rfilename)
    }
    if not any(name.endswith(".safetensors") for name in files):
        raise UnsupportedModel(
            "This repository has no safetensors weights",
            f"{repository} offers only formats that can run code when they are opened.",
            "Choose a repository with model.safetensors (many have a converted branch).",
        )
    require_space(sum(files.values()), f"Downloading {repository}")
    fetch_files(repository, files, folder, info.sha, progress)
    card = info.card_data.to_dict() if info.card_data else {}
    return {
        "source": f"Hugging Face Hub {repository}",
        "revision": info.sha,
        "licence": card.get("license", ""),
    }


def fetch_files(
    repository: str,
    files: dict[str, int],
    folder: Path,
    revision: str | None = None,
    progress: Progress = SILENT,
) -> None:
    """Download the named files (name -> bytes) into `folder`, reporting bytes over all of them."""
    from huggingface_hub import hf_hub_download

    total = sum(files.values())
    finished = 0
    try:
        for name, size in files.items():
            progress.check()
            bar = download_bar(progress, "Downloading the model", finished, total)
            with explained(repository):
                hf_hub_download(
                    repository, name, revision=revision, local_dir=folder, tqdm_class=bar
                )
            finished += size
    finally:
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # local_dir's bookkeeping


def download_bar(
    progress: Progress, phase: str, before: int = 0, total: int | None = None
) -> type[Any]:
    """hf_hub_download's progress bar as our progress; unlike its own it can stop the download.

    Reports `before` plus the bytes of this file, of `total` (this file's size where None).
    """
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            progress.check()
            self.n += n or 0
            progress.report(before + self.n, self.total if total is None else total, phase)
            return None

    return Bar


@contextmanager
def explained(repository: str) -> Iterator[None]:
    """Hub errors as sentences: not found, gated, offline."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as exc:
        raise UserError(
            "This model is gated",
            f"{repository} asks for its terms to be accepted first.",
            f"Accept them at https://huggingface.co/{repository}, then sign in: `hf auth login`.",
        ) from exc
    except errors.RepositoryNotFoundError as exc:
        raise NotFound(
            "No such model on the Hub",
            f"{repository} does not exist, or it is private.",
            "Check the spelling (owner/name).",
        ) from exc
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as exc:
        raise Offline(
            "The Hub cannot be reached",
            f"{repository} could not be fetched: {' '.join(str(exc).split())[:200]}",
            "Check the connection (or HF_HUB_OFFLINE), or add a local model folder.",
        ) from exc
    except Exception as exc:
        # httpx raises its own family for broken connections; it is no dependency of ours.
        if not isinstance(exc, OSError) and "httpx" not in type(exc).__module__:
            raise
        raise Offline(
            "The Hub did not answer",
            f"{repository}: {' '.join(str(exc).split())[:200]}",
            "Check the connection and try again, or add a local model folder.",
        ) from exc
