"""What a setting is: declared once with its unit, range and meaning; checked, described and overridden from that declaration."""

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml

from imu_ray.errors import ConfigError

T = TypeVar("T")
S = TypeVar("S", bound="Section")


def setting(
    default: T,
    doc: str,
    *,
    low: float = -math.inf,
    above: float = -math.inf,
    high: float = math.inf,
    identity: bool = True,
) -> T:
    """Declare a setting: its default, meaning and bounds (``low <= value <= high``, ``value > above``).

    ``identity=False`` marks a setting that cannot change the result of a run, so that it may differ on resume.
    """
    metadata = {"doc": doc, "low": low, "above": above, "high": high, "identity": identity}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Section:
    """A group of settings that checks itself when made; ``prefix`` is what stands before its settings' names."""

    prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value = _typed(getattr(self, item.name), hints[item.name])
            if isinstance(value, _Refusal) or not _in_range(value, item.metadata):
                raise ConfigError(
                    f"{self.prefix}{item.name} is {getattr(self, item.name)!r}; expected {describe_values(item, hints[item.name])}"
                )
            object.__setattr__(self, item.name, value)


class _Refusal:
    """The value does not fit the type."""


def _typed(value: Any, hint: Any) -> Any:
    """``value`` as ``hint``; numbers written as text (YAML reads ``1e-3`` as text) are converted."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else _Refusal()
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if type(value) in arguments:  # 1.0 stays a number where 1 would mean something else
            return value
        fits = (fit for fit in (_typed(value, choice) for choice in arguments) if not isinstance(fit, _Refusal))
        return next(fits, _Refusal())
    if origin is Literal:
        return value if value in arguments and isinstance(value, str) else _Refusal()
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return _Refusal()
        items = tuple(_typed(item, arguments[0]) for item in value)
        return _Refusal() if any(isinstance(item, _Refusal) for item in items) else items
    if hint is type(None):
        return None if value is None else _Refusal()
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            return _Refusal()
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, hint) and not (hint is int and isinstance(value, bool)) else _Refusal()


def _in_range(value: Any, bounds: Mapping[str, Any]) -> bool:
    if isinstance(value, tuple):
        return all(_in_range(item, bounds) for item in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return bool(bounds["low"] <= value <= bounds["high"] and value > bounds["above"] and math.isfinite(value))
    return True


def describe_values(item: "dataclasses.Field[Any]", hint: Any) -> str:
    """The values a setting takes, in words: ``a number in (0, 1], or "auto"``."""
    choices = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return ", or ".join(_describe_choice(item.metadata, choice) for choice in choices)


def _describe_choice(bounds: Mapping[str, Any], choice: Any) -> str:
    if typing.get_origin(choice) is Literal:
        return " or ".join(json.dumps(value) for value in typing.get_args(choice))
    if typing.get_origin(choice) is tuple:
        return {float: "a list of numbers", int: "a list of whole numbers", str: "a list of texts"}[typing.get_args(choice)[0]]
    if choice not in (int, float):
        return {bool: "true or false", str: "text", type(None): "null"}[choice]
    kind = "a whole number" if choice is int else "a number"
    least, opening = max(bounds["low"], bounds["above"]), "(" if bounds["above"] > -math.inf else "["
    if bounds["high"] < math.inf:
        return f"{kind} in {opening}{least:g}, {bounds['high']:g}]"
    if least == -math.inf:
        return kind
    return f"{kind} {'>' if opening == '(' else '>='} {least:g}"


def nearest(name: str, valid: Mapping[str, Any] | typing.Iterable[str]) -> str:
    """Remedy for a name that is not registered: the near ones, or all of them."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    close = close or [other for other in names if other.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    return f"did you mean {', '.join(close)}?" if close else f"expected one of {', '.join(names)}"


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted keys."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def settings_of(section: type[Section], prefix: str = "") -> dict[str, "dataclasses.Field[Any]"]:
    """Every setting of a section and of those inside it, by dotted key."""
    found: dict[str, dataclasses.Field[Any]] = {}
    hints = typing.get_type_hints(section)
    for item in dataclasses.fields(section):
        if dataclasses.is_dataclass(hints[item.name]):
            found |= settings_of(hints[item.name], f"{prefix}{item.name}.")
        else:
            found[prefix + item.name] = item
    return found


def replace_settings(section: S, flat: Mapping[str, Any]) -> S:
    """A copy of a section with settings replaced by dotted key."""
    changes: dict[str, Any] = {key: value for key, value in flat.items() if "." not in key}
    inner: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        head, dot, rest = key.partition(".")
        if dot:
            inner.setdefault(head, {})[rest] = value
    for name, values in inner.items():
        changes[name] = replace_settings(getattr(section, name), values)
    return dataclasses.replace(section, **changes)


def parse_assignment(text: str) -> tuple[str, Any]:
    """``"ascent.l1=0"`` to ``("ascent.l1", 0)``; the value is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {text!r}; expected dotted.key=value")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text!r}: the value is not YAML ({error})") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping from a file, without code execution; ``ConfigError`` when it is missing or not a mapping."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}; expected a YAML mapping of settings")
    return values
