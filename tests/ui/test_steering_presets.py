"""Steering presets: saved with what they belong to, bound again in this library or another one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mistudio.errors import InvalidInput
from mistudio.jobs.presets import BOUND, UNBOUND, WARNED, bind, with_bindings
from mistudio.jobs.template_files import entries_of, read_templates
from mistudio.jobs.templates import export_templates, import_templates
from mistudio.library.library import Library
from mistudio.ui.services import Services
from mistudio.ui.steering import presets
from mistudio.ui.steering.page import SteeringPage
from mistudio.ui.steering.request import Chosen, Form
from mistudio.ui.steering.sources import sources
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
    qtbot.waitUntil(lambda: made.presenter.index is not None, timeout=30_000)
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


def test_another_sae_of_its_kind_is_taken_with_a_warning(
    trained_library: Library, sae_id: int
) -> None:
    config = config_of(trained_library, Chosen(sae_id, 5))
    config["sae"]["created"] = "2020-01-01T00:00:00+00:00"
    found, binding = presets.chosen_of(trained_library, config, None)
    assert binding.result == WARNED and "the numbers may differ" in binding.message
    assert [c.sae_id for c in found] == [sae_id]


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("d_sae", 9999, "No SAE at blocks.2.hook_resid_post with 9,999 features"),
        ("hook_point", "blocks.1.hook_resid_post", "No SAE at blocks.1.hook_resid_post"),
    ],
)
def test_an_sae_of_another_shape_or_layer_leaves_it_unbound(
    trained_library: Library, sae_id: int, key: str, value: Any, told: str
) -> None:
    config = config_of(trained_library, Chosen(sae_id, 5))
    config["sae"][key] = value
    found, binding = presets.chosen_of(trained_library, config, sae_id)
    assert (found, binding.result) == ([], UNBOUND)
    assert told in binding.message


def test_without_its_model_or_its_features_it_is_unbound(
    trained_library: Library, sae_id: int
) -> None:
    config = config_of(trained_library, Chosen(sae_id, 5))
    other = {**config, "model": {**config["model"], "name": "another", "source": "hub"}}
    other["model"]["repository"] = "some/where"
    assert "The model another is not in this library" in bind(trained_library, other).message
    trained_library.execute("DELETE FROM feature_runs")
    assert "not discovered yet" in bind(trained_library, config).message


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
    assert presets.chosen_of(trained_library, entry.config, sae_id)[0] == []


def test_a_feature_that_its_own_sae_cannot_have_is_refused(
    trained_library: Library, sae_id: int
) -> None:
    config = config_of(trained_library, Chosen(sae_id, 5))
    config["features"][0]["feature_id"] = config["sae"]["d_sae"]
    document = {"version": "1.1", "steering_presets": [{"name": "broken", "config": config}]}
    (entry,) = entries_of(document)
    assert "does not exist in an SAE of" in entry.problem
    config["features"][0] |= {"feature_id": 5, "method": "explode"}
    (entry,) = entries_of(document)
    assert "A method must be one of" in entry.problem


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
    qtbot.waitUntil(lambda: len(section.rows()) == 1, timeout=5000)
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
    shot(page._page.widget(), "steering_presets-1280")
    assert nameless(page) == [] and too_small(page) == [] and cut_off(page) == []
    assert squeezed(page) == []
    monkeypatch.setattr(ConfirmDialog, "ask", classmethod(lambda cls, *_: True))
    section.rows()[0].delete.click()
    qtbot.waitUntil(lambda: section.rows() == [], timeout=5000)


def test_a_preset_of_an_sae_that_is_not_here_changes_nothing_and_says_so(
    page: SteeringPage, qtbot: Any
) -> None:
    library = page._services.library
    config = config_of(library, Chosen(page.presenter.sae_id or 0, 5))
    config["sae"]["d_sae"] = 9999
    library.templates.save("steering", "elsewhere", "", config)
    page.presenter.add(3, 1.0)
    qtbot.waitUntil(lambda: len(page.presets.rows()) == 1, timeout=5000)
    page.presets.rows()[0].load.click()
    assert [c.feature for c in page.presenter.selected] == [3]
    assert page.form().prompt == ""
    (toast,) = page._services.toasts.toasts
    assert "cannot be used yet" in toast.accessibleName()
