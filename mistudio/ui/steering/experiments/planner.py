"""The card in which an experiment is planned; the features and the rest of its settings are those
of the page."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PySide6.QtCore import Signal
from PySide6.QtWidgets import QLineEdit, QPlainTextEdit, QWidget

from mistudio import formatting
from mistudio.ui.steering.experiments import plan as plans
from mistudio.ui.steering.experiments.plan import (
    ABOUT,
    ABOUT_OWN,
    KINDS,
    MOST_SEEDS,
    STRENGTHS,
    Plan,
)
from mistudio.ui.steering.presenter import SteeringPresenter
from mistudio.ui.steering.request import Form
from mistudio.ui.widgets import Button, Card, Choice, FormRow, IntBox, LayerGrid, Text, column, row


class PlanCard(Card):
    """`form()` gives the settings of the page's form; `start_wanted` is its button."""

    start_wanted = Signal()

    def __init__(
        self,
        presenter: SteeringPresenter,
        form: Callable[[], Form],
        parent: QWidget | None = None,
    ) -> None:
        super().__init__("New experiment", "flask-conical", parent=parent)
        self._presenter, self._form = presenter, form
        self._busy = False
        self.kind = Choice(KINDS)
        self.kind.currentIndexChanged.connect(self._on_edited)
        self.about = Text("", "helper", wrap=True)
        self.prompts = QPlainTextEdit()
        self.prompts.setPlaceholderText("One prompt a line; empty: the prompt of the form above")
        self.prompts.setTabChangesFocus(True)
        self.prompts.setFixedHeight(4 * self.prompts.fontMetrics().lineSpacing() + 26)
        self.prompts.textChanged.connect(self._on_edited)
        self.strengths = QLineEdit(STRENGTHS)
        self.strengths.setToolTip("Each multiplies all coefficients")
        self.strengths.textChanged.connect(self._on_edited)
        self._strengths_row = FormRow("Strengths", self.strengths)
        self.seeds = IntBox(3, 1, MOST_SEEDS)
        self.seeds.setToolTip(
            "Every prompt is continued with each of them, from the seed under Advanced on. More "
            "seeds make the intervals narrower; one gives none"
        )
        self.seeds.valueChanged.connect(self._on_edited)
        self.layers = LayerGrid(label="Layers")
        self.layers.changed.connect(self._on_edited)
        self.start = Button("Run Experiment", "primary", "play")
        self.start.clicked.connect(self._on_start_clicked)
        self.reason = Text("", "helper", wrap=True)
        left, right = column(12), column(12)
        left.addWidget(FormRow("What to find out", self.kind))
        left.addWidget(self.about)
        left.addWidget(self._strengths_row)
        left.addWidget(FormRow("Seeds", self.seeds))
        left.addStretch(1)
        right.addWidget(FormRow("Prompts", self.prompts))
        right.addWidget(self.layers)
        right.addStretch(1)
        columns = row(spacing=24)
        columns.addLayout(left, 1)
        columns.addLayout(right, 1)
        buttons = row(self.start, self.reason)
        buttons.setStretch(1, 1)
        self.add(columns, buttons)

    # --- the plan -------------------------------------------------------------------------------

    def plan(self) -> Plan:
        own = self._form().prompt.strip()
        prompts = plans.read_prompts(self.prompts.toPlainText()) or ((own,) if own else ())
        return Plan(
            str(self.kind.value),
            prompts,
            plans.read_strengths(self.strengths.text()),
            self._layers(),
            self.seeds.value(),
        )

    def _layers(self) -> tuple[int, ...]:
        chosen = self._presenter.selected
        if not plans.at_own_layers(str(self.kind.value), chosen):
            return tuple(self.layers.selected())
        found = [self._presenter.source_of(c.sae_id) for c in chosen]
        return tuple(sorted({source.sae.layer for source in found if source is not None}))

    def show_plan(self, plan: Plan) -> None:
        """A single prompt is left to the form."""
        several = len(plan.prompts) > 1
        self.restore_state(
            {
                "kind": plan.kind,
                "prompts": plans.write_prompts(plan.prompts) if several else "",
                "strengths": ", ".join(f"{strength:g}" for strength in plan.strengths or ())
                or None,
                "layers": list(plan.layers) or None,
                "seeds": plan.seeds,
            }
        )

    def save_state(self) -> dict[str, Any]:
        """As it was typed."""
        return {
            "kind": self.kind.value,
            "prompts": self.prompts.toPlainText(),
            "strengths": self.strengths.text(),
            "layers": self.layers.selected(),
            "seeds": self.seeds.value(),
        }

    def restore_state(self, state: dict[str, Any]) -> None:
        """What can be understood of it; the rest stays."""
        kind, layers, seeds = state.get("kind"), state.get("layers"), state.get("seeds")
        if kind in dict(KINDS):
            self.kind.set_value(kind)
        if isinstance(state.get("prompts"), str):
            self.prompts.setPlainText(state["prompts"])
        if isinstance(state.get("strengths"), str):
            self.strengths.setText(state["strengths"])
        if isinstance(layers, list) and self.layers.n_layers:
            self.layers.set_selected(n for n in layers if isinstance(n, int))
        if isinstance(seeds, int):
            self.seeds.setValue(seeds)
        self.refresh()

    def set_n_layers(self, n_layers: int) -> None:
        """Of another model: all of them are chosen then."""
        if self.layers.n_layers != n_layers:
            self.layers.set_n_layers(n_layers)
            self.layers.set_selected(range(n_layers))

    def set_busy(self, busy: bool) -> None:
        self._busy = busy
        self.start.setText("Running…" if busy else "Run Experiment")
        self.refresh()

    def refresh(self) -> None:
        """What depends on plan, form and selection together."""
        plan, form = self.plan(), self._form()
        own = plans.at_own_layers(plan.kind, self._presenter.selected)
        self.about.setText(ABOUT_OWN if own else ABOUT[plan.kind])
        self._strengths_row.setVisible(plan.kind in (plans.SWEEP, plans.BY_LAYER))
        self.layers.setVisible(plan.kind in (plans.BY_LAYER, plans.STUDY) and not own)
        reason = plans.reason(plan, form, self._presenter.selected)
        self.start.setEnabled(not self._busy and not reason)
        self.reason.setText(reason or _amount(plan, form))

    def _on_edited(self, *_: object) -> None:
        self.refresh()

    def _on_start_clicked(self, checked: bool = False) -> None:
        self.start_wanted.emit()


def _amount(plan: Plan, form: Form) -> str:
    texts = plans.texts(plan, form)
    what = "steered text" if texts == 1 else "steered texts"
    told = f"{formatting.count(texts)} {what} of up to {formatting.count(form.max_tokens)} tokens"
    if form.temperature == 0 and plan.seeds > 1:
        told += ". At temperature 0 every seed writes the same: one is enough"
    return told
