"""Markov chains, as the IMU paper has them: what unlearning one kind of sequence leaves of a model, beside a retrained one.

    python tests/benchmarks/markov.py --nets DIR --out FILE.jsonl [--seeds 0 1 2]
    python tests/benchmarks/markov.py --out FILE.jsonl --table

Our reading of the paper's setting. Ten states in three groups; a chain stays in its home group with probability 0.8 and leaks into the others with
0.2. Each kind of sequence (retain, forget1, forget2) has a home group and a transition matrix of its own; a fifth of each is for testing. The
original is trained on retain and forget1, the reference on retain alone. Methods are given training rows of forget1. All run on the library's
parts in this process, also the one step that ``imu_ray.unlearn`` takes by default; ``--ray`` calls it beside. A line of the file is one seed (of
chains, training and method), method and learning rate: loss, and KL of the reference to the model, nats a token, on test sequences of each kind.
Trained models are kept in ``--nets``.
"""

import argparse
import functools
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import imu_ray
from imu_ray.config import AscentConfig, ForgetSetConfig
from imu_ray.influence.curvature import LAYER_CURVATURES
from imu_ray.influence.direction import fit_directions
from imu_ray.influence.gradients import IGNORE
from imu_ray.influence.intensity import SCHEMES
from imu_ray.scopes.base import Parameters
from imu_ray.scopes.features import FeatureShard, FeatureStore
from imu_ray.scopes.layers import Layers, LayersScope
from imu_ray.scopes.workers import Workers
from imu_ray.tasks.sequence import SequenceTask
from imu_ray.updates import UPDATES
from imu_ray.updates.base import UpdateProblem
from imu_ray.updates.batches import epoch_batches
from imu_ray.updates.objectives import OBJECTIVES
from imu_ray.updates.optimiser import Optimiser
from imu_ray.updates.stopping import Unseen, stop_targets

STATES, LENGTH, LEAKAGE, TEST = 10, 20, 0.2, 0.2
GROUPS = {"retain": range(4), "forget1": range(4, 7), "forget2": range(7, 10)}
SEQUENCES = {"retain": 10_000, "forget1": 5_000, "forget2": 5_000}
PAPER = imu_ray.UnlearnConfig.from_recipe("paper")
AGAIN = 1000  # added to the seed of a second retrained model
Figures = dict[str, float]


@dataclass(frozen=True)
class Sequences:
    """Token ids of one kind, ``[N, 20]``."""

    train: Tensor
    test: Tensor


def transitions(kind: str, generator: torch.Generator) -> Tensor:
    """Rows of probabilities ``[10, 10]``: 0.8 on random moves within the home group, 0.2 on the states outside it."""
    home = torch.zeros(STATES, dtype=torch.bool)
    home[list(GROUPS[kind])] = True
    moves = torch.rand(STATES, STATES, generator=generator).pow(3)
    inside, outside = moves * home, moves * ~home
    return (1 - LEAKAGE) * inside / inside.sum(1, keepdim=True) + LEAKAGE * outside / outside.sum(1, keepdim=True)


def draw(kind: str, count: int, generator: torch.Generator) -> Tensor:
    """Sequences of a new chain, which begin at a random state of its home group."""
    matrix, home = transitions(kind, generator), torch.tensor(list(GROUPS[kind]))
    tokens = [home[torch.randint(len(home), (count,), generator=generator)]]
    for _ in range(LENGTH - 1):
        tokens.append(torch.multinomial(matrix[tokens[-1]], 1, generator=generator).squeeze(1))
    return torch.stack(tokens, 1)


