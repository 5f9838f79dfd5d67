"""Utility at matched forgetting: objective x preconditioner x intensity on CIFAR-10, from cached features.

    python tests/benchmarks/study_cifar.py --data DIR --models DIR --cache DIR [--seeds 3] [--quick]

``--models`` holds what ``train_cifar.py`` wrote: ``original`` and ``retrain-class0``, ``retrain-random1``, ``retrain-random10``.
Every run keeps the head of every step; the head at a given forget accuracy is read off the path between the two steps that
bracket it, and retain and test accuracy are measured there, on all rows. Writes JSON, a table (Markdown) and the plot of the
frontiers to ``results/``.
"""

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import platform
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from imu_ray.audits.accuracy import predict_shard
from imu_ray.audits.membership import LossDraw, membership_inference
from imu_ray.config import UnlearnConfig
from imu_ray.influence.curvature import PRECONDITIONERS
from imu_ray.influence.direction import fit_direction
from imu_ray.influence.intensity import SCHEMES
from imu_ray.run.record import label_counts
from imu_ray.scopes.features import FeatureShard, norms_of, score_shard, shard_statistics
from imu_ray.scopes.head import Head
from imu_ray.scopes.measure import measure
from imu_ray.updates.batches import FeatureStore
from imu_ray.updates.iterative import AscentProblem, run_ascent
from imu_ray.updates.stopping import StopTarget, stop_targets
from imu_ray.updates.workers import Workers
from tests.benchmarks.small_resnet import small_resnet
from tests.benchmarks.train_cifar import forget_rows, load_split, normalise

SETS = {"class0": ("class:0", [0.5, 0.1, 0.01]), "random1": ("random:0.01", []), "random10": ("random:0.10", [])}
OBJECTIVE_NAMES = ("ascent", "bounded_ascent", "npo", "renormalise", "row_mask", "uniform_target")
PRECONDITIONER_NAMES = ("none", "feature_second_moment", "block_ggn")
INTENSITY_NAMES = ("imu", "uniform", "permuted")
WORLD: dict = {}


def features_of(checkpoint: Path, images: torch.Tensor, cache: Path) -> tuple[np.ndarray, Head]:
    """Head inputs ``[N, 192]`` of all images under one model, computed once."""
    model = small_resnet()
    model.load_state_dict(load_file(checkpoint))
    model.eval()
    path = cache / f"{checkpoint.stem}-{len(images)}.npy"
    if not path.exists():
        caught = []
        model.fc.register_forward_pre_hook(lambda _module, inputs: caught.append(inputs[0]))
        with torch.inference_mode():
            for part in images.split(250):
                model(normalise(part))
        np.save(path, torch.cat(caught).numpy())
    return np.load(path), Head.of(model, "fc")


def shard(features: np.ndarray, labels: np.ndarray, mask: np.ndarray | None = None) -> FeatureShard:
    rows = np.arange(len(labels)) if mask is None else np.flatnonzero(mask)
    sizes = tuple(min(256, len(rows) - start) for start in range(0, len(rows), 256))
    return FeatureShard(features[rows], labels[rows], pa.array([str(row) for row in rows]), sizes)


def load_world(options: argparse.Namespace) -> None:
    """Features of the original and of each retrained model, and the sets, in a global that forked workers share."""
    (train, train_labels), (test, test_labels) = (load_split(options.data, split) for split in ("train", "test"))
    options.cache.mkdir(parents=True, exist_ok=True)
    for name in ("original", *(f"retrain-{key}" for key in SETS)):
        checkpoint = options.models / f"{name}.safetensors"
        train_features, head = features_of(checkpoint, train, options.cache)
        test_features, _ = features_of(checkpoint, test, options.cache)
        for key, (without, _) in SETS.items():
            if name not in ("original", f"retrain-{key}"):
                continue
            mask = forget_rows(train_labels, without).numpy()
            labels, unseen = train_labels.numpy(), test_labels.numpy()
            keep = unseen != 0 if key == "class0" else None
            WORLD[name, key] = {
                "head": head,
                "forget": shard(train_features, labels, mask),
                "retain": shard(train_features, labels, ~mask),
                "test": shard(test_features, unseen, keep),  # class forgetting: test without the class
                "unseen": shard(test_features, unseen),
            }


