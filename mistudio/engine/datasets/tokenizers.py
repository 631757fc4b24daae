"""Tokenizers that belong to no model: brought from files or the Hub, named by content, tried out.

No code that comes with a tokenizer is ever run.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistudio.engine.datasets.token_settings import TokenSettings
from mistudio.engine.progress import SILENT, Progress
from mistudio.errors import CorruptFile, InvalidInput, NotFound

# What names a tokenizer. The chat format is left out: it changes only what conversations become.
HASHED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
# What is taken from a folder or a repository; nothing else is needed to tokenise.
TOKENIZER_FILES = (
    *HASHED_FILES,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_WHOLE = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_LARGEST = 256 * 1024**2  # bytes of one tokenizer file; the largest known ones have 35 MB


@dataclass(frozen=True)
class Choice:
    """One entry of the dialog's list. `source` is what `AddTokenizer` takes: a repository, or
    empty where a model or a file of the user's gives the tokenizer."""

    key: str
    label: str
    source: str
    help: str


CHOICES = (
    Choice("auto", "Auto (from model)", "", "The tokenizer of a model in your library: the tokens "
           "are then the ones that this model was trained with."),
    Choice("gpt2", "GPT-2", "openai-community/gpt2", "Byte-level, 50,257 tokens. Fetched from the "
           "Hub once, tokenizer files only."),
    Choice("llama", "LLaMA", "huggyllama/llama-7b", "SentencePiece, 32,000 tokens, as in LLaMA and "
           "Llama 2. Fetched from the Hub once, tokenizer files only."),
    Choice("custom", "Custom", "", "A tokenizer.json, a SentencePiece .model file, or a folder "
           "that holds one. No program code that comes with it is run."),
)  # fmt: skip


def hash_tokenizer(folder: Path) -> str:
    """Names a tokenizer by its content, so that two models with the same one share a store."""
    digest = hashlib.sha256()
    found = [folder / name for name in HASHED_FILES if (folder / name).is_file()]
    if not found:
        raise InvalidInput(
            "The model has no tokenizer",
            f"{folder.name} holds none of {', '.join(HASHED_FILES)}.",
            "Add the model again with its tokenizer files.",
        )
    for path in found:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def pad_token(tokenizer: Any, separator_id: int | None) -> int:
    """The id that fills windows up: the tokenizer's own, else the one that ends a text."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return 0 if separator_id is None else separator_id


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Put the tokenizer at `source` (a folder, a tokenizer.json or a SentencePiece .model) into
    `folder`, in a form that `load_tokenizer` reads.

    Raises NotFound, InvalidInput or CorruptFile where there is none.
    """
    if not source.exists():
        raise NotFound("File not found", f"There is nothing at {source}.", "Check the path.")
    folder.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                _copy(source / name, folder / name)
    elif source.suffix == ".json":
        _copy(source, folder / "tokenizer.json")
        beside = source.parent / "tokenizer_config.json"
        if source.name == "tokenizer.json" and beside.is_file():
            _copy(beside, folder / beside.name)
    elif source.suffix == ".model":
        _copy(source, folder / "tokenizer.model")
    else:
        raise _none_here(source)
    complete(folder, source)


def download_tokenizer(
    repository: str, folder: Path, progress: Progress = SILENT
) -> dict[str, Any]:
    """Fetch a repository's tokenizer files, and nothing else, into `folder`; their provenance.

    Raises what the hub package raises, and InvalidInput where the repository has no tokenizer.
    """
    from mistudio.engine.hub.download import download_files
    from mistudio.engine.hub.refusals import Subject
    from mistudio.engine.hub.repository import fetch_record, list_files
    from mistudio.engine.hub.session import Session

    folder.mkdir(parents=True, exist_ok=True)
    with Session(Subject("model", repository), None, progress) as session:
        record = fetch_record(session)
        found = list_files(session, record["sha"])
        files = [file for file in found if file.name in TOKENIZER_FILES]
        if any(file.name == "tokenizer.json" for file in files):  # it says the same as the model
            files = [file for file in files if not file.name.endswith(".model")]
        if not files:
            raise _none_here(repository)
        work = folder / ".download"
        try:
            fetched = download_files(
                session, record["sha"], files, work, "Downloading the tokenizer"
            )
            for file in fetched:
                os.replace(file.path, folder / file.name)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    complete(folder, repository)
    card = record.get("cardData")
    return {
        "revision": record["sha"],
        "licence": card.get("license", "") if isinstance(card, dict) else "",
        "files": [file.provenance() for file in fetched],
    }


def complete(folder: Path, source: Path | str) -> None:
    """See that the files in `folder` make a tokenizer; a SentencePiece model is converted."""
    paths = [folder / name for name in _WHOLE if (folder / name).is_file()]
    pair = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if not paths and not pair:
        raise _none_here(source)
    if paths and paths[0].name != "tokenizer.json":
        _convert(paths[0], folder)
    _forget_code(folder / "tokenizer_config.json")


