"""Every setting and every recipe of imu_ray, as frozen dataclasses."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from imu_ray.errors import ConfigError
from imu_ray.settings import Section, flatten, nearest, replace_settings, setting, settings_of


@dataclass(frozen=True)
class ForgetSetConfig(Section):
    """How rows become samples; the same for the forget set and the evaluation sets."""

    prefix = "forget_set."

    size: int | float | tuple[int, ...] | None = setting(
        None,
        "forget only a part: so many rows (`500`) or such a share of them (`0.1`), drawn at random and nested (a larger size contains a "
        "smaller one), or the rows of some classes (`[3, 5]`, class indices); null: all",
    )
    size_seed: int = setting(0, "seed of that draw, apart from `seed`, so that runs with other seeds forget the same rows", low=0)
    on_bad_row: Literal["error", "skip"] = setting(
        "error", "a row that cannot be used: stop and name it, or leave it out and list it in the manifest"
    )
    image_column: str = setting("image", "column with encoded images (PNG, JPEG bytes) or with numbers")
    label_column: str = setting("label", "column with whole-number labels, or names listed in `forget_set.classes`")
    id_column: str | None = setting(None, "column with unique sample ids; null: `id` if there is one, else the row number")
    classes: tuple[str, ...] | None = setting(None, "class names in the order of the model's outputs")
    image_mode: Literal["RGB", "L"] = setting("RGB", "decode images as colour or as grey")
    image_size: int | None = setting(None, "resize images to this many pixels square; null: leave as stored", low=1)
    mean: tuple[float, ...] | None = setting(
        None, "mean per channel, subtracted after decoded images are scaled to [0, 1] (numbers are taken as they are)"
    )
    std: tuple[float, ...] | None = setting(None, "standard deviation per channel, divided by after the mean", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.size
        if (isinstance(size, int) and size < 1) or (isinstance(size, float) and not 0 < size <= 1) or size == ():
            raise ConfigError(f"forget_set.size is {size!r}; expected a whole number >= 1 (rows), a share in (0, 1], or a list of classes")


@dataclass(frozen=True)
class InfluenceConfig(Section):
    """How each sample's influence is scored."""

    prefix = "influence."

    block_rows: int = setting(256, "rows per block: one forward call, one statistics sum, one scoring call", low=1)
    blocks_per_shard: int = setting(4, "blocks per task, a power of two", low=1, identity=False)
    features: Literal["cache", "recompute"] = setting(
        "cache",
        "keep the features in the object store; or run the forward pass again in every stage (seven and more in all), so that nothing is stored "
        "or spilled; the workers of an ascent then hold them all in memory",
        identity=False,
    )
    feature_dtype: Literal["float32", "float16", "bfloat16"] = setting(
        "float32", "how features are kept (float32: float64 of a float64 model); what is computed from them is float64"
    )
    autocast: Literal["none", "float16", "bfloat16"] = setting("none", "type that autocast runs the forward pass in")
    channels_last: bool = setting(False, "run the forward pass on images in channels-last memory format")
    compile: bool = setting(False, "compile the parts of the model in front of the head (`torch.compile`), once per worker process")
    curvature: str = setting(
        "diagonal_fisher",
        "curvature whose damped inverse weights the mean gradient: `diagonal_fisher` (paper), `identity`, `kfac`, `hessian`",
    )
    refresh: Literal["once", "epoch", "step"] = setting(
        "once",
        "when influence is scored: of the original head; or again, from the cached features, at the start of each epoch of the ascent, or "
        "within each batch; every sample is then in a batch, and those that are not kept there have no weight",
    )
    curvature_set: str = setting("forget", "samples that the curvature is fitted on: `forget`, or the name of an evaluation set")
    damping: float = setting(0.01, "lambda, added to the curvature's diagonal", above=0)
    damping_mode: Literal["absolute", "relative"] = setting(
        "absolute", "lambda is a number (paper), or a share of the mean of the curvature's diagonal"
    )
    robust: Literal["none", "clip"] = setting(
        "none", "`clip`: no sample enters the mean gradient and the Fisher with a larger gradient norm than the quantile below"
    )
    clip_quantile: float = setting(
        0.95, "quantile of the gradient norms: where `robust` clips, and what `outlier` is measured against", above=0, high=1
    )

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

    prefix = "intensity."

    scheme: str = setting("imu", "how weights are made: `imu` (paper), `loss`, or a control (`uniform`, `permuted`)")
    keep_fraction: float = setting(
        1.0, "share of the samples with negative influence kept, the strongest first (`imu`, `permuted`)", above=0, high=1
    )
    clip_quantile: float = setting(0.93, "quantile of the kept weights at which they are clipped (`imu`, `permuted`)", above=0, high=1)


