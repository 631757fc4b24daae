"""Programs that come with a model: shown without running, run only as they were consented to."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import own_models
import pytest
import torch
from own_models import write_own_model

from mistudio.engine.models import custom_code
from mistudio.engine.models.architecture import describe_architecture, read_architecture
from mistudio.engine.models.custom_code import (
    MAX_FILE,
    Consent,
    NeedsConsent,
    needs_code,
    read_folder,
    require_unchanged,
)
from mistudio.engine.models.hooks import HookPoint
from mistudio.engine.models.loading import (
    check_folder,
    describe,
    load_model,
    parse_config,
    read_headers,
)
from mistudio.errors import CorruptFile, Incompatible, UnsupportedModel

IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture(autouse=True)
def nothing_imported() -> Iterator[None]:
    """Each test meets the program for the first time."""
    yield
    for name in [name for name in sys.modules if name.startswith(custom_code._PACKAGE)]:
        del sys.modules[name]
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, custom_code._Finder)]


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "it ran"


@pytest.fixture
def folder(tmp_path: Path, marker: Path) -> Path:
    return write_own_model(tmp_path / "own", marker)


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# --- shown, not run -------------------------------------------------------------------------------


def test_without_consent_it_is_refused_and_nothing_runs(folder: Path, marker: Path) -> None:
    before = set(sys.modules)
    for refused in (check_folder, load_model):
        with pytest.raises(NeedsConsent, match="never runs such code"):
            refused(folder)
    describe(folder), read_architecture(folder), read_folder(folder)
    assert not marker.exists()
    assert not [name for name in set(sys.modules) - before if "own" in name]
    assert not list(folder.rglob("*.pyc")) and not list(folder.rglob("__pycache__"))


def test_all_files_that_would_run_are_found_with_their_hashes(folder: Path, marker: Path) -> None:
    (folder / "unrelated.py").write_text("raise SystemExit")
    code = read_folder(folder, "here")
    assert tuple(file.name for file in code.files) == own_models.CODE
    for file in code.files:
        data = (folder / file.name).read_bytes()
        import hashlib

        assert (file.bytes, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert file.text.encode() == data
    assert code.classes == own_models.AUTO_MAP
    assert Consent.from_dict(json.loads(json.dumps(code.consent().as_dict()))) == code.consent()
    assert not marker.exists()


def test_imports_are_followed_wherever_they_stand(folder: Path) -> None:
    path = folder / "own_layers.py"
    path.write_text(
        path.read_text()
        + "\n\ndef later():\n    try:\n        from .hidden import x\n    except ImportError:\n"
        "        from . import last\n"
    )
    (folder / "hidden.py").write_text("from .modeling_own import OwnForCausalLM as x\n")
    (folder / "last.py").write_text("")
    assert [f.name for f in read_folder(folder).files] == [
        "configuration_own.py", "hidden.py", "last.py", "modeling_own.py", "own_layers.py",
    ]  # fmt: skip


def test_a_description_without_running_is_what_the_program_builds(folder: Path) -> None:
    made, summary = read_architecture(folder), describe(folder)
    raw = (folder / "config.json").read_bytes()
    assert describe_architecture(raw, read_headers(folder)) == made
    decoder = load_model(folder, "fp32", consent=read_folder(folder).consent())
    assert made.n_layers == decoder.n_layers == summary.n_layers == 2
    assert made.d_model == decoder.d_model and made.vocab_size == decoder.vocab_size
    assert made.parameters == sum(p.numel() for p in decoder.model.parameters())
    assert made.parameters == summary.parameters
    block = decoder._blocks[0]
    assert made.blocks[0].parameters == sum(p.numel() for p in block.parameters())
    assert made.blocks[0].mlp == 3 * own_models.WIDTH * own_models.MLP
    assert made.gated_mlp and made.d_mlp == own_models.MLP and not made.tied_embeddings


def test_where_transformers_knows_the_architecture_its_own_code_is_used(folder: Path) -> None:
    assert needs_code({"model_type": "own", "auto_map": {"x": "y"}})
    assert needs_code({"model_type": "llama", "architectures": ["OwnX"], "auto_map": {"x": "y"}})
    known = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "auto_map": {"x": "y"}}
    assert not needs_code(known) and custom_code.brings_unused_code(known)
    assert not needs_code({"model_type": "own"})


# --- with consent ---------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "q8"])
def test_with_consent_it_loads_and_its_sites_are_read_and_changed(
    folder: Path, marker: Path, precision: Any
) -> None:
    consent = read_folder(folder).consent()
    assert not marker.exists()
    decoder = load_model(folder, precision, consent=consent)
    assert marker.exists()
    points = [HookPoint(site, 1) for site in ("attn_out", "mlp_in", "mlp_out", "resid_post")]
    found = decoder.capture(IDS, [HookPoint("resid_pre", 1), *points])
    stream = sum(found[HookPoint(s, 1)].float() for s in ("resid_pre", "attn_out", "mlp_out"))
    assert torch.allclose(stream, found[points[-1]].float(), atol=0.05, rtol=0.05)
    with torch.inference_mode():
        before = decoder.model(input_ids=IDS).logits
        with decoder.intervene({points[-1]: torch.zeros_like}):
            after = decoder.model(input_ids=IDS).logits
    assert not torch.equal(before, after) and torch.equal(after, torch.zeros_like(after))


def test_what_runs_is_what_was_hashed_whatever_lies_elsewhere(
    folder: Path, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    bad = tmp_path / "the wrong one ran"
    for name in own_models.CODE:
        (elsewhere / name).write_text(f"open({str(bad)!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(elsewhere))
    monkeypatch.setenv("HF_MODULES_CACHE", str(elsewhere))
    cache = folder / "__pycache__"
    cache.mkdir()
    (cache / "modeling_own.cpython-311.pyc").write_bytes(b"junk")
    decoder = load_model(folder, "fp32", consent=read_folder(folder).consent())
    assert marker.exists() and not bad.exists()
    assert type(decoder.model).__module__.startswith(custom_code._PACKAGE)
    assert [path.name for path in cache.iterdir()] == ["modeling_own.cpython-311.pyc"]
    assert not [m for m in sys.modules if m.startswith("transformers_modules")]


def _byte(folder: Path) -> None:
    path = folder / "own_layers.py"
    path.write_text(path.read_text().replace("1e-5", "1e-4"))


def _added(folder: Path) -> None:
    (folder / "more.py").write_text("")


def _added_and_imported(folder: Path) -> None:
    (folder / "more.py").write_text("")
    path = folder / "own_layers.py"
    path.write_text("from . import more\n" + path.read_text())


def _missing(folder: Path) -> None:
    (folder / "own_layers.py").unlink()


def _classes(folder: Path) -> None:
    auto_map = own_models.AUTO_MAP | {"AutoModelForCausalLM": "own_layers.OwnBlock"}
    change(folder, auto_map=auto_map)


def _invisible(folder: Path) -> None:
    path = folder / "own_layers.py"
    path.write_text(path.read_text() + "\u202e# x\n", encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_byte, "own_layers.py was changed"),
        (_added, "more.py was added"),
        (_added_and_imported, "more.py was added; own_layers.py was changed"),
        (_missing, "own_layers.py is not there"),
        (_classes, "names other classes"),
        (_invisible, "invisible sign"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_differs_from_the_consent_is_refused_at_every_load(
    folder: Path, marker: Path, damage: Callable[[Path], None], words: str
) -> None:
    consent = read_folder(folder).consent()
    damage(folder)
    with pytest.raises(Incompatible, match=words) as refusal:
        load_model(folder, "fp32", consent=consent)
    assert "Delete this model and add it again" in refusal.value.next_step
    assert not marker.exists()


def test_a_file_changed_after_the_comparison_is_not_what_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    consent, bad = read_folder(folder).consent(), tmp_path / "swapped"
    real = require_unchanged

    def compared_then_swapped(place: Path, given: Consent) -> Any:
        code = real(place, given)
        for name in own_models.CODE:
            (place / name).write_text(f"open({str(bad)!r}, 'w')")
        return code

    monkeypatch.setattr(custom_code, "require_unchanged", compared_then_swapped)
    load_model(folder, "fp32", consent=consent)
    assert not bad.exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("import no_such_library_anywhere", "imports no_such_library_anywhere"),
        ("from transformers import NoSuchThing", "does not work here. ImportError"),
        ("raise SystemExit(3)", "SystemExit"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_program_that_does_not_work_is_refused_in_words(
    folder: Path, line: str, words: str
) -> None:
    path = folder / "own_layers.py"
    path.write_text(f"{path.read_text()}\n{line}\n")
    for _ in range(2):  # a second try fares no better and no worse
        with pytest.raises(UnsupportedModel, match=words):
            load_model(folder, "fp32", consent=read_folder(folder).consent())


def test_a_program_of_another_model_than_its_weights_is_found_out(folder: Path) -> None:
    path = folder / "modeling_own.py"
    path.write_text(path.read_text().replace("config.num_hidden_layers)", "1)"))
    consent = read_folder(folder).consent()
    with pytest.raises(CorruptFile, match="builds 1 layers"):
        custom_code.try_building(folder, consent, 2, own_models.VOCAB)


# --- what is refused without looking further ------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("../modeling.Own", "no file beside"),
        ("..modeling.Own", "no file beside"),
        ("sub.modeling.Own", "no file beside"),
        ("/etc/passwd.Own", "no file beside"),
        ("modeling_own", "no file beside"),
        ("modeling_own.class", "no file beside"),
        ("eve/other--modeling_own.OwnForCausalLM", "another repository"),
        ("modeling_own.Nothing", "defines no Nothing"),
        ("missing.Own", "missing.py is not there"),
        (["modeling_own.OwnForCausalLM"], "names no class"),
        (None, "names no class"),
    ],
)
def test_classes_that_lie_elsewhere_are_refused(folder: Path, value: Any, words: str) -> None:
    change(folder, auto_map={**own_models.AUTO_MAP, "AutoModelForCausalLM": value})
    with pytest.raises(UnsupportedModel, match=words):
        read_folder(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("from ..outside import x", "leads out"),
        ("from ... import x", "leads out"),
        ("from .sub.module import x", "leads out"),
        ("from . import *", "leads out"),
        ("from .gone import x", "gone.py is not there"),
        ("x = (", "no Python"),
        ("x = " + "(" * 5000, "no Python"),
        ("x = " + "-" * 100_000 + "1", "no Python"),
        ("x = 1\0", "invisible"),
        ("x = 1 # \u202e }", "invisible"),
        ("# nothing\rimport os", "invisible"),
        ("\x1b[2Jx = 1", "invisible"),
        ("#" * (MAX_FILE + 1), "too long"),
    ],
    ids=lambda value: value[:20].encode("unicode_escape").decode(),
)
def test_programs_that_cannot_be_shown_as_they_would_run_are_refused(
    folder: Path, text: str, words: str
) -> None:
    (folder / "own_layers.py").write_bytes(text.encode())
    with pytest.raises(UnsupportedModel, match=words):
        read_folder(folder)


def test_too_many_files_and_too_many_bytes_are_refused(folder: Path) -> None:
    layers = folder / "own_layers.py"
    for n in range(40):
        (folder / f"part{n}.py").write_text(f"from . import part{n + 1}\n")
    layers.write_text("from . import part0\n")
    with pytest.raises(UnsupportedModel, match="more than 32 files"):
        read_folder(folder)
    for n in range(5):
        (folder / f"part{n}.py").write_text(f"from . import part{n + 1}\n" + "#" * 500_000)
    with pytest.raises(UnsupportedModel, match="too long"):
        read_folder(folder)


def test_other_encodings_and_special_files_are_refused(folder: Path, tmp_path: Path) -> None:
    layers = folder / "own_layers.py"
    layers.write_bytes("# -*- coding: latin-1 -*-\n# \xe9".encode("latin-1"))
    with pytest.raises(UnsupportedModel, match="not UTF-8"):
        read_folder(folder)
    layers.unlink()
    os.mkfifo(layers)
    with pytest.raises(UnsupportedModel, match="no plain file"):
        read_folder(folder)


def test_links_out_of_the_folder_are_refused_and_the_caches_own_are_not(
    folder: Path, tmp_path: Path
) -> None:
    layers = folder / "own_layers.py"
    outside = tmp_path / "outside.py"
    shutil.move(layers, outside)
    layers.symlink_to(outside)
    with pytest.raises(CorruptFile, match="leads out of the folder"):
        read_folder(folder)
    layers.unlink()
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    shutil.copytree(folder, snapshot)
    shutil.move(outside, blobs / "0123")
    (snapshot / "own_layers.py").symlink_to(Path("..", "..", "blobs", "0123"))
    assert len(read_folder(snapshot).files) == 3


def test_compiled_code_of_other_repositories_is_never_asked_for() -> None:
    for config in (
        {"attn_implementation": "eve/kernel"},
        {"_attn_implementation": {"": "eve/kernel"}},
        {"text_config": {"attn_implementation": "paged|eve/kernel"}},
    ):
        with pytest.raises(UnsupportedModel, match="code from elsewhere"):
            parse_config(json.dumps({"model_type": "llama", **config}).encode())
    parse_config(b'{"attn_implementation": "sdpa", "model_type": null}')


@pytest.mark.parametrize(
    "config", [{"architectures": "Llama"}, {"architectures": [["x"]]}, {"model_type": ["llama"]}]
)
def test_names_that_are_no_names_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(CorruptFile):
        parse_config(json.dumps(config).encode())
