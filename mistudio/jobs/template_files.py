"""The file with which templates and presets travel, read with distrust.

One JSON file holds all three kinds (`version` 1.1). Files of version 1.0, where hyper-parameters
have other names, and the web edition's files with one kind each are read too. A file is judged
entry by entry: what is wrong with one is said and leaves the others alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistudio.engine.training.config import parse
from mistudio.errors import CorruptFile, InvalidInput

VERSION = "1.1"
READ_VERSIONS = ("1.0", "1.1")
KINDS = {
    "training": "training_templates",
    "extraction": "extraction_templates",
    "steering": "steering_presets",
}
MOST_BYTES = 5_000_000
MOST_ENTRIES = 1000
MOST_LAYERS = 1000
MOST_FEATURES = 1000
LONGEST_NAME, LONGEST_TEXT = 120, 10_000
SITES = ("resid_pre", "resid_post", "attn_out", "mlp_in", "mlp_out")
SOURCES = ("auto", "extract", "hybrid")
SCOPES = ("all", "generated", "from_last", "last", "chosen")
METHODS = ("add", "clamp", "clamp_min", "scale", "ablate", "orthogonal", "cap")  # of steering

Config = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One template of a file. `problem`: why it cannot be used, empty where it can. `notes`: what
    was understood otherwise than it stands there."""

    kind: str
    name: str
    description: str = ""
    favourite: bool = False
    config: Config | None = None
    problem: str = ""
    notes: tuple[str, ...] = ()


# --- reading --------------------------------------------------------------------------------------