def sequences(seed: int) -> dict[str, Sequences]:
    """All three kinds."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {kind: draw(kind, count, generator) for kind, count in SEQUENCES.items()}
    return {
        kind: Sequences(*rows.split([len(rows) - int(TEST * len(rows)), int(TEST * len(rows))]))
        for kind, rows in drawn.items()
    }


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        q, k, v = (part(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.o(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """A causal transformer of four blocks: ids ``[B, T]`` to logits ``[B, T, states]``."""

    def __init__(self, width: int = 128, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(STATES, width), nn.Parameter(0.02 * torch.randn(LENGTH, width))
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, STATES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions[: ids.size(1)])))


def train(rows: Tensor, seed: int) -> Transformer:
    """AdamW at 5e-4 on batches of 128, five epochs."""
    torch.manual_seed(seed)
    model = Transformer()
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for _ in range(5):
        for batch in rows[torch.randperm(len(rows))].split(128):
            loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model.eval()


def trained(nets: Path, name: str, rows: Tensor, seed: int) -> Transformer:
    """The model from its file, which is made where it is not there."""
    path = nets / f"markov-{name}.safetensors"
    if not path.exists():
        started = time.time()
        nets.mkdir(parents=True, exist_ok=True)
        save_file(train(rows, seed).state_dict(), path)
        print(f"{path.stem}: {time.time() - started:.0f} s", flush=True)
    model = Transformer()
    model.load_state_dict(load_file(path))
    return model.eval()


@torch.inference_mode()
def predictions(model: nn.Module, rows: Tensor) -> Tensor:
    """Log-probabilities of the next tokens, ``[N, 19, 10]``."""
    return torch.cat([model(chunk[:, :-1]).log_softmax(-1) for chunk in rows.split(BLOCK)])


def compare(model: nn.Module, theirs: dict[str, Tensor], data: dict[str, Sequences]) -> Figures:
    """On the test sequences of each kind: loss, and KL of the reference's predictions to the model's, nats a token."""
    found = {}
    for kind, rows in data.items():
        mine = predictions(model, rows.test)
        found[f"{kind}.loss"] = float(F.nll_loss(mine.flatten(0, 1), rows.test[:, 1:].flatten()))
        found[f"{kind}.kl"] = float((theirs[kind].exp() * (theirs[kind] - mine)).sum(-1).mean())
    return found


# The paper's 50 steps of AdamW on batches of 4: objective and weights.
STEPS, BATCH, BLOCK = 50, 4, 250
RATES = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4)
ROWS = 1000  # of forget1 that a method is given: 200 are in the steps, all of them in the weights and the curvature
ITERATIVE = {
    "IMU weights, ascent": ("ascent", "imu"),
    "uniform weights, ascent": ("ascent", "uniform"),
    "permuted IMU weights, ascent": ("ascent", "permuted"),
    "NPO": ("npo", "uniform"),
    "bounded ascent": ("bounded_ascent", "uniform"),
}
# The library's default update: one step to the bounded loss of unseen sequences, which are of this kind.
ONE_STEP: dict[str, tuple[str, dict[str, Any]]] = {
    "library's default, K-FAC": ("forget2", {}),
    "library's default, no curvature": ("forget2", {"ascent.preconditioner": "none"}),
    "library's default, K-FAC, unseen rows of forget1": ("forget1", {}),
}


def layers_of(model: nn.Module, example: Tensor) -> Layers:
    """All linear layers of a model."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    task = SequenceTask(ForgetSetConfig(), LENGTH, STATES)
    return Layers.of_names(model, task, names, example, imu_ray.UnlearnConfig())


@torch.no_grad()
def shard_of(part: Layers, rows: Tensor) -> FeatureShard:
    """What crosses the cut, of some sequences."""
    features = part.cut.join(part.cut.prefix(rows)).numpy()
    labels = F.pad(rows[:, 1:], (0, 1), value=IGNORE).numpy()
    ids, sizes = pa.array([f"row{i}" for i in range(len(rows))]), tuple(len(block) for block in rows.split(BLOCK))
    return FeatureShard(features, labels, ids, sizes)


def scope_of(part: Layers, **shards: FeatureShard) -> LayersScope:
    return part.scope({name: FeatureStore([shard]) for name, shard in shards.items()}, Workers())


def scores_of(on: LayersScope) -> pa.Table:
    """The paper's scores of the rows, of all layers of the scope together."""
    (shard,), part = on.sets["forget"].shards, on.part
    reduce = lambda statistics: part.statistics(shard, dict.fromkeys(part.parameters, statistics)).parts
    return part.scores(
        shard, fit_directions(PAPER.influence, list(part.parameters), reduce, None, lambda level: 0.0)[0]
    )


def stepped(on: LayersScope, objective: str, weights: np.ndarray, rate: float, seed: int) -> Parameters:
    """Parameters after the steps."""
    settings = AscentConfig(
        update="iterative", objective=objective, optimizer="adamw", learning_rate=rate, batch_size=BATCH
    )
    optimiser, kept = Optimiser(on.parameters(), settings, {}), np.flatnonzero(weights > 0)
    for batch in itertools.islice(epoch_batches(kept, on.block_starts, settings, seed, 0), STEPS):
        optimiser.step(on.batch_gradient(optimiser.parameters, batch, weights, OBJECTIVES[objective], BATCH), rate)
    return optimiser.parameters


def one_step(part: Layers, rows: Tensor, unseen: Tensor, changes: dict[str, Any], seed: int) -> tuple[str, Parameters]:
    """What ``imu_ray.unlearn`` does by default, without Ray: how it ended, and parameters."""
    settings = imu_ray.UnlearnConfig().with_overrides({"ascent.scope": "usable", **changes}).ascent
    shards = {"forget": shard_of(part, rows), "test": shard_of(part, unseen)}
    before = scope_of(part, **shards).measure(part.parameters)
    expected = Unseen({"bounded_loss": before["test.bounded_loss"], "per_class": {}}, {})
    stop = settings.stop.but({"forget.bounded_loss": "auto"})
    problem = UpdateProblem(
        np.ones(len(rows)), settings, seed, stop_targets(stop, part.task.metrics, len(rows), expected)
    )
    if settings.curvature != "none":
        kfac = LAYER_CURVATURES["kfac"]
        each = (part.statistics(shard, dict.fromkeys(part.parameters, kfac.statistics)) for shard in shards.values())
        sums = functools.reduce(lambda a, b: a.merge(b), each).parts
        fitted = {name: kfac.solve(found, settings.preconditioner_damping) for name, found in sums.items()}
        problem = replace(problem, preconditioners=fitted)
    outcome = UPDATES["one_step"](scope_of(part, forget=shards["forget"]), problem)
    return outcome.status, outcome.parameters


