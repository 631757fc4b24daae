"""Where a dictionary reads and what it reconstructs."""

from __future__ import annotations

from dataclasses import dataclass

from mistudio.engine.models.hooks import HookPoint
from mistudio.errors import InvalidInput


@dataclass(frozen=True, order=True)
class Site:
    """An autoencoder reads and reconstructs one point; a transcoder reads `input` and
    reconstructs `output`."""

    input: HookPoint
    output: HookPoint

    @classmethod
    def at(cls, point: HookPoint) -> Site:
        """An autoencoder's site."""
        return cls(point, point)

    @classmethod
    def across_mlp(cls, point: HookPoint) -> Site:
        """A transcoder's site: from what enters the MLP to what it adds (Dunefsky et al. 2024).

        Raises InvalidInput where `point` is not an MLP's input.
        """
        if point.site != "mlp_in":
            raise InvalidInput(
                "A transcoder reads the MLP's input",
                f"It was asked to read {point.name}.",
                f"Choose {HookPoint('mlp_in', point.layer).name}, or the autoencoder wiring.",
                field="layers",
            )
        return cls(point, HookPoint("mlp_out", point.layer))

    @property
    def is_transcoder(self) -> bool:
        return self.input != self.output

    @property
    def points(self) -> tuple[HookPoint, ...]:
        """The points that must be captured."""
        return (self.input, self.output) if self.is_transcoder else (self.input,)

    @property
    def layer(self) -> int:
        return self.input.layer

    @property
    def name(self) -> str:
        """The input's name: it is unique among the sites of a run, and names its folder."""
        return self.input.name

    def __str__(self) -> str:
        return self.name
