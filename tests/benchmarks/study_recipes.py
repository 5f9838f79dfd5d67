"""What a request costs under each recipe: three CIFAR-10 nets x 1, 10, 100 rows and 1, 10, 50 % random rows, head only.

    python tests/benchmarks/study_recipes.py --data DIR --models DIR --cache DIR

``--models`` holds NAME.safetensors for the nets of ``nets.py``, as ``train_cifar.py --net NAME --name NAME`` writes them. The updates of
the library run on cached features in this process. ``evaluation["test"]``, which gives target and curvature, is the first half of the
test split; cost is read off the second half and off 10,000 training rows that are kept. Writes JSON and a table to ``results/``.
"""

import argparse
import functools
import json
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from imu_ray.audits.accuracy import set_figures
from imu_ray.audits.base import predict_shard
from imu_ray.config import ForgetSetConfig, UnlearnConfig
from imu_ray.influence.curvature import PRECONDITIONERS
from imu_ray.influence.direction import fit_directions
from imu_ray.influence.intensity import SCHEMES
from imu_ray.recipes import resolve_targets
from imu_ray.run.record import processor
from imu_ray.scopes.features import FeatureShard, FeatureStore
from imu_ray.scopes.head import Head, HeadScope, shard_statistics
from imu_ray.scopes.workers import Workers
from imu_ray.tasks.classification import ClassificationTask
from imu_ray.updates import UPDATES
from imu_ray.updates.base import UpdateProblem
from imu_ray.updates.stopping import Unseen
from tests.benchmarks.nets import NETS
from tests.benchmarks.train_cifar import load_split, normalise

BOUNDED = {"ascent.stop.targets": {"forget.bounded_loss": "auto"}, "ascent.stop.every_steps": 1}
METHODS = {
    "samples": UnlearnConfig.from_recipe("samples"),
    "samples, forget set's curvature alone": UnlearnConfig().with_overrides({"ascent.preconditioner_sets": ["forget"]}),
    "paper": UnlearnConfig.from_recipe("paper").with_overrides(BOUNDED),
    "uniform ascent": UnlearnConfig.from_recipe("paper").with_overrides({**BOUNDED, "intensity.scheme": "uniform"}),
    # Its trust region only shrank; here it grows as well, so that it goes farther than it did.
    "former samples": UnlearnConfig.from_recipe("paper").with_overrides(
        {
            "intensity.scheme": "uniform", "ascent.objective": "bounded_ascent", "ascent.preconditioner": "block_ggn",
            "ascent.preconditioner_sets": ["forget"], "ascent.learning_rate": 1.0, "ascent.l1": 0.0, "ascent.stop.every_steps": 1,
            "ascent.max_change": {"forget.accuracy": 0.02}, "ascent.stop.targets": {"forget.accuracy": "auto"},
        }
    ),
}  # fmt: skip


def features_of(net: str, options: argparse.Namespace) -> dict[str, np.ndarray]:
    """Head inputs and labels of both splits, computed once, and the head."""
    path = options.cache / f"{net}.npz"
    if not path.exists():
        model = NETS[net].make(10)
        model.load_state_dict(load_file(options.models / f"{net}.safetensors"))
        model.eval()
        head = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
        made = {"head": torch.cat([head.weight, head.bias.unsqueeze(1)], dim=1).detach().double().numpy()}
        for split in ("train", "test"):
            images, labels = (part[: NETS[net].rows] for part in load_split(options.data, split))
            caught: list[torch.Tensor] = []
            hook = head.register_forward_pre_hook(lambda _module, inputs, caught=caught: caught.append(inputs[0]))
            with torch.inference_mode():
                for part in images.split(250):
                    model(normalise(part))
            hook.remove()
            made |= {split: torch.cat(caught).numpy(), f"{split}_labels": labels.numpy()}
        options.cache.mkdir(parents=True, exist_ok=True)
        np.savez(path, **made)
    return dict(np.load(path))


def shard(features: np.ndarray, labels: np.ndarray) -> FeatureShard:
    sizes = tuple(min(256, len(labels) - start) for start in range(0, len(labels), 256))
    return FeatureShard(features, labels, pa.nulls(len(labels), pa.string()), sizes)


