"""Which files a path stands for. Nothing is opened here: a pipe or a device would never answer."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from mistudio.errors import InvalidInput, NotFound, UserError

SUFFIXES = (".txt", ".md", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".zst")
_ALIASES = {
    ".text": ".txt",
    ".markdown": ".md",
    ".ndjson": ".jsonl",
    ".tab": ".tsv",
    ".pq": ".parquet",
    ".ipc": ".arrow",
    ".arrows": ".arrow",
    ".feather": ".arrow",
    ".gzip": ".gz",
    ".zstd": ".zst",
}
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar", ".bz2", ".xz", ".lz4")
# Files about the data that lie beside it in folders from the Hub.
_ABOUT = {
    "readme.md", "readme.txt", "license.txt", "license.md", "dataset_info.json",
    "dataset_infos.json", "dataset_dict.json", "state.json", ".gitattributes",
}  # fmt: skip
_DATA = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
# Words in names of files and folders that say which split they are.
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
_SPLIT_ORDER = ("train", "validation", "test", "")


@dataclass(frozen=True)
class SourceFile:
    """A file to read. `name` is for people: relative to the folder that was chosen, printable."""

    path: Path
    name: str
    format: str
    compression: str
    size: int
    mtime_ns: int
    split: str = ""


@dataclass
class Found:
    """The files of a path, splits side by side; `links` and `others` were not followed or read."""

    files: list[SourceFile] = field(default_factory=list)
    links: int = 0  # that lead out of the folder, in a circle, or nowhere
    specials: int = 0  # pipes, sockets, devices
    empty: int = 0
    unreadable: list[str] = field(default_factory=list)  # folders without permission

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files)

    def left_out(self) -> list[str]:
        """A sentence for each kind of thing that was not read."""
        sentences = []
        if self.links:
            sentences.append(
                f"{_number(self.links, 'link')} not followed: only files that lie in the folder "
                "itself are read."
            )
        if self.specials:
            pipes = _number(self.specials, "pipe or device", "pipes or devices")
            sentences.append(f"{pipes} left out.")
        if self.empty:
            sentences.append(f"{_number(self.empty, 'empty file')} left out.")
        if self.unreadable:
            sentences.append(f"No permission to look into {', '.join(self.unreadable[:3])}.")
        return sentences


def find_files(path: Path) -> Found:
    """The readable files that a path stands for, refused with a sentence where there are none."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as exc:
        if path.is_symlink():
            what = f"{shown(path)} is a link that leads nowhere."
        else:
            what = f"There is nothing at {shown(path)}."
        raise NotFound("File not found", what, "Check the path.") from exc
    except (OSError, ValueError) as exc:  # ValueError: a zero byte in the path
        raise _unreachable(path, exc) from exc
    if stat.S_ISDIR(status.st_mode):
        return _of_folder(path)
    return Found([_single(path, status)])


def kind_of(path: PurePath) -> tuple[str, str] | None:
    """(format, compression) by the name, such as (".jsonl", ".gz"); None where we read no such."""
    suffixes = [_ALIASES.get(s.lower(), s.lower()) for s in path.suffixes[-2:]]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    format = suffixes[-1] if suffixes else ""
    return (format, compression) if format in SUFFIXES else None


def shown(path: Path | str) -> str:
    """A path as it can be printed and stored: bytes that are no UTF-8 and line breaks in names
    are replaced."""
    text = os.fsencode(path).decode("utf-8", "replace")
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", "\N{REPLACEMENT CHARACTER}", text)


def stem(path: Path) -> str:
    """A name without the endings that say its kind: `texts` of `texts.jsonl.gz`."""
    endings = kind_of(path)
    ending = "".join(path.suffixes[-2:] if endings and endings[1] else path.suffixes[-1:])
    return shown(path.name.removesuffix(ending) if endings else path.name)


def _single(path: Path, status: os.stat_result) -> SourceFile:
    if not stat.S_ISREG(status.st_mode):
        raise InvalidInput(
            "This is not a file",
            f"{shown(path)} is a pipe, a socket or a device; reading it might never end.",
            "Save its content in a file, then choose that.",
        )
    kind = kind_of(path)
    if kind is None:
        raise _unknown_kind(path)
    if status.st_size == 0:
        raise InvalidInput(
            "The file is empty",
            f"{shown(path)} has 0 bytes.",
            "Choose a file with text in it.",
        )
    return SourceFile(path, shown(path.name), *kind, status.st_size, status.st_mtime_ns)


