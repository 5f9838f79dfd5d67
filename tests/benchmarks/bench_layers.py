"""What the scope of layers costs beside plain PyTorch on random images: iterative steps, one step, memory, two workers.

    python tests/benchmarks/bench_layers.py [--repeat 5] [--only loops one_step memory workers] [--out FILE]

One thread to a process, float32. The sides of a comparison take turns in each of ``--repeat`` rounds. Seconds are CPU time of the
process, because a shared machine gives each side as much of it as it likes; medians, and medians of the ratios within a round.

- ``loops``: rows per second of the iterative update (``LayersScope.batch_gradient`` and ``Optimiser``), as a share of a plain loop's: the
  whole model in eval mode forward, weighted cross-entropy, backward to the same layers, SGD; and of a plain loop that begins at the cut.
- ``one_step``: the stages of ``imu_ray.unlearn`` with K-FAC and no views, over a training epoch of the whole model on the forget set.
  Ray's tasks are plain calls in this process; with ``--ray`` the same once more on a Ray of one worker, in seconds of a clock.
- ``memory``: what the process grows by at most in the factor sums and the solve of ResNet-18's last stage and head.
- ``workers``: two processes that sum by gloo, over two plain loops that know nothing of each other, in seconds of a clock.
"""

import argparse
import contextlib
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
import torch.distributed
import torchvision
from ray.remote_function import RemoteFunction
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import imu_ray
from imu_ray import pipeline
from imu_ray.config import ForgetSetConfig, UnlearnConfig
from imu_ray.distributed import metrics, tasks
from imu_ray.influence.curvature.kronecker import KFAC, FactorSums, factor_bytes
from imu_ray.models.choice import choose_layers
from imu_ray.pipeline import Pipeline
from imu_ray.run.record import processor
from imu_ray.scopes.features import FeatureShard, FeatureStore
from imu_ray.scopes.layers import Layers, LayersScope
from imu_ray.scopes.workers import Workers
from imu_ray.tasks.classification import ClassificationTask
from imu_ray.updates.objectives import OBJECTIVES
from imu_ray.updates.optimiser import Optimiser
from tests.benchmarks.nets import SmallResNet, SmallViT

CLASSES, BATCH, RATE, MOMENTUM = 10, 256, 1e-4, 0.9
Scope = str | list[str]


@dataclass(frozen=True)
class Case:
    """A model on images of a size, and the layers that move."""

    make: Callable[[], nn.Module]
    size: int
    scope: Scope
    head: str = "fc"
    rows: int = 1024

    def part(self, config: UnlearnConfig) -> Layers:
        """The layers of a new model, the same ones at every call."""
        torch.manual_seed(0)
        model, example = self.make().eval(), torch.randn(8, 3, self.size, self.size)
        names = choose_layers(model, example, self.scope, self.head)
        return Layers.of_names(model, ClassificationTask(ForgetSetConfig(), self.head, CLASSES), names, example, config)


def resnet18() -> nn.Module:
    return torchvision.models.resnet18(weights=None, num_classes=CLASSES)


STAGE: Scope = ["layer4", "fc"]
CASES = {
    "resnet, last:3": Case(SmallResNet, 32, "last:3"),
    "resnet, all": Case(SmallResNet, 32, "all", rows=512),
    "vit, last:3": Case(SmallViT, 32, "last:3", "head"),
    "vit, all": Case(SmallViT, 32, "all", "head", rows=512),
    "resnet18 at 32, layer4 + fc": Case(resnet18, 32, STAGE),
    "resnet18 at 64, layer4 + fc": Case(resnet18, 64, STAGE, rows=512),
}


class Images(torch.utils.data.Dataset):
    """Noise over one coarse pattern for each class, which a model learns in a few epochs."""

    def __init__(self, rows: int, size: int, seed: int) -> None:
        noise, pattern = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(9)
        self.labels = torch.randint(0, CLASSES, (rows,), generator=noise)
        patterns = nn.functional.interpolate(torch.randn(CLASSES, 3, 4, 4, generator=pattern), size=size)
        self.inputs = torch.randn(rows, 3, size, size, generator=noise) + patterns[self.labels]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        return self.inputs[row].numpy(), int(self.labels[row])


def store_of(part: Layers, images: Images) -> FeatureStore:
    """What crosses the cut, in shards of one block."""
    shards = []
    for start in range(0, len(images), BATCH):
        rows = slice(start, min(start + BATCH, len(images)))
        ids = pa.array([str(row) for row in range(rows.start, rows.stop)])
        values = part.cut.join(part.cut.prefix(images.inputs[rows])).numpy()
        shards.append(FeatureShard(values, images.labels[rows].numpy(), ids, (len(ids),)))
    return FeatureStore(shards)


