"""Many models of one training: originals, models retrained without the forget set, and what methods make of both."""

import functools
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from imu_ray.api import unlearn
from imu_ray.audits.margins import file_name, model_table
from imu_ray.config import EnsembleConfig, UnlearnConfig
from imu_ray.data import PartSource, Source, open_forget_set, open_other_set
from imu_ray.data.columns import image_fields
from imu_ray.distributed.model_job import make_models
from imu_ray.distributed.session import ray_session
from imu_ray.errors import CheckpointError, ConfigError, StageFailedError
from imu_ray.events import event
from imu_ray.experiments.methods_table import figures_name, margins_folder, method_rows, write_tables
from imu_ray.influence.scores import margins, sample_losses
from imu_ray.models.checkpoint import load_checkpoint
from imu_ray.models.layers import evaluation_mode, logits_of
from imu_ray.models.spec import ModelSpec, import_path
from imu_ray.recipes import require_classes
from imu_ray.run.directory import RunDirectory
from imu_ray.run.record import versions
from imu_ray.section import nest
from imu_ray.tasks.base import Batch, read_batch, reader_of
from imu_ray.tasks.classification import ClassificationTask

RECORD, ROWS = "ensemble.json", 256
BASES = {"original": "unlearned", "retrained": "control"}  # and what unlearning makes of it
TRAINED_ON = {"original": ("forget", "retain"), "retrained": ("retain",)}
TrainFn = Callable[[nn.Module, Tensor, Tensor, int], None]
Rows = tuple[Tensor, Tensor]  # decoded inputs ``[N, ...]`` and labels ``[N]``
Decoded = tuple[list[str], Tensor, Tensor]  # and ids before them


