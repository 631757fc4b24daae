"""The map: decoder directions on a plane, coloured by a statistic, linked with the table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PySide6.QtGui import QIcon
from PySide6.QtWidgets import QButtonGroup, QCheckBox, QWidget

from mistudio import formatting
from mistudio.engine.features.columns import BANDS
from mistudio.ui.features import shown
from mistudio.ui.features.pictures import figures
from mistudio.ui.features.pictures.parts import ExportDialog, Legend, Place
from mistudio.ui.features.pictures.point_map import (
    ADD,
    LASSO,
    PAN,
    RECTANGLE,
    REMOVE,
    Caption,
    PointMap,
)
from mistudio.ui.features.pictures.scales import Scale, continuous
from mistudio.ui.features.pictures.session import Session
from mistudio.ui.theme import icons, tokens
from mistudio.ui.widgets import (
    Button,
    Choice,
    FloatBox,
    FormRow,
    IntBox,
    Surface,
    Text,
    column,
    debounced,
    row,
)

if TYPE_CHECKING:
    from mistudio.engine.features.maps import FeatureMap

KIND = "map_features"
TITLES = {"umap": "UMAP", "tsne": "t-SNE"}
FIRST = ("density", "score", "band", "group", "top_token_share", "nearest_cosine")
NOT_NUMBERS = ("top_token", "common_token", "nearest_feature", "band")
MOST_CAPTIONS = 40
MARKS = (
    ("ring", "Enclosed here, or selected in the table"),
    ("diamond", "Starred"),
    ("faint", "Not among what the table shows"),
)


class MapView(QWidget):
    """Controls above, map and legend, what it is of below."""

    def __init__(self, session: Session, parent: QWidget | None = None) -> None:
        super().__init__(parent)
        self.session = session
        self.made: FeatureMap | None = None
        self.scale: Scale | None = None
        self.chosen = np.empty(0, np.int32)
        """Features that were enclosed."""
        self._values = np.empty(0)
        self._coloured = False  # whether the map that is shown has its colours

        self.method = Choice([("umap", "UMAP"), ("tsne", "t-SNE")])
        self.method.setObjectName("method")
        self.method.setAccessibleName("Method")
        self.method.currentIndexChanged.connect(self.refresh)
        self.colour = Choice([])
        self.colour.setObjectName("colour")
        self.colour.setAccessibleName("Colour by")
        self.colour.setMinimumContentsLength(18)
        self.colour.currentIndexChanged.connect(self._on_colour_changed)
        self.points = PointMap()
        self.points.tip = self.tip
        self.points.clicked.connect(session.open_feature)
        self.points.enclosed.connect(self._on_points_enclosed)
        self.points.pointed.connect(self._on_points_pointed)
        self.legend = Legend(MARKS)
        self._modes = QButtonGroup(self)  # one of them is on
        self.modes: dict[str, Button] = {}
        for mode, text, tip in (
            (PAN, "Move", "Drag moves the map, the wheel zooms; with Shift a drag is a lasso"),
            (LASSO, "Lasso", "Draw around features. Ctrl adds to those chosen, Alt takes out"),
            (RECTANGLE, "Rectangle", "Drag a rectangle. Ctrl adds to those chosen, Alt takes out"),
        ):
            button = Button(text, "small", tooltip=tip)
            button.setCheckable(True)
            button.setChecked(mode == PAN)
            button.clicked.connect(self._on_mode_clicked)
            self._modes.addButton(button)
            self.modes[mode] = button
        self._show_mode()
        self.whole = whole = Button("Show all", "small", "maximize-2", "The whole map again (Home)")
        whole.clicked.connect(self._on_whole_clicked)
        self.export = Button("Save picture…", "small", "download")
        self.export.clicked.connect(self.open_export)
        self.only_shown = QCheckBox("Dim what the table hides")
        self.only_shown.setToolTip(
            "Features that do not pass the table's filters and search are faint"
        )
        self.only_shown.setChecked(True)
        self.only_shown.toggled.connect(self._show_marks)
        modes = row(*self.modes.values(), whole, spacing=6)
        self._tools = QWidget()
        tools = row(
            Text("Method", "label"), self.method, 4, Text("Colour by", "label"), self.colour, 8,
            modes, None, self.export, spacing=8,
        )  # fmt: skip
        self._tools.setLayout(tools)

        picture = QWidget()
        picture.setProperty("surface", "clear")
        pair = row(self.points, self.legend, spacing=12)
        pair.setStretch(0, 1)
        picture.setLayout(pair)
        self.place = Place(picture)
        self.place.wanted.connect(self.make)
        self.place.cancelled.connect(self._on_place_cancelled)

        self._count = Text("", "label")
        self.clear_button = Button("Clear", "small", "x", "Choose none, and show all in the table")
        self.clear_button.clicked.connect(self.clear_chosen)
        self.said = Text("", "helper", wrap=True, selectable=True)
        self.settings = self._make_settings()
        self.settings_button = Button(
            "Other settings…", "small", "sliders-horizontal", "Make the map with other settings"
        )
        self.settings_button.setCheckable(True)
        self.settings_button.toggled.connect(self.settings.setVisible)
        layout = column(8)
        layout.addWidget(self._tools)
        layout.addWidget(self.place, 1)
        layout.addLayout(
            row(self._count, self.clear_button, None, self.only_shown, self.settings_button)
        )
        layout.addWidget(self.said)
        layout.addWidget(self.settings)
        self.setLayout(layout)

        self._marks_soon = debounced(self, 40, self._show_marks)
        session.opened.connect(self.refresh)
        session.linked.connect(self._marks_soon)
        session.job_changed.connect(self._show_state)
        session.progressed.connect(self._show_progress)
        session.names_arrived.connect(self._on_names_arrived)
        self.refresh()

    def _make_settings(self) -> QWidget:
        box = Surface("row", None, 14)
        box.hide()
        self.neighbours = IntBox(15, 2, 200)
        self.min_dist = FloatBox(0.05, 0.0, 0.99, 0.05)
        self.perplexity = IntBox(30, 2, 100)
        self.seed = IntBox(0, 0, 2**31 - 1)
        self.with_dense = QCheckBox("Include dense features")
        self.with_dense.setToolTip("Those that are active on more than a tenth of the tokens")
        self._rows = {
            "umap": [
                FormRow("Neighbours", self.neighbours, "More: the whole; fewer: the details."),
                FormRow("Smallest distance", self.min_dist, "Smaller: tighter groups."),
            ],
            "tsne": [FormRow("Perplexity", self.perplexity, "About how many count as near.")],
        }
        seed = FormRow("Seed", self.seed, "The same gives the same picture here.")
        again = Button("Make the map", "secondary", "refresh-cw")
        again.clicked.connect(self.make)
        self.again = again
        fields = row(*self._rows["umap"], *self._rows["tsne"], seed, spacing=16)
        box.add(fields, row(self.with_dense, None, again))
        return box

    # --- state ----------------------------------------------------------------------------------

    def refresh(self, *_: object) -> None:
        """Another discovery, method or map."""
        for method, rows in self._rows.items():
            for line in rows:
                line.setVisible(method == self.method.value)
        made = self.session.newest_map(self.method.value) if self.session.ready else None
        if made is not self.made:
            self.made = made
            self.chosen = np.empty(0, np.int32)
            if made is not None:
                features = made.features
                self.points.set_points(
                    features, made.places["x"][features], made.places["y"][features]
                )
                self._coloured = False
            self.said.setText(self.method_text())
        if made is not None and not self._coloured and self.session.columns is not None:
            self._coloured = True
            self._offer_colours()
            self._on_colour_changed()
        self._show_state()

    def _offer_colours(self) -> None:
        columns = self.session.columns
        names = list(columns.values) if columns is not None else []
        there = [one for one in shown.ALL.values() if one.name in names or one.name == "band"]
        numbers = [one for one in there if one.name not in NOT_NUMBERS]
        options = {one.name: one.title for one in numbers}
        if "band" in names:
            options["band"] = shown.ALL["band"].title
        options["group"] = "Group on the map"
        order = [name for name in FIRST if name in options]
        order += [name for name in options if name not in order]
        self.colour.set_options([(name, options[name]) for name in order])

    def _show_state(self) -> None:
        session = self.session
        job = session.job(KIND)
        if session.run is None:
            self.place.show_invitation(
                "microscope", "Choose an SAE whose features are discovered in the Features tab.",
                "", "", None,
            )  # fmt: skip
        elif job is not None:
            own = session.services.jobs.owns(job.id)
            waits = "It waits for the job before it." if job.status == "queued" else ""
            method = TITLES.get(job.params.get("method", ""), "map")
            self.place.show_progress(
                f"Making the {method} map…", waits or "You can go on working meanwhile.", own
            )
            self._show_progress()
        elif not session.ready:
            self.place.show_busy("Reading…")
        elif self.made is None:
            failed = session.failure(KIND)
            name = TITLES[self.method.value]
            self.place.show_invitation(
                "circle-dot",
                f"No {name} map of these features yet",
                f"Make the {name} map",
                "Decoder directions that point alike will stand close together. Seconds for a "
                "few thousand features, minutes for 65,000; it runs in the background and is kept.",
                failed.error if failed is not None else None,
            )
        else:
            self.place.show_picture()
        there = self.place.shows_picture
        self.export.setEnabled(there)
        for part in (self._count, self.only_shown, self.said):
            part.setVisible(there)
        self.colour.setEnabled(there)
        for button in (*self.modes.values(), self.whole):
            button.setEnabled(there)
        can = session.run is not None and job is None and session.ready
        self.settings_button.setEnabled(can)
        self.settings.setVisible(can and self.settings_button.isChecked())
        self._show_count()

    def _show_progress(self) -> None:
        if self.place.progress is None or not self.isVisible():
            return
        job = self.session.job(KIND)
        if job is not None:
            self.place.progress.show_snapshot(self.session.services.jobs.snapshot(job.id))

    def make(self, *_: object) -> None:
        from mistudio.jobs.kinds import MapFeatures

        if self.session.run is not None:
            self.session.submit(
                MapFeatures(
                    self.session.run.id,
                    method=self.method.value,
                    neighbours=self.neighbours.value(),
                    min_dist=round(self.min_dist.value(), 2),
                    perplexity=float(self.perplexity.value()),
                    with_dense=self.with_dense.isChecked(),
                    seed=self.seed.value(),
                )
            )

    def method_text(self) -> str:
        """What the map is of, how it was made, how far it can be trusted."""
        made = self.made
        if made is None:
            return ""
        settings, quality = made.settings, made.quality
        how = (
            f"{settings.neighbours} neighbours, smallest distance {settings.min_dist:g}"
            if settings.method == "umap"
            else f"perplexity {settings.perplexity:g}"
        )
        reduced = (
            f" in {made.components} principal components "
            f"({formatting.percent(made.variance, 0)} of the variance)"
            if made.components
            else ""
        )
        out = [
            f"{formatting.count(n)} {what}"
            for n, what in (
                (made.dead, "dead"),
                (made.dense, "dense"),
                (made.no_direction, "without a direction"),
            )
            if n
        ]
        left = f"; {' and '.join(out)} left out" if out else ""
        versions = ", ".join(f"{name} {number}" for name, number in made.versions.items())
        return (
            f"{TITLES[settings.method]} of {formatting.count(made.n)} decoder directions by exact "
            f"cosine{reduced}, {how}, seed {settings.seed}{left}. "
            f"Trustworthiness {quality.trust:.3f}: 1 is perfect, 0.5 chance; "
            f"{formatting.percent(quality.kept, 0)} of a feature's {quality.near} nearest "
            f"directions are among its {quality.near} nearest here (of "
            f"{formatting.count(quality.judged)} features). Distances between groups mean little. "
            f"Made in {formatting.duration(made.seconds)} with {versions}."
        )

    # --- colours --------------------------------------------------------------------------------

    def _on_colour_changed(self, *_: object) -> None:
        made, columns, name = self.made, self.session.columns, self.colour.value
        if made is None or columns is None or name is None:
            return
        self.scale, self._values = self._scale_of(name, made)
        self.points.set_colours(self.scale.shades(self._values), self.scale.palette())
        self.points.set_captions(self._captions() if name == "group" else ())
        self.legend.set_scale(self.scale)
        self._show_marks()

    def _scale_of(self, name: str, made: FeatureMap) -> tuple[Scale, np.ndarray]:
        columns = self.session.columns
        assert columns is not None
        if name == "group":
            groups = made.places["group"].astype(np.float64)
            n = int(groups.max(initial=-1)) + 1
            return (
                Scale(
                    "Group on the map",
                    "kinds",
                    none="in no group",
                    has_none=True,
                    unit=f"{n} groups; eight colours in turn, numbers on the map",
                    definition="Dense places of this plane, found by HDBSCAN (leaves, at least "
                    f"{made.settings.min_cluster} features): places to look at, no findings.",
                ),
                np.where(groups < 0, np.nan, groups),
            )
        one = shown.ALL[name]
        values = np.asarray(columns.values[name], np.float64)
        tip = shown.tip(one, columns.meta)
        if name == "band":
            there = set(values[made.features].astype(int).tolist())
            names = tuple(name if i in there else "" for i, name in enumerate(BANDS))
            return Scale(one.title, "steps", names=names, definition=tip), values
        return (
            continuous(
                one.title,
                values[made.features],
                unit="" if one.percent else one.unit,
                percent=one.percent,
                definition=tip,
            ),
            values,
        )

    def _captions(self) -> list[Caption]:
        assert self.made is not None
        places, found = self.made.places, []
        for group in range(min(int(places["group"].max(initial=-1)) + 1, MOST_CAPTIONS)):
            inside = places["group"] == group
            x, y = float(np.median(places["x"][inside])), float(np.median(places["y"][inside]))
            found.append(Caption(f"{group + 1}", x, y))
        return found

    def tip(self, feature: int) -> str:
        """Number, label, and the value that the colour stands for."""
        lines = [self.session.name(feature)]
        if self.scale is not None and self.made is not None:
            value = float(self._values[feature])
            if self.colour.value == "group":
                text = f"{int(value) + 1}" if np.isfinite(value) else self.scale.none
            else:
                text = shown.written(shown.ALL[self.colour.value], value)
            lines.append(f"{self.scale.title}: {text}")
        if self.session.mask([feature]).any() and self.session.starred()[feature]:
            lines.append("Starred")
        return "\n".join(lines)

    # --- choosing -------------------------------------------------------------------------------

    def _on_points_enclosed(self, features: np.ndarray, way: str) -> None:
        if way == ADD:
            features = np.union1d(self.chosen, features)
        elif way == REMOVE:
            features = np.setdiff1d(self.chosen, features)
        self.set_chosen(np.asarray(features, np.int32))

    def set_chosen(self, features: np.ndarray) -> None:
        """Keep these chosen and let the table show them alone; none lets it show all."""
        self.chosen = features
        table = self.session.presenter.table
        n = len(features)
        if n:
            noun = "feature" if n == 1 else "features"
            table.set_subset(features, f"Lasso: {formatting.count(n)} {noun}")
        else:
            table.set_subset(None, "")
        self._show_marks()

    def clear_chosen(self, *_: object) -> None:
        self.set_chosen(np.empty(0, np.int32))

    def _show_marks(self, *_: object) -> None:
        session = self.session
        if self.made is None or session.columns is None:
            return
        self._forget_what_was_let_go()
        n = len(session.columns)
        kept = session.shown() if self.only_shown.isChecked() else np.ones(n, bool)
        chosen = session.mask(self.chosen) | session.mask(session.selected())
        self.points.set_marks(kept, chosen, session.starred())
        self._show_count()

    def _forget_what_was_let_go(self) -> None:
        """The chip above the table was closed, or something else is shown alone there."""
        subset = self.session.presenter.table.subset
        if len(self.chosen) and not (
            subset is not None and np.array_equal(np.sort(subset.features), self.chosen)
        ):
            self.chosen = np.empty(0, np.int32)

    def _show_count(self) -> None:
        n = len(self.chosen)
        noun = "feature" if n == 1 else "features"
        self._count.setText(
            f"{formatting.count(n)} {noun} enclosed; the table shows them"
            if n
            else "Draw around features to see them alone in the table"
        )
        self.clear_button.setVisible(n > 0 and self.place.shows_picture)

    # --- slots ----------------------------------------------------------------------------------

    def _on_points_pointed(self, feature: int) -> None:
        if feature >= 0:
            self.session.want_names([feature])

    def _on_names_arrived(self) -> None:
        if self.isVisible() and self.points.current >= 0:
            self.points.show_tip()

    def _on_mode_clicked(self, checked: bool = False) -> None:
        self._show_mode()

    def _show_mode(self) -> None:
        """The one that is on has a tick."""
        for mode, button in self.modes.items():
            on = button.isChecked()
            button.setIcon(icons.icon_beside_text("check", tokens.EMERALD) if on else QIcon())
            if on:
                self.points.mode = mode

    def _on_whole_clicked(self, checked: bool = False) -> None:
        self.points.show_all()

    def _on_place_cancelled(self) -> None:
        self.session.cancel(KIND)

    # --- export ---------------------------------------------------------------------------------

    def figure(self, as_pixels: bool = False) -> figures.Figure:
        made, scale = self.made, self.scale
        assert made is not None and scale is not None
        features = made.features
        kept = self.session.shown()[features] if self.only_shown.isChecked() else None
        captions = self._captions() if self.colour.value == "group" else []
        name = TITLES[made.settings.method]
        notes = [self.method_text(), figures.drawn(self.session.provenance)]
        if kept is not None and not kept.all():
            n = formatting.count(int(kept.sum()))
            notes.insert(1, f"Coloured: the {n} features that pass the filters; grey: the others.")
        return figures.Figure(
            f"Map of {formatting.count(made.n)} features ({name})",
            figures.Points(
                made.places["x"][features].astype(np.float64),
                made.places["y"][features].astype(np.float64),
                scale.shades(self._values)[features],
                np.ones(len(features), bool) if kept is None else kept,
                tuple((caption.text, caption.x, caption.y) for caption in captions),
                (f"{name} 1 (no unit)", f"{name} 2 (no unit)"),
            ),
            scale,
            tuple(notes),
            as_pixels,
        )

    def open_export(self, *_: object) -> ExportDialog:
        dialog = ExportDialog(self.session, self.figure, "feature-map", self)
        dialog.open()
        return dialog
