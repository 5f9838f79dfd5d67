"""What scoring costs beside a plain forward pass and beside other ways to score, on CIFAR-sized random images.

    python tests/benchmarks/bench_influence.py [--rows 1024] [--repeat 5] [--only small_cnn resnet18] [--pin]

One process, one torch thread, one run; decoding ahead is a second thread, as in a worker. With ``--pin`` the process is kept on one core,
so that decoding has no other core to hide on; the results are recorded apart. Every way is timed in turn in each of ``--repeat`` rounds; seconds are medians, ratios are medians of the ratios within a round:

- ``forward``: the model in eval mode over ready tensors in batches of 256, and nothing else.
- ``scoring``: ours, from a map-style dataset to a table of scores: reading, checks, digests, the forward pass, moments, scores.
- ``head``: the part of it after the forward pass, on cached features.
- ``published``: the published way: twice over the samples, one at a time, ``loss.backward()``, an N x P matrix of head gradients kept.
- ``published, head``: the same with gradients of the head alone (``autograd.grad``), which spares the backward pass through the rest.
- ``torch.func``: per-sample head gradients by vmap(grad) in chunks of 64, the same N x P matrix.
- ``captum``: TracInCPFast on the head with one checkpoint, the forget set against itself (no curvature: another score).
- ``kronfluence``: diagonal factors and pairwise scores on the head with an aggregated query gradient (the same score; it writes to disk).

The slow ways run on the first ``--slow-rows`` samples and are scaled to ``--rows``. All but captum must give our scores to 1e-3 of the
largest, or the benchmark stops. Writes ``results/influence-DATE.json`` and prints a table. On a CUDA device see ``--device``.
"""

import argparse
import datetime
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]
# ruff: noqa: E402 - this tree comes first
from imu_ray.config import InfluenceConfig, UnlearnConfig
from imu_ray.data import Source, open_source
from imu_ray.influence.curvature.base import merge_tree
from imu_ray.influence.direction import fit_directions
from imu_ray.run.record import processor
from imu_ray.scopes.extraction import extract_features
from imu_ray.scopes.features import FeatureShard
from imu_ray.scopes.head import Head, shard_statistics
from imu_ray.tasks.classification import ClassificationTask

CLASSES, BATCH, DAMPING = 10, 256, 0.01


class Images(torch.utils.data.Dataset):
    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.inputs[row], int(self.labels[row])


def cnn(channels: Sequence[int]) -> nn.Module:
    """Stages of 3 x 3 convolution, batch normalisation, ReLU and 2 x 2 maximum; 16 positions of the last go into the head."""
    layers: list[nn.Module] = []
    for inner, outer in pairwise([3, *channels]):
        layers += [nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer), nn.ReLU(), nn.MaxPool2d(2)]
    body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten())
    return nn.Sequential(OrderedDict(body=body, fc=nn.Linear(channels[-1] * 16, CLASSES)))


def resnet18() -> nn.Module:
    return torchvision.models.resnet18(weights=None, num_classes=CLASSES)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "small_cnn": partial(cnn, (8, 16)),
    "cnn": partial(cnn, (32, 64, 128)),
    "resnet18": resnet18,
}


