"""Which settings and recipe a run follows, which targets it aims at, and what a user must be told of them."""

import logging
import math
from collections.abc import Collection, Mapping
from typing import Any

from imu_ray.config import UnlearnConfig
from imu_ray.data.columns import LABEL
from imu_ray.errors import ConfigError, nearest
from imu_ray.events import event
from imu_ray.influence.curvature import CURVATURES, LAYER_CURVATURES, PRECONDITIONERS
from imu_ray.influence.intensity import SCHEMES
from imu_ray.models.choice import check_scope
from imu_ray.run.record import SamplesRecord
from imu_ray.scopes.base import FORGET_VIEWS
from imu_ray.tasks import TASKS
from imu_ray.tasks.base import Metric, Task
from imu_ray.tasks.transforms import find_transform
from imu_ray.updates import UPDATES
from imu_ray.updates.objectives import OBJECTIVES, OF_CLASSES
from imu_ray.updates.stopping import WHOLE_CLASS_ACCURACY, StopTarget, Unseen, stop_targets

AUTOMATIC = "bounded_loss"  # moves with every sample, however few there are, and no single one can carry it
HEAD, LAST = "head", "last:1"  # scopes that ``auto`` stands for with a classifier
CHANCE = 1e-3
NEAR_CHANCE_ROWS = 20  # fewest rows of which a mean near chance says something


def resolve_settings(recipe: str | None, config: UnlearnConfig | None, task: str) -> UnlearnConfig:
    """The settings that ``recipe`` or ``config`` mean for a task, with every registered name checked."""
    if not isinstance(task, str) or task not in TASKS:
        raise ConfigError(f"task is {task!r}; {nearest(str(task), TASKS)}")
    if recipe is not None and config is not None:
        raise ConfigError(
            f"recipe={recipe!r} and config were both given; expected one of them; combine them with "
            "UnlearnConfig.from_recipe(name).with_overrides({...})"
        )
    if config is not None and not isinstance(config, UnlearnConfig):
        raise ConfigError(
            f"config is a {type(config).__name__}; expected an UnlearnConfig: UnlearnConfig().with_overrides({{...}})"
        )
    settings = config or UnlearnConfig.from_recipe(recipe or "auto")
    if settings.ascent.scope == "auto" and TASKS[task].scope != HEAD:  # what that means is told from the model
        settings = settings.with_overrides({"ascent.scope": TASKS[task].scope})
    for key, name, registry in (
        ("influence.curvature", settings.influence.curvature, CURVATURES),
        ("intensity.scheme", settings.intensity.scheme, SCHEMES),
        ("ascent.update", settings.ascent.update, UPDATES),
        ("ascent.objective", settings.ascent.objective, OBJECTIVES),
        ("ascent.preconditioner", settings.ascent.curvature, {"none": None, **PRECONDITIONERS, **LAYER_CURVATURES}),
    ):
        if name not in registry:
            raise ConfigError(f"{key} is {name!r}; {nearest(name, registry)}")
    if settings.ascent.scope != "auto":
        check_scope(settings.ascent.scope)
    if settings.ascent.views or settings.audit.views:
        find_transform(settings.ascent.view_transform)
    _check_task(settings, TASKS[task], task)
    _check_layers(settings)
    return settings


def settle_scope(settings: UnlearnConfig, task: Task) -> UnlearnConfig:
    """With the scope that ``auto`` means for a model: its head, or its last layer where there is no linear head.

    Raises:
        ConfigError: other settings mean nothing for that scope.
    """
    if settings.ascent.scope != "auto":
        return settings
    found = settings.with_overrides({"ascent.scope": HEAD if task.head else LAST})
    _check_layers(found)
    return found


def _check_task(settings: UnlearnConfig, kind: type[Task], task: str) -> None:
    """Refuse settings that mean nothing for the task."""
    ascent, influence = settings.ascent, settings.influence
    if not ascent.deep and kind.scope != HEAD:
        raise ConfigError(
            f"ascent.scope is 'head' with task {task!r}; expected all, last:N or a list of module patterns"
        )
    if settings.recipe == "classes" and LABEL not in kind.fields(settings.forget_set):
        raise ConfigError(f"recipe is 'classes' with task {task!r}, whose samples are of no class; expected samples")
    if influence.reference == "batch" and (influence.refresh, influence.curvature_set) != ("once", "forget"):
        raise ConfigError(
            f"influence.refresh is {influence.refresh!r} and influence.curvature_set {influence.curvature_set!r} with "
            "influence.reference 'batch'; expected once and forget"
        )
    _check_target(settings, kind, task)
    if influence.unit == "token" and LABEL in kind.fields(settings.forget_set):
        raise ConfigError(f"influence.unit is 'token' with task {task!r}, whose samples have none; expected sample")
    asked = (influence.refresh, influence.unit, influence.reference)
    if influence.scores is not None and asked != ("once", "sample", "forget_set"):
        raise ConfigError(
            f"influence.refresh, unit and reference are {', '.join(asked)} with influence.scores, which is scored "
            "already, by sample; expected once, sample and forget_set"
        )
    for key, views in (("ascent.views", ascent.views), ("audit.views", settings.audit.views)):
        if views and not kind.augmented:
            raise ConfigError(f"{key} is {views} with task {task!r}, which has none; expected 0")


