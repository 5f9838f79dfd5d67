"""A job file: the arguments of a stage and all settings, in YAML."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, field_validator

from imu_ray.config import RECIPES, EnsembleConfig, ForgetSetConfig, SweepConfig, UnlearnConfig, recipe_settings
from imu_ray.errors import ConfigError
from imu_ray.models.spec import ModelSpec
from imu_ray.section import Section, flatten, merge, nest


class ModelSection(Section):
    """How to build a model."""

    prefix = "model."

    factory: str
    """`package.module:callable`, importing which runs code; a torchvision classifier; `timm:NAME` (extra
    `timm`); or `hf:PATH`, an image classifier or causal language model, or an adapter of one, in a folder of Hugging
    Face's (extra `hf`)"""
    kwargs: dict[str, Any] = Field({})
    """keyword arguments of the factory; `timm:NAME` and torchvision have random weights unless these say otherwise"""
    checkpoint: str | None = None
    """path or URI of a `.safetensors` file, of the index of several, or of a folder with either; or of a state dict
    that `torch.load(weights_only=True)` reads"""
    head: str | None = None
    """name of the classifier head, when it cannot be told"""
    merge_adapter: bool = False
    """write the base model with the adapter merged into it, in place of the adapter alone"""
    gradient_checkpointing: bool = False
    """run the blocks of a Hugging Face model again on the way back in place of keeping what they computed: less memory,
    a third more time, the same numbers"""

    def spec(self) -> ModelSpec:
        """The model as the stages take it."""
        own = {"kwargs": nest(self.kwargs)}
        return ModelSpec(**{**{name: getattr(self, name) for name in type(self).model_fields}, **own})


class OriginalSection(ModelSection):
    """A second model that an audit compares with."""

    prefix = "original."


class ForgetSetSection(ForgetSetConfig):
    """The samples to forget, and how rows become samples."""

    path: str
    """path or URI of the samples to forget"""


def _new_run_dir() -> str:
    from imu_ray.run.directory import default_run_dir

    return str(default_run_dir())


class JobConfig(UnlearnConfig):
    """What a job file says: the arguments of a stage and all settings."""

    model: ModelSection
    original: OriginalSection | None = None
    forget_set: ForgetSetSection
    evaluation: dict[str, str | dict[str, Any]] = Field({})
    """path or URI per evaluation set, by name; measured, never trained on. Of a set that is read in another way, a
    mapping: its `path`, and settings of `forget_set` that are its own: `test: {path: /data/test, image_column: png}`"""
    run_dir: str = Field(default_factory=_new_run_dir)
    """directory or URI of the results; default `runs/<time>-<id>`"""
    task: str = "classification"
    """kind of task"""
    axes: dict[str, Any] = Field({})
    """setting to a list of values or a distribution, for a sweep; the other commands leave it alone"""
    sweep: SweepConfig = Field(default_factory=SweepConfig)
    ensemble: EnsembleConfig = Field(default_factory=EnsembleConfig)

    @field_validator("evaluation", mode="before")
    @classmethod
    def _is_path_per_name(cls, value: Any) -> Any:
        flat = flatten(value) if isinstance(value, Mapping) else {"": None}
        has_own = {key.partition(".")[0] for key in flat if "." in key}
        sets = nest({f"{key}.path" if key in has_own else key: given for key, given in flat.items()})
        paths = (given.get("path") if isinstance(given, Mapping) else given for given in sets.values())
        if not all(isinstance(path, str) for path in paths):
            raise ValueError("a path per name, such as {test: /data/test.parquet}, or a mapping with a path in it")
        return sets

    @classmethod
    def load(cls, path: str | Path, assignments: Sequence[str] = ()) -> "JobConfig":
        """Read a job file, then apply ``dotted.key=value`` assignments; the recipe comes first, whatever the order.

        Raises:
            ConfigError: a key is unknown or missing, or a value is out of range.
        """
        layers = [read_yaml(path), *map(parse_assignment, assignments)]
        recipe = {key: value for layer in layers for key, value in layer.items()}.get("recipe", UnlearnConfig().recipe)
        job = cls(**{"model": {}, "forget_set": {}, **merge(cls, recipe_settings(recipe), *layers)})
        job._check_run_dir()
        return job

    def _check_run_dir(self) -> None:
        from imu_ray.distributed.session import submitted_job

        kept = "run_dir" in self.model_fields_set and ("://" in self.run_dir or Path(self.run_dir).is_absolute())
        if submitted_job() is not None and not kept:
            raise ConfigError(
                f"run_dir is {self.run_dir!r} under `ray job submit`, whose working directory is temporary, so that "
                "the result would be lost; expected an absolute path on storage that the nodes share, or a URI "
                "(s3://bucket/path)"
            )

    @property
    def config(self) -> UnlearnConfig:
        """The settings alone."""
        own = set(type(self).model_fields) - set(UnlearnConfig.model_fields)
        return UnlearnConfig(**self.model_dump(exclude={"forget_set": {"path"}, **dict.fromkeys(own, True)}))

    def arguments(self) -> dict[str, Any]:
        """What every stage takes."""
        return {
            "model": self.model.spec(),
            "forget_set": self.forget_set.path,
            "task": self.task,
            "evaluation": self.evaluation,
            "config": self.config,
        }


def job_schema() -> dict[str, Any]:
    """JSON schema of a job file, for editors."""
    from imu_ray.experiments.axes import DISTRIBUTIONS, axis_settings

    schema = JobConfig.model_json_schema()
    drawn = {"type": "object", "properties": {name: {"type": "array"} for name in DISTRIBUTIONS}, "maxProperties": 1}
    axis = {"anyOf": [{"type": "array", "minItems": 1}, {**drawn, "additionalProperties": False}]}
    schema["properties"]["axes"] |= {
        "properties": dict.fromkeys(axis_settings(), axis),
        "patternProperties": {"^[^.]+$": {"type": "object"}},  # keys may be nested
        "additionalProperties": False,
    }
    schema["properties"]["recipe"]["enum"] = list(RECIPES)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def parse_assignment(text: str) -> dict[str, Any]:
    """``"ascent.l1=0"`` to ``{"ascent.l1": 0}``; the value is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {text!r}; expected dotted.key=value")
    try:
        return {key.strip(): yaml.safe_load(value)}
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
