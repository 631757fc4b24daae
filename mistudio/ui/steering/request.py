"""What a generation is asked for: the chosen features and the form, to and from a job's request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from mistudio.ui.steering.units import STRONGEST

if TYPE_CHECKING:
    from mistudio.jobs.steering import Steer

# Every method that the engine knows, in the words of the screen.
METHODS: dict[str, tuple[str, str]] = {
    "add": ("Add", "Adds strength × max along the feature's direction, whatever is there."),
    "clamp": ("Clamp", "Sets the feature's activation to strength × max; the rest stays."),
    "clamp_min": ("Clamp min", "Raises the activation to strength × max where it is below."),
    "scale": ("Scale", "Multiplies the activation that is there by the strength."),
    "ablate": ("Ablate", "Takes the feature's activation away; the strength is not used."),
    "orthogonal": ("Orthogonal", "Multiplies all that lies along the direction; 0 takes it out."),
    "cap": ("Cap", "Limits what lies along the direction to strength × max from above."),
}
CALIBRATED = ("add", "clamp", "clamp_min")  # those whose strength can be calibrated
FACTORS = ("scale", "orthogonal")  # the strength is a factor, not a multiple of the maximum
SCOPES = (
    ("all", "Prompt and generated tokens"),
    ("generated", "Generated tokens only"),
    ("from_last", "From the last prompt token on"),
    ("last", "Last prompt token only"),
    ("chosen", "Chosen prompt tokens"),
)
MOST_SCALES = 4
CONTROL = "Random direction (control)"  # what its row is called


@dataclass(frozen=True)
class Chosen:
    """A feature that steers; `strength` in multiples of its largest activation."""

    sae_id: int
    feature: int
    strength: float = 0.0
    method: str = "add"

    @property
    def key(self) -> tuple[int, int]:
        return self.sae_id, self.feature

    @classmethod
    def read(cls, value: Any) -> Chosen | None:
        """From `[sae_id, feature, strength, method]`; None where it is something else."""
        try:
            sae_id, feature, strength, method = value
            found = cls(int(sae_id), int(feature), _clamped(float(strength)), str(method))
        except (TypeError, ValueError):
            return None
        return found if found.method in METHODS and found.feature >= 0 else None

    def as_list(self) -> list[Any]:
        return [self.sae_id, self.feature, self.strength, self.method]

    def at(self, strength: float) -> Chosen:
        return replace(self, strength=_clamped(strength))


def _clamped(strength: float) -> float:
    return min(max(strength, -STRONGEST), STRONGEST)


@dataclass(frozen=True)
class Form:
    """All but the features. `layers` None: each feature acts where its SAE reads."""

    prompt: str = ""
    temperature: float = 0.7
    max_tokens: int = 100
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    chat: bool = False
    scales: tuple[float, ...] = (1.0,)
    scope: str = "all"
    positions: tuple[int, ...] = ()
    layers: tuple[int, ...] | None = None
    keep_norm: bool = False
    control: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether nothing under Advanced is other than at first."""
        return replace(self, prompt="", temperature=0.7, max_tokens=100, positions=()) == Form()

    def as_dict(self) -> dict[str, Any]:
        """As JSON reads it back: tuples are lists."""
        values = asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}

    @classmethod
    def read(cls, value: Any) -> Form:
        """What can be understood of a saved form; the rest is as in a new one."""
        given = value if isinstance(value, dict) else {}
        form = cls()
        for name, default in asdict(form).items():
            found = _like(given.get(name), default, name)
            if found is not None:
                form = replace(form, **{name: found})
        return form


def _like(value: Any, default: Any, name: str) -> Any:
    """The value in the default's type; None where it has another."""
    if name == "layers":
        return _numbers(value, int)
    if isinstance(default, tuple):
        found = _numbers(value, float if name == "scales" else int)
        return found or None if name == "scales" else found
    if name == "scope":
        return value if value in dict(SCOPES) else None
    if isinstance(default, bool):
        return value if isinstance(value, bool) else None
    if isinstance(default, float):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if number else None
    if isinstance(default, int):
        return value if isinstance(value, int) and not isinstance(value, bool) else None
    return value if isinstance(value, str) else None


def _numbers(value: Any, kind: type) -> tuple[Any, ...] | None:
    if not isinstance(value, list | tuple):
        return None
    if not all(isinstance(n, int | float) and not isinstance(n, bool) for n in value):
        return None
    return tuple(kind(n) for n in value)[: None if kind is int else MOST_SCALES]


# --- to a job and back ----------------------------------------------------------------------------


def to_job(form: Form, chosen: Sequence[Chosen], sae_id: int) -> Steer:
    """The job; `sae_id`, the source that is shown, is its SAE where it has a chosen feature."""
    from mistudio.jobs.kinds import Steer

    own = sae_id if any(c.sae_id == sae_id for c in chosen) else chosen[0].sae_id
    return Steer(
        sae_id=own,
        features=[[c.feature, c.strength, c.method] for c in chosen if c.sae_id == own],
        others=tuple(c.as_list() for c in chosen if c.sae_id != own),
        prompt=form.prompt,
        temperature=form.temperature,
        top_p=form.top_p,
        top_k=form.top_k,
        repetition_penalty=form.repetition_penalty,
        max_new_tokens=form.max_tokens,
        seed=form.seed,
        chat=form.chat,
        scales=form.scales,
        scope=form.scope,
        positions=form.positions if form.scope == "chosen" else (),
        layers=form.layers or (),
        keep_norm=form.keep_norm,
        control=form.control,
    )


def from_request(request: Mapping[str, Any]) -> tuple[list[Chosen], Form]:
    """Features and form of an earlier generation."""
    own = [[request["sae_id"], *entry] for entry in request.get("features", [])]
    entries = [*own, *request.get("others", [])]
    padded = [[*entry, "add"] if len(entry) == 3 else entry for entry in entries]
    chosen = [found for entry in padded if (found := Chosen.read(entry)) is not None]
    form = Form.read(
        {
            **request,
            "max_tokens": request.get("max_new_tokens"),
            "layers": request.get("layers") or None,
        }
    )
    return chosen, form


def is_of(request: Mapping[str, Any], chosen: Sequence[Chosen], form: Form) -> bool:
    """Whether the features and the form would ask for an earlier generation again."""
    features, asked = from_request(request)
    if form.scope != "chosen":
        form = replace(form, positions=())
    return asked == form and set(features) == set(chosen)


def names(request: Mapping[str, Any]) -> list[str]:
    """What the steered rows are called, the control last."""
    scales = request.get("scales") or [1.0]
    alone = len(scales) == 1 and scales[0] == 1.0
    found = ["Steered" if alone else f"Steered × {scale:g}" for scale in scales]
    return found + ([CONTROL] if request.get("control") else [])


def features_text(request: Mapping[str, Any]) -> str:
    """`#12 × +2, #40 ablate`."""
    chosen, _ = from_request(request)
    return ", ".join(_feature_text(c) for c in chosen)


def _feature_text(chosen: Chosen) -> str:
    if chosen.method == "ablate":
        return f"#{chosen.feature} ablate"
    way = "" if chosen.method == "add" else f" {METHODS[chosen.method][0].lower()}"
    return f"#{chosen.feature}{way} × {chosen.strength:+g}"
