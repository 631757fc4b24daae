#!/usr/bin/env python3
"""Set up miStudio in .venv and run it: the window, the demo, the tests, the command line.

Standard library only. Every step can be repeated: what is done is not done again, what was
interrupted is repaired, and a start that finds everything in place adds well under a second.
"""

import contextlib
import datetime
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time

MINIMUM_PYTHON = (3, 11)


def python_problem(version, which=shutil.which):
    """What to say to a Python that is too old, or None. Runs on any Python 3.6 or newer."""
    if tuple(version[:2]) >= MINIMUM_PYTHON:
        return None
    newer = next((p for p in ("python3.13", "python3.12", "python3.11") if which(p)), None)
    advice = f"Found {newer}: run it as `{newer} run.py`."
    if newer is None:
        advice = "Install Python 3.11 or newer and run this again with it."
    return (
        f"miStudio needs Python 3.11 or newer; this is Python {version[0]}.{version[1]}. {advice}"
    )


if python_problem(sys.version_info):
    sys.exit(python_problem(sys.version_info))

import dataclasses  # noqa: E402
import tomllib  # noqa: E402
from collections.abc import Iterable, Mapping, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
# The libraries that a benchmark compares with; they and the app cannot share an environment.
PEERS = ROOT / ".venv-peers"