def figures(world: dict, head: Head) -> dict[str, float]:
    """Accuracies in per cent and membership inference (per cent of balanced accuracy) of one head."""
    sets = {name: FeatureStore([world[name]]) for name in ("forget", "retain", "test")}
    measured = measure(sets, head, head.matrix_CD, Workers())
    forget = predict_shard(world["forget"], head)
    members, others = LossDraw(0), LossDraw(0, np.unique(forget.labels))
    members.take(forget)
    others.take(predict_shard(world["unseen"], head))
    attack = membership_inference(members.losses, others.losses, dataclasses.replace(UnlearnConfig().audit, permutations=20), 0)
    return {**{name: 100 * measured[f"{name}_accuracy"] for name in sets}, "membership": 100 * attack["balanced_accuracy"]}


def head_at(level: float, heads: list[Head], accuracies: list[float], forget: FeatureStore) -> Head | None:
    """The first head on the path whose forget accuracy is at most ``level``, found between two steps by bisection."""
    past = next((i for i, accuracy in enumerate(accuracies) if accuracy <= level), None)
    if past is None or past == 0:
        return None
    before, after = heads[past - 1].matrix_CD, heads[past].matrix_CD
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        trial = measure({"forget": forget}, heads[0], before + middle * (after - before), Workers())["forget_accuracy"]
        low, high = (low, middle) if trial <= level else (middle, high)
    return Head(heads[0].name, before + high * (after - before), heads[0].has_bias)


def path_of(world: dict, settings: UnlearnConfig, lowest: float) -> tuple[list[Head], list[dict[str, float]]]:
    """Heads and records of every step until the forget accuracy is at ``lowest``."""
    head, forget = world["head"], FeatureStore([world["forget"]])
    reduce = lambda statistics: shard_statistics(world["forget"], head, statistics)
    direction, _ = fit_direction(settings.influence, reduce, None, lambda level: np.quantile(norms_of(world["forget"], head), level))
    table = score_shard(world["forget"], head, direction)
    influence, losses = (lambda name=name: [table[name].to_numpy()] for name in ("influence", "loss"))
    (weights,) = SCHEMES[settings.intensity.scheme](influence, losses, settings.intensity, settings.seed)()
    curvature = None
    if settings.ascent.preconditioner != "none":
        curvature = PRECONDITIONERS[settings.ascent.preconditioner].fit(reduce, settings.ascent.preconditioner_damping)
    heads = [head]
    target = StopTarget("forget_accuracy", lowest, "study", tolerance=1.0)
    problem = AscentProblem(head, weights, settings.ascent, settings.seed, [target], curvature, forget)
    outcome = run_ascent(problem, Workers(), checked=lambda _record, made: heads.append(made))
    return heads, outcome.trajectory


def study(job: tuple) -> dict:
    """One combination: figures at every level, and points of its frontier."""
    torch.set_num_threads(1)
    key, objective, preconditioner, scheme, seed, levels = job
    world = WORLD["original", key]
    # A rate that is too low to get there is raised; the path is what counts, not the speed.
    for rate in (1e-3, 1e-2, 1e-1, 1.0):
        settings = UnlearnConfig().with_overrides(
            {"seed": seed, "intensity.scheme": scheme, "ascent.objective": objective, "ascent.preconditioner": preconditioner,
             "ascent.learning_rate": rate, "ascent.stop.max_epochs": 1000, "ascent.stop.max_steps": 250, "ascent.stop.every_steps": 1,
             "ascent.l1": 5e-4 if preconditioner == "none" else 0.0,  # a preconditioner amplifies it where there is no curvature
             "ascent.keep": "all", "ascent.guard.max_forget_loss": 1e6}
        )  # fmt: skip
        started = time.time()
        heads, trajectory = path_of(world, settings, min(levels))
        seconds = time.time() - started
        if trajectory[-1]["forget_accuracy"] <= min(levels):
            break
    accuracies = [record["forget_accuracy"] for record in trajectory]
    forget = FeatureStore([world["forget"]])
    found = {}
    for level in levels:
        head = head_at(level, heads, accuracies, forget)
        found[f"{100 * level:.1f}"] = figures(world, head) if head else None
    frontier = []
    if seed == 0:
        for level in np.linspace(accuracies[0] - 0.005, min(levels), 8):
            head = head_at(float(level), heads, accuracies, forget)
            frontier += [figures(world, head)] if head else []
    return {"set": key, "objective": objective, "preconditioner": preconditioner, "intensity": scheme, "seed": seed,
            "learning_rate": rate, "steps": int(trajectory[-1]["step"]), "seconds": round(seconds, 2), "at": found,
            "frontier": frontier}  # fmt: skip


