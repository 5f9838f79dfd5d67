"""The trials of a sweep: axes, what they may be, and a name for every combination."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from ray import tune
from ray.tune.search.sample import Domain

from imu_ray.config import UnlearnConfig
from imu_ray.errors import ConfigError
from imu_ray.pipeline import resolve_settings
from imu_ray.settings import Section, nearest, setting, settings_of

SIZE = "forget_set.size"
# What a trial cannot change, because the features that all trials share depend on it, or because it is not a trial's to say.
FIXED = (
    "forget_set.", "influence.block_rows", "influence.blocks_per_shard", "influence.features", "influence.feature_dtype", "influence.autocast",
    "influence.channels_last", "influence.compile", "resources.", "audit.", "recipe", "log",
)  # fmt: skip


@dataclass(frozen=True)
class SweepConfig(Section):
    """How trials are made, run and chosen."""

    prefix = "sweep."

    samples: int = setting(1, "draws of the axes that are distributions, for each point of the others", low=1)
    scheduler: Literal["grid", "asha"] = setting(
        "grid", "run every trial to its end, or stop early those whose forget accuracy falls slowest (one size at a time)"
    )
    choose_by: Literal["auto", "output_change", "parameter_drift", "retain_accuracy", "test_accuracy"] = setting(
        "auto",
        "best trial of a size, among those that reached their target: highest accuracy on an evaluation set, or, without retain data, "
        "least change of the outputs or of the head; `auto`: `retain_accuracy` where `evaluation` has a retain set, else `output_change` for "
        "sets of a few classes and `parameter_drift` for mixed ones",
    )
    max_retries: int = setting(1, "times a failed trial is started again", low=0, identity=False)


def make_trials(axes: Mapping[str, Any], base: UnlearnConfig, settings: SweepConfig) -> dict[str, dict[str, Any]]:
    """Overrides of every trial by its name, in order; each is checked here, before anything runs."""
    valid = [key for key in settings_of(UnlearnConfig) if key == SIZE or not key.startswith(FIXED)]
    if not axes:
        raise ConfigError("axes is empty; expected at least one setting with a list of values, such as forget_set.size: [0.1, 1.0]")
    for key, values in axes.items():
        if key not in valid:
            reason = "all trials share it" if key in settings_of(UnlearnConfig) else nearest(key, valid)
            raise ConfigError(f"{key!r} cannot be an axis of a sweep: {reason}")
        if not isinstance(values, Domain) and (not isinstance(values, list | tuple) or not values):
            raise ConfigError(f"axis {key} is {values!r}; expected a list of values, or a distribution of ray.tune")
    if settings.scheduler == "asha" and len(axes.get(SIZE, [None])) > 1:
        raise ConfigError(
            f"sweep.scheduler is 'asha' with {len(axes[SIZE])} values of {SIZE}; expected one, because trials of different sizes answer "
            "different questions; use grid, or a sweep per size"
        )
    listed = {key: values for key, values in axes.items() if not isinstance(values, Domain)}
    drawn = {key: domain for key, domain in axes.items() if isinstance(domain, Domain)}
    random = np.random.default_rng(base.seed)
    trials = {}
    for point in itertools.product(*listed.values()):
        for _ in range(settings.samples if drawn else 1):
            overrides = dict(zip(listed, point, strict=True)) | {key: domain.sample(random_state=random) for key, domain in drawn.items()}
            config = resolve_settings(None, base.with_overrides(overrides))
            trials[_name(overrides, config)] = overrides
    return trials


def _name(overrides: Mapping[str, Any], config: UnlearnConfig) -> str:
    """A name that says what the trial is, the same each time, fit for a folder."""
    text = "_".join(f"{key.rsplit('.', 1)[-1]}-{value:.3g}" if isinstance(value, float) else f"{key.rsplit('.', 1)[-1]}-{value}"
                    for key, value in overrides.items())  # fmt: skip
    return f"{re.sub(r'[^A-Za-z0-9.+-]+', '_', text)[:80]}-{config.identity()[:6]}"


def largest_size(sizes: Sequence[Any]) -> Any:
    """The size that contains all others; None (everything) unless all are counts, or all are shares."""
    kinds = {type(size) for size in sizes}
    return max(sizes) if kinds in ({int}, {float}) else None


def read_axes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Axes as a job's YAML says them: ``forget_set.size: [0.1, 1.0]``, ``ascent.learning_rate: {loguniform: [1e-4, 1e-1]}``.

    Raises:
        ConfigError: a distribution is not one of ``uniform``, ``loguniform``, ``quniform``, ``choice``, ``randint``.
    """
    axes: dict[str, Any] = {}
    known = ("uniform", "loguniform", "quniform", "choice", "randint")
    valid = settings_of(UnlearnConfig)
    for key, value in values.items():
        outer, _, last = key.rpartition(".")
        if key in valid or outer not in valid:
            axes[key] = value
        elif last not in known:
            raise ConfigError(f"axis {outer} has distribution {last!r}; {nearest(last, known)}")
        else:
            arguments = [value] if last == "choice" else [float(item) for item in value]
            axes[outer] = getattr(tune, last)(*arguments)
    return axes