class Ways:
    """Every way to score ``rows`` samples with one model; each call returns the scores, or None where they are others."""

    def __init__(self, name: str, rows: int, slow_rows: int, device: torch.device, dtype: str) -> None:
        torch.manual_seed(0)
        self.name = name
        self.model = MODELS[name]().eval().to(device)
        self.inputs, self.labels = torch.randn(rows, 3, 32, 32), torch.randint(CLASSES, (rows,))
        self.slow = slice(0, slow_rows)
        self.device = device
        self.settings = InfluenceConfig(autocast=dtype)
        self.source = open_source(Images(self.inputs, self.labels), UnlearnConfig().forget_set)
        self.task = ClassificationTask.for_model(self.model.cpu(), {"forget": self.source}, UnlearnConfig().forget_set)
        self.model.to(device)
        self.head = Head.of(self.model, self.task)
        self.ready = self.inputs.to(device)
        self.shards = self._extract(self.source)

    def forward(self) -> None:
        with (
            torch.inference_mode(),
            torch.autocast(
                self.device.type, getattr(torch, self.settings.autocast, None), self.settings.autocast != "none"
            ),
        ):
            for batch in self.ready.split(BATCH):
                outputs = self.model(batch)
            outputs.sum().item()  # waits for a GPU

    def _extract(self, source: Source) -> list[FeatureShard]:
        shards = source.shards(BATCH, self.settings.blocks_per_shard)
        return [
            extract_features(source, shard, self.head, self.model, self.device, self.settings)[0] for shard in shards
        ]

    def _score(self, shards: list[FeatureShard]) -> np.ndarray:
        name = self.head.name
        reduce = lambda statistics: {
            name: merge_tree(shard_statistics(shard, self.head, statistics) for shard in shards)
        }
        directions, _ = fit_directions(self.settings, [name], reduce, None, lambda _: np.nan)
        return np.concatenate([self.head.scores(shard, directions)["influence"].to_numpy() for shard in shards])

    def scoring(self) -> np.ndarray:
        return self._score(self._extract(self.source))

    def head_alone(self) -> np.ndarray:
        return self._score(self.shards)

    def published(self, whole: bool = True) -> np.ndarray:
        parameters = [*self.model.fc.parameters()]
        passes = []
        for _ in range(2):
            rows = []
            for row in range(self.slow.stop):
                loss = nn.functional.cross_entropy(
                    self.model(self.ready[row : row + 1]), self.labels[row : row + 1].to(self.device)
                )
                if whole:
                    self.model.zero_grad()
                    loss.backward()
                gradients = (
                    [parameter.grad for parameter in parameters] if whole else torch.autograd.grad(loss, parameters)
                )
                rows.append(torch.cat([part.flatten() for part in gradients]))
            passes.append(torch.stack(rows))
        return direct_scores(passes[0], passes[1])

    def vmapped(self) -> np.ndarray:
        fixed = {key: value.detach() for key, value in self.model.state_dict().items()}
        chosen = {key: fixed.pop(key) for key in ("fc.weight", "fc.bias")}

        def loss(head: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
            logits = torch.func.functional_call(self.model, {**fixed, **head}, image.unsqueeze(0))
            return nn.functional.cross_entropy(logits, label.unsqueeze(0))

        per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0), chunk_size=64)
        gradients = per_sample(chosen, self.ready[self.slow], self.labels[self.slow].to(self.device))
        flat = torch.cat([part.flatten(1) for part in gradients.values()], dim=1)
        return direct_scores(flat, flat)

    def captum(self) -> None:
        from captum.influence import TracInCPFast

        tracer = TracInCPFast(
            self.model, self.model.fc, Images(self.inputs, self.labels), checkpoints=[""], checkpoints_load_func=lambda *_: 1.0,
            loss_fn=nn.CrossEntropyLoss(reduction="sum"), batch_size=BATCH,
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tracer.influence((self.inputs, self.labels))

    def kronfluence(self) -> np.ndarray:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.task import Task
        from kronfluence.utils.dataset import DataLoaderKwargs

        class Head(Task):
            def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
                return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

            def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
                return self.compute_train_loss(batch, model)

            def get_influence_tracked_modules(self) -> list[str]:
                return ["fc"]

        task, samples = Head(), torch.utils.data.TensorDataset(self.inputs, self.labels)
        model = MODELS[self.name]().eval()
        model.load_state_dict(self.model.state_dict())
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            analyzer = Analyzer(
                "head",
                prepare_model(model, task),
                task,
                cpu=self.device.type == "cpu",
                output_dir=folder,
                disable_tqdm=True,
            )
            analyzer.set_dataloader_kwargs(DataLoaderKwargs(num_workers=0))
            analyzer.fit_all_factors(
                "diagonal",
                samples,
                per_device_batch_size=BATCH,
                factor_args=FactorArguments("diagonal", use_empirical_fisher=True),
            )
            analyzer.compute_pairwise_scores(
                "scores", "diagonal", samples, samples, per_device_query_batch_size=BATCH, per_device_train_batch_size=BATCH,
                score_args=ScoreArguments(damping_factor=DAMPING, aggregate_query_gradients=True),
            )  # fmt: skip
            scores = analyzer.load_pairwise_scores("scores")["all_modules"].squeeze(0)
        return -scores.double().numpy() / len(self.labels)

    def expected(self) -> np.ndarray:
        """Our scores of the samples of the slow ways, scored as a forget set of their own."""
        return self._score(
            self._extract(
                open_source(Images(self.inputs[self.slow], self.labels[self.slow]), UnlearnConfig().forget_set)
            )
        )


def direct_scores(first_NP: Tensor, second_NP: Tensor) -> np.ndarray:
    """I = -G (F + damping)^-1 mean(G) from gradient matrices."""
    direction = first_NP.mean(0) / ((first_NP**2).mean(0) + DAMPING)
    return -(second_NP @ direction).double().cpu().numpy()


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    ways = Ways(name, options.rows, options.slow_rows, torch.device(options.device), options.autocast)
    share = options.rows / options.slow_rows
    timed: dict[str, tuple[Callable[[], Any], float]] = {
        "forward": (ways.forward, 1.0), "scoring": (ways.scoring, 1.0), "head": (ways.head_alone, 1.0), "published": (ways.published, share),
        "published, head": (partial(ways.published, whole=False), share),
        "torch.func": (ways.vmapped, share), "captum": (ways.captum, 1.0), "kronfluence": (ways.kronfluence, 1.0),
    }  # fmt: skip
    timed = {
        way: run for way, run in timed.items() if way not in ("captum", "kronfluence") or importlib.util.find_spec(way)
    }
    whole, part = ways.head_alone(), ways.expected()
    rounds: list[dict[str, float]] = []
    for turn in range(options.repeat + 1):  # the first warms up
        seconds = {}
        for way, (run, scale) in timed.items():
            begun = time.perf_counter()
            scores = run()
            seconds[way] = (time.perf_counter() - begun) * scale
            if scores is not None and options.autocast == "none":
                expected = whole if scale == 1.0 else part
                difference = np.abs(scores - expected).max() / np.abs(expected).max()
                assert difference < 1e-3, f"{way} on {name}: scores differ by {difference:.2g} of the largest"
        if turn:
            rounds.append(seconds)
        print(
            f"{name} round {turn}: " + ", ".join(f"{way} {value:.3f} s" for way, value in seconds.items()), flush=True
        )
    medians = {way: statistics.median(seconds[way] for seconds in rounds) for way in timed}
    ratios = {way: statistics.median(seconds[way] / seconds["forward"] for seconds in rounds) for way in timed}
    for way in ("published", "published, head"):
        ratios[f"{way} / scoring"] = statistics.median(seconds[way] / seconds["scoring"] for seconds in rounds)
    return {
        "rows": options.rows,
        "slow_rows": options.slow_rows,
        "seconds": medians,
        "ratio_to_forward": ratios,
        "rounds": rounds,
    }


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024, help="a multiple of 1024")
    parser.add_argument("--slow-rows", type=int, default=256, help="samples of the slow ways, a multiple of 256")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", choices=list(MODELS), nargs="+", default=list(MODELS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--autocast", choices=["none", "bfloat16"], default="none")
    parser.add_argument("--pin", action="store_true", help="keep the process on one core")
    options = parser.parse_args()
    if options.pin:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "hardware": {"processor": processor(), "device": options.device, "threads": 1},
        "torch": torch.__version__, "load_before": os.getloadavg()[0],
    }  # fmt: skip
    for name in options.only:
        record[name] = measure(name, options)
    kind = f"influence{'-pinned' if options.pin else ''}{'-cuda' if options.device == 'cuda' else ''}"
    path = Path(__file__).parent / "results" / f"{kind}-{record['date']}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    for name in options.only:
        print(f"\n{name}, {options.rows} samples: seconds, ratio to the plain forward pass")
        for way, seconds in record[name]["seconds"].items():
            print(f"  {way:16} {seconds:8.3f} {record[name]['ratio_to_forward'][way]:8.3f}")
        for way in ("published", "published, head"):
            print(f"  {way} / scoring: {record[name]['ratio_to_forward'][f'{way} / scoring']:.1f}")
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