def run(
    config: UnlearnConfig, head: Head, sets: dict[str, FeatureShard]
) -> tuple[str, dict[str, float], dict[str, float], float]:
    """Status, figures before and after, and seconds of one run: what the pipeline does, without Ray."""
    started = time.perf_counter()
    forget, settings = sets["forget"], config.ascent
    original = {name: set_figures(predict_shard(sets[name], head)) for name in ("forget", "test")}
    counts = {int(label): part["samples"] for label, part in original["forget"]["per_class"].items()}
    targets = resolve_targets(config, head.task.metrics, counts, 10, Unseen(original["test"], counts), ())
    reduce = functools.partial(shard_statistics, forget, head)
    by_layer = lambda statistics: {head.name: reduce(statistics)}
    directions, _ = fit_directions(config.influence, [head.name], by_layer, None, lambda level: 0.0)
    table = head.scores(forget, directions)
    weights = SCHEMES[config.intensity.scheme](
        table["influence"].to_numpy(), table["loss"].to_numpy(), config.intensity, 0
    )
    pooled = [sets[name] for name in settings.preconditioner_sets]
    preconditioners = {}
    if settings.curvature != "none":
        merged = lambda statistics: functools.reduce(
            lambda a, b: a.merge(b), (shard_statistics(part, head, statistics) for part in pooled)
        )
        preconditioners = {"fc": PRECONDITIONERS[settings.curvature].fit(merged, settings.preconditioner_damping)}
    scope = HeadScope(head, {"forget": FeatureStore([forget])}, Workers())
    outcome = UPDATES[settings.update](scope, UpdateProblem(weights, settings, 0, targets, preconditioners))
    seconds = time.perf_counter() - started
    whole = HeadScope(head, {name: FeatureStore([part]) for name, part in sets.items()}, Workers())
    return outcome.status, whole.measure(whole.parameters()), whole.measure(outcome.parameters), seconds


def study(net: str, options: argparse.Namespace) -> list[dict]:
    made = features_of(net, options)
    train, train_labels, test, test_labels = (made[key] for key in ("train", "train_labels", "test", "test_labels"))
    half, rows = len(test) // 2, []
    head = Head("fc", torch.from_numpy(made["head"]), True, ClassificationTask(ForgetSetConfig(), "fc", 10))
    unseen, held_out = shard(test[:half], test_labels[:half]), shard(test[half:], test_labels[half:])
    for size, draws in ((1, 10), (10, 5), (100, 3), (0.01, 3), (0.1, 2), (0.5, 1)):
        count = size if isinstance(size, int) else round(size * len(train))
        for draw in range(draws):
            order = np.random.default_rng((draw, count)).permutation(len(train))
            forget, kept = np.sort(order[:count]), np.sort(order[count : count + 10_000])
            sets = {"forget": shard(train[forget], train_labels[forget]), "test": unseen, "held out": held_out}
            sets["retain"] = shard(train[kept], train_labels[kept])
            for name, config in METHODS.items():
                status, before, after, seconds = run(config, head, sets)
                changes = {
                    f"{key}_change": 100 * (after[f"{key}.accuracy"] - before[f"{key}.accuracy"])
                    for key in ("retain", "held out")
                }
                figures = {f"forget_{key}": after[f"forget.{key}"] for key in ("accuracy", "bounded_loss")}
                rows.append({"net": net, "rows": count, "share": size, "draw": draw, "method": name, "status": status, **figures,
                             **changes, "seconds": seconds})  # fmt: skip
                print(rows[-1], flush=True)
    return rows


def table_of(rows: list[dict]) -> str:
    """Mean change of held-out test accuracy and of retain accuracy in points, over the draws that were not met already; share reached."""
    lines = []
    for net in dict.fromkeys(row["net"] for row in rows):
        sizes = list(dict.fromkeys(row["rows"] for row in rows if row["net"] == net))
        lines += [
            f"\n**{net}**\n",
            "| test / retain, points | " + " | ".join(f"{size:,}" for size in sizes) + " |",
            "|---" * (len(sizes) + 1) + "|",
        ]
        for method in METHODS:
            cells = []
            for size in sizes:
                part = [row for row in rows if (row["net"], row["rows"], row["method"]) == (net, size, method)]
                tried = [row for row in part if row["status"] != "already_met"]
                reached = sum(row["status"] == "reached" for row in tried)
                means = [
                    np.mean([row[f"{key}_change"] for row in tried]) if tried else 0.0 for key in ("held out", "retain")
                ]
                cells.append(
                    f"{means[0]:+.2f} / {means[1]:+.2f} ({reached} of {len(tried)})" if tried else "met already"
                )
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "models", "cache"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for net in options.nets for row in study(net, options)]
    stem = Path(__file__).with_name("results") / f"recipes-{time.strftime('%Y-%m-%d')}"
    stem.with_suffix(".json").write_text(json.dumps({"processor": processor(), "rows": rows}, indent=1) + "\n")
    stem.with_suffix(".md").write_text(table_of(rows))


if __name__ == "__main__":
    main()