class Plain:
    """A plain loop over the whole model, or from the cut on: weighted cross-entropy, backward to the layers, SGD."""

    def __init__(self, part: Layers, images: Images, weights: Tensor, kept: FeatureStore | None) -> None:
        self.part, self.labels, self.weights = part, images.labels, weights
        self.inputs = (
            images.inputs if kept is None else torch.cat([torch.from_numpy(s.features_nF) for s in kept.shards])
        )
        self.from_cut = kept is not None
        part.cut.model.requires_grad_(False)
        layers = [part.cut.model.get_submodule(name) for name in part.parameters]
        moved = [tensor.requires_grad_() for layer in layers for tensor in layer.parameters(recurse=False)]
        self.optimiser = torch.optim.SGD(moved, RATE, MOMENTUM, weight_decay=5e-4)

    def step(self, batch: np.ndarray) -> None:
        rows = torch.from_numpy(batch)
        inputs, cut = self.inputs[rows], self.part.cut
        outputs = cut.suffix(cut.split(inputs)) if self.from_cut else cut.model(inputs)
        losses = nn.functional.cross_entropy(outputs, self.labels[rows], reduction="none")
        self.optimiser.zero_grad()
        (-(losses * self.weights[rows]).sum() / self.weights[rows].sum()).backward()
        self.optimiser.step()


class Ours:
    """The iterative update's step."""

    def __init__(self, case: Case, part: Layers, weights: Tensor, kept: FeatureStore, workers: Workers) -> None:
        settings = {
            "ascent.scope": case.scope,
            "ascent.learning_rate": RATE,
            "ascent.momentum": MOMENTUM,
            "ascent.l1": 0.0,
        }
        self.config = UnlearnConfig.from_recipe("paper").with_overrides(settings).ascent
        self.scope, self.weights = LayersScope(part, {"forget": kept}, workers), weights.double().numpy()
        self.optimiser = Optimiser(self.scope.parameters(), self.config, {})

    def step(self, batch: np.ndarray) -> None:
        objective, pieces = OBJECTIVES["ascent"], self.config.piece_rows
        gradient = self.scope.batch_gradient(self.optimiser.parameters, batch, self.weights, objective, pieces)
        self.optimiser.step(gradient, RATE)


def batches(rows: int) -> list[np.ndarray]:
    return [np.sort(part) for part in np.split(np.random.default_rng(0).permutation(rows), range(BATCH, rows, BATCH))]


def seconds(work: Callable[[], Any], clock: Callable[[], float] = time.process_time) -> float:
    started = clock()
    work()
    return clock() - started


def medians(rounds: list[dict[str, float]], *bases: str) -> dict[str, float]:
    """Median seconds by name, and medians of the speed of ours as a multiple of each base's within a round."""
    names = rounds[0]
    found = {f"{name}_s": round(statistics.median(each[name] for each in rounds), 3) for name in names}
    for name in names.keys() - set(bases):
        for base in bases:
            ratio = statistics.median(each[base] / each[name] for each in rounds)
            found[f"{name}_over_{base}"] = round(ratio, 3)
    return dict(sorted(found.items()))


def loops(repeat: int) -> dict[str, Any]:
    """Each step over the same batches: the plain loop, the plain loop from the cut, and ours."""
    found = {}
    for name, case in CASES.items():
        sides, parts = sides_of(case, Workers()), batches(case.rows)
        rounds = [{key: seconds(steps_of(side, parts)) for key, side in sides.items()} for _ in range(repeat + 1)]
        found[name] = {"rows": case.rows, **medians(rounds[1:], "plain", "plain_from_cut")}  # the first one warms up
        print(name, found[name], flush=True)
    return found


def steps_of(side: Any, parts: list[np.ndarray]) -> Callable[[], None]:
    def steps() -> None:
        for batch in parts:
            side.step(batch)

    return steps


def sides_of(case: Case, workers: Workers) -> dict[str, Any]:
    """Every way, each with a model of its own."""
    images, config = Images(case.rows, case.size, 1), UnlearnConfig.from_recipe("paper")
    weights = torch.rand(case.rows, generator=torch.Generator().manual_seed(2))
    parts = [case.part(config) for _ in range(3)]
    kept = store_of(parts[0], images)
    return {
        "plain": Plain(parts[1], images, weights, None),
        "plain_from_cut": Plain(parts[2], images, weights, kept),
        "ours": Ours(case, parts[0], weights, kept, workers),
    }


class Ref:
    """A result, where Ray would have a reference to it."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Call:
    """A remote function that is called here."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        self.function, self.returns = function, options.get("num_returns", 1)

    def remote(self, *arguments: Any) -> Any:
        made = self.function(*(each.value if isinstance(each, Ref) else each for each in arguments))
        return Ref(made) if self.returns == 1 else [Ref(part) for part in made]