def rate_sweep(job: tuple) -> dict:
    """One whole run under a recipe with its own stop rule, at one learning rate."""
    torch.set_num_threads(1)
    key, recipe, rate = job
    world = WORLD["original", key]
    settings = UnlearnConfig.from_recipe(recipe).with_overrides(
        {"ascent.learning_rate": rate, "ascent.stop.max_epochs": 200, "ascent.stop.max_steps": 4000}
    )
    head, forget = world["head"], FeatureStore([world["forget"]])
    unseen = figures(world, head)["test"] / 100
    targets = stop_targets(settings.ascent.stop, label_counts(world["forget"].labels_n), 10, unseen)
    weights = np.ones(len(forget))
    curvature = None
    if settings.ascent.preconditioner != "none":
        reduce = lambda statistics: shard_statistics(world["forget"], head, statistics)
        curvature = PRECONDITIONERS[settings.ascent.preconditioner].fit(reduce, settings.ascent.preconditioner_damping)
    problem = AscentProblem(head, weights, settings.ascent, 0, targets, curvature, forget)
    outcome = run_ascent(problem, Workers())
    return {"set": key, "recipe": recipe, "learning_rate": rate, "status": outcome.status,
            "steps": outcome.trajectory[-1]["step"], **figures(world, outcome.head)}  # fmt: skip


def gap(found: dict[str, float], reference: dict[str, float]) -> float:
    """Mean distance from the retrained model over forget, retain, test accuracy and membership inference."""
    return float(np.mean([abs(found[name] - reference[name]) for name in ("forget", "retain", "test", "membership")]))


def summarise(runs: list[dict], references: dict[str, dict[str, float]]) -> list[dict]:
    """Mean and spread over seeds at each level."""
    rows = []
    identity = lambda run: (run["set"], run["objective"], run["preconditioner"], run["intensity"])
    for group, members in itertools.groupby(sorted(runs, key=identity), key=identity):
        members = list(members)
        for level in members[0]["at"]:
            hits = [run["at"][level] for run in members if run["at"][level]]
            if hits:
                row = dict(zip(("set", "objective", "preconditioner", "intensity"), group, strict=True))
                row |= {"level": float(level), "seeds": len(hits)}
                row |= {name: float(np.mean([hit[name] for hit in hits])) for name in hits[0]}
                row["retain_sd"] = float(np.std([hit["retain"] for hit in hits]))
                row["gap"] = float(np.mean([gap(hit, references[group[0]]) for hit in hits]))
                rows.append(row)
    return rows


