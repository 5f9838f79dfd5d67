"""Every setting and every recipe: frozen dataclasses, YAML, dotted overrides.

A setting is declared once, with its unit, its range and its meaning; the check, the README's table and the error text all
come from that declaration.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from imu_ray.errors import ConfigError

T = TypeVar("T")


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
    """A group of settings that checks itself when made."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value = _typed(getattr(self, item.name), hints[item.name])
            if isinstance(value, _Refusal) or not _in_range(value, item.metadata):
                raise ConfigError(
                    f"{_SECTION_NAMES.get(type(self).__name__, '')}{item.name} is {getattr(self, item.name)!r}; expected "
                    f"{describe_values(item, hints[item.name])}"
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
        return "a list of numbers" if typing.get_args(choice)[0] is float else "a list of texts"
    if choice not in (int, float):
        return {bool: "true or false", str: "text", type(None): "null"}[choice]
    kind = "a whole number" if choice is int else "a number"
    least, opening = max(bounds["low"], bounds["above"]), "(" if bounds["above"] > -math.inf else "["
    if bounds["high"] < math.inf:
        return f"{kind} in {opening}{least:g}, {bounds['high']:g}]"
    return f"{kind} {'>' if opening == '(' else '>='} {least:g}"


@dataclass(frozen=True)
class ForgetSetConfig(Section):
    """How rows become samples; the same for the forget set and the evaluation sets."""

    on_bad_row: Literal["error", "skip"] = setting(
        "error", "a row that cannot be used: stop and name it, or leave it out and list it in the manifest"
    )
    image_column: str = setting("image", "column with encoded images (PNG, JPEG bytes) or with numbers")
    label_column: str = setting("label", "column with whole-number labels, or names listed in `forget_set.classes`")
    id_column: str | None = setting(None, "column with unique sample ids; null: `id` if there is one, else the row number")
    classes: tuple[str, ...] | None = setting(None, "class names in the order of the model's outputs")
    image_mode: Literal["RGB", "L"] = setting("RGB", "decode images as colour or as grey")
    image_size: int | None = setting(None, "resize images to this many pixels square; null: leave as stored", low=1)
    mean: tuple[float, ...] | None = setting(None, "mean per channel, subtracted after scaling pixels to [0, 1]")
    std: tuple[float, ...] | None = setting(None, "standard deviation per channel, divided by after the mean")


@dataclass(frozen=True)
class InfluenceConfig(Section):
    """How each sample's influence is scored."""

    block_rows: int = setting(256, "rows per block: one forward call, one statistics sum, one scoring call", low=1)
    blocks_per_shard: int = setting(4, "blocks per task, a power of two", low=1, identity=False)
    curvature: str = setting("diagonal_fisher", "curvature whose damped inverse weights the mean gradient")
    damping: float = setting(0.01, "lambda, added to the curvature's diagonal", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks_per_shard & (self.blocks_per_shard - 1):
            raise ConfigError(
                f"influence.blocks_per_shard is {self.blocks_per_shard}; expected a power of two (1, 2, 4, 8, ...), so that "
                "the sums do not depend on it"
            )


@dataclass(frozen=True)
class IntensityConfig(Section):
    """How scores become weights of the ascent."""

    scheme: str = setting("imu", "how weights are made: `imu`, or a control (`uniform`, `permuted`)")
    keep_fraction: float = setting(1.0, "share of the selected samples kept, the largest scores first", above=0, high=1)
    clip_quantile: float = setting(0.93, "quantile of the kept weights at which they are clipped", above=0, high=1)


@dataclass(frozen=True)
class StopConfig(Section):
    """When the ascent has done its work."""

    forget_accuracy: float | Literal["auto"] | None = setting(
        "auto",
        "stop when the forget set's accuracy is at or below this share; `auto`: 0.01 when the forget set is whole classes, "
        "else the accuracy on `evaluation['test']`, else off; null: off",
        low=0,
        high=1,
    )
    every_steps: int = setting(5, "steps between checks", low=1)


@dataclass(frozen=True)
class AscentConfig(Section):
    """The weighted ascent on the head."""

    objective: str = setting("ascent", "what each step does to a sample's logits")
    learning_rate: float = setting(0.01, "step size of SGD", above=0)
    momentum: float = setting(0.9, "momentum of SGD", low=0, high=1)
    weight_decay: float = setting(5e-4, "L2 penalty on the head, added to the gradient", low=0)
    l1: float = setting(5e-4, "alpha, weight of the L1 norm of the head", low=0)
    batch_size: int = setting(256, "kept rows per global step, whatever the number of workers", low=1)
    epochs: int = setting(10, "passes over the kept rows at most", low=1)
    microbatch_rows: int = setting(32, "rows per piece of a batch that is dealt to one worker", low=1)
    window_blocks: int = setting(64, "blocks within which rows are shuffled; reads stay sequential beyond", low=1)
    stop: StopConfig = field(default_factory=StopConfig)


@dataclass(frozen=True)
class AuditConfig(Section):
    """What is measured before and after."""

    membership_min_rows: int = setting(20, "fewest rows per side for a membership-inference figure", low=8)
    permutations: int = setting(200, "label permutations behind the membership band", low=20)
    report: bool = setting(True, "write report.html", identity=False)


@dataclass(frozen=True)
class ResourcesConfig(Section):
    """What a run takes of the cluster."""

    workers: int = setting(1, "parallel scoring tasks, and workers of the ascent", low=1, identity=False)
    cpus_per_worker: int = setting(1, "CPU threads of a worker", low=1)
    gpus_per_worker: float = setting(0.0, "GPUs of a worker; fractions share a GPU", low=0)
    max_retries: int = setting(2, "times a killed task or worker group is started again", low=0, identity=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus_per_worker > 1 and not self.gpus_per_worker.is_integer():
            raise ConfigError(f"resources.gpus_per_worker is {self.gpus_per_worker}; expected a fraction of one or a whole number")


@dataclass(frozen=True)
class UnlearnConfig(Section):
    """All settings of a run. Make one with ``from_recipe`` and ``with_overrides``."""

    seed: int = setting(0, "seed of every random choice", low=0)
    recipe: str = setting("paper", "named set of settings that this configuration started from")
    forget_set: ForgetSetConfig = field(default_factory=ForgetSetConfig)
    influence: InfluenceConfig = field(default_factory=InfluenceConfig)
    intensity: IntensityConfig = field(default_factory=IntensityConfig)
    ascent: AscentConfig = field(default_factory=AscentConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)

    @classmethod
    def from_recipe(cls, name: str) -> "UnlearnConfig":
        """The settings of a recipe (``RECIPES``); ``ConfigError`` names the nearest one when there is none."""
        if name not in RECIPES:
            raise ConfigError(f"recipe is {name!r}; {nearest(name, RECIPES)}")
        return cls().with_overrides({"recipe": name, **RECIPES[name]})

    def with_overrides(self, overrides: Mapping[str, Any]) -> "UnlearnConfig":
        """A copy with settings replaced, named by dotted key (``"ascent.stop.every_steps"``) or by nested mapping.

        Raises:
            ConfigError: a key is unknown (the nearest valid one is named) or a value is out of range.
        """
        flat = dict(flatten(overrides))
        valid = settings_of(type(self))
        for key in flat:
            if key not in valid:
                raise ConfigError(f"unknown setting {key!r}; {nearest(key, valid)}")
        return typing.cast(UnlearnConfig, _replace(self, flat))

    def to_dict(self) -> dict[str, Any]:
        """All settings as nested plain values."""
        return dataclasses.asdict(self)

    def identity(self) -> str:
        """SHA-256 of the settings that can change a result."""
        values = dict(flatten(self.to_dict()))
        kept = {key: values[key] for key, item in settings_of(type(self)).items() if item.metadata["identity"]}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


# recipe -> what it changes; `paper` is the default of every setting. Sources: arXiv:2508.01620.
RECIPES: dict[str, dict[str, Any]] = {"paper": {}}

_SECTION_NAMES = {
    "ForgetSetConfig": "forget_set.",
    "InfluenceConfig": "influence.",
    "IntensityConfig": "intensity.",
    "AscentConfig": "ascent.",
    "StopConfig": "ascent.stop.",
    "AuditConfig": "audit.",
    "ResourcesConfig": "resources.",
}


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


def _replace(section: Section, flat: Mapping[str, Any]) -> Section:
    changes: dict[str, Any] = {key: value for key, value in flat.items() if "." not in key}
    inner: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        head, dot, rest = key.partition(".")
        if dot:
            inner.setdefault(head, {})[rest] = value
    for name, values in inner.items():
        changes[name] = _replace(getattr(section, name), values)
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