@dataclass(frozen=True)
class StopConfig(Section):
    """When the ascent has done its work: at the first target that is met, or when steps or epochs run out."""

    prefix = "ascent.stop."

    forget_accuracy: float | Literal["auto"] | None = setting(
        "auto",
        "stop when the forget set's accuracy is at or below this share; `auto`: 0.01 when the forget set is whole classes, "
        "else the accuracy on `evaluation['test']`, else off; null: off",
        low=0,
        high=1,
    )
    forget_loss: float | Literal["auto"] | None = setting(
        None, "stop when the mean forget loss (nats) is at or above this; `auto`: ln C, that of a uniform guess; null: off", low=0
    )
    membership: bool = setting(
        False, "stop when forget samples are no more confident than `evaluation['test']` samples of the same classes (AUC 0.5)"
    )
    tolerance: float = setting(
        0.005, "how far past a target a run may end, in the target's unit; an overshoot is bisected back (at least one sample)", above=0
    )
    every_steps: int = setting(10, "steps between checks", low=1)
    max_epochs: int = setting(10, "passes over the kept rows at most", low=1)
    max_steps: int | None = setting(None, "steps at most; null: as many as the epochs have", low=1)


@dataclass(frozen=True)
class GuardConfig(Section):
    """What must not happen on the way; the head goes back to the last good check and the run ends `stopped_by_guard`."""

    prefix = "ascent.guard."

    max_forget_loss: float = setting(100.0, "mean forget loss (nats) above which the ascent counts as exploded", above=0)
    max_parameter_drift: float | None = setting(None, "largest change of the head, as a share of its norm; null: any", above=0)
    min_accuracy: float | None = setting(None, "lowest accuracy allowed on the guarded evaluation set; null: any", low=0, high=1)
    evaluation_set: str = setting("test", "evaluation set that `min_accuracy` guards")


@dataclass(frozen=True)
class StepControlConfig(Section):
    """A trust region: a step that changes the forget set more than this is halved until it does not."""

    prefix = "ascent.step_control."

    max_accuracy_change: float | None = setting(None, "largest change of the forget accuracy in one step; null: any", above=0, high=1)
    max_loss_change: float | None = setting(None, "largest change of the mean forget loss (nats) in one step; null: any", above=0)


