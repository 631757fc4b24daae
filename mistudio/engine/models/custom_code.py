"""Models that bring their own Python program: what would run is read, never run, until somebody
consents to exactly these bytes.

`read_folder` (and `hub.model_code` for repositories) gather the files that config.json's
`auto_map` names and what they import from beside them. `Consent` remembers their hashes.
`load_classes` compiles the very text that was hashed, under a package name that holds the hash:
nothing is written, and neither transformers' cache of downloaded modules, nor a .pyc, nor a folder
on `sys.path` can stand in for it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import json
import keyword
import stat
import sys
import threading
import types
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistudio.errors import CorruptFile, Incompatible, UnsupportedModel, UserError

CONFIG, MODEL = "AutoConfig", "AutoModelForCausalLM"
MAX_FILE = 512 * 1024  # bytes; transformers' longest model file has 200,000
MAX_ALL = 2 * 1024**2
MAX_FILES = 32
_PACKAGE = "mistudio_own_code_"
MEANING = (
    "This model brings its own program. It would run with all your rights: it could read, change "
    "and send away every file that you can."
)
_TITLE = "The model needs its own program code"


class NeedsConsent(UnsupportedModel):
    """The model can only be used by running Python code that comes with it."""


@dataclass(frozen=True)
class CodeFile:
    """A Python file as it would run. `text` is its whole content in UTF-8."""

    name: str
    bytes: int
    sha256: str
    text: str


@dataclass(frozen=True)
class Consent:
    """What somebody agreed to: `classes` as config.json's `auto_map` names them, `files` with their
    SHA-256, and where they came from (`origin`, at `revision` where it is a repository)."""

    classes: dict[str, str]
    files: dict[str, str]
    origin: str = ""
    revision: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 over the classes, the names and the hashes: one number for all that would run."""
        told = json.dumps([self.classes, self.files], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        return {
            "classes": dict(self.classes),
            "files": dict(self.files),
            "origin": self.origin,
            "revision": self.revision,
            "digest": self.digest,
        }

    @classmethod
    def from_dict(cls, row: Mapping[str, Any] | None) -> Consent | None:
        """None where there is none."""
        if not row:
            return None
        return cls(
            {str(k): str(v) for k, v in dict(row["classes"]).items()},
            {str(k): str(v) for k, v in dict(row["files"]).items()},
            str(row.get("origin", "")),
            str(row.get("revision", "")),
        )


@dataclass(frozen=True)
class OwnCode:
    """All Python files of a model that would run, by name, and the classes that are taken."""

    classes: dict[str, str]
    files: tuple[CodeFile, ...]
    origin: str
    revision: str = ""

    def consent(self) -> Consent:
        files = {file.name: file.sha256 for file in self.files}
        return Consent(dict(self.classes), files, self.origin, self.revision)

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


# --- is it needed? --------------------------------------------------------------------------------


def needs_code(raw: Mapping[str, Any]) -> bool:
    """Whether the model of this config.json can only be built by Python code of its own. Many bring
    code and do not need it: where transformers knows the architecture, its own is used."""
    from mistudio.engine.models.hf import CONFIG_MAPPING
    from mistudio.engine.models.hf import modeling_auto as auto

    if not raw.get("auto_map") or raw.get("is_encoder_decoder"):
        return False
    if raw.get("model_type") not in CONFIG_MAPPING:
        return True
    known = {
        *auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
        *auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values(),
        *auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values(),
    }
    return architecture_of(raw) not in known


def brings_unused_code(raw: Mapping[str, Any]) -> bool:
    """Whether code lies beside the model that is not used, because transformers has its own."""
    return bool(raw.get("auto_map")) and not needs_code(raw)


def architecture_of(raw: Mapping[str, Any]) -> str:
    names = raw.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def needs_consent(raw: Mapping[str, Any]) -> NeedsConsent:
    """The refusal of a model whose code nobody has consented to."""
    kind = raw.get("model_type")
    return NeedsConsent(
        _TITLE,
        f'{architecture_of(raw) or "The model"} (of type "{kind}") is Python code that comes with '
        "the download. miStudio never runs such code by itself: it could do anything on this "
        "computer.",
        "Choose a model that transformers supports itself; or read the code and consent to it "
        "(the window shows it; `mistudio model add --show-code` prints it).",
    )


def classes_of(raw: Mapping[str, Any]) -> dict[str, str]:
    """The classes that would be taken, `module.Class` each. Raises `UnsupportedModel` where they
    are no plain names of files beside config.json."""
    told = raw.get("auto_map")
    if not isinstance(told, dict) or not isinstance(told.get(MODEL), str):
        raise _refused(
            f"config.json names no class of its own that writes text ({MODEL} in auto_map)."
        )
    found = {key: told[key] for key in (CONFIG, MODEL) if isinstance(told.get(key), str)}
    for key, value in found.items():
        if "--" in value:
            raise _refused(
                f"{key} is code of another repository ({value.partition('--')[0][:80]!r}): what it "
                "holds can change without this model changing."
            )
        parts = value.split(".")
        if len(parts) != 2 or not all(map(_is_name, parts)):
            raise _refused(f"{key} is {value[:80]!r}, which names no file beside config.json.")
    return found


def _is_name(text: str) -> bool:
    return text.isascii() and text.isidentifier() and not keyword.iskeyword(text)


def _refused(why: str) -> UnsupportedModel:
    return UnsupportedModel(
        "The model's own program code cannot be used",
        why,
        "Choose a model that transformers supports itself.",
    )


# --- what would run -------------------------------------------------------------------------------


def gather(
    raw: Mapping[str, Any], read: Callable[[str], bytes], origin: str, revision: str = ""
) -> OwnCode:
    """The files that would run, followed from `auto_map` through their relative imports. They are
    parsed, never imported. `read(name)` gives a file's bytes (one more than `MAX_FILE` at most) and
    raises FileNotFoundError where there is none.

    Raises `UnsupportedModel` where code lies elsewhere, is missing, too large, or hides something.
    """
    classes = classes_of(raw)
    wanted = list(dict.fromkeys(value.split(".")[0] for value in classes.values()))
    files: dict[str, CodeFile] = {}
    total = 0
    while wanted:
        module = wanted.pop(0)
        name = f"{module}.py"
        if name in files:
            continue
        if len(files) == MAX_FILES:
            raise _refused(f"It has more than {MAX_FILES} files.")
        try:
            data = read(name)
        except FileNotFoundError:
            raise _refused(f"Its file {name} is not there.") from None
        total += len(data)
        if len(data) > MAX_FILE or total > MAX_ALL:
            raise too_large(name)
        files[name] = CodeFile(name, len(data), hashlib.sha256(data).hexdigest(), _text(name, data))
        wanted += _imports(files[name])
    for value in classes.values():
        module, _, wanted_class = value.partition(".")
        if not _defines(files[f"{module}.py"], wanted_class):
            raise _refused(f"{module}.py defines no {wanted_class}.")
    return OwnCode(classes, tuple(files[name] for name in sorted(files)), origin, revision)


def too_large(name: str) -> UnsupportedModel:
    return _refused(
        f"{name} is too long to be read: a file may have {MAX_FILE:,} bytes, all together "
        f"{MAX_ALL:,}."
    )


def read_folder(folder: Path, origin: str = "", revision: str = "") -> OwnCode:
    """What would run of a model's folder. Raises as `gather` and `read_config`."""
    from mistudio.engine.models.loading import read_config

    return gather(read_config(folder), lambda name: _read(folder, name), origin, revision)


def _read(folder: Path, name: str) -> bytes:
    path = folder / name
    check_link(folder, path)
    if not stat.S_ISREG(path.stat().st_mode):
        raise _refused(f"{name} is no plain file.")
    with path.open("rb") as file:
        return file.read(MAX_FILE + 1)


def check_link(folder: Path, path: Path) -> None:
    """Refuse links that lead out of a model's folder, save those that huggingface_hub's cache is
    made of (`snapshots/<commit>/file` -> `blobs/<hash>`)."""
    if not path.is_symlink():
        return
    home = folder.resolve()
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as exc:
        raise CorruptFile(
            "A file of the model is not there",
            f"{path.name} in {folder.name} is a link that leads nowhere.",
            "Put the file itself there, or download the model again.",
        ) from exc
    cached = home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"
    if not (target.is_relative_to(home) or cached):
        raise CorruptFile(
            "A file of the model lies elsewhere",
            f"{path.name} in {folder.name} is a link that leads out of the folder.",
            "Nothing was copied. Put the file itself there, or download the model again.",
        )


def _text(name: str, data: bytes) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise _refused(
            f"{name} is not UTF-8 text, so it cannot be shown as it would run."
        ) from None
    for sign in text.replace("\r\n", "\n"):
        # Such signs change how a line looks, not what it does: nobody could read what would run.
        if unicodedata.category(sign) in ("Cf", "Cc", "Cs", "Zl", "Zp") and sign not in "\n\t\f":
            raise _refused(
                f"{name} holds an invisible sign (U+{ord(sign):04X}): it would not do what it "
                "looks like."
            )
    return text


def _tree(file: CodeFile) -> ast.Module:
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its invalid escapes are its own matter
            return ast.parse(file.text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as exc:
        raise _refused(
            f"{file.name} is no Python that this version reads: {' '.join(str(exc).split())[:200]}."
        ) from exc


def _imports(file: CodeFile) -> list[str]:
    """The modules beside it that a file imports, wherever in it."""
    found = []
    for node in ast.walk(_tree(file)):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        names = [node.module] if node.module else [alias.name for alias in node.names]
        dots = "." * node.level
        for name in names:
            if node.level > 1 or not _is_name(name):
                raise _refused(
                    f"{file.name} imports {dots}{name[:80]} (line {node.lineno}), which leads out "
                    "of the model's folder or into another one: only files beside it are shown and "
                    "run."
                )
            found.append(name)
    return found


def _defines(file: CodeFile, name: str) -> bool:
    """A class, or something that the file imports or sets under the name."""
    for node in ast.walk(_tree(file)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return True
        if isinstance(node, ast.alias) and (node.asname or node.name) == name:
            return True
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id == name:
            return True
    return False


# --- has it changed? ------------------------------------------------------------------------------


def require_unchanged(folder: Path, consent: Consent) -> OwnCode:
    """The code of a library's folder, where it is exactly what was consented to. Raises
    `Incompatible` with what differs."""
    try:
        code = read_folder(folder, consent.origin, consent.revision)
    except UserError as exc:
        raise changed(f"{exc.what}") from exc
    found = {file.name: file.sha256 for file in code.files}
    beside = {path.name for path in folder.rglob("*.py")}
    differ = [
        *(f"{name} is missing" for name in sorted(set(consent.files) - set(found))),
        *(f"{name} was added" for name in sorted((set(found) | beside) - set(consent.files))),
        *(
            f"{name} was changed"
            for name in sorted(set(found) & set(consent.files))
            if found[name] != consent.files[name]
        ),
    ]
    if code.classes != consent.classes:
        differ.append("config.json names other classes")
    if differ:
        raise changed(f"{'; '.join(differ)}.")
    return code


def changed(why: str) -> Incompatible:
    return Incompatible(
        "The model's program is not the one you consented to",
        f"{why} Nothing of it was run.",
        "Delete this model and add it again: its files are then shown anew, and you decide.",
    )


# --- running it -----------------------------------------------------------------------------------

_importing = threading.Lock()


@dataclass(frozen=True)
class Program:
    """A consented model's classes, imported. `config` is built from the checked config.json."""

    config: Any
    model: Any


def load_classes(folder: Path, consent: Consent) -> Program:
    """Import the classes of a model in the library, after its files were compared with the consent.
    This runs the model's code, with the user's rights."""
    from mistudio.engine.models.hf import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
    from mistudio.engine.models.loading import read_config

    raw = read_config(folder)
    code = require_unchanged(folder, consent)
    with _importing:
        model = _class(folder, code, MODEL)
        config = _class(folder, code, CONFIG) if CONFIG in code.classes else None
    config = config or CONFIG_MAPPING[raw["model_type"]]
    for one, kind in ((model, PreTrainedModel), (config, PreTrainedConfig)):
        if not (isinstance(one, type) and issubclass(one, kind)):
            raise _refused(f"{one!r} is no {kind.__name__}.")
    with own_words():
        return Program(config.from_dict(raw), model)


def try_building(folder: Path, consent: Consent, n_layers: int, vocab_size: int) -> None:
    """Build the model without weights, so that a program that does not work here, or is of another
    model than the weights, is found out before it is kept."""
    import torch

    from mistudio.engine.models.loading import quiet_transformers
    from mistudio.engine.models.quantise import find_blocks

    program = load_classes(folder, consent)
    with own_words(), quiet_transformers(), torch.device("meta"):
        model = program.model(program.config)
        found = len(find_blocks(model, n_layers)), len(model.get_input_embeddings().weight)
    if found != (n_layers, vocab_size):
        raise CorruptFile(
            "The model's weights do not fit its program",
            f"Its program builds {found[0]:,} layers and {found[1]:,} tokens; its files hold "
            f"{n_layers:,} and {vocab_size:,}.",
            "Download the model again.",
        )


@contextmanager
def own_words() -> Iterator[None]:
    """Whatever the model's own program raises, as a refusal in words."""
    from mistudio.engine.progress import Cancelled

    try:
        yield
    except (UserError, Cancelled, MemoryError, OSError):
        raise
    except (Exception, SystemExit) as exc:
        if isinstance(exc, ModuleNotFoundError) and not str(exc.name).startswith(_PACKAGE):
            raise UnsupportedModel(
                "The model needs another library",
                f"Its program imports {exc.name}, which is not installed.",
                "Install it into miStudio's environment, or choose another model.",
            ) from exc
        said = " ".join(str(exc).split())[:300]
        raise UnsupportedModel(
            "The model's own program does not work here",
            f"{type(exc).__name__}: {said}",
            "It may be written for another version of transformers; look for a newer revision of "
            "the model, or choose another one.",
        ) from exc


def _class(folder: Path, code: OwnCode, key: str) -> Any:
    module_name, _, name = code.classes[key].partition(".")
    package = _PACKAGE + code.consent().digest
    if package not in sys.modules:
        made = types.ModuleType(package)
        made.__path__ = []
        sys.modules[package] = made
        sys.meta_path.insert(0, _Finder(package, folder, code))
    with own_words():
        return getattr(importlib.import_module(f"{package}.{module_name}"), name)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of one program: those that were shown, and no others."""

    def __init__(self, package: str, folder: Path, code: OwnCode) -> None:
        self._prefix, self._folder = f"{package}.", folder
        self._texts = {file.name.removesuffix(".py"): file.text for file in code.files}

    def find_spec(
        self, fullname: str, path: Any, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        name = fullname.removeprefix(self._prefix)
        if not fullname.startswith(self._prefix) or name not in self._texts:
            return None
        place = str(self._folder / f"{name}.py")
        loader = _Loader(place, self._texts[name])
        return importlib.machinery.ModuleSpec(fullname, loader, origin=place)


class _Loader(importlib.abc.ExecutionLoader):
    """Compiles the text that was hashed; the file is not opened again."""

    def __init__(self, place: str, text: str) -> None:
        self._place, self._text = place, text

    def get_filename(self, fullname: str) -> str:
        return self._place

    def get_source(self, fullname: str) -> str:
        return self._text
