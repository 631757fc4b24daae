"""The architecture viewer: what a model is made of, before or after its weights are here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PySide6.QtCore import Qt
from PySide6.QtWidgets import QDialog, QVBoxLayout, QWidget

from mistudio import formatting
from mistudio.ui.models.parts import Column, FactsTable, head_of, room_of
from mistudio.ui.models.plan_table import PlanTable
from mistudio.ui.models.presenter import HOOK_POINTS, problem_of
from mistudio.ui.services import Services
from mistudio.ui.widgets import (
    ErrorPanel,
    StatTile,
    Surface,
    Text,
    clear,
    column,
    row,
    scrolling,
    tiles,
)

if TYPE_CHECKING:
    from mistudio.engine.models.architecture import Architecture
    from mistudio.ui.models.candidate import Fit


@dataclass(frozen=True)
class Module:
    """One line of the list of layers."""

    index: str
    kind: str
    details: str
    parameters: int


def modules(made: Architecture) -> list[Module]:
    """The parts of a decoder in the order of its forward pass."""
    width, vocabulary = f"{made.d_model}", f"{made.vocab_size}"
    attention = f"Attention: {heads_text(made.n_heads, made.n_kv_heads)} heads"
    if made.head_dim:
        attention += f" × {made.head_dim} dims"
    mlp = f"MLP: {width} → {made.d_mlp} → {width}"
    if made.experts:
        mlp = f"{made.experts} experts: {width} → {made.d_mlp} → {width}"
    output = f"Shape {width} × {vocabulary}"
    if made.tied_embeddings:
        output += ", tied to the embedding (counted once)"
    inside = made.embedding_parameters + made.head_parameters
    inside += sum(block.parameters for block in made.blocks)
    lines = [Module("0", "Embedding", f"Shape {vocabulary} × {width}", made.embedding_parameters)]
    for block in made.blocks:
        lines.append(
            Module(
                str(block.index + 1),
                f"TransformerBlock_{block.index}",
                f"{attention} | {mlp}",
                block.parameters,
            )
        )
    last = len(made.blocks)
    rest = made.parameters - inside
    lines.append(Module(str(last + 1), made.norm, f"Shape {width}, before the output", rest))
    lines.append(Module(str(last + 2), "Output", output, made.head_parameters))
    return lines


def block_text(made: Architecture) -> str:
    """Where the parameters of a block are; of the first one where they differ."""
    block = made.blocks[0]
    same = all(other.parameters == block.parameters for other in made.blocks)
    whose = "Each block" if same else "Block 0 (they differ)"
    parts = (("attention", block.attention), ("MLP", block.mlp), ("norms", block.norms))
    told = " + ".join(f"{formatting.count(n)} {name}" for name, n in parts)
    return f"{whose}: {formatting.count(block.parameters)} parameters = {told}"


def modules_table(lines: list[Module]) -> FactsTable:
    columns = (
        Column("#", 44, mono=True),
        Column("Part", 184, mono=True),
        Column("Details"),
        Column("Parameters", 112, right=True, mono=True),
    )
    cells = [
        (line.index, line.kind, line.details, formatting.count(line.parameters)) for line in lines
    ]
    return FactsTable("Model layers", columns, cells, [f"{m.kind}: {m.details}" for m in lines])


class ArchitectureDialog(QDialog):
    """Opens at once; `read` works the figures out in the background."""

    def __init__(
        self,
        services: Services,
        name: str,
        about: str,
        read: Callable[[], Fit],
        parent: QWidget | None = None,
    ) -> None:
        super().__init__(parent)
        self.setObjectName("architecture_dialog")
        self.setWindowTitle(f"{name} Architecture")
        self.setAttribute(Qt.WidgetAttribute.WA_DeleteOnClose)
        room = room_of(parent)
        self.resize(min(896, room.width() - 64), round(room.height() * 0.8))
        self._about = about
        self.tiles: dict[str, StatTile] = {}
        self.facts: dict[str, StatTile] = {}
        self.modules: list[Module] = []
        self.plans: PlanTable | None = None
        body = QWidget()
        self._inside = column(16)
        self._inside.setContentsMargins(24, 0, 24, 24)
        self._inside.addWidget(Text("Reading the configuration…", "helper"))
        self._inside.addStretch(1)
        body.setLayout(self._inside)
        self._subtitle = Text(about, "helper", wrap=True)
        layout = QVBoxLayout(self)
        layout.setContentsMargins(0, 0, 0, 0)
        layout.setSpacing(0)
        layout.addLayout(head_of(self, f"{name} Architecture", self._subtitle, "emerald"))
        area = scrolling(body)
        area.setFocusPolicy(Qt.FocusPolicy.StrongFocus)  # so that the arrow keys scroll
        area.setAccessibleName(f"Architecture of {name}")
        layout.addWidget(area, 1)
        area.setFocus()
        services.background.run(read, self._on_read, self._on_failed)

    @property
    def ready(self) -> bool:
        return bool(self.modules)

    def _on_failed(self, error: Exception) -> None:
        problem = problem_of(error)
        clear(self._inside)
        self._inside.addWidget(ErrorPanel(problem.title, problem.what, problem.next_step))
        self._inside.addStretch(1)

    def _on_read(self, fit: Fit) -> None:
        made = fit.architecture
        self._subtitle.setText(
            f"{formatting.short_count(made.parameters)} parameters • {self._about}"
        )
        self.modules = modules(made)
        self.tiles, self.facts = _tiles(made), _facts(made)
        self.plans = PlanTable(fit)
        memory = Surface("tile", None, 16)
        memory.add(self.plans)
        clear(self._inside)
        inside = self._inside
        inside.addLayout(tiles(list(self.tiles.values()), 4))
        inside.addWidget(Text("Model Layers", "card"))
        inside.addWidget(modules_table(self.modules))
        self.block_text = Text(block_text(made), "helper", wrap=True)
        inside.addWidget(self.block_text)
        inside.addWidget(Text("Model Configuration", "card"))
        inside.addLayout(tiles(list(self.facts.values()), 4))
        inside.addWidget(Text("Memory at Each Precision", "card"))
        inside.addWidget(memory)
        inside.addWidget(Text("Hook Points", "card"))
        inside.addWidget(
            Text(
                f"Where activations are read and changed: once in each of the {made.n_layers} "
                f"blocks (N from 0 to {made.n_layers - 1}), named as in TransformerLens.",
                "helper",
                wrap=True,
            )
        )
        inside.addLayout(_hook_rows(made.d_model))
        inside.addStretch(1)


def heads_text(heads: int, kv: int) -> str:
    """`9 (3 KV)`; without the second number where every head has keys of its own."""
    if not heads:
        return "—"
    return f"{heads}" if kv in (0, heads) else f"{heads} ({kv} KV)"


def _tiles(made: Architecture) -> dict[str, StatTile]:
    return {
        "layers": StatTile("Total Layers", str(made.n_layers), "emerald", "Transformer blocks"),
        "width": StatTile(
            "Hidden Dimension",
            formatting.count(made.d_model),
            "purple",
            "Channels of the residual stream",
        ),
        "heads": StatTile(
            "Attention Heads",
            heads_text(made.n_heads, made.n_kv_heads),
            "blue",
            "Query heads of each block; KV: key/value heads, which several of them share",
        ),
        "parameters": StatTile(
            "Parameters",
            formatting.short_count(made.parameters),
            "yellow",
            f"{formatting.count(made.parameters)}, counted in the model's modules; "
            "tied embeddings count once",
        ),
    }


def _facts(made: Architecture) -> dict[str, StatTile]:
    context = made.context_length
    ratio = formatting.number(made.d_mlp / made.d_model).rstrip("0").rstrip(".")
    kind = f"{made.activation or 'unnamed'}{', gated' if made.gated_mlp else ''}"
    if made.experts:
        kind = f"{made.experts} experts, {kind}"
    return {
        "vocabulary": StatTile(
            "Vocabulary Size", formatting.count(made.vocab_size), "slate", note="tokens"
        ),
        "context": StatTile(
            "Context Length",
            formatting.count(context) if context else "—",
            "slate",
            "max_position_embeddings of config.json",
            "tokens",
        ),
        "mlp": StatTile(
            "MLP", f"{formatting.count(made.d_mlp)} ({ratio}×)", "slate",
            "Its width, and that over the width of the residual stream", kind,
        ),
        "head_dim": StatTile(
            "Head Dimension", str(made.head_dim) if made.head_dim else "—", "slate",
            note="channels",
        ),
        "norm": StatTile("Norms", made.norm, "slate"),
        "positions": StatTile("Positions", made.positions.capitalize(), "slate"),
        "embeddings": StatTile(
            "Embeddings", "Tied" if made.tied_embeddings else "Separate", "slate",
            "Tied: the output layer uses the embedding's weights",
            f"{formatting.short_count(made.embedding_parameters)} parameters",
        ),
        "architecture": StatTile(
            "Architecture", "Decoder-only", "slate", made.architecture, f"type {made.model_type}"
        ),
    }  # fmt: skip


def _hook_rows(width: int) -> QVBoxLayout:
    lines = column(6)
    for suffix, meaning in HOOK_POINTS:
        line = Surface("row", padding=10)
        name = Text(f"blocks.N.{suffix}", "mono", "blue", selectable=True)
        name.setMinimumWidth(234)
        shape = Text(f"[batch, tokens, {width}]", "mono")
        line.add(row(name, Text(meaning, "small"), None, shape))
        line.setAccessibleName(f"blocks.N.{suffix}: {meaning}, {width} channels")
        lines.addWidget(line)
    return lines