@dataclass(frozen=True)
class AscentConfig(Section):
    """The weighted ascent on the head."""

    prefix = "ascent."

    objective: str = setting(
        "ascent", "what a step does to the logits: `ascent`, `bounded_ascent`, `npo`, `renormalise`, `row_mask`, `uniform_target`"
    )
    preconditioner: str = setting(
        "none", "curvature of the forget set that steers the step: `none`, `feature_second_moment`, `block_ggn`, `full_ggn`"
    )
    preconditioner_damping: float = setting(0.01, "damping of the preconditioner, as a share of its mean eigenvalue", above=0)
    preconditioner_memory: float = setting(2.0, "GiB that the preconditioner may take in one process", above=0, identity=False)
    optimizer: Literal["sgd", "adamw"] = setting("sgd", "optimiser")
    learning_rate: float = setting(0.01, "step size", above=0)
    schedule: Literal["constant", "cosine", "step"] = setting(
        "constant", "learning rate over the steps: constant; cosine to 0; or a tenth after each of half and three quarters"
    )
    momentum: float = setting(0.9, "momentum of SGD; first beta of AdamW", low=0, high=1)
    weight_decay: float = setting(5e-4, "L2 penalty on the head, added to the gradient (AdamW: decoupled)", low=0)
    l1: float = setting(5e-4, "alpha, weight of the L1 norm of the head", low=0)
    anchor: float = setting(0.0, "mu, pull back to the original head: mu (W - W0) is added to the gradient", low=0)
    batch_size: int = setting(256, "kept rows per global step, whatever the number of workers", low=1)
    microbatch_rows: int = setting(32, "rows per piece of a batch that is dealt to one worker", low=1)
    window_blocks: int = setting(64, "blocks within which rows are shuffled; reads stay sequential beyond", low=1)
    keep: Literal["last", "best", "all"] = setting(
        "last", "head kept: the last; that of the check nearest the first target; or the last, with every check's head in `heads/`"
    )
    state_every_checks: int = setting(1, "checks between saved states", low=1, identity=False)
    stop: StopConfig = field(default_factory=StopConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    step_control: StepControlConfig = field(default_factory=StepControlConfig)


@dataclass(frozen=True)
class AuditConfig(Section):
    """What is measured before and after."""

    prefix = "audit."

    membership_min_rows: int = setting(20, "fewest rows per side for a membership-inference figure", low=8)
    permutations: int = setting(200, "label permutations behind the membership band", low=20)
    report: bool = setting(True, "write report.html", identity=False)


@dataclass(frozen=True)
class ResourcesConfig(Section):
    """What a run takes of the cluster."""

    prefix = "resources."

    workers: int = setting(1, "parallel scoring tasks, and workers of the ascent", low=1, identity=False)
    cpus_per_worker: int = setting(1, "CPU threads of a worker", low=1)
    gpus_per_worker: float = setting(0.0, "GPUs of a worker; fractions share a GPU", low=0)
    autoscaling: bool | Literal["auto"] = setting(
        "auto",
        "wait for nodes when the workers do not fit on those that are there; `auto`: where Ray's autoscaler is known to run (`ray up`, "
        "autoscaler v2)",
        identity=False,
    )
    max_retries: int = setting(2, "times a killed task or worker group is started again", low=0, identity=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpus_per_worker > 1 and not self.gpus_per_worker.is_integer():
            raise ConfigError(f"resources.gpus_per_worker is {self.gpus_per_worker}; expected a fraction of one or a whole number")


@dataclass(frozen=True)
class UnlearnConfig(Section):
    """All settings of a run. Make one with ``from_recipe`` and ``with_overrides``."""

    seed: int = setting(0, "seed of every random choice", low=0)
    recipe: str = setting(
        "paper", "named set of settings that this configuration started from; chosen with `from_recipe` or a job's `recipe:`"
    )
    log: Literal["text", "json"] = setting("text", "how a job writes its log: a line of text, or of JSON, per event", identity=False)
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
        return dataclasses.replace(cls(), recipe=name).with_overrides(RECIPES[name])

    def with_overrides(self, overrides: Mapping[str, Any]) -> "UnlearnConfig":
        """A copy with settings replaced, named by dotted key (``"ascent.stop.every_steps"``) or by nested mapping.

        Raises:
            ConfigError: a key is unknown (the nearest valid one is named) or a value is out of range.
        """
        flat = dict(flatten(overrides))
        if flat.get("recipe", self.recipe) != self.recipe:
            raise ConfigError(
                f"recipe cannot be overridden (now {self.recipe!r}, wanted {flat['recipe']!r}); expected UnlearnConfig.from_recipe(name), "
                "which sets everything that the recipe stands for, and overrides after it"
            )
        valid = settings_of(type(self))
        for key in flat:
            if key not in valid:
                raise ConfigError(f"unknown setting {key!r}; {nearest(key, valid)}")
        return replace_settings(self, flat)

    def to_dict(self) -> dict[str, Any]:
        """All settings as nested plain values."""
        return dataclasses.asdict(self)

    def identity(self) -> str:
        """SHA-256 of the settings that can change a result."""
        values = dict(flatten(self.to_dict()))
        kept = {key: values[key] for key, item in settings_of(type(self)).items() if item.metadata["identity"]}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


# recipe -> what it changes; `paper` is the default of every setting (arXiv:2508.01620). The others are what did better at
# matched forgetting in tests/benchmarks/results/.
RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},
    # Whole classes: push down the true-class logit and nothing else, until the class is gone.
    "classes": {
        "intensity.scheme": "uniform",
        "ascent.objective": "row_mask",
        "ascent.l1": 0.0,
        "ascent.stop.every_steps": 1,
        "ascent.stop.forget_accuracy": 0.01,
        "ascent.step_control.max_accuracy_change": 0.1,
    },
    # Random samples: bounded ascent, steered by the curvature of the forget set as a stand-in for that of the retain set.
    "samples": {
        "intensity.scheme": "uniform",
        "ascent.objective": "bounded_ascent",
        "ascent.preconditioner": "block_ggn",
        # The preconditioner's inverse is scaled to a mean eigenvalue of 1, so that steps along the curvature are small.
        "ascent.learning_rate": 1.0,
        # The preconditioner would amplify the penalty where the forget set has no curvature.
        "ascent.l1": 0.0,
        "ascent.stop.every_steps": 1,
        "ascent.step_control.max_accuracy_change": 0.02,
    },
}
