"""The tables: every row, losing ones too, then each promise with what it came to."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from runs import OURS, PEER, Row, fair

DEFINITIONS = """\
training step      tokens/s of whole steps, statistics and care for dead latents on, 32 active
         latents, in alternating blocks of two live processes; ratio: median of the blocks' ratios;
         dead: latents that are held dead, so that the care for them has work
peak extra memory  the most that a fresh process held during three steps, less what it held before
         it made the trainer: resident bytes on the CPU, allocated bytes on a GPU
FVU      sum ||x - x_hat||^2 / sum ||x - mean||^2 over 50,000 held-out tokens, in float64;
         explained variance is 1 - FVU
L0       active latents per token, there
silent   share of latents that fired on none of these tokens
trained  the same weights, selecting as in training (BatchTopK exactly, over 2,048 held-out tokens)
set      the same weights with the threshold that gives L0 = k on training tokens; for SAELens'
         BatchTopK this is what is compared, as the threshold it exports is a running average
         from 0 that short runs leave wrong; its exported row is shown beside it
tokens/s of the run's own loop; s: its seconds; load: runnable processes over the last minute
inputs   what SAELens was given: raw activations, or its own scaling to E||x|| = sqrt(d)
All exports are reloaded from disk and judged by one evaluator; both sides had the same batches in
the same order, the same threads, fp32. miStudio trains with its default template: no rate is given.
SAELens has a warm-up over 5 % and a decay over 20 % of the steps and a dead window of 5 % (at least
50,000 tokens); its learning rate is searched on seed 0 and the best is run on the other seeds.
"""


@dataclass(frozen=True)
class Gate:
    """A promise: what was measured, and whether it holds."""

    what: str
    ours: str
    peer: str
    found: float
    bound: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        return self.found >= self.bound if self.at_least else self.found <= self.bound

    def cells(self) -> list[str]:
        sign = ">=" if self.at_least else "<="
        outcome = "yes" if self.holds else "NO"
        return [
            self.what,
            self.ours,
            self.peer,
            f"{self.found:.3g}",
            f"{sign} {self.bound:.3g}",
            outcome,
        ]

    def as_dict(self) -> Row:
        return {**self.__dict__, "holds": self.holds}


@dataclass(frozen=True)
class Comparison:
    """One corpus, width and architecture: all rows, and those that are compared, by seed."""

    corpus: str
    width: int
    arch: str
    peer_rows: list[Row]
    best: dict[int, Row]
    ours: dict[int, Row]
    ours_by_time: dict[int, Row]

    @property
    def name(self) -> str:
        return f"{self.corpus}, {self.width} latents, {self.arch}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = (
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
    return "\n".join(text)


def speed_table(rows: Sequence[Row]) -> str:
    head = ["training step", "d", "latents", "batch", "dead", OURS, PEER, "ratio", "blocks"]
    cells = (
        [
            row["arch"], str(row["d"]), str(row["width"]), str(row["batch"]), str(row["dead"]),
            f"{row[OURS]:,.0f}", f"{row[PEER]:,.0f}", f"{row['ratio']:.2f}", ratios(row["blocks"]),
        ]
        for row in rows
    )  # fmt: skip
    return table(head, cells)


def ratios(blocks: Sequence[Row]) -> str:
    found = [block[OURS] / block[PEER] for block in blocks]
    return f"{len(found)}: {min(found):.2f}-{max(found):.2f}"


def memory_table(rows: Sequence[Row]) -> str:
    head = ["peak extra memory", "d", "latents", "batch", f"{OURS} MB", f"{PEER} MB", "ratio"]
    cells = (
        [
            row["arch"], str(row["d"]), str(row["width"]), str(row["batch"]),
            f"{row[OURS] / 1e6:,.0f}", f"{row[PEER] / 1e6:,.0f}", f"{row['ratio']:.3f}",
        ]
        for row in rows
    )  # fmt: skip
    return table(head, cells)


QUALITY_HEAD = (
    "run", "seed", "rate", "steps", "FVU", "L0", "silent", "FVU set", "L0 set", "silent set",
    "tokens/s", "s", "load",
)  # fmt: skip


def quality_table(comparison: Comparison) -> str:
    rows = [(PEER, row) for row in comparison.peer_rows]
    rows += [(f"{PEER}, best rate", row) for row in comparison.best.values()]
    rows += [(f"{OURS}, as many tokens", row) for row in comparison.ours.values()]
    rows += [(f"{OURS}, as much time", row) for row in comparison.ours_by_time.values()]
    return table(QUALITY_HEAD, (quality_cells(label, row) for label, row in rows))


def quality_cells(label: str, row: Row) -> list[str]:
    inputs = f" ({row['inputs']})" if row["side"] == PEER else ""
    return [
        label + inputs,
        str(row["seed"]),
        f"{row['learning_rate']:.2g}",
        str(row["steps"]),
        *verdict_cells(row["exported"]),
        *verdict_cells(row.get("calibrated")),
        f"{row['tokens_per_second']:,.0f}",
        f"{row['whole_seconds']:.0f}",
        f"{row['load']:.1f}",
    ]


def verdict_cells(verdict: Row | None) -> list[str]:
    if verdict is None:
        return ["", "", ""]
    return [f"{verdict['fvu']:.4f}", f"{verdict['l0']:.2f}", f"{100 * verdict['silent']:.2f} %"]


def speed_gates(rows: Sequence[Row], device: str) -> list[Gate]:
    def bound(row: Row) -> float:
        if device == "cpu":
            return 3.0
        return 2.0 if row["width"] >= 24576 else 1.5

    return [
        Gate(
            f"tokens/s, {row['arch']} at {row['width']}, {row['dead']} dead",
            f"{row[OURS]:,.0f}",
            f"{row[PEER]:,.0f}",
            row["ratio"],
            bound(row),
            at_least=True,
        )
        for row in rows
    ]


def memory_gates(rows: Sequence[Row]) -> list[Gate]:
    return [
        Gate(
            f"peak memory, {row['arch']} at {row['width']}",
            f"{row[OURS] / 1e6:,.0f} MB",
            f"{row[PEER] / 1e6:,.0f} MB",
            row["ratio"],
            1 / 3,
        )
        for row in rows
    ]


def quality_gates(comparison: Comparison) -> list[Gate]:
    ours = list(comparison.ours.values())
    by_time = list(comparison.ours_by_time.values())
    best = list(comparison.best.values())
    name = comparison.name
    gates = [
        _ratio(f"FVU at equal tokens, {name}", ours, best, lambda row: fair(row)["fvu"], 1.0),
        _ratio(f"FVU at equal time, {name}", by_time, best, lambda row: fair(row)["fvu"], 0.9),
        _ratio(f"seconds for that, {name}", by_time, best, lambda row: row["whole_seconds"], 1.02),
    ]
    apart = max(
        abs(fair(mine)["l0"] / fair(theirs)["l0"] - 1)
        for mine, theirs in [*zip(ours, best, strict=True), *zip(by_time, best, strict=True)]
    )
    all_ours = [*ours, *by_time]
    silent = max(row["exported"]["silent"] for row in all_ours)
    gates += [
        Gate(f"L0 apart, worst seed, {name}", *_each(all_ours, best, "l0"), apart, 0.02),
        Gate(f"silent latents, worst seed, {name}", *_each(all_ours, best, "silent"), silent, 0.01),
    ]
    exported = [row for row in all_ours if "trained" in row]
    if exported:
        l0 = max(abs(row["exported"]["l0"] / row["trained"]["l0"] - 1) for row in exported)
        ev = max(row["exported"]["fvu"] - row["trained"]["fvu"] for row in exported)
        gates += [
            Gate(f"L0, exported against trained, {name}", "", "", l0, 0.02),
            Gate(f"explained variance lost in the export, {name}", "", "", ev, 0.005),
        ]
    error = max(row["in_saelens"]["error"] for row in all_ours)
    gates.append(Gate(f"max|dy|/max|y| of our export in SAELens, {name}", "", "", error, 1e-5))
    return gates


def _ratio(
    what: str, ours: list[Row], peer: list[Row], value: Callable[[Row], float], bound: float
) -> Gate:
    mine, theirs = (statistics.mean(map(value, rows)) for rows in (ours, peer))
    return Gate(what, f"{mine:.4g}", f"{theirs:.4g}", mine / theirs, bound)


def _each(ours: list[Row], peer: list[Row], name: str) -> tuple[str, str]:
    def worst(rows: list[Row]) -> str:
        return f"{max(fair(row)[name] for row in rows):.4g}"

    return worst(ours), worst(peer)


def gate_table(gates: Sequence[Gate]) -> str:
    head = ["promise", OURS, PEER, "found", "wanted", "holds"]
    return table(head, (gate.cells() for gate in gates))


def as_json(
    settings: dict[str, Any],
    speed: list[Row],
    memory: list[Row],
    comparisons: list[Comparison],
    gates: list[Gate],
) -> Row:
    return {
        "settings": settings,
        "speed": speed,
        "memory": memory,
        "quality": [comparison.__dict__ for comparison in comparisons],
        "gates": [gate.as_dict() for gate in gates],
    }