@dataclass(frozen=True)
class Ensemble:
    """What every task works with; picklable. ``(base, seed)`` tells a model.

    Attributes:
        model: the architecture.
        train_fn: trains a model in place on inputs, labels and a seed.
        methods: by name the settings of a library's run, or a callable (``call``).
        sources: ``forget``, ``retain``, ``unseen`` (which methods may look at) and ``test`` (which they do not).
        task: how rows are decoded.
        config: of the library's runs.
        location: where the models and their margins lie.
        control: whether methods are run on retrained models too.
        retain_points: retained rows whose margins are kept.
    """

    model: ModelSpec
    train_fn: TrainFn
    methods: Mapping[str, Mapping[str, Any]]
    sources: Mapping[str, Source]
    task: ClassificationTask
    config: UnlearnConfig
    location: str
    control: bool
    retain_points: int

    def __call__(self, model: tuple[str, int]) -> None:
        """Train a model, or load it where it was trained, and run every method on it that has not been run."""
        base, seed = model
        run, checkpoint = RunDirectory(self.location), f"models/{base}-{seed:05d}.safetensors"
        there = frozenset(run.storage.files())
        torch.manual_seed(seed)
        built = self.model.build()
        with run.storage.fetch(checkpoint) as path:
            if path is not None:
                load_checkpoint(built, path)
        if path is None:
            started = time.monotonic()
            built.train()
            self.train_fn(built, *self.rows(*TRAINED_ON[base]), seed)
            run.write_model(checkpoint, built.eval())
            self.measure(run, "", base, seed, built, {"seconds": time.monotonic() - started, "status": "trained"})
        elif figures_name("", base, seed) not in there:
            self.measure(run, "", base, seed, built, {"status": "trained"})
        kind, failed = BASES[base], list[str]()
        for name in self.methods_of(base):
            if figures_name(name, kind, seed) in there:
                continue
            torch.manual_seed(seed)
            started = time.monotonic()
            try:
                changed, status = self.run_method(name, built, seed)
                self.measure(run, name, kind, seed, changed, {"seconds": time.monotonic() - started, "status": status})
            except Exception as error:  # the other methods are run all the same
                failed.append(f"{name} failed: {type(error).__name__}: {error}")
        if failed:
            raise StageFailedError("; ".join(failed))

    def run_method(self, name: str, model: nn.Module, seed: int) -> tuple[nn.Module, str]:
        """The model that a method makes, and how it ended."""
        settings = dict(self.methods[name])
        if call := settings.pop("call", None):
            settings.pop("needs", None)
            changed = import_path(f"ensemble.methods.{name}.call", call)(
                model, self.rows("forget"), self.rows("retain"), self.rows("unseen"), seed, **settings
            )
            return changed.eval(), "done"
        config = method_config(self.config, settings).with_overrides({"seed": seed})
        # A run inside a task: its tasks take the CPU that this one leaves while it waits.
        with tempfile.TemporaryDirectory() as folder:
            result = unlearn(
                model,
                self.sources["forget"],
                evaluation={"test": self.sources["unseen"]},
                config=config,
                run_dir=Path(folder) / "run",
            )
        return result.model, result.status

    def methods_of(self, base: str) -> Collection[str]:
        """The methods that are run on the models of a base."""
        return self.methods if base == "original" or self.control else ()

    def lacks(self, there: Collection[str], model: tuple[str, int]) -> bool:
        """Whether any figures of a model, which are written last, are not among the files of the directory."""
        base, seed = model
        names = [figures_name("", base, seed), *(figures_name(own, BASES[base], seed) for own in self.methods_of(base))]
        return not all(name in there for name in names)

    def batches(self, name: str) -> Iterator[Batch]:
        """The samples of a set, decoded."""
        source = self.sources[name]
        task = reader_of(self.task, source)
        for start in range(0, source.num_rows, ROWS):
            yield read_batch(task, source, start, min(start + ROWS, source.num_rows))

    @functools.cached_property
    def decoded(self) -> Mapping[str, Decoded]:
        """Ids, inputs and labels of all sets, held by the process."""
        found = {}
        for name in self.sources:
            parts = list(self.batches(name))
            ids = [each for part in parts for each in part.ids]
            found[name] = ids, torch.cat([part.inputs for part in parts]), torch.cat([part.labels_B for part in parts])
        return found

    def rows(self, *names: str) -> Rows:
        """All samples of some sets, in memory of their own: what is given them may change them."""
        parts = [self.decoded[name] for name in names]
        return torch.cat([inputs for _, inputs, _ in parts]), torch.cat([labels_N for _, _, labels_N in parts])

    def points(self) -> Iterator[tuple[str, Decoded]]:
        """Where margins are kept: the forget set, some of what is retained, and unseen rows that no method looks at."""
        yield "forget", self.decoded["forget"]
        ids, inputs, labels_N = self.decoded["retain"]
        some = np.linspace(0, len(ids) - 1, min(self.retain_points, len(ids))).round().astype(np.int64)
        yield "retain", ([ids[at] for at in some], inputs[some], labels_N[some])
        yield "test", self.decoded["test"]

    def measure(
        self, run: RunDirectory, method: str, kind: str, seed: int, model: nn.Module, told: Mapping[str, Any]
    ) -> None:
        """Write margins and figures of a model."""
        ids, sets, found = list[str](), list[str](), list[Tensor]()
        figures: dict[str, Any] = {"kind": kind, "seed": seed, "method": method, **told}
        for name, (own, inputs, labels_N) in self.points():
            with evaluation_mode(model):
                logits_NC = torch.cat([logits_of(model(part.clone())) for part in torch.split(inputs, ROWS)])
            ids += own
            sets += [name] * len(own)
            found.append(margins(logits_NC, labels_N))
            figures[name] = {
                "accuracy": float((logits_NC.argmax(1) == labels_N).double().mean()),
                "loss": float(sample_losses(logits_NC, labels_N).mean()),
            }
            if not math.isfinite(figures[name]["loss"]):
                raise StageFailedError(
                    f"the {kind} model of seed {seed}{method and f' by {method}'} gives losses on {name} that are not "
                    "finite; expected a model that answers; look at the method's steps"
                )
        table = model_table(kind, seed, ids, sets, torch.cat(found).numpy())
        run.write_table(f"{margins_folder(method)}/{file_name(kind, seed)}", table)
        run.write_json(figures_name(method, kind, seed), figures)


