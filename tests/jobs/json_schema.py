"""As much of JSON Schema as our own schemas use. A word that is not known is an error: a rule that
is not looked at would pass everything."""

from __future__ import annotations

import re
from typing import Any

_TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "null": type(None),
}
_SAID = {"$schema", "title", "description"}


def problems(value: Any, schema: dict[str, Any], where: str = "$") -> list[str]:
    """What in `value` breaks the schema, as sentences with the place."""
    found: list[str] = []
    for word, rule in schema.items():
        if word in _SAID or word in ("required", "properties", "additionalProperties", "items"):
            continue
        found += _broken(word, rule, value, where)
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        found += [
            f"{where}: {name} is missing"
            for name in schema.get("required", ())
            if name not in value
        ]
        for name, entry in value.items():
            rule = properties.get(name, schema.get("additionalProperties"))
            if isinstance(rule, dict):
                found += problems(entry, rule, f"{where}.{name}")
            elif rule is False:
                found.append(f"{where}: {name} is not known")
    if isinstance(value, list) and "items" in schema:
        for number, entry in enumerate(value):
            found += problems(entry, schema["items"], f"{where}[{number}]")
    return found


def _broken(word: str, rule: Any, value: Any, where: str) -> list[str]:
    if word == "type":
        kinds = [rule] if isinstance(rule, str) else rule
        fits = any(
            isinstance(value, _TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))
            for kind in kinds
        )
        return [] if fits else [f"{where} is {value!r}, not {rule}"]
    broken = {
        "const": lambda: value != rule,
        "enum": lambda: value not in rule,
        "minimum": lambda: isinstance(value, int | float) and value < rule,
        "maximum": lambda: isinstance(value, int | float) and value > rule,
        "minItems": lambda: len(value) < rule,
        "maxItems": lambda: len(value) > rule,
        "pattern": lambda: isinstance(value, str) and not re.search(rule, value),
        "minProperties": lambda: len(value) < rule,
    }
    if word not in broken:
        raise ValueError(f"{where}: the rule {word!r} is not known")
    return [f"{where} is {value!r}; {word} is {rule!r}"] if broken[word]() else []