def _none_here(source: Path | str) -> InvalidInput:
    name = source.name if isinstance(source, Path) else source
    return InvalidInput(
        "There is no tokenizer here",
        f"{name} is neither a tokenizer.json nor a SentencePiece .model file, nor a folder with "
        "one of them.",
        "Choose the tokenizer.json of a model.",
        field="tokenizer",
    )


def _copy(source: Path, target: Path) -> None:
    if not source.is_file() or source.stat().st_size > _LARGEST:
        raise InvalidInput(
            "This file cannot be a tokenizer",
            f"{source.name} is not an ordinary file of at most {_LARGEST // 1024**2} MB.",
            "Choose the tokenizer.json of a model.",
            field="tokenizer",
        )
    shutil.copyfile(source, target)


def _convert(path: Path, folder: Path) -> None:
    """A SentencePiece model as tokenizer.json, with the special tokens that it names."""
    from mistudio.engine.datasets.sentencepiece import read_model, to_tokenizer

    model = read_model(path)
    to_tokenizer(model).save(str(folder / "tokenizer.json"))
    config = folder / "tokenizer_config.json"
    if not config.is_file():
        names = {piece.text for piece in model.pieces}
        usual = {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": model.pieces[model.unknown_id].text,
            "pad_token": "<pad>",
        }
        known = {role: token for role, token in usual.items() if token in names}
        config.write_text(json.dumps(known, indent=1), encoding="utf-8")


def _forget_code(config: Path) -> None:
    """A reference to program code of the tokenizer's own would only make loading refuse."""
    if not config.is_file():
        return
    try:
        values = json.loads(config.read_bytes())
    except ValueError as exc:
        raise CorruptFile(
            "The tokenizer's configuration is damaged",
            f"{config.name} is not valid: {exc}.",
            "Get the file again.",
        ) from exc
    if isinstance(values, dict) and values.pop("auto_map", None) is not None:
        config.write_text(json.dumps(values, indent=1), encoding="utf-8")


# --- trying one out -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chip:
    """One token of a preview. `text` shows it; `special` ones stand for no text."""

    id: int
    text: str
    special: bool
    padding: bool = False


@dataclass(frozen=True)
class Preview:
    """`tokens` counts all of the text, special tokens included and padding not; `chips` are the
    first window of it, as a dataset of this one text would have it; `windows` is how many windows
    it takes up, `cut` how many tokens are left out."""

    chips: tuple[Chip, ...]
    tokens: int
    windows: int
    cut: int


def preview(
    tokenizer: Any,
    text: str,
    settings: TokenSettings,
    bos_id: int | None,
    separator_id: int | None,
    limit: int = 512,
) -> Preview:
    """What the settings make of a text; at most `limit` chips."""
    from mistudio.engine.datasets.documents import Document
    from mistudio.engine.datasets.encoding import Encoder
    from mistudio.engine.models.loading import special_ids

    bos_id = bos_id if settings.add_special_tokens else None
    ids = Encoder(tokenizer, settings, bos_id).encode([Document(text)]).ids.tolist()
    whole = TokenSettings(
        padding="none", truncation="do_not_truncate", add_special_tokens=settings.add_special_tokens
    )
    everything = len(Encoder(tokenizer, whole, bos_id).encode([Document(text)]).ids)
    stride = max(1, settings.max_length - (bos_id is not None))
    windows = -(-len(ids) // stride) if settings.padding != "none" else len(ids) // stride
    front = [] if bos_id is None else [bos_id]
    known = special_ids(tokenizer)
    shown = [*front, *ids[:stride]] if ids else []
    if settings.padding == "max_length" and shown:
        pads = settings.max_length - len(shown)
    else:
        pads = 0
    pad = pad_token(tokenizer, separator_id)
    chips = [Chip(i, piece(tokenizer, i), i in known) for i in shown[:limit]]
    chips += [
        Chip(pad, piece(tokenizer, pad), True, padding=True)
        for _ in range(max(0, min(pads, limit - len(chips))))
    ]
    kept = len(ids) if settings.padding != "none" else windows * stride
    if settings.packed:
        everything = len(ids)
    total = everything + len(front) if everything else 0
    return Preview(tuple(chips), total, windows, max(0, everything - kept))


def piece(tokenizer: Any, token_id: int) -> str:
    """A token as text for the eye: its own spelling where it is only a part of a character."""
    token = tokenizer.convert_ids_to_tokens(token_id)
    if token is None:
        return f"<{token_id}>"
    text = str(tokenizer.decode([token_id]))
    if "\ufffd" in text or not text:
        return str(token)
    if str(token).startswith("\u2581") and not text.startswith(" "):
        return f" {text}"
    return text