@contextlib.contextmanager
def tasks_here() -> Iterator[None]:
    """Ray's tasks as plain calls in this process, so that its CPU time and memory are those of all tasks."""
    with contextlib.ExitStack() as stack:

        def put(owner: Any, name: str, value: Any) -> None:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        put(ray, "put", Ref)
        put(ray, "get", lambda found: [each.value for each in found] if isinstance(found, list) else found.value)
        put(ray, "wait", lambda pending, **_: (pending[:1], pending[1:]))
        put(ray, "cluster_resources", lambda: {"CPU": 1.0, "object_store_memory": 2.0**33})
        put(RemoteFunction, "options", lambda self, **options: Call(self._function, options))
        put(tasks.StageRef, "begin", tasks.StageRef.work)
        put(pipeline, "ray_session", contextlib.nullcontext)
        for name in ("gauge", "count", "flush"):
            put(metrics, name, lambda *_, **__: None)
        yield


@contextlib.contextmanager
def stage_seconds() -> Iterator[dict[str, float]]:
    """CPU seconds of this process in each stage of the runs inside."""
    found: dict[str, float] = {}
    before = Pipeline.stage

    @contextlib.contextmanager
    def stage(self: Pipeline, name: str) -> Iterator[None]:
        started = time.process_time()
        with before(self, name):
            yield
        found[name] = time.process_time() - started

    Pipeline.stage = stage  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Pipeline.stage = before  # type: ignore[method-assign]


ONE_STEP = {
    "resnet, last:3": (CASES["resnet, last:3"], 4000),
    "vit, last:3": (CASES["vit, last:3"], 2000),
    "resnet18 at 32, layer4 + fc": (CASES["resnet18 at 32, layer4 + fc"], 2000),
    "resnet18 at 64, layer4 + fc": (CASES["resnet18 at 64, layer4 + fc"], 2000),
}


def train(model: nn.Module, images: Images, optimiser: torch.optim.Optimizer) -> None:
    """An epoch of plain training."""
    model.train()
    for batch in batches(len(images)):
        rows = torch.from_numpy(batch)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images.inputs[rows]), images.labels[rows]).backward()
        optimiser.step()


def one_step(repeat: int, on_ray: bool) -> dict[str, Any]:
    """Stages of a run that brings the accuracy on the forget set to 80 %, over a training epoch in the same round."""
    found = {}
    for name, (case, rows) in ONE_STEP.items():
        found[name] = one_step_of(case, rows, repeat, on_ray)
        print(name, found[name], flush=True)
    return found


def one_step_of(case: Case, rows: int, repeat: int, on_ray: bool) -> dict[str, Any]:
    images, test = Images(rows, case.size, 1), Images(500, case.size, 2)
    torch.manual_seed(0)
    model = case.make()
    optimiser = torch.optim.SGD(model.parameters(), 0.02, MOMENTUM)
    for _ in range(3):
        train(model, images, optimiser)
    model.eval()
    settings = {
        "ascent.scope": case.scope,
        "ascent.stop.targets": {"forget.accuracy": 0.8},
        "audit.report": False,
        "resources.workers": 1,
    }
    config = UnlearnConfig.from_recipe("samples").with_overrides(settings)

    def run() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            made = imu_ray.unlearn(model, images, evaluation={"test": test}, config=config, run_dir=f"{folder}/run")
        return made.manifest

    def epoch() -> None:  # of a copy, so that every round forgets the same model
        copied = case.make()
        copied.load_state_dict(model.state_dict())
        train(copied, images, torch.optim.SGD(copied.parameters(), 1e-3, MOMENTUM))

    rounds = []
    for _ in range(repeat):
        with tasks_here(), stage_seconds() as stages:
            manifest = run()
        rounds.append({"epoch": seconds(epoch), **stages})
    found = {
        "rows": rows,
        "layers": manifest["model"]["layers"],
        "status": manifest["ascent"]["status"],
        "epoch_s": round(statistics.median(each["epoch"] for each in rounds), 2),
        "epochs": {
            stage: round(statistics.median(each[stage] / each["epoch"] for each in rounds), 3) for stage in stages
        },
        "epochs_in_all": round(statistics.median(sum(each.values()) / each["epoch"] - 1 for each in rounds), 2),
    }
    if on_ray:
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
        run()  # starts the worker
        clocks = [(seconds(epoch, time.perf_counter), run()["seconds"]) for _ in range(repeat)]
        ray.shutdown()
        found["epochs_in_all_on_ray"] = round(statistics.median(sum(each.values()) / base for base, each in clocks), 2)
    return found


