"""What a group of settings is: declared once, checked by pydantic, and overridden by dotted key or nested mapping."""

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, ValidatorFunctionWrapHandler, field_validator

from imu_ray.errors import ConfigError, nearest

S = TypeVar("S", bound="Section")
Schemas = Mapping[str, dict[str, Any]]
# For settings that cannot change the result of a run, so that they may differ on resume.
NO_RESULT: dict[str, Any] = {"changes_result": False}


class Section(BaseModel):
    """A group of settings, checked when made; ``prefix`` is what stands before their names."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        json_schema_extra={"patternProperties": {"[.]": {}}},  # a job file may name inner settings by dotted key
        use_attribute_docstrings=True,
    )
    prefix: ClassVar[str] = ""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_refusal(type(self), values, error.errors()[0])) from None

    @field_validator("*", mode="wrap")
    @classmethod
    def _keep_booleans(cls, value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        """Refuse ``true`` for a number, and a number for ``true``, which pydantic would convert."""
        checked = check(value)
        if not isinstance(checked, BaseModel) and _booleans(value) != _booleans(checked):
            raise ValueError
        return checked

    def with_overrides(self: S, overrides: Mapping[str, Any]) -> S:
        """A copy with settings replaced, named by dotted key (``"ascent.stop.every_steps"``) or by nested mapping.

        A setting that is a mapping keeps its other entries.

        Raises:
            ConfigError: a key is unknown (the nearest valid one is named) or a value is out of range.
        """
        return type(self)(**merge(type(self), self.to_dict(), overrides))

    def to_dict(self) -> dict[str, Any]:
        """All settings as nested plain values."""
        return self.model_dump()

    def identity(self) -> str:
        """SHA-256 of the settings that can change a result."""
        settings = settings_of(type(self))
        values = dict(_by_setting(settings, self.to_dict()))
        kept = {key: values[key] for key, schema in settings.items() if schema.get("changes_result", True)}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


@functools.cache
def settings_of(section: type[Section]) -> dict[str, dict[str, Any]]:
    """JSON schema of every setting of a section and of those inside it, by dotted key."""
    schema = section.model_json_schema()

    def walk(properties: Mapping[str, dict[str, Any]], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, item in properties.items():
            inner = next((choice["$ref"] for choice in (item, *item.get("anyOf", ())) if "$ref" in choice), None)
            if inner is None:
                yield f"{prefix}{name}", {**item, "description": " ".join(item.get("description", "").split())}
            else:
                yield from walk(schema["$defs"][inner.rpartition("/")[2]]["properties"], f"{prefix}{name}.")

    return dict(walk(schema["properties"], ""))


def merge(section: type[Section], *layers: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a section from layers of settings, each by dotted key or nested mapping; later layers win."""
    settings = settings_of(section)
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in _by_setting(settings, layer):
            old = merged.get(key)
            merged[key] = {**old, **value} if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return nest(merged)


def _by_setting(settings: Schemas, values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values by the dotted name of their setting; a setting that is a mapping takes what is below it."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        outer = next((item for item in settings if f"{name}.".startswith(f"{item}.")), "")
        if outer and settings[outer].get("type") == "object" and (name != outer or isinstance(value, Mapping)):
            yield outer, flatten(value if name == outer else {name[len(outer) + 1 :]: value})
        elif name == outer:
            yield name, value
        elif isinstance(value, Mapping):
            yield from _by_setting(settings, value, f"{name}.")
        elif inner := [item for item in settings if item.startswith(f"{name}.")]:
            such = next((item for item in inner if "default" not in settings[item]), inner[0])
            raise ConfigError(f"{name} is {value!r}; expected a mapping of settings such as {such}")
        else:
            raise ConfigError(f"unknown setting {name!r}; {nearest(name, settings)}")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as nested mappings; of two that exclude each other the later wins."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *outer, last = key.split(".")
        level = tree
        for name in outer:
            if not isinstance(level.get(name), dict):
                level[name] = {}
            level = level[name]
        level[last] = value
    return tree


def _booleans(value: Any) -> int:
    """How many booleans a value holds."""
    if isinstance(value, Mapping | list | tuple):
        return sum(map(_booleans, value.values() if isinstance(value, Mapping) else value))
    return isinstance(value, bool)


def _refusal(section: type[Section], values: Mapping[str, Any], error: Mapping[str, Any]) -> str:
    """What is wrong with a section's values, and what was expected."""
    name, *inner = error["loc"]
    key = f"{section.prefix}{name}"
    if error["type"] == "extra_forbidden":
        return f"unknown setting {key!r}; {nearest(key, [section.prefix + item for item in settings_of(section)])}"
    schema = section.model_json_schema()["properties"][name]
    if error["type"] == "missing":
        meaning = " ".join(schema.get("description", "").split())
        return f"{key} is missing; expected {in_words(schema)}: {meaning}"
    value = values[name]
    entries = schema.get("additionalProperties")
    if isinstance(value, Mapping) and isinstance(entries, dict) and inner:
        key, value, schema = f"{key}.{inner[0]}", value[inner[0]], entries
    return f"{key} is {value!r}; expected {str(error.get('ctx', {}).get('error', '')) or in_words(schema)}"


def in_words(schema: Mapping[str, Any]) -> str:
    """The values that a JSON schema takes: ``a number in (0, 1], or "auto"``."""
    if "anyOf" in schema:
        return ", or ".join(map(in_words, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return " or ".join(json.dumps(value) for value in schema.get("enum") or [schema["const"]])
    if schema.get("type") == "array":
        plural = {"integer": "whole numbers", "number": "numbers", "string": "texts"}[schema["items"]["type"]]
        return f"a list of {plural}{_range(schema['items'])}"
    words = {"boolean": "true or false", "string": "text", "null": "null", "object": "a mapping"}
    words |= {"integer": "a whole number", "number": "a number"}
    return words.get(schema.get("type", "object"), "a mapping") + _range(schema)


def _range(schema: Mapping[str, Any]) -> str:
    low, above, high = (schema.get(key) for key in ("minimum", "exclusiveMinimum", "maximum"))
    if high is not None:
        return f" in {'[' if above is None else '('}{low if above is None else above:g}, {high:g}]"
    return f" > {above:g}" if above is not None else "" if low is None else f" >= {low:g}"
