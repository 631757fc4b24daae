"""run.py: what it decides, without installing anything."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "run.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mistudio_run_script", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


run = load()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONSTRAINTS = (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_only_the_standard_library_is_imported() -> None:
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    assert names <= set(sys.stdlib_module_names)


# An old Python must get as far as the message: it parses the whole file and runs its first lines.
def test_an_old_python_can_read_the_script_and_hears_what_it_needs() -> None:
    source = SCRIPT.read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 7))
    before_the_check = source.partition("if python_problem(sys.version_info):")[0]
    assert "tomllib" not in before_the_check and "dataclasses" not in before_the_check

    assert run.python_problem((3, 11, 0)) is None
    assert run.python_problem((3, 14, 0)) is None
    alone = run.python_problem((3, 10, 4), which=lambda name: None)
    assert "3.11 or newer" in alone and "this is Python 3.10." in alone and "Install" in alone
    beside = run.python_problem((3, 9, 2), which=lambda name: name == "python3.12" or None)
    assert "`python3.12 run.py`" in beside


@pytest.mark.parametrize(
    ("version", "specifiers", "expected"),
    [
        ("2.13.0+cpu", ">=2.6", True),
        ("2.13.0+cpu", "==2.13.0", True),
        ("2.5.1", ">=2.6", False),
        ("2.10", ">=2.6", True),
        ("6.12.0", ">=6.8,!=6.9.1,!=6.9.2,!=6.12.0", False),
        ("6.12.1", ">=6.8,!=6.9.1,!=6.9.2,!=6.12.0", True),
        ("5.23.0", ">=5.2,<6", True),
        ("6.0.0", ">=5.2,<6", False),
        ("1.0", "", True),
    ],
)
def test_version_ranges(version: str, specifiers: str, expected: bool) -> None:
    assert run.satisfies(version, specifiers) is expected


def test_an_unreadable_range_is_an_error_and_not_a_yes() -> None:
    with pytest.raises(ValueError, match="~=2"):
        run.satisfies("2.0", "~=2.0")


def test_every_range_in_pyproject_can_be_read() -> None:
    for python in ("3.11.7", "3.12.1", "3.14.0"):
        ranges = run.declared_ranges(PYPROJECT, python)
        assert {"torch", "transformers", "pyside6-essentials", "pyqtgraph"} <= set(ranges)
        for specifiers in ranges.values():
            run.satisfies("1.0", specifiers)


def test_the_broken_qt_is_refused_only_where_it_breaks() -> None:
    old = run.declared_ranges(PYPROJECT, "3.11.7")["pyside6-essentials"]
    new = run.declared_ranges(PYPROJECT, "3.12.0")["pyside6-essentials"]
    assert not run.satisfies("6.12.0", old)
    assert run.satisfies("6.12.0", new)


def test_pins_lie_inside_the_declared_ranges() -> None:
    for python in ("3.11.7", "3.13.0"):
        for name, specifiers in run.declared_ranges(PYPROJECT, python).items():
            _, _, version = run.pinned(CONSTRAINTS, name).partition("==")
            assert not version or run.satisfies(version, specifiers), name


def test_an_installed_torch_in_range_is_kept_and_an_old_one_is_not() -> None:
    ranges = {"torch": ">=2.6", "pyside6-essentials": ">=6.8", "numpy": ">=2"}
    installed = {"torch": "2.9.1+cu130", "pyside6-essentials": "6.7.0", "numpy": "2.0"}
    kept = run.kept_versions(ranges, installed)
    assert kept == {"torch": "2.9.1+cu130"}
    text = run.constraints_keeping("# why\ntorch==2.13.0\nPySide6-Essentials==6.11.3\n", kept)
    assert text == "# why\ntorch==2.9.1+cu130\nPySide6-Essentials==6.11.3\n"


def test_torch_build_follows_the_machine() -> None:
    pin = "torch==2.13.0"
    index = ("--extra-index-url", run.CPU_INDEX)
    machine = run.Machine
    assert run.choose_torch(machine("Linux"), "", pin).arguments == (pin, *index)
    assert run.choose_torch(machine("Linux", nvidia=True), "", pin).arguments == (pin,)
    assert run.choose_torch(machine("Darwin"), "", pin).arguments == (pin,)
    jetson = run.choose_torch(machine("Linux", nvidia=True, jetson=True), "", pin)
    assert jetson.arguments == (pin, *index)
    assert "MISTUDIO_TORCH" in jetson.note


def test_the_users_choice_of_torch_wins_everywhere() -> None:
    machine = run.Machine("Linux", nvidia=True, jetson=True)
    choice = run.choose_torch(machine, "'/tmp/my wheels/torch.whl' --no-index", "torch==2.13.0")
    assert choice.arguments == ("/tmp/my wheels/torch.whl", "--no-index")


def test_missing_libraries_become_package_names_of_the_release() -> None:
    missing = ["libglib-2.0.so.0", "libgthread-2.0.so.0", "libEGL.so.1", "libmystery.so.9"]
    assert run.apt_packages(missing, "bookworm") == ["libglib2.0-0", "libegl1"]
    assert run.apt_packages(missing, "noble") == ["libglib2.0-0t64", "libegl1"]
    assert run.apt_packages(["libxcb-cursor.so.0"], "trixie") == ["libxcb-cursor0"]


def test_missing_libraries_are_one_line_with_the_command() -> None:
    line = run.missing_libraries_line(["libEGL.so.1"], ["libegl1"])
    assert "\n" not in line
    assert "libEGL.so.1" in line
    assert "sudo apt-get install -y --no-install-recommends libegl1" in line
    assert "package manager" in run.missing_libraries_line(["libEGL.so.1"], [])


def test_os_release_is_read_with_and_without_quotes() -> None:
    release = run.read_os_release('NAME="Ubuntu"\nVERSION_CODENAME=noble\n\n# comment\n')
    assert release["NAME"] == "Ubuntu"
    assert release["VERSION_CODENAME"] == "noble"


def test_set_up_is_repeated_when_and_only_when_something_counts() -> None:
    def key(pyproject: dict | None = None, **change: object) -> str:
        values = {
            "pyproject": pyproject or {"project": {"dependencies": ["torch>=2.6"]}},
            "constraints": "torch==2.13.0\n",
            "python": "3.11.7 /usr/bin/python3.11",
            "extras": ["test", "hub"],
            "root": "/home/me/mistudio",
        }
        return run.setup_key(**(values | change))

    assert key() == key()
    assert key(extras=["hub", "test"]) == key()
    assert key({"project": {"dependencies": ["torch>=2.6"]}, "tool": {"ruff": {}}}) == key()
    assert key({"project": {"dependencies": ["torch>=2.7"]}}) != key()
    for change in (
        {"constraints": "torch==2.14.0\n"},
        {"python": "3.12.1 /usr/bin/python3.12"},
        {"extras": ["test"]},
        {"root": "/home/me/elsewhere"},
    ):
        assert key(**change) != key(), change


def test_a_richer_set_up_serves_a_plainer_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "STATE", tmp_path)
    monkeypatch.setattr(run, "PYTHON", Path(sys.executable))
    pyproject = {"project": {"dependencies": []}}
    assert not run.is_set_up(set(), pyproject, "")
    names = {"test"}
    key = run.setup_key(pyproject, "", run.venv_identity(), names, str(run.ROOT))
    run.stamp_path(names).write_text(key)
    assert run.is_set_up({"test"}, pyproject, "")
    assert run.is_set_up(set(), pyproject, "")
    assert not run.is_set_up({"test", "hub"}, pyproject, "")
    assert not run.is_set_up(set(), pyproject, "torch==2.14.0")
    monkeypatch.setattr(run, "PYTHON", tmp_path / "gone")
    assert not run.is_set_up(set(), pyproject, "")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ("app", [])),
        (["--library", "x"], ("app", ["--library", "x"])),
        (["demo", "--no-window"], ("demo", ["--no-window"])),
        (["mistudio", "train", "--help"], ("mistudio", ["train", "--help"])),
        (["test", "-k", "hooks"], ("test", ["-k", "hooks"])),
        (["--help"], ("help", [])),
    ],
)
def test_arguments(arguments: list[str], expected: tuple[str, list[str]]) -> None:
    assert run.parse(arguments) == expected


def test_every_command_is_in_the_usage() -> None:
    for command in run.COMMANDS:
        assert f"\n  {command} " in run.USAGE


def test_an_unknown_command_and_an_unknown_check_are_bad_usage(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run.main(["dance"]) == 2
    assert "no command 'dance'" in capsys.readouterr().err
    assert run.main(["check", "spelling"]) == 2
    assert "lint, format, types, layers" in capsys.readouterr().err


def test_exit_codes_of_children_are_passed_on() -> None:
    environment = run.child_environment()
    assert run.call([sys.executable, "-c", "raise SystemExit(7)"], environment) == 7
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"
    assert run.call([sys.executable, "-c", killed], environment) == 143


def test_no_display_is_said_before_anything_is_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run.platform, "system", lambda: "Linux")
    monkeypatch.setattr(run, "set_up", lambda extras: pytest.fail("set up without a display"))
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    assert run.main([]) == 1
    assert "no display" in capsys.readouterr().err


def test_half_installed_packages_are_found(tmp_path: Path) -> None:
    """The repair script, pointed at a folder of its own: whole stays, broken goes."""

    def distribution(name: str, record: str | None) -> None:
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        if record is not None:
            (info / "RECORD").write_text(record)

    (tmp_path / "whole.py").touch()
    (tmp_path / "~torn").mkdir()
    distribution("whole", "whole.py,,\nwhole-1.0.dist-info/METADATA,,\n")
    distribution("gap", "gap.py,,\n")
    distribution("norecord", None)
    code = run.REPAIR.replace('sysconfig.get_paths()["purelib"]', repr(str(tmp_path)))
    assert "sysconfig.get_paths" not in code
    answer = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True
    )
    assert sorted(answer.stdout.split()) == ["gap-1.0.dist-info", "norecord-1.0.dist-info"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["whole-1.0.dist-info", "whole.py"]


def test_benchmark_tables_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "results" / "bench_speed.md"
    run.keep_table(path, "a 1\n")
    run.keep_table(path, "a 2\n")
    text = path.read_text()
    assert text.startswith("# bench_speed\n")
    assert text.index("a 1") < text.index("a 2")
    assert text.count("```text") == 2


def test_options_of_a_benchmark_need_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.bench_arguments(["peers", "--steps", "300"]) == (["peers"], ["--steps", "300"])
    monkeypatch.setattr(run, "set_up", lambda extras: pytest.fail("set up for a bad command"))
    assert run.main(["bench", "--steps", "300"]) == 2
    assert "name it" in capsys.readouterr().err
    assert run.main(["bench", "nothing_like_this"]) == 2


def test_a_peer_that_cannot_be_installed_is_said_and_leaves_no_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise run.SetupError("pip could not install SAELens (exit 1).")

    monkeypatch.setattr(run, "set_up", lambda extras: None)
    monkeypatch.setattr(run, "ensure_qt", lambda xcb: None)
    monkeypatch.setattr(run, "set_up_peers", refuse)
    monkeypatch.setattr(run, "keep_table", lambda path, table: pytest.fail("a table of nothing"))
    assert run.main(["bench", "peers"]) == 1
    said = capsys.readouterr().err
    assert "SAELens could not be installed" in said and "pip could not" in said


def test_peers_are_set_up_once_and_again_when_something_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    installed = []
    wanted = tmp_path / "tests" / "benchmarks" / "peers" / "requirements.txt"
    wanted.parent.mkdir(parents=True)
    wanted.write_text("sae-lens==1\n")
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\n")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "STATE", tmp_path / "state")
    monkeypatch.setattr(run, "PEERS", tmp_path / "peers")
    monkeypatch.delenv("MISTUDIO_TORCH", raising=False)
    python = run.python_of(tmp_path / "peers")
    python.parent.mkdir(parents=True)
    python.touch()
    monkeypatch.setattr(run, "venv_python_works", lambda venv: True)
    monkeypatch.setattr(run, "ensure_pip", lambda venv: None)
    monkeypatch.setattr(run, "in_venv", lambda code, venv: '{"torch": "2.13.0+cpu"}')
    monkeypatch.setattr(
        run, "pip_install", lambda label, arguments, pip=(): installed.append((label, arguments))
    )
    run.set_up_peers()
    assert installed[0][1][0] == "torch==2.13.0", "the app's torch, before all else"
    assert installed[-1][1][-2:] == ["-r", str(wanted)]
    first = len(installed)
    run.set_up_peers()
    assert len(installed) == first, "nothing has changed"
    wanted.write_text("sae-lens==2\n")
    run.set_up_peers()
    assert len(installed) == 2 * first
