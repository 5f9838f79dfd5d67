"""CIFAR-100: a class among its siblings (an oak among trees), or all five classes of a super-class, is forgotten, beside a retrained model.

    for set in 52 47,52,56,59,96; do
      python tests/benchmarks/train_cifar.py --data DATA --out NETS --net deep --name deep100-class_${set//,/_} --without class:$set
    done
    python tests/benchmarks/superclass.py --data DATA --nets NETS --out FILE.jsonl
    python tests/benchmarks/superclass.py --out FILE.jsonl --table

``--data`` holds CIFAR-100, ``--nets`` the original ``deep100-none`` too. Methods are the library's own updates, run in this process on the training
rows of the classes, with the same target: at most 1 % of them are recognised. A trust region keeps each step from changing that by more than a
tenth, so that no learning rate has to be found. A line of the file is one set and method: accuracy on the training rows to forget, on training
rows of all other classes, and on test rows of the forgotten classes, of their siblings (the other classes of their super-classes) and of the
remaining ones.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from imu_ray.config import UnlearnConfig
from imu_ray.scopes.features import FeatureStore
from imu_ray.scopes.workers import Workers
from imu_ray.updates import UPDATES
from imu_ray.updates.base import UpdateProblem
from imu_ray.updates.stopping import stop_targets
from tests.benchmarks.baselines import Problem
from tests.benchmarks.library_methods import imu_weights, layers_of, shard_of
from tests.benchmarks.nets import NETS
from tests.benchmarks.study_layers import accuracy_of, lines_of, load, logits_of
from tests.benchmarks.train_cifar import forget_rows, load_split

NET, CLASSES = "deep100", 100
RETAINED = 2000  # rows of the other classes
COLUMNS = ("forget", "retain", "forgotten classes", "siblings", "others")

# The steps of recipe `classes` on the head, with the weights and the objective of each method.
METHODS: dict[str, dict[str, Any]] = {
    "IMU weights, ascent": {"intensity.scheme": "imu", "ascent.objective": "ascent", "ascent.l1": 5e-4},
    "uniform weights, ascent": {"ascent.objective": "ascent"},
    "permuted IMU weights, ascent": {"intensity.scheme": "permuted", "ascent.objective": "ascent", "ascent.l1": 5e-4},
    "NPO": {"ascent.objective": "npo"},
    "recipe `classes`": {},
    "one step of `last:3`, no curvature": {
        "ascent.scope": "last:3",
        "ascent.update": "one_step",
        "ascent.objective": "bounded_ascent",
        "ascent.max_change": {},
    },
}
SEEDS = {"permuted IMU weights, ascent": (0, 1, 2)}


@dataclass(frozen=True)
class Case:
    """The rows to forget, and those that all models are measured on: images and labels by column."""

    forget: tuple[Tensor, Tensor]
    sets: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, without: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], coarse: Tensor) -> "Case":
        """``coarse``: super-class of each class, ``[100]``."""
        mask, gone = forget_rows(train[1], without), forget_rows(torch.arange(CLASSES), without)
        siblings = torch.isin(coarse, coarse[gone]) & ~gone
        kept = torch.randperm(len(mask), generator=torch.Generator().manual_seed(0))
        kept = kept[~mask[kept]][:RETAINED]
        chosen = {"forgotten classes": gone, "siblings": siblings, "others": ~gone & ~siblings}
        forget = train[0][mask], train[1][mask]
        sets = {"forget": forget, "retain": (train[0][kept], train[1][kept])}
        sets |= {name: tuple(part[which[test[1]]] for part in test) for name, which in chosen.items()}
        return cls(forget, sets)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Accuracy in each column that has rows."""
        model = model.to(memory_format=torch.channels_last)
        return {
            name: accuracy_of(logits_of(model, images), labels)
            for name, (images, labels) in self.sets.items()
            if len(labels)
        }