def grown(results: Any, size: int, rows: int, what: str) -> None:
    """By how many MB a process grows at most, and its CPU seconds: factor sums of a stage, or the solve of its largest layer."""
    torch.set_num_threads(1)
    part = Case(resnet18, size, STAGE).part(UnlearnConfig.from_recipe("samples"))
    (shard,) = [joined(store_of(part, Images(rows, size, 1)))]
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    started, before = time.process_time(), peak_mb()
    if what == "sums":
        part.statistics(shard, dict.fromkeys(part.parameters, FactorSums.of))
    else:
        outputs, width = max((matrix.shape for matrix in part.parameters.values()), key=lambda shape: shape[1])
        sums = FactorSums(rows, rows, torch.eye(outputs).double(), torch.rand(width, width).double())
        sums.inputs_DD.copy_(sums.inputs_DD @ sums.inputs_DD.T)
        KFAC().solve(sums, 0.01).apply_inverse(torch.rand(outputs, width).double())
    results.put((peak_mb() - before, time.process_time() - started))


def peak_mb() -> float:
    return int(next(line for line in Path("/proc/self/status").open() if line.startswith("VmHWM")).split()[1]) / 1024


def joined(store: FeatureStore) -> FeatureShard:
    """All shards as one of several blocks."""
    features, labels = (
        np.concatenate([getattr(each, key) for each in store.shards]) for key in ("features_nF", "labels_n")
    )
    ids = pa.concat_arrays([each.ids for each in store.shards])
    return FeatureShard(features, labels, ids, tuple(len(each.labels_n) for each in store.shards))


def memory(repeat: int) -> dict[str, Any]:
    """Peaks above what model and features take; each in a process of its own."""
    found = {}
    for what in ("sums", "solve"):
        results = multiprocessing.get_context("spawn").Queue()
        process = multiprocessing.get_context("spawn").Process(target=grown, args=(results, 64, 1024, what))
        process.start()
        grew, took = results.get()
        process.join()
        found[what] = {"peak_mb": round(grew), "cpu_s": round(took, 1)}
    part = Case(resnet18, 64, STAGE).part(UnlearnConfig.from_recipe("samples"))
    found["factors_mb"] = round(sum(factor_bytes(*matrix.shape) for matrix in part.parameters.values()) / 2**20)
    print(found, flush=True)
    return found


WORKERS = ("resnet, last:3", "resnet, all", "resnet18 at 64, layer4 + fc")


def worker(rank: int, path: str, name: str, repeat: int, results: Any) -> None:
    """In each round: a plain loop over half of every batch, which knows nothing of the other process's; then our steps together."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    sides, whole = sides_of(CASES[name], Workers(rank, 2)), batches(CASES[name].rows)
    steps = {
        "ours": whole,
        "plain": [batch[rank::2] for batch in whole],
        "plain_from_cut": [batch[rank::2] for batch in whole],
    }
    for _ in range(repeat + 1):
        made = {}
        for key, parts in steps.items():
            torch.distributed.barrier()
            clock, cpu = time.perf_counter(), time.process_time()
            for batch in parts:
                sides[key].step(batch)
            made[key] = (time.perf_counter() - clock, time.process_time() - cpu)
        results.put(made)
    torch.distributed.destroy_process_group()


def slower(pair: list[dict[str, tuple[float, float]]], place: int) -> dict[str, float]:
    return {key: max(each[key][place] for each in pair) for key in pair[0]}


def two_workers(repeat: int) -> dict[str, Any]:
    """Seconds of the slower process of each round, of a clock and of its CPU."""
    found = {}
    for name in WORKERS:
        context = multiprocessing.get_context("spawn")
        queues = [context.Queue(), context.Queue()]
        with tempfile.TemporaryDirectory() as folder:
            arguments = [(rank, f"{folder}/group", name, repeat, queues[rank]) for rank in range(2)]
            group = [context.Process(target=worker, args=each) for each in arguments]
            for process in group:
                process.start()
            pairs = [[queue.get() for queue in queues] for _ in range(repeat + 1)][1:]
            for process in group:
                process.join()
        found[name] = {
            kind: medians([slower(pair, place) for pair in pairs], "plain", "plain_from_cut")
            for place, kind in enumerate(("clock", "cpu"))
        }
        print(name, found[name], flush=True)
    return found


def main() -> None:
    """Measure and record."""
    parts = {"loops": loops, "one_step": one_step, "memory": memory, "workers": two_workers}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--ray", action="store_true")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_name("results") / f"layers-{time.strftime('%Y-%m-%d')}.json"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    made = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in options.only:
        made |= {"processor": processor(), "torch": torch.__version__, "repeat": options.repeat, "batch": BATCH}
        made[name] = parts[name](options.repeat, options.ray) if name == "one_step" else parts[name](options.repeat)
        options.out.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