def python_of(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


PYTHON = python_of(VENV)
STATE = VENV / "mistudio"
LOG = STATE / "setup.log"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
KEPT_IF_IN_RANGE = ("torch", "pyside6-essentials")

USAGE = """\
usage: python3 run.py [COMMAND] [ARGUMENTS]

  app [ARGS]        start the window (this is what happens without a command)
  demo [ARGS]       the whole road on the sample: import, tokenise, extract, train, discover, steer;
                    --no-window prints a report and ends, --library DIR, --json FILE
  mistudio ARGS     the command line: list, doctor, dataset add, model add, train, ...
  test [ARGS]       the checks and then the test suite; ARGS go to pytest
  check [NAMES]     lint, format, types, layers: all of them or those named
  bench [NAMES] [OPTIONS]
                    the benchmarks in tests/benchmarks; keeps their tables in results/ there.
                    `bench peers` alone compares with SAELens, which it installs in .venv-peers
                    (--help shows its options; in full it takes hours and can be interrupted)
  setup [EXTRAS]    set up only; EXTRAS: test

The first start creates .venv and installs what the command needs, later starts go straight on.
MISTUDIO_TORCH="pip arguments" chooses the torch build by hand, for example a wheel's path.
"""


class SetupError(Exception):
    """Set-up cannot go on; the text says what happened and what to do."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- what is wanted -------------------------------------------------------------------------------


def version_key(version: str) -> tuple[int, ...]:
    """The release numbers of a version, padded: "2.13.0+cpu" -> (2, 13, 0, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in match.group().split(".")] if match else []
    return (*numbers, 0, 0, 0, 0)[:4]


def satisfies(version: str, specifiers: str) -> bool:
    """Whether a version lies in a range such as ">=6.8,!=6.9.1,<7". Local parts do not count."""
    compare = {
        ">=": lambda a, b: a >= b,
        "<=": lambda a, b: a <= b,
        "==": lambda a, b: a == b,
        "!=": lambda a, b: a != b,
        ">": lambda a, b: a > b,
        "<": lambda a, b: a < b,
    }
    for specifier in filter(None, (part.strip() for part in specifiers.split(","))):
        match = re.fullmatch(r"(>=|<=|==|!=|>|<)\s*([\d.]+)", specifier)
        if not match:
            raise ValueError(f"cannot read the version range {specifier!r}")
        if not compare[match.group(1)](version_key(version), version_key(match.group(2))):
            return False
    return True


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared_ranges(pyproject: Mapping, python: str) -> dict[str, str]:
    """Canonical name -> version range of the app's own dependencies, for one Python version."""
    ranges = {}
    for requirement in pyproject["project"]["dependencies"]:
        text, _, marker = requirement.partition(";")
        condition = re.fullmatch(r'\s*python_version\s*(\S+)\s*"([\d.]+)"\s*', marker)
        if condition and not satisfies(python, condition.group(1) + condition.group(2)):
            continue
        match = re.fullmatch(r"\s*([A-Za-z0-9._-]+)\s*(\[.*?\])?\s*(.*?)\s*", text)
        if match:
            ranges[canonical(match.group(1))] = match.group(3)
    return ranges


def kept_versions(ranges: Mapping[str, str], installed: Mapping[str, str]) -> dict[str, str]:
    """What is installed already and inside the range: too large to exchange without need."""
    return {
        name: installed[name]
        for name in KEPT_IF_IN_RANGE
        if name in installed and satisfies(installed[name], ranges.get(name, ""))
    }


def constraints_keeping(constraints: str, kept: Mapping[str, str]) -> str:
    """The constraints file with the pins of kept packages replaced by what is installed."""
    lines = []
    for line in constraints.splitlines():
        name, _, pin = line.partition("==")
        lines.append(
            f"{name}=={kept[canonical(name)]}" if pin and canonical(name) in kept else line
        )
    return "\n".join(lines) + "\n"


def pinned(constraints: str, name: str) -> str:
    """The requirement that the constraints file pins, "torch==2.13.0"."""
    for line in constraints.splitlines():
        if canonical(line.partition("==")[0].strip()) == canonical(name):
            return line.strip()
    return name


def setup_key(
    pyproject: Mapping, constraints: str, python: str, extras: Iterable[str], root: str
) -> str:
    """A hash of everything that decides what must be installed."""
    parts = [
        json.dumps(pyproject.get("build-system"), sort_keys=True),
        json.dumps(pyproject.get("project"), sort_keys=True),
        json.dumps(pyproject.get("tool", {}).get("setuptools"), sort_keys=True),
        constraints,
        python,
        "+".join(sorted(extras)),
        root,
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


# --- which torch ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Machine:
    """What decides the torch build."""

    system: str
    nvidia: bool = False
    jetson: bool = False


@dataclasses.dataclass(frozen=True)
class TorchChoice:
    label: str
    arguments: tuple[str, ...]
    note: str = ""


def choose_torch(machine: Machine, override: str, pin: str) -> TorchChoice:
    """The pip arguments that install torch: the small CPU build unless a GPU is there to use."""
    if override:
        return TorchChoice(
            f"torch as MISTUDIO_TORCH says ({override})", tuple(shlex.split(override))
        )
    cpu = (pin, "--extra-index-url", CPU_INDEX)
    if machine.jetson:
        return TorchChoice(
            "torch (CPU build)",
            cpu,
            "This is a Jetson. For its GPU, take the torch wheel that NVIDIA offers for your "
            "JetPack and run this again with MISTUDIO_TORCH set to the wheel's path, or to "
            "'torch --index-url URL' with the index NVIDIA names; see README, 'Which torch'.",
        )
    if machine.system == "Darwin":
        return TorchChoice("torch (with Metal)", (pin,))
    if machine.nvidia:
        return TorchChoice("torch (CUDA build, several GB)", (pin,))
    return TorchChoice("torch (CPU build)", cpu)


def this_machine() -> Machine:
    jetson = os.path.exists("/etc/nv_tegra_release") or "tegra" in platform.release()
    nvidia = os.path.exists("/proc/driver/nvidia/version")
    smi = shutil.which("nvidia-smi")
    if smi and not nvidia:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            answer = subprocess.run([smi, "-L"], capture_output=True, text=True, timeout=20)
            nvidia = answer.returncode == 0 and "GPU" in answer.stdout
    return Machine(platform.system(), nvidia, jetson)


# --- system libraries that Qt loads ---------------------------------------------------------------

QT_LIBRARIES = {
    "libglib-2.0.so.0": "libglib2.0-0",
    "libgthread-2.0.so.0": "libglib2.0-0",
    "libEGL.so.1": "libegl1",
    "libGL.so.1": "libgl1",
    "libdbus-1.so.3": "libdbus-1-3",
    "libfontconfig.so.1": "libfontconfig1",
    "libfreetype.so.6": "libfreetype6",
    "libxkbcommon.so.0": "libxkbcommon0",
    "libX11.so.6": "libx11-6",
}
XCB_LIBRARIES = {
    "libX11-xcb.so.1": "libx11-xcb1",
    "libxcb.so.1": "libxcb1",
    "libxcb-cursor.so.0": "libxcb-cursor0",
    "libxcb-icccm.so.4": "libxcb-icccm4",
    "libxcb-image.so.0": "libxcb-image0",
    "libxcb-keysyms.so.1": "libxcb-keysyms1",
    "libxcb-randr.so.0": "libxcb-randr0",
    "libxcb-render.so.0": "libxcb-render0",
    "libxcb-render-util.so.0": "libxcb-render-util0",
    "libxcb-shape.so.0": "libxcb-shape0",
    "libxcb-shm.so.0": "libxcb-shm0",
    "libxcb-sync.so.1": "libxcb-sync1",
    "libxcb-util.so.1": "libxcb-util1",
    "libxcb-xfixes.so.0": "libxcb-xfixes0",
    "libxcb-xkb.so.1": "libxcb-xkb1",
    "libxkbcommon-x11.so.0": "libxkbcommon-x11-0",
}
# Releases from before the 64-bit time_t change, which renamed some packages.
OLD_NAMES_IN = {"buster", "bullseye", "bookworm", "focal", "jammy"}
RENAMED = {"libglib2.0-0": "libglib2.0-0t64"}


def apt_packages(libraries: Iterable[str], codename: str) -> list[str]:
    """The Debian or Ubuntu packages that hold these libraries, each once, in order."""
    known = QT_LIBRARIES | XCB_LIBRARIES
    names = [known[library] for library in libraries if library in known]
    if codename not in OLD_NAMES_IN:
        names = [RENAMED.get(name, name) for name in names]
    return list(dict.fromkeys(names))


def read_os_release(text: str) -> dict[str, str]:
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {key.strip(): value.strip().strip("\"'") for key, _, value in pairs}


def apt_command(packages: Sequence[str], sudo: str = "sudo ") -> str:
    return f"{sudo}apt-get update && {sudo}apt-get install -y --no-install-recommends " + " ".join(
        packages
    )


def missing_libraries_line(libraries: Sequence[str], packages: Sequence[str]) -> str:
    """One line: what is missing and the command that installs it."""
    what = f"Qt cannot load {', '.join(libraries)}."
    if packages:
        return f"{what} Install what is missing with: {apt_command(packages)}"
    return f"{what} Install them with your system's package manager and run this again."


PROBE = r"""
import ctypes, json, os, sys
wanted, xcb = json.loads(sys.argv[1])
error = None
try:
    from PySide6 import QtCore, QtGui, QtNetwork, QtSvg, QtSvgWidgets, QtWidgets
    if xcb:
        plugins = QtCore.QLibraryInfo.path(QtCore.QLibraryInfo.LibraryPath.PluginsPath)
        ctypes.CDLL(os.path.join(plugins, "platforms", "libqxcb.so"))
    os.environ["QT_QPA_PLATFORM"] = "offscreen"
except (ImportError, OSError) as problem:
    error = str(problem)
missing = []
if error:
    for name in wanted:
        try:
            ctypes.CDLL(name)
        except OSError:
            missing.append(name)
    named = error.partition(":")[0].strip()
    if named.endswith(".so") or ".so." in named:
        if named not in missing and os.sep not in named:
            missing.append(named)
print(json.dumps({"error": error, "missing": missing}))
"""


def missing_qt_libraries(xcb: bool) -> list[str]:
    """Libraries that keep Qt from starting, found by loading Qt in a child process."""
    wanted = list(QT_LIBRARIES) + (list(XCB_LIBRARIES) if xcb else [])
    child = subprocess.run(
        [str(PYTHON), "-c", PROBE, json.dumps([wanted, xcb])],
        capture_output=True,
        text=True,
        env={**os.environ, "QT_QPA_PLATFORM": "offscreen"},
    )
    try:
        answer = json.loads(child.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        raise SetupError(
            f"Qt does not start here (exit {child.returncode}): {child.stderr.strip()[-800:]}"
        ) from None
    if answer["error"] and not answer["missing"]:
        raise SetupError(f"Qt does not start here: {answer['error']}")
    return answer["missing"]


def install_with_apt(packages: Sequence[str]) -> bool:
    """Install system packages where we may; the outcome, with apt's words when it fails."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    with step(f"system libraries for Qt ({', '.join(packages)})"):
        for command in (["apt-get", "update"], install):
            result = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
            )
        if result.returncode:
            say(result.stdout[-1500:])
        return result.returncode == 0


def ensure_qt(xcb: bool) -> None:
    """Check for Qt's system libraries; install them if we may, else say in one line what to do."""
    if platform.system() != "Linux":
        return
    stamp = STATE / ("qt-xcb.stamp" if xcb else "qt-offscreen.stamp")
    key = setup_stamps_text()
    if key and stamp.is_file() and stamp.read_text() == key:
        return
    missing = missing_qt_libraries(xcb)
    if missing:
        release = {}
        with contextlib.suppress(OSError):
            release = read_os_release(Path("/etc/os-release").read_text())
        debian = shutil.which("apt-get") is not None
        codename = release.get("UBUNTU_CODENAME") or release.get("VERSION_CODENAME", "")
        packages = apt_packages(missing, codename) if debian else []
        if packages and os.geteuid() == 0 and install_with_apt(packages):
            missing = missing_qt_libraries(xcb)
            packages = apt_packages(missing, codename)
    if missing:
        raise SetupError(missing_libraries_line(missing, packages))
    stamp.write_text(key)


# --- set-up ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def step(label: str):
    """One line when a step begins and one with its time when it ends."""
    say(f"  {label} ...")
    began = time.monotonic()
    yield
    say(f"    done in {time.monotonic() - began:.1f} s")


def child_environment(**more: str) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "PYTHONPATH")}
    return environment | more


def venv_python_works(venv: Path = VENV) -> bool:
    """Whether it has an interpreter that starts, new enough and the one it was made for."""
    python = python_of(venv)
    if not python.exists() or not (venv / "pyvenv.cfg").is_file():
        return False
    ask = "import sys; print(sys.version_info[:2] >= (3, 11), sys.prefix != sys.base_prefix)"
    try:
        answer = subprocess.run(
            [str(python), "-I", "-c", ask], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    made_for = re.search(r"^version(?:_info)?\s*=\s*(\d+\.\d+)", _text(venv / "pyvenv.cfg"), re.M)
    library = venv / "lib" / f"python{made_for.group(1)}" if made_for else venv
    return answer.stdout.split() == ["True", "True"] and (os.name == "nt" or library.is_dir())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def venv_identity(venv: Path = VENV) -> str:
    """Its interpreter: changes when it is rebuilt or its base Python is replaced."""
    version = re.search(r"^version(?:_info)?\s*=\s*(\S+)", _text(venv / "pyvenv.cfg"), re.M)
    return f"{version.group(1) if version else '?'} {os.path.realpath(python_of(venv))}"


def stamp_path(extras: Iterable[str]) -> Path:
    return STATE / f"setup-{'+'.join(sorted(extras)) or 'app'}.stamp"


def setup_stamps_text() -> str:
    """All set-up stamps as one text: a check that depends on what is installed remembers it."""
    return "".join(_text(path) for path in sorted(STATE.glob("setup-*.stamp")))


def is_set_up(extras: set[str], pyproject: Mapping, constraints: str) -> bool:
    """Whether a stamp says that at least these extras are installed as the files now ask."""
    if not PYTHON.exists():
        return False
    for path in STATE.glob("setup-*.stamp"):
        names = set(path.stem.removeprefix("setup-").split("+")) - {"app"}
        if names >= extras:
            key = setup_key(pyproject, constraints, venv_identity(), names, str(ROOT))
            if _text(path) == key:
                return True
    return False


# Looks for packages whose installation was cut short and forgets them, so that pip installs them
# again instead of taking them for done. Prints their names.
REPAIR = r"""
import importlib.metadata, os, shutil, sysconfig
site = sysconfig.get_paths()["purelib"]
for entry in os.listdir(site):
    if entry.startswith("~"):
        shutil.rmtree(os.path.join(site, entry), ignore_errors=True)
for distribution in list(importlib.metadata.distributions(path=[site])):
    files = distribution.files
    whole = files and distribution.metadata["Name"] and all(
        os.path.exists(distribution.locate_file(f)) for f in files if not str(f).endswith(".pyc")
    )
    if not whole:
        print(os.path.basename(distribution._path))
        shutil.rmtree(distribution._path, ignore_errors=True)
"""

INSTALLED = r"""
import importlib.metadata, json, re, sysconfig
found = importlib.metadata.distributions(path=[sysconfig.get_paths()["purelib"]])
print(json.dumps({re.sub("[-_.]+", "-", d.metadata["Name"]).lower(): d.version for d in found}))
"""


def in_venv(code: str, venv: Path = VENV) -> str:
    return subprocess.run(
        [str(python_of(venv)), "-I", "-c", code], capture_output=True, text=True, check=True
    ).stdout


def make_venv(venv: Path = VENV) -> None:
    """Create it; without ensurepip (fresh Debian) pip is put in afterwards."""
    with step(f"virtual environment in {venv.name} (Python {platform.python_version()})"):
        command = [sys.executable, "-m", "venv", "--clear"]
        if importlib.util.find_spec("ensurepip"):
            result = subprocess.run([*command, str(venv)], capture_output=True, text=True)
            if result.returncode == 0:
                return
        result = subprocess.run(
            [*command, "--without-pip", str(venv)], capture_output=True, text=True
        )
        if result.returncode:
            raise SetupError(
                f"Python could not create {venv}: {(result.stderr or result.stdout).strip()[-600:]}"
            )


def pip_environment() -> dict[str, str]:
    # A user's pip settings for installing outside virtual environments would stop pip here.
    return child_environment(
        PIP_USER="0",
        PIP_REQUIRE_VIRTUALENV="0",
        PIP_DISABLE_PIP_VERSION_CHECK="1",
        PIP_NO_INPUT="1",
        PYTHONUNBUFFERED="1",
    )


def pip_install(label: str, arguments: Sequence[str], pip: Sequence[str] = ()) -> None:
    """Run pip: with its own progress on a terminal, else with a line now and then."""
    command = [*(pip or (str(PYTHON), "-m", "pip")), "install", *arguments]
    with step(label):
        if sys.stderr.isatty():
            code = call(command, pip_environment(), stdout=sys.stderr)
        else:
            code = _pip_quietly(command)
    if code:
        raise SetupError(
            f"pip could not install {label} (exit {code}). Its words are above; what it needs most "
            "often is a network connection or disk space. Run the same command again to go on."
        )


def _pip_quietly(command: Sequence[str]) -> int:
    with LOG.open("a", encoding="utf-8", errors="replace") as log:
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        child = subprocess.Popen(
            [*command, "--progress-bar", "off"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=pip_environment(),
        )
        began = time.monotonic()
        with stopping_with_us(child):
            while True:
                try:
                    code = child.wait(timeout=10)
                    break
                except subprocess.TimeoutExpired:
                    doing = re.findall(r"^ *([A-Z]\w+ing .*)$", _text(LOG), re.M)
                    latest = doing[-1].partition(" (from ")[0] if doing else "working"
                    if latest.count(",") > 1:
                        latest = f"Installing {latest.count(',') + 1} packages"
                    say(f"    {time.monotonic() - began:.0f} s: {latest[:90]}")
    if code:
        say("\n".join(_text(LOG).splitlines()[-25:]))
    return code


def ensure_pip(venv: Path = VENV) -> None:
    """pip and setuptools inside it, by ensurepip or by the pip of the Python that runs this."""

    def works(*command: str) -> bool:
        result = subprocess.run([*command, "--version"], capture_output=True)
        return result.returncode == 0

    tools = ["pip", *tomllib.loads(_text(ROOT / "pyproject.toml"))["build-system"]["requires"]]
    python = str(python_of(venv))
    own = (python, "-m", "pip")
    outer = (sys.executable, "-m", "pip", "--python", python)
    if not works(*own):
        subprocess.run([python, "-I", "-m", "ensurepip"], capture_output=True)
    if works(*own):
        pip_install("pip and setuptools", tools, own)
    elif works(*outer):
        pip_install("pip and setuptools", tools, outer)
    else:
        raise SetupError(
            "This Python has neither ensurepip nor a pip of version 22.3 or newer. "
            f"On Debian or Ubuntu: {apt_command(['python3-venv'])}"
        )


def install_torch(pyproject: Mapping, constraints: str) -> None:
    """torch before everything else and once: it is most of what is downloaded."""
    override = os.environ.get("MISTUDIO_TORCH", "").strip()
    remembered = STATE / "torch.txt"
    installed = json.loads(in_venv(INSTALLED))
    ranges = declared_ranges(pyproject, platform.python_version())
    if override:
        if "torch" in installed and _text(remembered) == override:
            return
    elif "torch" in kept_versions(ranges, installed):
        return
    if override and "torch" in installed:
        call([str(PYTHON), "-m", "pip", "uninstall", "-y", "-q", "torch"], pip_environment())
    install_torch_build(choose_torch(this_machine(), override, pinned(constraints, "torch")))
    remembered.write_text(override)


def install_torch_build(choice: TorchChoice, pip: Sequence[str] = ()) -> None:
    if choice.note:
        say(f"  {choice.note}")
    if CPU_INDEX in choice.arguments:
        # Without dependencies and with few retries: where the index cannot be reached, pip asks it
        # once, in seconds, and takes torch from the ordinary index.
        quick = ["--no-deps", "--retries", "1", "--timeout", "15"]
        try:
            pip_install(choice.label, [*choice.arguments, *quick], pip)
        except SetupError:
            say("  once more, with patience:")
            pip_install(choice.label, [*choice.arguments, "--no-deps"], pip)
    else:
        pip_install(choice.label, choice.arguments, pip)


def set_up(extras: set[str]) -> None:
    """Bring .venv to what pyproject.toml and constraints.txt ask for, with these extras."""
    pyproject = tomllib.loads(_text(ROOT / "pyproject.toml"))
    constraints = _text(ROOT / "constraints.txt")
    override = os.environ.get("MISTUDIO_TORCH", "").strip()
    same_torch = not override or _text(STATE / "torch.txt") == override
    if same_torch and is_set_up(extras, pyproject, constraints):
        return
    unknown = extras - set(pyproject["project"]["optional-dependencies"])
    if unknown:
        raise SetupError(f"There is no extra called {', '.join(sorted(unknown))}.")
    with only_one():
        began = time.monotonic()
        say("Setting up miStudio in .venv (only when something changed)")
        if not venv_python_works():
            make_venv()
        STATE.mkdir(exist_ok=True)
        LOG.unlink(missing_ok=True)
        repaired = in_venv(REPAIR).split()
        if repaired:
            say(f"  left half-installed last time, installing again: {', '.join(repaired)}")
        ensure_pip()
        install_torch(pyproject, constraints)
        kept = kept_versions(
            declared_ranges(pyproject, platform.python_version()), json.loads(in_venv(INSTALLED))
        )
        (STATE / "constraints.txt").write_text(constraints_keeping(constraints, kept))
        target = str(ROOT) + (f"[{','.join(sorted(extras))}]" if extras else "")
        pip_install(
            "miStudio and its packages" + (f" with {', '.join(sorted(extras))}" if extras else ""),
            ["--no-build-isolation", "-c", str(STATE / "constraints.txt"), "-e", target],
        )
        key = setup_key(pyproject, constraints, venv_identity(), extras, str(ROOT))
        stamp_path(extras).write_text(key)
        say(f"Set up in {time.monotonic() - began:.0f} s")


def peers_key(requirements: str, torch: str, override: str, python: str) -> str:
    """A hash of everything that decides what .venv-peers holds."""
    return hashlib.sha256("\0".join((requirements, torch, override, python)).encode()).hexdigest()


def set_up_peers() -> None:
    """Bring .venv-peers to what tests/benchmarks/peers/requirements.txt asks for, with the app's
    torch. Comes after `set_up`. Raises SetupError."""
    wanted = ROOT / "tests" / "benchmarks" / "peers" / "requirements.txt"
    torch = pinned(_text(ROOT / "constraints.txt"), "torch")
    override = os.environ.get("MISTUDIO_TORCH", "").strip()
    stamp = PEERS / "mistudio.stamp"

    def key() -> str:
        return peers_key(_text(wanted), torch, override, venv_identity(PEERS))

    if python_of(PEERS).exists() and _text(stamp) == key():
        return
    with only_one():
        began = time.monotonic()
        say("Setting up the libraries to compare with in .venv-peers (only when they change)")
        STATE.mkdir(parents=True, exist_ok=True)
        stamp.unlink(missing_ok=True)
        if not venv_python_works(PEERS):
            make_venv(PEERS)
        in_venv(REPAIR, PEERS)
        ensure_pip(PEERS)
        pip = (str(python_of(PEERS)), "-m", "pip")
        install_torch_build(choose_torch(this_machine(), override, torch), pip)
        limits = PEERS / "constraints.txt"
        kept = json.loads(in_venv(INSTALLED, PEERS)).get("torch")
        limits.write_text(f"torch=={kept}\n" if kept else "")
        pip_install("SAELens", ["-c", str(limits), "-r", str(wanted)], pip)
        stamp.write_text(key())
        say(f"Set up in {time.monotonic() - began:.0f} s")


@contextlib.contextmanager
def only_one():
    """Two set-ups at once would spoil each other: the second waits."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / "setup.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say("Another set-up is running here; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# --- running --------------------------------------------------------------------------------------


@contextlib.contextmanager
def stopping_with_us(child: subprocess.Popen):
    """However we leave, the child does not stay behind."""
    try:
        yield
    except KeyboardInterrupt:
        # The terminal has sent the interrupt to the child as well: let it end in its own way.
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            child.wait(timeout=30)
        raise
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                child.kill()


def call(command: Sequence[str], environment: Mapping[str, str], **more) -> int:
    """Run a child to its end; its exit code, 128 + n where signal n ended it."""
    child = subprocess.Popen(command, cwd=ROOT, env=dict(environment), **more)
    with stopping_with_us(child):
        code = child.wait()
    return code if code >= 0 else 128 - code


def become(command: Sequence[str]) -> int:
    """Hand over to the app: its output, signals and exit code are then the caller's."""
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "posix":
        os.execve(command[0], list(command), child_environment())
    return call(command, child_environment())


def has_display(environment: Mapping[str, str]) -> bool:
    if platform.system() != "Linux":
        return True
    return bool(environment.get("DISPLAY") or environment.get("WAYLAND_DISPLAY"))


def run_app(arguments: list[str]) -> int:
    asked_for = os.environ.get("QT_QPA_PLATFORM", "")
    if not asked_for and not has_display(os.environ):
        raise SetupError(
            "There is no display here (neither DISPLAY nor WAYLAND_DISPLAY is set), so no window "
            "can open. `python3 run.py demo` and `python3 run.py mistudio` work without one."
        )
    set_up(set())
    ensure_qt(xcb=bool(os.environ.get("DISPLAY")) and asked_for in ("", "xcb"))
    return become([str(PYTHON), "-m", "mistudio", *arguments])


def run_demo(arguments: list[str]) -> int:
    set_up(set())
    if "--no-window" not in arguments and has_display(os.environ):
        try:
            ensure_qt(xcb=bool(os.environ.get("DISPLAY")))
        except SetupError as problem:
            say(f"{problem}\nThe demo runs without its window.")
            arguments = [*arguments, "--no-window"]
    return become([str(PYTHON), "-m", "mistudio", "demo", *arguments])


def run_mistudio(arguments: list[str]) -> int:
    if not arguments:
        return run_app([])
    set_up(set())
    return become([str(PYTHON), "-m", "mistudio", *arguments])


def run_setup(arguments: list[str]) -> int:
    set_up(set(arguments))
    return 0


IMPORT_LINTER = "import sys; from importlinter.cli import lint_imports_command as c; sys.exit(c())"
CHECKS = {
    "lint": ["-m", "ruff", "check", "."],
    "format": ["-m", "ruff", "format", "--check", "--output-format", "concise", "."],
    "types": ["-m", "mypy"],
    "layers": ["-c", IMPORT_LINTER, "--no-logo"],
}


def run_check(arguments: list[str]) -> int:
    unknown = [name for name in arguments if name not in CHECKS]
    if unknown:
        say(f"There is no check called {', '.join(unknown)}: there are {', '.join(CHECKS)}.")
        return 2
    set_up({"test"})
    return checks(arguments or list(CHECKS))


def checks(names: Sequence[str]) -> int:
    """Run the checks; 0 if all pass, else 1. A failing one shows what it said."""
    failed = []
    for name in names:
        began = time.monotonic()
        child = subprocess.Popen(
            [str(PYTHON), *CHECKS[name]],
            cwd=ROOT,
            env=child_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        with stopping_with_us(child):
            output, _ = child.communicate()
        outcome = "FAILED" if child.returncode else "passed"
        say(f"  {name:<7} {outcome} in {time.monotonic() - began:.1f} s")
        if child.returncode:
            failed.append(name)
            say(output.rstrip())
    return 1 if failed else 0


def run_test(arguments: list[str]) -> int:
    set_up({"test"})
    ensure_qt(xcb=False)
    say("Checks")
    checked = checks(list(CHECKS))
    say("Tests")
    with tempfile.TemporaryDirectory(prefix="mistudio-", ignore_cleanup_errors=True) as home:
        environment = child_environment(
            QT_QPA_PLATFORM="offscreen",
            HF_HUB_OFFLINE="1",
            TOKENIZERS_PARALLELISM="false",
            MISTUDIO_HOME=home,
        )
        # The whole suite shares the cores; a few tests are there sooner without helpers.
        cores = str(min(os.cpu_count() or 1, 8))
        spread = () if arguments else ("-n", cores, "--dist", "worksteal")
        tested = call([str(PYTHON), "-m", "pytest", *spread, *arguments], environment)
    say(f"checks {'failed' if checked else 'passed'}, tests {'failed' if tested else 'passed'}")
    return tested or checked


def bench_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of benchmarks, and the options that follow them."""
    first = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    return list(arguments[:first]), list(arguments[first:])


def run_bench(arguments: list[str]) -> int:
    folder = ROOT / "tests" / "benchmarks"
    names, options = bench_arguments(arguments)
    scripts = sorted(folder.glob("bench_*.py"))
    if names:
        scripts = [s for s in scripts if any(name in s.stem for name in names)]
    if not scripts:
        say(f"No benchmark in {folder.relative_to(ROOT)} is called {' or '.join(names)}.")
        return 2
    if options and len(scripts) != 1:
        say(f"{' '.join(options)} belongs to one benchmark: name it, as in `bench peers --help`.")
        return 2
    set_up({"test"})
    ensure_qt(xcb=False)
    return 1 if [script for script in scripts if not run_one_bench(script, options)] else 0


def run_one_bench(script: Path, options: Sequence[str]) -> bool:
    """Whether it went well; its table is then kept."""
    say(f"\n{script.stem}")
    environment = child_environment(
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        QT_QPA_PLATFORM=os.environ.get("QT_QPA_PLATFORM", "offscreen"),
    )
    asks_for_help = bool({"-h", "--help"} & set(options))
    if script.stem == "bench_peers" and not asks_for_help:
        environment["MISTUDIO_PEERS_PYTHON"] = str(python_of(PEERS))
        try:
            set_up_peers()
        except SetupError as problem:
            say(f"SAELens could not be installed, so there is nothing to compare with. {problem}")
            return False
    lines = []
    child = subprocess.Popen(
        [str(PYTHON), str(script), *options],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    with stopping_with_us(child):
        for line in child.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
        code = child.wait()
    if code:
        say(f"{script.stem} failed (exit {code})")
    elif not asks_for_help:
        keep_table(script.parent / "results" / f"{script.stem}.md", "".join(lines))
    return code == 0


def keep_table(path: Path, table: str) -> None:
    """Append one run's output to the benchmark's results, with what it was measured on."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    day = datetime.date.today().isoformat()
    where = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    path.parent.mkdir(exist_ok=True)
    if not path.exists():
        path.write_text(f"# {path.stem}\n\nWritten by `python3 run.py bench`; newest run last.\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(
            f"\n## {day}, {commit or 'no commit'}: {where}\n\n```text\n{table.rstrip()}\n```\n"
        )


COMMANDS = {
    "app": run_app,
    "demo": run_demo,
    "mistudio": run_mistudio,
    "test": run_test,
    "check": run_check,
    "bench": run_bench,
    "setup": run_setup,
}


def parse(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The command and its arguments; options alone belong to the window."""
    if not arguments:
        return "app", []
    if arguments[0] in ("-h", "--help", "help"):
        return "help", []
    if arguments[0].startswith("-"):
        return "app", list(arguments)
    return arguments[0], list(arguments[1:])


def main(arguments: Sequence[str]) -> int:
    command, rest = parse(arguments)
    if command == "help":
        print(USAGE, end="")
        return 0
    if command not in COMMANDS:
        say(f"There is no command {command!r}.\n\n{USAGE}")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return COMMANDS[command](rest)
    except SetupError as problem:
        say(str(problem))
        return 1
    except KeyboardInterrupt:
        say("\nStopped. Run the same command again to go on.")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