def _unknown_kind(path: Path) -> InvalidInput:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    known = ", ".join(SUFFIXES)
    if suffixes and suffixes[-1] in _ARCHIVES:
        step = "Unpack it, then choose the file or folder that was inside."
    elif suffixes and _ALIASES.get(suffixes[-1], suffixes[-1]) in COMPRESSIONS:
        step = "Rename it so that its name says what is inside, such as texts.jsonl.gz."
    else:
        step = "Convert it to one of these (JSON lines keeps titles and topics)."
    return InvalidInput(
        "This kind of file cannot be read",
        f"{shown(path.name)} is not one of {known}, nor one of these packed as .gz or .zst.",
        step,
    )


def _of_folder(root: Path) -> Found:
    found = Found()
    named = list(_walk(root, found))
    if any(file.format in _DATA for file in named):
        named = [f for f in named if f.path.name.lower() not in _ABOUT] or named
    filled = [file for file in named if file.size]
    found.empty = len(named) - len(filled)
    if not filled:
        raise InvalidInput(
            "No text files in this folder",
            " ".join([f"{shown(root)} holds none of {', '.join(SUFFIXES)}.", *found.left_out()]),
            "Choose a folder with text files, or a single file.",
        )
    found.files = _by_split(filled)
    return found


def _walk(root: Path, found: Found) -> list[SourceFile]:
    """Hidden files and folders are left out, as other programs' notes."""

    def fault(exc: OSError) -> None:
        found.unreadable.append(shown(exc.filename or root))

    files: list[SourceFile] = []
    links: list[Path] = []
    for base, folders, names in os.walk(root, onerror=fault):
        folders[:] = sorted(n for n in folders if not n.startswith(".") and n != "__MACOSX")
        for name in [*names, *folders]:
            path = Path(base, name)
            if path.is_symlink():
                links.append(path)
            elif name not in folders and not name.startswith(".") and (kind := kind_of(path)):
                _add(path, kind, root, files, found)
    _follow(links, root, files, found)
    if not files and found.unreadable:
        raise UserError(
            "No permission",
            f"{found.unreadable[0]} may not be looked into.",
            "Change its permissions, or choose another folder.",
        )
    return files


def _follow(links: list[Path], root: Path, files: list[SourceFile], found: Found) -> None:
    """Links to files inside the folder that are not read anyway; all others are counted."""
    inside = root.resolve()
    known = {file.path.resolve() for file in files} if links else set()
    for link in sorted(links):
        try:
            target = link.resolve(strict=True)
        except (OSError, RuntimeError):  # RuntimeError: a circle
            found.links += 1
            continue
        kind = kind_of(link)
        if kind and target.is_relative_to(inside) and target.is_file():
            if target not in known:
                known.add(target)
                _add(link, kind, root, files, found)
        elif kind or target.is_dir():
            found.links += 1


def _add(
    path: Path, kind: tuple[str, str], root: Path, files: list[SourceFile], found: Found
) -> None:
    try:
        status = path.stat()
    except OSError:  # gone since it was listed
        return
    if not stat.S_ISREG(status.st_mode):
        found.specials += 1
        return
    name = shown(path.relative_to(root))
    files.append(SourceFile(path, name, *kind, status.st_size, status.st_mtime_ns))


def _by_split(files: list[SourceFile]) -> list[SourceFile]:
    """In the order of their names, one split after the other. Names say something only where one
    of them says `train`: a lone `test.txt` is just a file."""
    splits = {file.path: split_of(file.name) for file in files}
    if "train" not in splits.values():
        splits = dict.fromkeys(splits, "")
    marked = [
        SourceFile(f.path, f.name, f.format, f.compression, f.size, f.mtime_ns, splits[f.path])
        for f in files
    ]
    return sorted(marked, key=lambda file: (_SPLIT_ORDER.index(file.split), file.path))


def split_of(name: str) -> str:
    """The split that a relative path names (`data/train-00000-of-00003.parquet`), the innermost
    first; empty where it names none."""
    for part in reversed(re.split(r"[/\\]", name)):
        for word in re.split(r"[-_. ]", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return ""


def _unreachable(path: Path, exc: OSError | ValueError) -> UserError:
    return UserError(
        "The file cannot be reached",
        f"{shown(path)}: {getattr(exc, 'strerror', None) or exc}.",
        "Check the path and its permissions.",
    )


def _number(n: int, noun: str, plural: str = "") -> str:
    return f"{n:,} {noun if n == 1 else plural or noun + 's'} {'was' if n == 1 else 'were'}"
