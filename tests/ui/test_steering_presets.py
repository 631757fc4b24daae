"""Steering presets: saved with what they belong to, bound again in this library or another one."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from PySide6.QtCore import QRect, Qt
from PySide6.QtTest import QTest
from PySide6.QtWidgets import QApplication

from mistudio.errors import InvalidInput, UserError
from mistudio.jobs.features import newest_run, open_features
from mistudio.jobs.job import run_job, submit
from mistudio.jobs.kinds import Discover, Export, ImportSae
from mistudio.jobs.presets import BOUND, REFUSED, UNBOUND, WARNED, bind, with_bindings
from mistudio.jobs.template_files import entries_of, read_templates
from mistudio.jobs.templates import export_templates, import_templates
from mistudio.library.library import Library
from mistudio.ui.services import Services
from mistudio.ui.steering import presets
from mistudio.ui.steering.page import SteeringPage
from mistudio.ui.steering.presenter import SteeringPresenter
from mistudio.ui.steering.request import Chosen, Form
from mistudio.ui.steering.sources import sources
from mistudio.ui.templates.import_dialog import ImportDialog
from mistudio.ui.templates.section import TemplateSection
from mistudio.ui.widgets import ConfirmDialog

from .checks import cut_off, nameless, squeezed, too_small
from .screens import shot

FORM = Form(
    prompt="The history of, the",
    temperature=0.9,
    top_k=40,
    scales=(0.5, 1.0),
    scope="chosen",
    positions=(1, 3),
    layers=(1, 2),
    keep_norm=True,
)


def config_of(library: Library, *chosen: Chosen, form: Form = FORM) -> dict[str, Any]:
    return presets.to_config(library, form, chosen, {s.sae.id: s for s in sources(library)})


@pytest.fixture
def sae_id(trained_library: Library) -> int:
    return trained_library.saes.all()[0].id


@pytest.fixture
def page(
    qtbot: Any, services_of: Callable[[Library], Services], trained_library: Library
) -> SteeringPage:
    made = SteeringPage(services_of(trained_library))
    qtbot.addWidget(made)
    made.resize(1280, 720)
    made.show()
    made.activate()
    qtbot.waitUntil(lambda: made.presenter.index is not None)
    return made


def test_a_preset_brings_back_features_and_form(trained_library: Library, sae_id: int) -> None:
    chosen = (Chosen(sae_id, 5, 1.5, "clamp"), Chosen(sae_id, 9, -2.0))
    config = json.loads(json.dumps(config_of(trained_library, *chosen)))
    found, binding = presets.chosen_of(trained_library, config, None)
    assert (binding.result, binding.message) == (BOUND, "")
    assert tuple(found) == chosen
    assert presets.form_of(config) == FORM
    assert presets.meta(config) == (
        "2 features • Layers 1-2 • T: 0.9 • BatchTopK SAE • tiny-llama-0.9m • intros"
    )


def test_nothing_selected_is_nothing_to_save(trained_library: Library) -> None:
    with pytest.raises(InvalidInput):
        config_of(trained_library)


def test_a_preset_goes_through_a_file_unchanged(
    trained_library: Library, sae_id: int, tmp_path: Path
) -> None:
    config = config_of(trained_library, Chosen(sae_id, 5, 1.5, "ablate"))
    trained_library.templates.save("steering", "mine", "", config)
    export_templates(trained_library, tmp_path / "out.json")
    entries = read_templates(tmp_path / "out.json")
    (entry,) = (entry for entry in entries if entry.name == "mine")
    assert entry.config == config
    assert import_templates(trained_library, [entry])[0].result == "kept"
    assert with_bindings(trained_library, [entry])[0].notes == ("Bound.",)


# --- model and SAE: every combination -------------------------------------------------------------

Change = Callable[[dict[str, Any]], None]
STRANGE = "5" * 64


def change(part: str, **values: Any) -> Change:
    return lambda config: config[part].update(values)


# What the file says of the model or the SAE, compared with what is here; what that comes to by
# itself, and a word of the reason.
MODELS: dict[str, tuple[Change, str, str]] = {
    "the same": (change("model"), BOUND, ""),
    "under another name, same weights": (change("model", name="theirs"), BOUND, ""),
    "same name, weights not known": (change("model", sha256=""), BOUND, ""),
    "same name, other weights": (change("model", sha256=STRANGE), WARNED, "other weights"),
    "another one": (change("model", name="theirs", sha256=STRANGE), UNBOUND, "not in this library"),
    "same name, other depth": (change("model", n_layers=40), REFUSED, "4 layers of width 128 here"),
    "same name, other width": (
        lambda config: (config["model"].update(d_model=64), config["sae"].update(d_in=64)),
        REFUSED, "not 4 of width 64",
    ),
}  # fmt: skip
SAES: dict[str, tuple[Change, str, str]] = {
    "the same": (change("sae"), BOUND, ""),
    "same weights, made elsewhere": (change("sae", created="2020-01-01", name="x"), BOUND, ""),
    "same moment, weights not known": (change("sae", sha256=""), BOUND, ""),
    "another run's": (change("sae", sha256=STRANGE), WARNED, "other features"),
    "perhaps another run's": (change("sae", sha256="", created="x"), WARNED, "is not known"),
    "another layer's": (
        lambda config: (
            config["sae"].update(layer=1, hook_point="blocks.1.hook_resid_post"),
            config["features"][0].update(layer=1),
        ),
        UNBOUND, "No SAE at blocks.1.hook_resid_post",
    ),
    "another site's": (
        change("sae", hook_point="blocks.2.hook_mlp_out"), UNBOUND, "No SAE at blocks.2.hook_mlp",
    ),
    "a transcoder's": (
        change("sae", hook_point_out="blocks.2.hook_mlp_out"), UNBOUND,
        "No SAE at blocks.2.hook_resid_post to blocks.2.hook_mlp_out",
    ),
    "wider": (change("sae", d_sae=9999), REFUSED, "has 256 features, not 9,999"),
    "narrower": (change("sae", d_sae=16), REFUSED, "has 256 features, not 16"),
}  # fmt: skip
WORST = (BOUND, WARNED, UNBOUND, REFUSED)


def through_a_file(library: Library, path: Path, config: dict[str, Any]) -> Any:
    """A preset from a file on the disk into the library; (what became of it, the preset or None)"""
    document = {"version": "1.1", "steering_presets": [{"name": "x", "config": config}]}
    path.write_text(json.dumps(document), encoding="utf-8")
    (outcome,) = import_templates(library, with_bindings(library, read_templates(path)))
    found = library.templates.named("steering", outcome.name) if outcome.name else None
    return outcome, found


@pytest.fixture
def presenter(
    services_of: Callable[[Library], Services], trained_library: Library
) -> SteeringPresenter:
    return SteeringPresenter(services_of(trained_library))


def test_every_combination_of_model_and_sae_has_its_outcome_and_says_why(
    trained_library: Library, sae_id: int, presenter: SteeringPresenter, tmp_path: Path
) -> None:
    sound = config_of(trained_library, Chosen(sae_id, 5, 1.5))
    assert len(sound["sae"]["sha256"]) == len(sound["model"]["sha256"]) == 64
    seen = set()
    for (model, (edit_model, of_model, why_model)), (sae, (edit_sae, of_sae, why_sae)) in product(
        MODELS.items(), SAES.items()
    ):
        row = f"model {model}, SAE {sae}"
        config = json.loads(json.dumps(sound))
        edit_model(config)
        edit_sae(config)
        # Without its model no SAE is looked at; of two reasons the first that ends it is told.
        expected = of_model if of_model in (UNBOUND, REFUSED) else max(of_model, of_sae, key=rank)
        outcome, preset = through_a_file(trained_library, tmp_path / "x.json", config)
        seen.add(expected)
        told = outcome.entry.problem or " ".join(outcome.entry.notes)
        why = why_model if of_model in (UNBOUND, REFUSED) else (why_sae or why_model)
        assert why in told, row
        if expected == REFUSED:
            assert (outcome.result, preset) == ("refused", None), row
            assert told.endswith("Then import the file again."), row
            # One that is in the library already is not loaded.
            number = trained_library.templates.save("steering", "old", "", config)
            preset = trained_library.templates.get(number)
        else:
            assert outcome.result == "added" and preset is not None, row
            assert told.startswith(expected.capitalize()), row
        presenter.set_selected([Chosen(sae_id, 9, 0.5)])
        _, binding, taken = presenter.load_preset(preset)
        assert (binding.result, taken) == (expected, expected in (BOUND, WARNED)), row
        wanted = [Chosen(sae_id, 5, 1.5)] if taken else [Chosen(sae_id, 9, 0.5)]
        assert presenter.selected == wanted, row
        assert taken or (binding.message and binding.next_step.endswith(".")), row
        trained_library.templates.remove(preset.id)
    assert seen == set(WORST)


def rank(result: str) -> int:
    return WORST.index(result)


def test_without_a_discovery_it_waits_for_one(
    trained_library: Library, sae_id: int, tmp_path: Path, presenter: SteeringPresenter
) -> None:
    config = config_of(trained_library, Chosen(sae_id, 5))
    trained_library.execute("DELETE FROM feature_runs")
    outcome, preset = through_a_file(trained_library, tmp_path / "x.json", config)
    assert "not discovered yet. Discover them" in outcome.entry.notes[0]
    assert bind(trained_library, preset.config).result == UNBOUND


def test_an_sae_that_travelled_is_known_by_its_weights(
    trained_library: Library, sae_id: int, tmp_path: Path
) -> None:
    """Exported, imported again and discovered by itself: as in the library of somebody else."""
    library = trained_library
    config = config_of(library, Chosen(sae_id, 5))
    del config["features"][0]["max_activation"]  # that of a shorter discovery is another

    def run(job: Any) -> Any:
        row = run_job(library, job, submit(library, job))
        assert row.status == "finished", row.error
        return row.result

    run(Export(None, str(tmp_path / "out"), "saelens", sae_id))
    (copy,) = run(ImportSae(str(tmp_path / "out"), 1, "theirs"))["sae_ids"]
    run(Discover(copy, max_tokens=2000, dataset_id=1))
    library.execute("DELETE FROM feature_runs WHERE sae_id = ?", (sae_id,))
    assert bind(library, config).sae_ids == (copy,)
    assert bind(library, config).result == BOUND


def test_a_strength_that_means_another_push_here_is_said(
    trained_library: Library, sae_id: int
) -> None:
    """Discovered with another text, a feature has another largest activation."""
    config = config_of(trained_library, Chosen(sae_id, 5, 1.5))
    (feature,) = config["features"]
    store, _ = open_features(trained_library, newest_run(trained_library, sae_id))
    assert feature["max_activation"] == float(store.columns["max_activation"][5]) > 0
    feature["max_activation"] *= 2
    binding = bind(trained_library, config)
    assert (binding.result, binding.sae_ids) == (WARNED, (sae_id,))
    assert binding.message.endswith("so that the same strength pushes less.")
    feature["method"] = "scale"  # a factor
    assert bind(trained_library, config).result == BOUND


def test_two_saes_that_are_one_here_cannot_have_the_same_feature(
    trained_library: Library, sae_id: int
) -> None:
    config = config_of(trained_library, Chosen(sae_id, 5))
    twin = {**config["sae"], "sha256": STRANGE}
    config["features"].append({"feature_id": 6, "coefficient": 1.0, "sae": twin})
    assert bind(trained_library, config).result == WARNED
    config["features"][1]["feature_id"] = 5
    binding = bind(trained_library, config)
    assert (binding.result, binding.sae_ids) == (UNBOUND, ()) and "of two SAEs" in binding.message


# --- what is refused where it is read -------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda c: c["features"][0].update(feature_id=256), "does not exist in an SAE of 256"),
        (lambda c: c["features"][0].update(method="explode"), "A method must be one of"),
        (lambda c: c["features"][0].update(layer=1), "its SAE is not"),
        (lambda c: c["features"].append(c["features"][0]), "stands in it twice"),
        (lambda c: c["features"].clear(), "It has no features"),
        (lambda c: c["sae"].update(layer=1), "at blocks.2.hook_resid_post and at layer 1"),
        (lambda c: c["sae"].update(d_in=64), "does not fit a model of width 128"),
        (lambda c: c["model"].update(n_layers=2), "do not exist in a model of 2 layers"),
        (lambda c: c["sae"].pop("d_sae"), "does not say at which layer and how large"),
        (lambda c: c["sae"].clear(), "a model but no SAE"),
        (lambda c: c["model"].clear(), "an SAE but no model"),
        (lambda c: c.update(temperature=9), "The temperature must be between 0 and 2"),
        (lambda c: c["settings"].update(scales="nan"), "The setting scales must be between"),
        (lambda c: c["settings"].update(scales="1;2"), "numbers with commas"),
        (lambda c: c["settings"].update(max_tokens=10**400), "The setting max_tokens must be"),
        (lambda c: c["settings"].update(scope="everywhere"), "The setting scope must be one of"),
        (lambda c: c["settings"].update(keep_norm="yes"), "must be true or false"),
    ],
)
def test_what_contradicts_itself_is_refused_and_changes_nothing(
    trained_library: Library, sae_id: int, tmp_path: Path, edit: Change, told: str
) -> None:
    config = config_of(trained_library, Chosen(sae_id, 5))
    edit(config)
    before = trained_library.templates.all()
    outcome, _ = through_a_file(trained_library, tmp_path / "x.json", config)
    assert outcome.result == "refused" and told in outcome.entry.problem
    assert trained_library.templates.all() == before


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ('{"version": "1.1", "steering_presets": [', "not valid JSON"),
        ('{"version": "2.0", "steering_presets": []}', "of another version"),
        ('{"version": "1.1", "steering_presets": {"a": 1}}', "not a file of templates"),
        ('{"kind": "mistudio.cluster-definition", "schema_version": "1", "members": []}',
         "steering sets cannot be read"),
        ('{"kind": "mistudio.cluster-bundle", "clusters": []}', "steering sets cannot be read"),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_presets_is_refused_in_words(
    trained_library: Library, tmp_path: Path, text: str, title: str
) -> None:
    before = trained_library.templates.all()
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=title) as caught:
        read_templates(tmp_path / "x.json")
    assert caught.value.what and caught.value.next_step
    assert trained_library.templates.all() == before


def test_200_damaged_presets_neither_crash_nor_change_what_is_there(
    trained_library: Library, sae_id: int, tmp_path: Path
) -> None:
    """Bytes turned, cut and doubled, values replaced: what is still taken in is a preset that can
    be shown and loaded; nothing else in the library is touched."""
    library = trained_library
    library.execute("PRAGMA synchronous = OFF")
    others = ("models", "saes", "feature_runs", "trainings", "jobs", "feature_notes")
    config = config_of(library, Chosen(sae_id, 5, 1.5, "clamp"), Chosen(sae_id, 9, -2.0))
    library.templates.save("steering", "mine", "words", config)
    export_templates(library, tmp_path / "out.json")
    document = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    document = {"version": "1.1", "steering_presets": document["steering_presets"]}
    whole, chance = json.dumps(document).encode(), random.Random(8)

    def rest() -> list[Any]:
        return [[tuple(row) for row in library.rows(f"SELECT * FROM {name}")] for name in others]

    before, mine = rest(), library.templates.all()
    counts = {"unreadable": 0, "refused": 0, "kept": 0, "added": 0}
    for number in range(200):
        path = tmp_path / "damaged.json"
        path.write_bytes(damaged(whole, chance, number))
        try:
            outcomes = import_templates(library, with_bindings(library, read_templates(path)))
        except UserError as error:
            counts["unreadable"] += 1
            assert error.what and error.next_step and library.templates.all() == mine
            continue
        for outcome in outcomes:
            counts[outcome.result] += 1
            if outcome.result != "added":
                continue
            preset = library.templates.named("steering", outcome.name)
            assert preset is not None and presets.meta(preset.config)
            form = presets.form_of(preset.config)
            assert 0 <= form.temperature <= 2 and 1 <= form.max_tokens <= 2048
            found, _ = presets.chosen_of(library, preset.config, sae_id)
            for one in found:
                assert 0 <= one.feature < library.saes.get(one.sae_id).d_sae
                assert abs(one.strength) <= 5
            library.templates.remove(preset.id)
        assert library.templates.all() == mine
    assert rest() == before
    assert min(counts.values()) > 5, counts


VALUES = ("NaN", "1e999", "-1", "1e308", "9" * 400, '"\\u0000"', "[]", "{}", "true", '"x"', "null")


def damaged(whole: bytes, chance: random.Random, number: int) -> bytes:
    at = chance.randrange(len(whole))
    match number % 4:
        case 0:
            return whole[:at]
        case 1:
            return whole[:at] + bytes([chance.randrange(256)]) + whole[at + 1 :]
        case 2:
            end = min(at + chance.randrange(1, 60), len(whole))
            return whole[:end] + whole[at:end] * 2 + whole[end:]
    # A value replaced by another that is JSON or nearly.
    found = list(re.finditer(rb': ("[^"]*"|[-\d.]+|true|false)', whole))
    place = chance.choice(found)
    return whole[: place.start(1)] + chance.choice(VALUES).encode() + whole[place.end(1) :]


def test_what_an_earlier_version_let_in_is_shown_as_far_as_it_is_understood(
    trained_library: Library, sae_id: int
) -> None:
    config = config_of(trained_library, Chosen(sae_id, 5))
    config["settings"] |= {"scales": "nan", "seed": 10**400, "top_p": "x", "prompt": "Hello"}
    assert presets.form_of(config) == replace(
        FORM, prompt="Hello", scales=(1.0,), seed=0, top_p=1.0
    )


def test_a_preset_that_names_no_sae_takes_the_one_that_is_shown(
    trained_library: Library, sae_id: int
) -> None:
    raw = {"features": [{"feature_id": 42, "coefficient": 3.5}], "temperature": 1.0}
    document = {"version": "1.0", "steering_presets": [{"name": "Positive", **raw}]}
    (entry,) = entries_of(document)
    assert entry.config is not None
    found, binding = presets.chosen_of(trained_library, entry.config, sae_id)
    assert binding.result == UNBOUND and found == [Chosen(sae_id, 42, 3.5)]
    raw["features"][0]["feature_id"] = 100_000  # type: ignore[index]
    (entry,) = entries_of({"version": "1.0", "steering_presets": [{"name": "P", **raw}]})
    assert entry.config is not None
    found, binding = presets.chosen_of(trained_library, entry.config, sae_id)
    assert found == [] and "has only 256 features" in binding.message


def test_what_an_old_preset_cannot_bring_along_is_said(
    trained_library: Library, sae_id: int
) -> None:
    raw = {"features": [{"feature_id": 42, "coefficient": 150}], "intervention_layers": [8, 12]}
    (entry,) = entries_of({"version": "1.0", "steering_presets": [{"name": "P", **raw}]})
    assert entry.config is not None
    found, binding = presets.chosen_of(trained_library, entry.config, sae_id)
    assert found == [Chosen(sae_id, 42, 5.0)]
    assert "Its layers are left out: the features act at layer 2." in binding.message
    assert "limited" in binding.message


# --- on the screen --------------------------------------------------------------------------------


def test_saved_starred_loaded_and_deleted(
    page: SteeringPage, qtbot: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    section, form = page.presets, page.configuration
    section.set_expanded(True)
    assert not section.save.isEnabled()
    page.presenter.add(5, 1.5)
    form.prompt.setPlainText("The history")
    form.advanced.seed.setValue(7)
    section.save.click()
    assert section.name.text().startswith("steering_1features_layer2_")
    assert section.commit.text() == "Save Preset"
    section.name.setText("mine")
    section.commit.click()
    qtbot.waitUntil(lambda: len(section.rows()) == 1)
    (line,) = section.rows()
    assert section.button.text() == "Steering Presets (1)"
    line.star.click()
    assert page._services.library.templates.named("steering", "mine").favourite
    page.presenter.set_selected([])
    form.prompt.setPlainText("something else")
    form.advanced.seed.setValue(1)
    section.rows()[0].load.click()
    assert [c.as_list()[1:] for c in page.presenter.selected] == [[5, 1.5, "add"]]
    assert (form.form().prompt, form.form().seed) == ("The history", 7)
    assert form.advanced.expanded  # a seed of its own would else be out of sight
    qtbot.waitUntil(lambda: squeezed(page) == [])  # layouts settle one by one
    shot(page._page.widget(), "steering_presets-1280")
    assert nameless(page) == [] and too_small(page) == [] and cut_off(page) == []
    kept = page._services.library.templates.named("steering", "mine")
    monkeypatch.setattr(ConfirmDialog, "ask", classmethod(lambda cls, *_: False))
    section.rows()[0].delete.click()
    assert page._services.library.templates.named("steering", "mine") == kept
    monkeypatch.setattr(ConfirmDialog, "ask", classmethod(lambda cls, *_: True))
    section.rows()[0].delete.click()
    qtbot.waitUntil(lambda: section.rows() == [])
    undo = page._services.toasts.toasts[-1]
    assert "“mine” was deleted" in undo.message
    undo._on_action_clicked()
    qtbot.waitUntil(lambda: len(section.rows()) == 1)
    assert page._services.library.templates.named("steering", "mine") == kept


def test_the_keyboard_keeps_its_place_in_the_list(
    page: SteeringPage, qtbot: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    section, templates = page.presets, page._services.library.templates
    monkeypatch.setattr(ConfirmDialog, "ask", classmethod(lambda cls, *_: True))
    page.presenter.add(5, 1.5)
    for name in ("one", "two", "three"):
        templates.save("steering", name, "", page._preset())
    section.set_expanded(True)
    qtbot.waitUntil(lambda: len(section.rows()) == 3)

    def names() -> list[str]:
        return [line.template.name for line in section.rows()]

    def press(place: int, stop: str) -> None:
        button = getattr(section.rows()[place], stop)
        button.setFocus()
        QTest.keyClick(button, Qt.Key.Key_Space)

    assert names() == ["three", "two", "one"]
    press(2, "star")
    qtbot.waitUntil(lambda: names() == ["one", "three", "two"])
    assert section.window().focusWidget() is section.rows()[0].star  # it went along to the top
    press(1, "delete")
    qtbot.waitUntil(lambda: names() == ["one", "two"])
    assert section.window().focusWidget() is section.rows()[1].delete
    press(1, "delete")
    qtbot.waitUntil(lambda: names() == ["one"])
    assert section.window().focusWidget() is section.rows()[0].delete
    press(0, "delete")
    qtbot.waitUntil(lambda: names() == [])
    assert section.window().focusWidget() is section.save


def test_the_import_tells_what_becomes_of_each(
    trained_library: Library,
    sae_id: int,
    services_of: Callable[[Library], Services],
    qtbot: Any,
    tmp_path: Path,
) -> None:
    kinds = ["the same", "another run's", "another layer's", "wider"]
    entries = []
    for name in kinds:
        config = config_of(trained_library, Chosen(sae_id, 5, 1.5))
        SAES[name][0](config)
        entries.append({"name": name, "config": config})
    entries.append({"name": "damaged", "config": {"features": 3}})
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"version": "1.1", "steering_presets": entries}), encoding="utf-8")
    section = TemplateSection(
        services_of(trained_library), "steering", "Steering Presets", dict, presets.meta
    )
    qtbot.addWidget(section)
    section.import_from(path)

    def dialogs() -> list[ImportDialog]:
        return [w for w in QApplication.topLevelWidgets() if isinstance(w, ImportDialog)]

    qtbot.waitUntil(lambda: bool(dialogs()))
    (dialog,) = dialogs()
    model = dialog.model
    told = [[model.index(row, column).data() for column in range(4)] for row in range(len(entries))]
    assert [row[2] for row in told] == ["Can be added"] * 3 + ["Refused"] * 2
    beginnings = ["Bound.", "Bound with a warning: Another SAE", "Unbound: No SAE at", "The SAE at"]
    for row, beginning in zip(told, [*beginnings, "The features must be"], strict=True):
        assert row[3].startswith(beginning), row
    assert dialog._summary.text() == (
        "3 of 5 entries can be added. 2 refused; the table says why. "
        "What is damaged must be exported again."
    )
    table = dialog.table
    qtbot.waitUntil(lambda: not dialog._fit.isActive() and table.columnWidth(3) > 400)
    shot(dialog, "steering_presets-import")
    for row in range(5):  # what is to be done is at the end of a note: it must be seen
        space = QRect(0, 0, table.columnWidth(3) - 20, 1000)
        words = Qt.TextFlag.TextWordWrap
        needed = table.fontMetrics().boundingRect(space, words, told[row][3]).height()
        assert needed <= table.rowHeight(row) < 3 * needed, told[row]
    assert nameless(dialog) == [] and too_small(dialog) == []
    dialog.accept_button.click()
    qtbot.waitUntil(lambda: dialog.accept_button.text() == "Close")
    assert dialog._summary.text() == "3 added, 2 refused."
    assert len(trained_library.templates.of_kind("steering")) == 3
    dialog.accept_button.click()
    qtbot.waitUntil(lambda: not dialogs())


def test_a_preset_of_an_sae_that_is_not_here_changes_nothing_and_says_so(
    page: SteeringPage, qtbot: Any
) -> None:
    library = page._services.library
    config = config_of(library, Chosen(page.presenter.sae_id or 0, 5))
    config["sae"]["d_sae"] = 9999
    library.templates.save("steering", "elsewhere", "", config)
    page.presenter.add(3, 1.0)
    qtbot.waitUntil(lambda: len(page.presets.rows()) == 1)
    page.presets.rows()[0].load.click()
    assert [c.feature for c in page.presenter.selected] == [3]
    assert page.form().prompt == ""
    (toast,) = page._services.toasts.toasts
    assert "is refused" in toast.accessibleName()
    assert "has 256 features, not 9,999" in toast.message and "Train or import" in toast.message
