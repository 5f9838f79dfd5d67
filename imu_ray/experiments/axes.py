"""The trials of a sweep: axes, what they may be, and a name for every combination."""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ray import tune
from ray.tune.search.sample import Domain

from imu_ray.config import SweepConfig, UnlearnConfig
from imu_ray.errors import ConfigError, nearest
from imu_ray.recipes import resolve_settings
from imu_ray.section import settings_of

SIZE = "forget_set.size"
SETS = ("retain", "test")  # evaluation sets that the best trial can be chosen by
DISTRIBUTIONS = ("uniform", "loguniform", "quniform", "choice", "randint")
# What a trial cannot change: the features that all trials share depend on it, or it is not a trial's to say.
FIXED = (
    "forget_set.", "influence.block_rows", "influence.blocks_per_shard", "influence.features",
    "influence.feature_dtype", "influence.autocast", "influence.channels_last", "influence.compile",
    "ascent.scope", "ascent.views", "ascent.view_transform", "resources.", "audit.", "recipe", "log", "tracking",
)  # fmt: skip


def axis_settings() -> list[str]:
    """The settings that a trial can change."""
    return [key for key in settings_of(UnlearnConfig) if key == SIZE or not key.startswith(FIXED)]


def make_trials(
    axes: Mapping[str, Any], base: UnlearnConfig, settings: SweepConfig, task: str = "classification"
) -> dict[str, dict[str, Any]]:
    """Overrides of every trial by its name, in order; each is checked here, before anything runs."""
    valid = axis_settings()
    if not axes:
        raise ConfigError("axes is empty; expected a setting with a list of values, as forget_set.size: [0.1, 1.0]")
    for key, values in axes.items():
        if key not in valid:
            reason = "all trials share it" if key in settings_of(UnlearnConfig) else nearest(key, valid)
            raise ConfigError(f"{key!r} cannot be an axis of a sweep: {reason}")
        if key == "seed" and (base.ascent.views or base.audit.views):
            raise ConfigError("'seed' cannot be an axis of a sweep with views: all trials share them")
        if not isinstance(values, Domain) and (not isinstance(values, list | tuple) or not values):
            raise ConfigError(f"axis {key} is {values!r}; expected a list of values, or a distribution of ray.tune")
    if settings.scheduler == "asha" and len(axes.get(SIZE, [None])) > 1:
        raise ConfigError(
            f"sweep.scheduler is 'asha' with {len(axes[SIZE])} values of {SIZE}; expected one, because trials of "
            "different sizes answer different questions; use grid, or a sweep per size"
        )
    listed = {key: values for key, values in axes.items() if not isinstance(values, Domain)}
    drawn = {key: domain for key, domain in axes.items() if isinstance(domain, Domain)}
    random = np.random.default_rng(base.seed)
    trials = {}
    for point in itertools.product(*listed.values()):
        for _ in range(settings.samples if drawn else 1):
            overrides = dict(zip(listed, point, strict=True))
            overrides |= {key: domain.sample(random_state=random) for key, domain in drawn.items()}
            config = resolve_settings(None, base.with_overrides(overrides), task)
            trials[_name(overrides, config)] = overrides
    return trials


def _name(overrides: Mapping[str, Any], config: UnlearnConfig) -> str:
    """A name that says what the trial is, the same each time, fit for a folder."""
    texts = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in overrides.items()}
    shown = "_".join(f"{key.rsplit('.', 1)[-1]}-{text}" for key, text in texts.items())
    digest = hashlib.sha256(json.dumps([config.identity(), overrides], sort_keys=True).encode()).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9.+-]+', '_', shown)[:80]}-{digest[:6]}"


def largest_size(sizes: Sequence[Any]) -> Any:
    """The size that contains all others; None (everything) unless all are counts, or all are shares."""
    kinds = {type(size) for size in sizes}
    return max(sizes) if kinds in ({int}, {float}) else None


def read_axes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Axes of a job's YAML: ``forget_set.size: [0.1, 1.0]``, ``ascent.learning_rate: {loguniform: [1e-4, 1e-1]}``.

    Raises:
        ConfigError: a distribution is not one of ``uniform``, ``loguniform``, ``quniform``, ``choice``, ``randint``.
    """
    axes: dict[str, Any] = {}
    valid = settings_of(UnlearnConfig)
    for key, value in values.items():
        outer, _, last = key.rpartition(".")
        if key in valid or outer not in valid:
            axes[key] = value
        elif last not in DISTRIBUTIONS:
            raise ConfigError(f"axis {outer} has distribution {last!r}; {nearest(last, DISTRIBUTIONS)}")
        else:
            arguments = [value] if last == "choice" else [float(item) for item in value]
            axes[outer] = getattr(tune, last)(*arguments)
    return axes