def _check_target(settings: UnlearnConfig, kind: type[Task], task: str) -> None:
    """Refuse settings that mean nothing for what a label is."""
    rows, ascent = settings.forget_set, settings.ascent
    if rows.target == "class" and rows.class_weights is None:
        return
    if LABEL not in kind.fields(rows):
        named = f"target is {rows.target!r}" if rows.target != "class" else "class_weights are set"
        raise ConfigError(
            f"forget_set.{named} with task {task!r}, whose samples are of no class; expected class, and no weights"
        )
    if rows.target == "class":
        return
    for holds, what, expected in (
        (bool(kind.retrieval_sets), f"task is {task!r}", "classification; a person is one class"),
        (settings.recipe == "classes", "recipe is 'classes'", "samples: the rows are of no one class"),
        (
            ascent.objective in OF_CLASSES,
            f"ascent.objective is {ascent.objective!r}",
            f"one of {', '.join(sorted(set(OBJECTIVES) - OF_CLASSES))}: a row has no one true class",
        ),
        (isinstance(rows.size, tuple), "forget_set.size names classes", "a number of rows, a share of them, or null"),
    ):
        if holds:
            raise ConfigError(f"{what} with forget_set.target {rows.target!r}; expected {expected}")


def require_classes(settings: UnlearnConfig, what: str) -> None:
    """``ConfigError`` where a label is not one class, of which something is told."""
    if settings.forget_set.target != "class":
        raise ConfigError(
            f"forget_set.target is {settings.forget_set.target!r} in {what} that is told by classes; expected class; "
            "run unlearn() for each setting"
        )


def _check_layers(settings: UnlearnConfig) -> None:
    """Refuse settings that mean nothing for what may move."""
    ascent, influence, deep = settings.ascent, settings.influence, settings.ascent.deep
    kinds = ("none", "kfac") if deep else ("none", *PRECONDITIONERS)
    for holds, what, expected in (
        (ascent.curvature not in kinds, f"ascent.preconditioner is {ascent.preconditioner!r}", " or ".join(kinds)),
        (
            deep and influence.curvature == "hessian",
            "influence.curvature is 'hessian'",
            "diagonal_fisher, kfac or identity",
        ),
        (deep and influence.refresh != "once", f"influence.refresh is {influence.refresh!r}", "once"),
        (deep and influence.compile, "influence.compile is true", "false"),
        (
            deep and influence.feature_dtype != "float32",
            f"influence.feature_dtype is {influence.feature_dtype!r}",
            "float32",
        ),
    ):
        if holds:
            raise ConfigError(f"{what} with ascent.scope {ascent.scope!r}; expected {expected}")


def looks_like_whole_classes(
    label_counts: Mapping[int, int], num_classes: int, kept_labels: Collection[int] = ()
) -> bool:
    """Whether a forget set is whole classes rather than a random draw.

    False when samples of these classes are kept, as far as the evaluation sets show (``kept_labels``). True when a
    random draw of as many rows from equally frequent classes would leave out as many classes as this one does with a
    probability below 1e-3 (union bound). Equally frequent classes are an assumption.
    """
    rows, present = sum(label_counts.values()), len(label_counts)
    if present in (0, num_classes) or not label_counts.keys().isdisjoint(kept_labels):
        return False
    log_bound = math.log(math.comb(num_classes, present)) + rows * math.log(present / num_classes)
    return log_bound < math.log(CHANCE)


def choose_recipe(recipe: str, label_counts: Mapping[int, int], num_classes: int) -> tuple[str, str]:
    """The recipe that ``recipe`` stands for, and why.

    ``auto`` is ``samples`` where the labels are mixed. Where they are not, what was asked for cannot be told from the
    rows.

    Raises:
        ConfigError: ``auto`` on rows of one class, or of fewer classes than a random draw would have.
    """
    rows, present = sum(label_counts.values()), len(label_counts)
    if recipe != "auto":
        return recipe, "named in the settings"
    if not present:
        return "samples", "auto: the rows to forget are of no class"
    if present == 1 or looks_like_whole_classes(label_counts, num_classes):
        labels = ", ".join(map(str, list(label_counts)[:5])) + (", ..." if present > 5 else "")
        raise ConfigError(
            f"recipe is 'auto', and the {rows} rows to forget have only {present} of {num_classes} labels ({labels}); "
            "expected to be told what must go: recipe 'classes' when the model must no longer recognise the class, "
            "recipe 'samples' when these rows must go and others of their class are kept"
        )
    return "samples", f"auto: the {rows} rows to forget have {present} of {num_classes} labels"