@dataclass(frozen=True)
class EnsembleResult:
    """What an ensemble gives back.

    Attributes:
        run_dir: where models, margins and tables lie.
        table: a row for each method, with *do nothing* and *retrain*: figures by name, and why some are missing.
        failed: reason by model that failed each time.
    """

    run_dir: str
    table: list[dict[str, Any]]
    failed: dict[str, str]


def ensemble(
    model: ModelSpec,
    forget_set: Any,
    *,
    train_fn: str | TrainFn,
    evaluation: Mapping[str, Any],
    methods: Mapping[str, Mapping[str, Any]] | None = None,
    config: UnlearnConfig | None = None,
    settings: EnsembleConfig | None = None,
    run_dir: str | Path,
) -> EnsembleResult:
    """Train originals and models without the forget set, unlearn each by every method, and audit the populations.

    A model is a Ray task; what was finished before is not made again when the same call is repeated. A model that fails
    is tried again, then left out, and named in the result.

    Args:
        model: the architecture; every model is built after ``torch.manual_seed(seed)`` and trained anew.
        forget_set: as in ``unlearn``.
        train_fn: ``package.module:callable`` or a callable that trains a model in place: ``train_fn(model, inputs,
            labels, seed)`` with decoded inputs ``[N, ...]`` and labels ``[N]``.
        evaluation: ``retain``, the other training rows, and ``test``, unseen ones. Methods may look at the first half
            of ``test``; figures are of the second.
        methods: name to settings of a run (``{"recipe": "samples"}``), or to ``{"call": "package.module:callable"}``
            with arguments: ``call(model, forget, retain, unseen, seed, **arguments) -> model``, each set as inputs and
            labels; ``needs`` says what data it reads, for the table. Default: the recipe ``samples``.
        config: settings that the runs have in common.
        settings: ``ensemble.*``.
        run_dir: directory or URI of models, margins, ``ensemble.json``, ``metrics.json`` and ``table.md``.

    Raises:
        ImuError: see ``imu_ray.errors``; too few models are left for any audit.
    """
    settings, config = settings or EnsembleConfig(), config or UnlearnConfig()
    require_classes(config, "an ensemble")
    methods = methods if methods is not None else nest(settings.methods) or {"samples": {"recipe": "samples"}}
    methods = {name: nest(dict(own)) for name, own in methods.items()}
    work = _open(model, forget_set, train_fn, evaluation, methods, config, settings, str(run_dir))
    run = RunDirectory(run_dir)
    with run.locked():
        _begin(run, work, train_fn, settings)
        bases = ("original", "retrained")
        models = [(base, seed) for seed in range(settings.models) for base in bases]
        with ray_session(config.resources) as resources:
            there = frozenset(run.storage.files())
            failed = make_models("models", work, [each for each in models if work.lacks(there, each)], resources)
        named = {f"{base} {seed}": reason for (base, seed), reason in failed.items()}
        for name, reason in named.items():
            event("model failed", model=name, reason=reason)
        table = method_rows(run, methods)
        write_tables(run, table, named, settings.models)
    return EnsembleResult(str(run_dir), table, named)


def method_config(config: UnlearnConfig, settings: Mapping[str, Any]) -> UnlearnConfig:
    """The settings of a library's run: a recipe, what all runs have in common, and what a method sets."""
    own = dict(settings)
    own.pop("needs", None)
    base = UnlearnConfig.from_recipe(own.pop("recipe", config.recipe))
    shared = {
        "forget_set": config.forget_set.to_dict(),
        "influence": {"block_rows": config.influence.block_rows},
        "audit": {"permutations": 20, "recovery": (), "report": False},
        "resources": {"workers": 1, "ascent_workers": 1, "cpus_per_worker": config.resources.cpus_per_worker},
    }
    return base.with_overrides(shared).with_overrides(own)