def read_templates(path: Path) -> list[Entry]:
    """The entries of a file. CorruptFile or InvalidInput where it holds no templates at all."""
    if not path.is_file():
        raise InvalidInput("No such file", f"There is no file at {path}.", "Choose another one.")
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise InvalidInput(
            "This is not a file of templates",
            f"{path.name} has {size / 1e6:.0f} MB; such files have less than "
            f"{MOST_BYTES / 1e6:.0f} MB.",
            "Choose the file that Export wrote.",
        )
    try:
        document = json.loads(path.read_bytes(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as exc:
        raise CorruptFile(
            "The file is not valid JSON",
            f"{path.name} cannot be read as templates"
            + (f" (line {exc.lineno})." if isinstance(exc, json.JSONDecodeError) else "."),
            "Choose the file that Export wrote.",
        ) from exc
    return entries_of(document, path.name)


def entries_of(document: Any, name: str = "The file") -> list[Entry]:
    """The entries of a parsed document, in its order."""
    if not isinstance(document, dict):
        raise _no_templates(name, "it holds no object with templates")
    if str(document.get("kind", "")).startswith("mistudio.cluster"):
        raise InvalidInput(
            "The web edition's steering sets cannot be read",
            f"{name} is a cluster of features, with strengths in another unit.",
            "Choose its features in the Steering tab and save a preset.",
        )
    version = str(document.get("version", "1.0"))
    if version not in READ_VERSIONS:
        raise InvalidInput(
            "The file is of another version",
            f"{name} says version {version[:20]!r}; this miStudio reads "
            f"{' and '.join(READ_VERSIONS)}.",
            "Update miStudio, or export the templates again.",
        )
    lists = {kind: document[key] for kind, key in KINDS.items() if key in document}
    if "templates" in document:  # the web edition: one kind a file
        lists[_kind_of(document["templates"])] = document["templates"]
    if not lists:
        raise _no_templates(name, f"it has none of {', '.join(KINDS.values())}")
    for kind, found in lists.items():
        if not isinstance(found, list):
            raise _no_templates(name, f"{KINDS[kind]} is not a list")
    if sum(map(len, lists.values())) > MOST_ENTRIES:
        raise _no_templates(name, f"it has more than {MOST_ENTRIES} entries")
    return [_entry(kind, raw) for kind, found in lists.items() for raw in found]


def _no_templates(name: str, why: str) -> InvalidInput:
    return InvalidInput(
        "This is not a file of templates", f"{name}: {why}.", "Choose the file that Export wrote."
    )


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _kind_of(found: Any) -> str:
    first = found[0] if isinstance(found, list) and found and isinstance(found[0], dict) else {}
    return "extraction" if "layer_indices" in first or "hook_types" in first else "training"


def _entry(kind: str, raw: Any) -> Entry:
    if not isinstance(raw, dict):
        return Entry(kind, "", problem="It is not an object.")
    name = raw.get("name")
    try:
        name = _text(name, "The name", LONGEST_NAME, needed=True)
        description = _text(raw.get("description") or "", "The description", LONGEST_TEXT)
        notes: list[str] = []
        config = _READERS[kind](raw, notes)
    except _Refused as exc:
        return Entry(kind, str(name)[:LONGEST_NAME] if name else "", problem=str(exc))
    favourite = raw.get("is_favorite") is True
    return Entry(kind, name, description, favourite, config, "", tuple(notes))


class _Refused(Exception):
    """Why an entry cannot be used, as a sentence."""


def _text(value: Any, what: str, longest: int, needed: bool = False) -> str:
    if not isinstance(value, str) or (needed and not value.strip()):
        raise _Refused(f"{what} is {'missing' if value in (None, '') else 'not a text'}.")
    if len(value) > longest:
        raise _Refused(f"{what} is longer than {longest:,} characters.")
    if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]", value):
        raise _Refused(f"{what} holds control characters.")
    return value.strip()


def _whole(value: Any, what: str, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise _Refused(f"{what} must be a whole number.")
    if not least <= value <= most:
        raise _Refused(f"{what} must be between {least:,} and {most:,}.")
    return int(value)


def _number(value: Any, what: str, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Refused(f"{what} must be a number.")
    if not least <= value <= most:
        raise _Refused(f"{what} must be between {least:g} and {most:g}.")
    return float(value)


def _layers(value: Any) -> list[int]:
    if not isinstance(value, list) or len(value) > MOST_LAYERS:
        raise _Refused("The layers must be a list of layer numbers.")
    return sorted({_whole(layer, "A layer", 0, MOST_LAYERS) for layer in value})


def _choice(value: Any, what: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise _Refused(f"{what} must be one of {', '.join(choices)}.")
    return str(value)


def _reference(value: Any, what: str) -> Config:
    """Who the model or the dataset is; only short texts and numbers are kept."""
    if value is None or value == {}:
        return {}
    if not isinstance(value, dict):
        raise _Refused(f"{what} must be an object.")
    kept: Config = {}
    texts = ("name", "source", "repository", "revision", "sha256", "created")
    for key in (*texts, "hook_point", "hook_point_out"):
        if key in value:
            kept[key] = _text(value[key], f"{what}'s {key}", 300)
    for key in ("d_model", "n_layers", "d_in", "d_sae", "layer"):
        if value.get(key) is not None:
            kept[key] = _whole(value[key], f"{what}'s {key}", 0, 10**9)
    return kept


# --- trainings

# What version 1.0 calls them.
_OLD_NAMES = {
    "learningRate": "learning_rate",
    "batchSize": "batch_size",
    "l1Coefficient": "l1_coefficient",
    "expansionFactor": "expansion",
    "trainingSteps": "steps",
    "optimizer": "optimizer",
    "lrSchedule": "schedule",
    "ghostGradPenalty": "ghost_gradients",
}
# The web edition's names, where they differ from ours.
_WEB_NAMES = {
    "expansion_factor": "expansion",
    "total_steps": "steps",
    "l1_alpha": "l1_coefficient",
    "top_k": "k",
    "target_l0": "k",
    "lr_schedule": "schedule",
    "latent_dim": "width",
    "ghost_grad_penalty": "ghost_gradients",
    "training_layers": "layers",
}
_OLD_WIRING = {"sparse": "sae", "skip": "skip_sae", "transcoder": "transcoder"}


def _training(raw: Mapping[str, Any], notes: list[str]) -> Config:
    if "config" in raw:
        return _own_training(raw["config"])
    given = raw.get("hyperparameters")
    if not isinstance(given, dict):
        raise _Refused("It has no hyperparameters.")
    values: Config = {}
    layers: Any = []
    for key, value in given.items():
        name = _OLD_NAMES.get(key) or _WEB_NAMES.get(key) or key
        if name in ("trainingLayers", "layers"):
            layers = value
        elif name not in _FIELDS and name != "ghost_gradients":
            notes.append(f"{key[:60]} is not used here.")
        elif value is not None:
            values[name] = value.lower() if isinstance(value, str) else value
    wiring = raw.get("encoder_type")
    if wiring is not None:
        values["wiring"] = _OLD_WIRING.get(str(wiring), str(wiring))
    if values.pop("l1_coefficient", None) is not None:
        notes.append("Its L1 coefficient is left out: the target L0 sets the sparsity.")
    if raw.get("model_id") or raw.get("dataset_id"):
        notes.append("Its model and dataset are numbers of another library: choose them again.")
    return {
        "model": {},
        "dataset": {},
        "layers": _layers(layers),
        "site": "resid_post",
        "source": "auto",
        "hyperparameters": _hyperparameters(values),
    }


def _own_training(config: Any) -> Config:
    if not isinstance(config, dict):
        raise _Refused("Its configuration is not an object.")
    return {
        "model": _reference(config.get("model"), "The model"),
        "dataset": _reference(config.get("dataset"), "The dataset"),
        "layers": _layers(config.get("layers", [])),
        "site": _choice(config.get("site", "resid_post"), "The site", SITES),
        "source": _choice(config.get("source", "auto"), "The source", SOURCES),
        "hyperparameters": _hyperparameters(config.get("hyperparameters", {})),
    }


def _hyperparameters(values: Any) -> Config:
    if not isinstance(values, dict):
        raise _Refused("The hyperparameters are not an object.")
    for name, value in values.items():
        if not isinstance(value, str | int | float | bool | None):
            raise _Refused(f"{str(name)[:60]} holds neither a number nor a text.")
    try:
        config = parse(values)
    except InvalidInput as exc:
        raise _Refused(exc.what) from exc
    kept = {name: getattr(config, name) for name in values if name in _FIELDS}
    if "ghost_gradients" in values:
        kept |= {"auxk": config.auxk, "revive": config.revive}
    return kept


# --- extractions

_OLD_SITES = {
    "residual": "resid_post",
    "mlp": "mlp_out",
    "attention": "attn_out",
    **{site: site for site in SITES},
}


def _extraction(raw: Mapping[str, Any], notes: list[str]) -> Config:
    own = raw.get("config")
    if own is not None and not isinstance(own, dict):
        raise _Refused("Its configuration is not an object.")
    given = own if own is not None else raw
    sites = given.get("sites", given.get("hook_types", ["resid_post"]))
    if not isinstance(sites, list) or not all(isinstance(site, str) for site in sites):
        raise _Refused("The activation types must be a list of names.")
    unknown = [site for site in sites if site not in _OLD_SITES]
    if unknown or not sites:
        raise _Refused(f"There is no activation type {', '.join(unknown)[:60] or '(none)'}.")
    config: Config = {
        "model": _reference(given.get("model"), "The model"),
        "dataset": _reference(given.get("dataset"), "The dataset"),
        "layers": _layers(given.get("layers", given.get("layer_indices", []))),
        "sites": list(dict.fromkeys(_OLD_SITES[site] for site in sites)),
    }
    documents = given.get("max_documents", given.get("max_samples"))
    for name, value, most in (
        ("max_documents", documents, 10**12),
        ("max_tokens", given.get("max_tokens"), 10**15),
        ("batch_size", given.get("batch_size"), 4096),
        ("context", given.get("context"), 10**6),
    ):
        if value is not None:
            config[name] = _whole(value, name, 1, most)
    if given.get("top_k_examples") is not None:
        notes.append("Its examples per feature belong to the discovery: choose them there.")
    return config


# --- steering


def _steering(raw: Mapping[str, Any], notes: list[str]) -> Config:
    own = raw.get("config")
    if own is not None:
        if not isinstance(own, dict):
            raise _Refused("Its configuration is not an object.")
        given: Mapping[str, Any] = own
    else:
        given = raw
        notes.append("Its features are numbers of another library's dictionary: choose the SAE.")
    features = given.get("features")
    if not isinstance(features, list) or len(features) > MOST_FEATURES:
        raise _Refused("The features must be a list.")
    if not features:
        raise _Refused("It has no features.")
    config: Config = {
        "features": [_feature(feature) for feature in features],
        "layers": _layers(given.get("layers", given.get("intervention_layers", []))),
        "temperature": _number(given.get("temperature", 0.7), "The temperature", 0, 2),
    }
    if own is not None:
        config["model"] = _reference(own.get("model"), "The model")
        config["sae"] = _reference(own.get("sae"), "The SAE")
        config["title"] = _text(own.get("title", ""), "The title", 500)
        config["settings"] = _settings(own.get("settings", {}))
    _check_agreement(config)
    return config


def _feature(raw: Any) -> Config:
    if not isinstance(raw, dict):
        raise _Refused("A feature is not an object.")
    feature: Config = {
        "feature_id": _whole(raw.get("feature_id"), "A feature's number", 0, 10**9),
        "coefficient": _number(raw.get("coefficient"), "A coefficient", -1e4, 1e4),
    }
    if "label" in raw:
        feature["label"] = _text(raw["label"], "A label", 500)
    if "layer" in raw:
        feature["layer"] = _whole(raw["layer"], "A layer", 0, MOST_LAYERS)
    if raw.get("max_activation") is not None:
        largest = _number(raw["max_activation"], "A largest activation", 0, 1e9)
        feature["max_activation"] = largest
    if "method" in raw:
        feature["method"] = _choice(raw["method"], "A method", METHODS)
    if "sae" in raw:
        feature["sae"] = _reference(raw["sae"], "A feature's SAE")
    return feature


def _check_agreement(config: Config) -> None:
    """What contradicts itself was damaged or edited, and could never be bound to anything."""
    model, shared = config.get("model", {}), config.get("sae", {})
    n_layers = model.get("n_layers")
    if n_layers is not None and any(layer >= n_layers for layer in config["layers"]):
        raise _Refused(f"Its layers do not exist in a model of {n_layers} layers.")
    seen = set()
    for feature in config["features"]:
        sae = feature.get("sae") or shared
        number, layer = feature["feature_id"], feature.get("layer")
        _check_sae(sae, model)
        if sae and number >= sae["d_sae"]:
            raise _Refused(
                f"Feature {number:,} does not exist in an SAE of {sae['d_sae']:,} features."
            )
        if layer is not None and layer != sae.get("layer", layer):
            raise _Refused(f"Feature {number:,} is said to be at layer {layer}; its SAE is not.")
        key = (number, json.dumps(sae, sort_keys=True))
        if key in seen:
            raise _Refused(f"Feature {number:,} stands in it twice.")
        seen.add(key)


def _check_sae(sae: Config, model: Config) -> None:
    if bool(sae) != bool(model):
        raise _Refused(f"It names {'an SAE but no model' if sae else 'a model but no SAE'}.")
    if not sae:
        return
    if not sae.get("d_sae") or not (sae.get("hook_point") or "layer" in sae):
        raise _Refused("It does not say at which layer and how large its SAE is.")
    place = re.match(r"blocks\.(\d+)\.", sae.get("hook_point", ""))
    layer = sae.get("layer", int(place[1]) if place else 0)
    if place and int(place[1]) != layer:
        raise _Refused(f"Its SAE is said to be at {sae['hook_point']} and at layer {layer}.")
    if layer >= model.get("n_layers", layer + 1):
        raise _Refused(f"Layer {layer} does not exist in a model of {model['n_layers']} layers.")
    if sae.get("d_in", 0) and sae["d_in"] != model.get("d_model", sae["d_in"]):
        raise _Refused(
            f"An SAE that reads {sae['d_in']:,} numbers does not fit a model of width "
            f"{model['d_model']:,}."
        )


def _number_list(most: int, least: float, largest: float) -> Callable[[Any, str], Any]:
    """A reader of `1,2.5`: numbers, separated by commas; empty where there is none."""

    def read(value: Any, what: str) -> Any:
        parts = _text(value, what, LONGEST_TEXT).split(",") if value != "" else []
        if len(parts) > most:
            raise _Refused(f"{what} holds more than {most} numbers.")
        for part in parts:
            try:
                number = float(part)
            except ValueError:
                raise _Refused(f"{what} must be numbers with commas between them.") from None
            _number(number, what, least, largest)
        return value

    return read


def _flag(value: Any, what: str) -> bool:
    if not isinstance(value, bool):
        raise _Refused(f"{what} must be true or false.")
    return value


# What is known of a generation's settings; the others are kept as long as they are plain.
_SETTINGS: dict[str, Callable[[Any, str], Any]] = {
    "prompt": lambda value, what: _text(value, what, LONGEST_TEXT),
    "max_tokens": lambda value, what: _whole(value, what, 1, 2048),
    "top_p": lambda value, what: _number(value, what, 0.01, 1),
    "top_k": lambda value, what: _whole(value, what, 0, 1000),
    "repetition_penalty": lambda value, what: _number(value, what, 0.5, 2),
    "seed": lambda value, what: _whole(value, what, 0, 2**31 - 1),
    "chat": _flag,
    "keep_norm": _flag,
    "control": _flag,
    "scope": lambda value, what: _choice(value, what, SCOPES),
    "scales": _number_list(MOST_LAYERS, -100, 100),
    "positions": _number_list(LONGEST_TEXT, 0, 10**7),
    "layers": _number_list(MOST_LAYERS, 0, MOST_LAYERS),
}


def _settings(value: Any) -> Config:
    """Settings of the generation: short texts, numbers and switches."""
    if not isinstance(value, dict) or len(value) > 100:
        raise _Refused("The settings are not an object.")
    return {key: _setting(str(key), entry) for key, entry in value.items()}


def _setting(key: str, entry: Any) -> Any:
    what = f"The setting {key[:60]}"
    if entry is None:
        return None
    if key in _SETTINGS:
        read = _SETTINGS[key](entry, what)
        return entry if isinstance(entry, str) else read  # texts keep their spaces
    if isinstance(entry, str):
        _text(entry, what, LONGEST_TEXT)
    elif not isinstance(entry, bool):
        _number(entry, what, -(2**53), 2**53)
    return entry


def sound_settings(config: Config) -> Config:
    """The settings of a preset that are what they should be; for those that lie in a library, which
    an earlier version or another program may have written."""
    found, settings = {}, config.get("settings", {})
    for key, entry in settings.items() if isinstance(settings, dict) else ():
        try:
            found[key] = _setting(str(key), entry)
        except _Refused:
            continue
    return found


_READERS: dict[str, Callable[[Mapping[str, Any], list[str]], Config]] = {
    "training": _training,
    "extraction": _extraction,
    "steering": _steering,
}
_FIELDS = frozenset(parse({}).__dataclass_fields__)