def called(model: nn.Module, rows: Tensor, unseen: Tensor, changes: dict[str, Any], seed: int) -> tuple[str, nn.Module]:
    """The same by ``imu_ray.unlearn``, in a directory that is not kept."""
    table_of = lambda rows: pa.table({"tokens": rows.tolist()})
    config = imu_ray.UnlearnConfig().with_overrides(
        {"seed": seed, "audit.report": False, "resources.workers": 1, "influence.block_rows": BLOCK, **changes}
    )
    with tempfile.TemporaryDirectory() as folder:
        result = imu_ray.unlearn(
            model,
            table_of(rows),
            task="sequence",
            evaluation={"test": table_of(unseen)},
            config=config,
            run_dir=f"{folder}/run",
        )
    return result.status, result.model


def run_seed(seed: int, options: argparse.Namespace, done: set[tuple[Any, ...]]) -> None:
    """Write the lines of a seed that are not in the file yet."""
    data = sequences(seed)
    kept, forget = data["retain"].train, data["forget1"].train
    original = trained(options.nets, f"original-{seed}", torch.cat([kept, forget]), seed)
    reference = trained(options.nets, f"retrained-{seed}", kept, seed)

    theirs = {kind: predictions(reference, rows.test) for kind, rows in data.items()}

    def write(method: str, model: nn.Module, **notes: Any) -> None:
        line = {"seed": seed, "method": method, **notes, **compare(model, theirs, data)}
        with options.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    if (seed, "do nothing", None) not in done:
        write("do nothing", original)
    if (seed, "retrained", None) not in done:
        write("retrained", reference)
    part = layers_of(original, forget[:2])
    on, scores = scope_of(part, forget=shard_of(part, forget[:ROWS])), None
    for method, (objective, scheme) in ITERATIVE.items():
        for rate in options.rates:
            if (seed, method, rate) in done:
                continue
            scores = scores or scores_of(on)
            weights = SCHEMES[scheme](scores["influence"].to_numpy(), scores["loss"].to_numpy(), PAPER.intensity, seed)
            after = stepped(on, objective, weights, rate, seed)
            write(method, part.changed(after).apply(original), rate=rate, kept=int((weights > 0).sum()))
    for method, (kind, changes) in ONE_STEP.items():
        # No model was trained on forget2; of forget1 the test rows alone are unseen.
        unseen = (data[kind].train if kind == "forget2" else data[kind].test)[:ROWS]
        if (seed, method, None) not in done:
            status, after = one_step(part, forget[:ROWS], unseen, changes, seed)
            write(method, part.changed(after).apply(original), status=status)
        if options.ray and (seed, f"{method}, called", None) not in done:
            status, model = called(original, forget[:ROWS], unseen, changes, seed)
            write(f"{method}, called", model, status=status)
    if seed == 0 and (seed, "retrained, another seed", None) not in done:
        write("retrained, another seed", trained(options.nets, f"retrained-{seed}-again", kept, seed + AGAIN))


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(lines: list[dict[str, Any]]) -> str:
    """Medians over the seeds, with the lowest and highest, as Markdown; of rates those that every seed has."""
    keys = [f"{kind}.kl" for kind in SEQUENCES] + ["forget1.loss"]
    rows = [["method", "rate", *(f"KL, {kind}" for kind in SEQUENCES), "loss, forget1"], ["---"] * (len(keys) + 2)]
    parts: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for line in lines:
        parts.setdefault((line["method"], line.get("rate", 0.0)), []).append(line)
    seeds = len({line["seed"] for line in lines})
    for (method, rate), part in parts.items():
        if rate and len(part) < seeds:
            continue
        figures = []
        for key in keys:
            found = sorted(line[key] for line in part)
            spread = f" ({found[0]:.2f} to {found[-1]:.2f})" if len(found) > 1 else ""
            figures.append(f"{statistics.median(found):.2f}{spread}")
        rows.append([method, f"{rate:g}" if rate else "", *figures])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Run, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--ray", action="store_true", help="call imu_ray.unlearn too, for what it does by default")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--rates", nargs="*", type=float, default=RATES, help="learning rates that are tried")
    options = parser.parse_args()
    if not options.table:
        torch.set_num_threads(1)
        os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])  # for Ray's workers
        done = {(line["seed"], line["method"], line.get("rate")) for line in lines_of(options.out)}
        quiet = {"include_dashboard": False, "logging_level": "warning"}
        with ray.init("local", num_cpus=1, **quiet) if options.ray else nullcontext():
            for seed in options.seeds:
                run_seed(seed, options, done)
    print(table(lines_of(options.out)))


if __name__ == "__main__":
    main()
