"""Models from the Hub: which of a repository's files a model needs, and fetching them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mistudio.engine.hub.access import Access
from mistudio.engine.hub.download import download_files
from mistudio.engine.hub.refusals import Subject
from mistudio.engine.hub.repository import fetch_record, list_files
from mistudio.engine.hub.session import Session
from mistudio.engine.progress import SILENT, Progress
from mistudio.errors import UnsupportedModel

_WANTED = re.compile(
    r"(model.*\.safetensors|model\.safetensors\.index\.json|config\.json|generation_config\.json|"
    r"tokenizer.*|special_tokens_map\.json|vocab\.json|merges\.txt|chat_template\.jinja|.*\.model)"
)
PHASE = "Downloading the model"


def download_model(
    repository: str,
    folder: Path,
    require_space: Callable[[int, str], None],
    progress: Progress = SILENT,
    access: Access | None = None,
) -> dict[str, Any]:
    """Fetch a model's safetensors, configuration and tokenizer; returns its provenance.

    Repositories with only pickled weights are refused before anything is fetched.
    """
    with Session(Subject("model", repository), access, progress) as session:
        record = fetch_record(session)
        files = [f for f in list_files(session, record["sha"]) if _WANTED.fullmatch(f.name)]
        if not any(file.name.endswith(".safetensors") for file in files):
            raise UnsupportedModel(
                "This repository has no safetensors weights",
                f"{repository} offers only formats that can run code when they are opened.",
                "Choose a repository with model.safetensors (many have a converted branch).",
            )
        require_space(sum(file.size or 0 for file in files), f"Downloading {repository}")
        work = folder / ".download"
        try:
            fetched = download_files(session, record["sha"], files, work, PHASE)
            for file in fetched:
                os.replace(file.path, folder / file.name)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    card = record.get("cardData")
    return {
        "source": f"Hugging Face Hub {repository}",
        "revision": record["sha"],
        "licence": card.get("license", "") if isinstance(card, dict) else "",
        "files": [file.provenance() for file in fetched],
    }
