"""Paths: what is no file, what must not be followed, names that cannot be printed."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

from hostile import ANY, case

Make = Callable[[Path], Path]


def text(path: Path, content: str = "some words") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def named(name: str | bytes) -> Make:
    """A good file whose name is the matter."""

    def make(folder: Path) -> Path:
        return text(Path(os.fsdecode(os.path.join(os.fsencode(folder), os.fsencode(name)))))

    return make


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.txt")
    return folder / "pipe.txt"


def bound_socket(folder: Path) -> Path:
    before = os.getcwd()
    os.chdir(folder)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("socket.txt")
    finally:
        os.chdir(before)
    return folder / "socket.txt"


def inside(make: Make, content: str | None = "good") -> Make:
    """The folder itself is added, with a good file beside the bad thing or without."""

    def both(folder: Path) -> Path:
        make(folder)
        if content is not None:
            text(folder / "beside.txt", content)
        return folder

    return both


def link(target: str, name: str = "link.txt") -> Make:
    def make(folder: Path) -> Path:
        (folder / name).symlink_to(target)
        return folder / name

    return make


def out_of_the_folder(folder: Path) -> Path:
    text(folder / "secret.txt", "secret")
    (folder / "chosen").mkdir()
    (folder / "chosen" / "link.txt").symlink_to("../secret.txt")
    (folder / "chosen" / "up").symlink_to("..")
    text(folder / "chosen" / "own.txt", "own")
    return folder / "chosen"


def circle(folder: Path) -> Path:
    (folder / "a.txt").symlink_to("b.txt")
    (folder / "b.txt").symlink_to("a.txt")
    return folder / "a.txt"


def folders_in_a_circle(folder: Path) -> Path:
    text(folder / "deep" / "a.txt", "once")
    (folder / "deep" / "again").symlink_to("..")
    return folder


def link_within(folder: Path) -> Path:
    text(folder / "blobs" / "0123abcd", "from a blob")
    (folder / "data.txt").symlink_to("blobs/0123abcd")
    return folder


def linked_twice(folder: Path) -> Path:
    text(folder / "a.txt", "once")
    (folder / "b.txt").symlink_to("a.txt")
    return folder


def sparse(size: int, name: str = "sparse.txt", begins: bytes = b"") -> Make:
    def make(folder: Path) -> Path:
        with (folder / name).open("wb") as file:
            file.write(begins)
            file.truncate(size)
        return folder / name

    return make


def deep(folder: Path) -> Path:
    path = folder
    for _ in range(60):
        path = path / "down"
    text(path / "a.txt", "deep down")
    return folder


def many(folder: Path) -> Path:
    for i in range(500):
        text(folder / f"{i:03}.txt", f"file {i}")
    return folder


def empty_folder(folder: Path) -> Path:
    (folder / "x.parquet").mkdir()
    return folder / "x.parquet"


def several(contents: dict[str, str]) -> Make:
    def make(folder: Path) -> Path:
        for name, content in contents.items():
            text(folder / name, content)
        return folder

    return make


def missing(name: str) -> Make:
    return lambda folder: folder / name


case("nothing there", missing("none.txt"), "nothing at")
case("nothing there, with a line break", missing("no\nne.txt"), "nothing at")
case("below a file", lambda f: text(f / "a.txt") / "b.txt", "nothing at")
case("a name too long", missing("n" * 300 + ".txt"), "cannot be reached")
case("a zero byte in the name", missing("a\0b.txt"), "cannot be reached")
case("an empty file", named_empty := (lambda f: text(f / "a.txt", "")), "0 bytes")
case("an empty folder", lambda f: f, "No text files")
case("a folder of empty files", inside(named_empty, ""), "empty files")
case("an empty file beside a good one", inside(named_empty), ["good"])
case("an unknown kind", named("a.docx"), "cannot be read")
case("no ending", named("noname"), "cannot be read")
case("only an ending", named(".txt"), "cannot be read")
case("dots alone", named("..txt"), "cannot be read")
case("a pipe", fifo, "pipe, a socket or a device")
case("a pipe in a folder", inside(fifo), ["good"])
case("nothing but a pipe", inside(fifo, None), "1 pipe or device was left out")
case("a socket", bound_socket, "pipe, a socket or a device")
case("a socket in a folder", inside(bound_socket), ["good"])
for device in ("/dev/zero", "/dev/null", "/dev/random", "/dev/tty"):
    case(f"a link to {device}", link(device), ANY if device == "/dev/tty" else "device")
    case(f"a link to {device} in a folder", inside(link(device)), ["good"])
case("a link to endless memory", link("/proc/self/mem"), ANY)
case("a link to a file of no size", link("/proc/self/environ"), "0 bytes")
case("a folder called x.txt", lambda f: text(f / "x.txt" / "a.txt").parent, ["some words"])
case("a folder called x.txt in a folder", lambda f: text(f / "x.txt" / "a.txt").parent.parent, 1)
case("an empty folder called x.parquet", empty_folder, "No text files")
case("a link to nothing", link("nowhere.txt"), "leads nowhere")
case("a link to nothing in a folder", inside(link("nowhere.txt")), ["good"])
case("a link to itself", link("link.txt"), "cannot be reached")
case("links in a circle", circle, "cannot be reached")
case("links in a circle in a folder", inside(circle), ["good"])
case("links out of the folder", out_of_the_folder, ["own"])
case("folders in a circle", folders_in_a_circle, ["once"])
case("nothing but a link out", inside(link("/etc/hostname"), None), "1 link was not followed")
case("a link to a file within", link_within, ["from a blob"])
case("a link to a file that is read anyway", linked_twice, ["once"])
case("a terabyte of zeros", sparse(10**12), "disk space")
case("a gigabyte of zeros", sparse(10**9), "not a text file")
case("a gigabyte of zeros as JSON lines", sparse(10**9, "s.jsonl"), "not a text file")
case("a gigabyte of zeros as Parquet", sparse(10**9, "s.parquet"), "s.parquet")
case("a gigabyte of zeros as Arrow", sparse(10**9, "s.arrow"), "s.arrow")
case("a gigabyte of zeros, packed", sparse(10**9, "s.jsonl.gz"), "s.jsonl.gz")
case("a folder 60 deep", deep, ["deep down"])
case("500 files", many, 500)
for name in (
    "line\nbreak.txt", b"not utf-8 \xff\xfe.txt", "n" * 240 + ".txt", "emoji 🙂.txt", "-rf.txt",
    " .txt", "'quotes\" $(x) `y`.txt", "back\\slash.txt", "%s {} \x1b[31m.txt", "\u202egpj.txt",
    "CON.txt", "a..txt", "ümlaut e\u0301.TXT", "semi;colon&.txt",
):  # fmt: skip
    case(f"named {name!r:.40}", named(name), ["some words"])
    case(f"named {name!r:.40} in a folder", inside(named(name), None), 1)
case(
    "one bad file among good ones",
    several({"a.jsonl": '{"text": "a"}', "b.jsonl": "broken", "c.jsonl": '{"text": "c"}'}),
    "b.jsonl, line 1",
    ["a", "c"],
)
case(
    "a file without text among good ones",
    several({"a.jsonl": '{"text": "a"}', "b.csv": "x,y\n1,2\n", "c.json": "[", "d.json": '["d"]'}),
    ANY,
    ANY,
)
case(
    "notes about the data",
    several({"README.md": "# Read me", "d.jsonl": '{"text": "a"}', ".hidden.txt": "h"}),
    ["a"],
)
case("hidden files and folders", several({".git/a.txt": "x", "b.txt": "b"}), ["b"])
case("what archives leave", several({"__MACOSX/._a.txt": "\0", "a.txt": "a"}), ["a"])