def _open(
    model: ModelSpec,
    forget_set: Any,
    train_fn: str | TrainFn,
    evaluation: Mapping[str, Any],
    methods: Mapping[str, Mapping[str, Any]],
    config: UnlearnConfig,
    settings: EnsembleConfig,
    location: str,
) -> Ensemble:
    """Check all that can be checked before a model is trained."""
    if missing := {"retain", "test"} - evaluation.keys():
        raise ConfigError(f"evaluation lacks {', '.join(sorted(missing))}; expected retain and test")
    if not isinstance(model, ModelSpec):
        raise ConfigError(f"model is a {type(model).__name__}; expected a ModelSpec, from which each model is built")
    for name, own in methods.items():
        if "call" in own:
            import_path(f"ensemble.methods.{name}.call", str(own["call"]))
        else:
            method_config(config, own)
    rows = config.forget_set
    whole = {name: open_other_set(name, evaluation[name], rows, image_fields) for name in ("retain", "test")}
    whole = {"forget": open_forget_set(forget_set, rows, image_fields(rows)), **whole}
    config = config.with_overrides({"forget_set": {"ids": None, "where": None}})  # they are chosen
    half = whole["test"].num_rows // 2
    parts = {"unseen": np.arange(half), "test": np.arange(half, whole["test"].num_rows)}
    sources = {**whole, **{name: PartSource(whole["test"], rows) for name, rows in parts.items()}}
    task = ClassificationTask.for_model(model.build(), sources, config.forget_set, model.head)
    for source in whole.values():
        source.check(task.num_classes)
    train = import_path("ensemble.train_fn", train_fn) if isinstance(train_fn, str) else train_fn
    if not callable(train):
        raise ConfigError(f"ensemble.train_fn {train_fn!r} is a {type(train).__name__}; expected a callable")
    return Ensemble(model, train, methods, sources, task, config, location, settings.control, settings.retain_points)


def _begin(run: RunDirectory, work: Ensemble, train_fn: str | TrainFn, settings: EnsembleConfig) -> None:
    """Write what the models are made from, or refuse a directory that holds models made from something else."""
    defined: Any = train_fn if hasattr(train_fn, "__qualname__") else type(train_fn)
    made_from = {
        "model": work.model.describe(),
        "train_fn": train_fn if isinstance(train_fn, str) else f"{defined.__module__}:{defined.__qualname__}",
        "rows": {name: [source.num_rows, _digest(work.batches(name))] for name, source in work.sources.items()},
        "retain_points": work.retain_points,
        "config": work.config.identity(),
    }
    found, began = run.read_json(RECORD), list[dict[str, str]]()
    methods = {name: json.loads(json.dumps(own)) for name, own in work.methods.items()}
    if found is not None:
        known = found["methods"]
        same = all(known[name] == own for name, own in methods.items() if name in known)
        if found["made_from"] != made_from or not same:
            raise CheckpointError(
                f"run_dir {run.location} holds an ensemble of another model, training, samples or settings; expected "
                "the same, or a new directory"
            )
        methods = known | methods
        began = found["versions"]
    elif run.storage.entries():
        raise CheckpointError(f"run_dir {run.location} holds other files; expected an empty or new directory")
    current = versions()
    used = began if current in began else [*began, current]
    run.write_json(RECORD, {"made_from": made_from, "methods": methods, "models": settings.models, "versions": used})


def _digest(batches: Iterable[Batch]) -> str:
    seen = hashlib.sha256()
    for batch in batches:
        seen.update(batch.inputs.numpy().tobytes() + batch.labels_B.numpy().tobytes())
    return seen.hexdigest()