def write_table(path: Path, rows: list[dict], base: dict, references: dict, rates: list[dict]) -> None:
    lines = ["# Utility at matched forgetting, CIFAR-10, head only", "", "Means over seeds; per cent. MIA: balanced accuracy of membership "
             "inference. Gap: mean distance from the retrained model over forget, retain, test and MIA.", ""]  # fmt: skip
    for key in SETS:
        mine = [row for row in rows if row["set"] == key]
        lines += [f"## {key}", "", "| | forget | retain | test | MIA |", "|---|---|---|---|---|"]
        for title, side in (("original", base[key]), ("retrained", references[key])):
            lines.append(f"| {title} | " + " | ".join(f"{side[name]:.2f}" for name in ("forget", "retain", "test", "membership")) + " |")
        for level in sorted({row["level"] for row in mine}, reverse=True):
            lines += ["", f"At forget accuracy {level:.1f} %:", "",
                      "| objective | preconditioner | intensity | seeds | retain (sd) | test | MIA | gap |", "|---|---|---|---|---|---|---|---|"]  # fmt: skip
            for row in sorted((row for row in mine if row["level"] == level), key=lambda row: -row["retain"]):
                lines.append(
                    f"| {row['objective']} | {row['preconditioner']} | {row['intensity']} | {row['seeds']} | {row['retain']:.2f} "
                    f"({row['retain_sd']:.2f}) | {row['test']:.2f} | {row['membership']:.1f} | {row['gap']:.2f} |"
                )
        lines.append("")
    lines += ["## Learning rates under the recipes with step control", "", "| set | recipe | rate | status | steps | forget | retain | test |",
              "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for run in rates:
        lines.append(
            f"| {run['set']} | {run['recipe']} | {run['learning_rate']:g} | {run['status']} | {run['steps']:.0f} | {run['forget']:.2f} | "
            f"{run['retain']:.2f} | {run['test']:.2f} |"
        )
    path.write_text("\n".join(lines) + "\n")


def draw_frontiers(path: Path, runs: list[dict], base: dict, references: dict) -> None:
    shown = {
        ("ascent", "none", "imu"): "IMU (paper)", ("ascent", "none", "uniform"): "uniform ascent",
        ("row_mask", "none", "uniform"): "row mask", ("renormalise", "none", "uniform"): "renormalise",
        ("bounded_ascent", "block_ggn", "uniform"): "bounded + block GGN", ("ascent", "block_ggn", "imu"): "IMU + block GGN",
    }  # fmt: skip
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    for axis, key in zip(figure.subplots(1, 3), SETS, strict=True):
        for run in runs:
            label = shown.get((run["objective"], run["preconditioner"], run["intensity"]))
            if label and run["set"] == key and run["frontier"]:
                points = [base[key], *run["frontier"]]
                style = {"color": f"C{list(shown.values()).index(label)}", "label": label, "marker": ".", "linewidth": 1.5}
                axis.plot([p["forget"] for p in points], [p["retain"] for p in points], **style)
        axis.plot(references[key]["forget"], references[key]["retain"], "k*", markersize=11, label="retrained")
        axis.invert_xaxis()
        axis.set(title=key, xlabel="forget accuracy in %", ylabel="retain accuracy in %")
        if key != "class0":
            axis.set_ylim(bottom=min(references[key]["retain"], base[key]["retain"]) - 7)
        else:
            axis.set_ylim(80, 93)
        axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run every combination and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="uniform weights and one seed only")
    options = parser.parse_args()
    load_world(options)
    torch.set_num_threads(1)
    base = {key: figures(WORLD["original", key], WORLD["original", key]["head"]) for key in SETS}
    references = {key: figures(WORLD[f"retrain-{key}", key], WORLD[f"retrain-{key}", key]["head"]) for key in SETS}
    jobs = []
    for key, (_, levels) in SETS.items():
        wanted = levels or [references[key]["forget"] / 100]
        schemes, seeds = (("uniform",), 1) if options.quick else (INTENSITY_NAMES, options.seeds)
        jobs += [
            (key, *combination, wanted) for combination in itertools.product(OBJECTIVE_NAMES, PRECONDITIONER_NAMES, schemes, range(seeds))
        ]
    runs = []
    with multiprocessing.get_context("fork").Pool(options.processes) as pool:
        for number, run in enumerate(pool.imap_unordered(study, jobs), 1):
            runs.append(run)
            if number % 20 == 0:
                print(f"{number} of {len(jobs)} runs", flush=True)
        rates = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0]
        sweeps = [("class0", "classes", rate) for rate in rates] + [("random10", "samples", rate) for rate in rates]
        swept = pool.map(rate_sweep, sweeps)
    results = Path(__file__).parent / "results"
    stem = f"cifar10-study-{time.strftime('%Y-%m-%d')}"
    record = {"date": time.strftime("%Y-%m-%d"), "platform": platform.platform(), "torch": torch.__version__, "original": base,
              "retrained": references, "summary": summarise(runs, references), "rates": swept}  # fmt: skip
    (results / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    write_table(results / f"{stem}.md", record["summary"], base, references, swept)
    draw_frontiers(results / f"{stem}.png", runs, base, references)


if __name__ == "__main__":
    main()