def unlearned(original: nn.Module, forget: tuple[Tensor, Tensor], config: UnlearnConfig) -> tuple[nn.Module, str]:
    """The changed copy of a model, and how the update ended: what ``imu_ray.unlearn`` does, without Ray."""
    problem = Problem(original, *forget, crop=0)
    part = layers_of(problem, "head" if config.ascent.scope == "auto" else config.ascent.scope)
    on = part.scope({"forget": FeatureStore([shard_of(part, *forget, "row")])}, Workers())
    weights = np.ones(on.rows) if config.intensity.scheme == "uniform" else imu_weights(on, part)
    if config.intensity.scheme == "permuted":
        weights = np.random.default_rng(config.seed).permutation(weights)
    targets = stop_targets(config.ascent.stop, part.task.metrics, on.rows, None)
    outcome = UPDATES[config.ascent.update](on, UpdateProblem(weights, config.ascent, config.seed, targets))
    return part.changed(outcome.parameters).apply(original), outcome.status


def super_classes(data: Path) -> Tensor:
    """The super-class of each class."""
    table = pq.read_table(sorted(data.glob("test-*.parquet"))[0], columns=["label", "coarse_label"])
    pairs = dict(zip(table["label"].to_pylist(), table["coarse_label"].to_pylist(), strict=True))
    return torch.tensor([pairs[label] for label in range(CLASSES)])


def run(options: argparse.Namespace) -> None:
    """Write the lines that are not in the file yet."""
    how = NETS["deep"]
    train = tuple(part[: how.rows] for part in load_split(options.data, "train"))
    test, coarse = load_split(options.data, "test"), super_classes(options.data)
    original = load(options.nets, f"{NET}-none", how, CLASSES)
    done = {(line["set"], line["method"], line.get("seed")) for line in lines_of(options.out)}
    for without in options.sets:
        name = f"{NET}-{without.translate(str.maketrans(':,', '__'))}"
        case = Case.of(without, train, test, coarse)

        def write(method: str, model: nn.Module, case: Case = case, without: str = without, **notes: Any) -> None:
            line = {"set": without, "rows": len(case.forget[1]), "method": method, **notes, **case.measure(model)}
            with options.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)

        if (without, "do nothing", None) not in done:
            write("do nothing", original)
        if (without, "retrained", None) not in done and (options.nets / f"{name}.json").exists():
            write("retrained", load(options.nets, name, how, CLASSES))
        for method, changes in METHODS.items():
            for seed in SEEDS.get(method, (0,)):
                if (without, method, seed) in done:
                    continue
                config = UnlearnConfig.from_recipe("classes").with_overrides({"seed": seed, **changes})
                started = time.process_time()
                model, status = unlearned(original, case.forget, config)
                seconds = round(time.process_time() - started, 1)
                write(method, model, seed=seed, status=status, seconds=seconds)


def table(lines: list[dict[str, Any]]) -> str:
    """Accuracies in per cent for each set, medians over the seeds, as Markdown."""
    made = []
    for chosen in dict.fromkeys(line["set"] for line in lines):
        part = [line for line in lines if line["set"] == chosen]
        made += [f"\n**{chosen}**, {part[0]['rows']:,} rows\n", f"| | {' | '.join(COLUMNS)} |", "|---" * 6 + "|"]
        for method in ("do nothing", "retrained", *METHODS):
            found = [line for line in part if line["method"] == method]
            if not found:
                continue
            cells = [
                f"{100 * statistics.median(line[name] for line in found):.1f}" if name in found[0] else ""
                for name in COLUMNS
            ]
            ended = ", ".join({line["status"] for line in found if "status" in line} - {"reached"})
            made.append(f"| {' | '.join([f'{method} ({ended})' if ended else method, *cells])} |")
    return "\n".join(made)


def main() -> None:
    """Run, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--nets", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--sets", nargs="+", default=["class:52", "class:47,52,56,59,96"], help="as train_cifar.py's --without"
    )
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if not options.table:
        torch.set_num_threads(1)
        run(options)
    print(table(lines_of(options.out)))


if __name__ == "__main__":
    main()