def resolve_targets(
    config: UnlearnConfig,
    metrics: Mapping[str, Metric],
    label_counts: Mapping[int, int],
    num_classes: int,
    unseen: Unseen | None,
    kept_labels: Collection[int],
    rows: int | None = None,
) -> list[StopTarget]:
    """The targets that ``ascent.stop.targets`` means for this forget set; empty only under recipe ``paper``.

    ``rows`` of the forget set are told where labels do not count them.

    Raises:
        ConfigError: there is no target, and the recipe is not ``paper``.
    """
    stop, paper = config.ascent.stop, config.recipe == "paper"
    rows = sum(label_counts.values()) if rows is None else rows
    if stop.targets:
        targets = stop_targets(stop, metrics, rows, unseen)
    elif paper and looks_like_whole_classes(label_counts, num_classes, kept_labels):
        targets = stop_targets(stop.but({"forget.accuracy": WHOLE_CLASS_ACCURACY}), metrics, rows, unseen)
    elif unseen is not None:
        moved = FORGET_VIEWS if config.ascent.views else "forget"
        name = "forget.accuracy" if paper and "accuracy" in metrics else f"{moved}.{AUTOMATIC}"
        targets = stop_targets(stop.but({name: "auto"}), metrics, rows, unseen)
    else:
        targets = []
    if targets:
        return targets
    if not paper:
        raise ConfigError(
            "the rows to forget have no target, so that nothing says when they are forgotten; expected "
            "evaluation={'test': unseen samples}, which shows what such rows are like when they were never learnt, or "
            "a number in ascent.stop.targets, such as forget.accuracy: 0.8; recipe 'classes' brings its own"
        )
    event(
        "no target",
        level=logging.WARNING,
        advice=(
            "all epochs are run; give evaluation['test'] or ascent.stop.targets, because ascent without a stop ruins "
            "the model"
        ),
    )
    return []


def overlaps(evaluation: Mapping[str, SamplesRecord], retrieval_sets: Collection[str]) -> list[str]:
    """Sentences on evaluation sets that hold rows to forget; where persons are looked up they are told apart.

    Raises:
        ConfigError: all rows of ``test`` are such.
    """
    test = evaluation.get("test")
    if test is not None and test.in_forget_set == test.rows_used:
        raise ConfigError(
            "every row of evaluation['test'] has the input of a row to forget; expected samples that the model has "
            "never seen; give those, or leave it out"
        )
    return [
        f"{known.in_forget_set} of {known.rows_used} rows of evaluation[{name!r}] have the input of a row to forget: "
        + (
            "they are not unseen, as targets and attacks take them to be"
            if name == "test"
            else "its figures mix forgotten rows with others"
        )
        + "; leave them out."
        for name, known in evaluation.items()
        if known.in_forget_set and name not in retrieval_sets
    ]


def warnings_of(
    recipe: str,
    label_counts: Mapping[int, int],
    num_classes: int,
    metrics: Mapping[str, Metric],
    original: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """Sentences for the headline: what contradicts the recipe, and sets on which the original model is near chance.

    Args:
        recipe: that is followed.
        label_counts: rows of the forget set per label.
        num_classes: classes of the model.
        metrics: of the task.
        original: figures of the original model by sample set.
    """
    found = []
    if recipe == "classes" and not looks_like_whole_classes(label_counts, num_classes) and len(label_counts) > 1:
        found.append(
            f"Recipe 'classes' on rows with {len(label_counts)} of {num_classes} labels, which look like a random "
            "draw; recipe 'samples' is made for those."
        )
    for name in ("test", "forget"):
        figures = original.get(name)
        if figures is None or figures["samples"] < NEAR_CHANCE_ROWS:
            continue
        for metric, kind in metrics.items():
            if kind.counted and kind.chance is not None and figures[metric] < kind.chance + 0.15 * (1 - kind.chance):
                found.append(
                    f"The original model's {metric} on {name} is {100 * figures[metric]:.1f} %, near chance "
                    f"({100 * kind.chance:.1f} %): check the checkpoint, the labels and the preprocessing "
                    "(forget_set.mean, std, image_mode, image_size) before you rely on this run."
                )
    return found
