"""What scoring and the ascent of a causal language model cost beside plain PyTorch on random tokens: rows per second and memory.

    python tests/benchmarks/bench_language.py [--repeat 5] [--only ascent scoring memory] [--lengths 96 256] [--out FILE]

A Llama-like model of 4.9 million random weights, float32, one thread; rows of half ``--lengths`` tokens up to so many. The sides of a
comparison take turns in each of ``--repeat`` rounds, each twice, of which the second time counts: the first one finds the allocator as the
other side left it, and fetches pages anew. Seconds are CPU time of the process; medians, and medians of the ratios within a round.

- ``ascent``: the iterative update (``LayersScope.batch_gradient`` and ``Optimiser``) over a plain loop on the same padded batches: the model
  in eval mode forward, weighted cross-entropy, backward to the same layers, SGD.
- ``scoring``: ``Layers.scores`` over a plain pass (forward, cross-entropy, backward to the same layers, nothing for a single row), and over
  gradients of one row at a time, each multiplied with the direction.
- ``memory``: what a process grows by at most in a batch of each, in both batches of scores; of the ascent also with the model's blocks run
  again.
"""

import argparse
import itertools
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from imu_ray.config import ForgetSetConfig, UnlearnConfig
from imu_ray.influence.gradients import IGNORE
from imu_ray.models.blocks import checkpoint_blocks
from imu_ray.models.choice import choose_layers
from imu_ray.run.record import processor
from imu_ray.scopes.features import FeatureShard, FeatureStore
from imu_ray.scopes.layers import Layers, LayersScope
from imu_ray.scopes.workers import Workers
from imu_ray.tasks.sequence import SequenceTask
from imu_ray.updates.objectives import OBJECTIVES
from imu_ray.updates.optimiser import Optimiser
from tests.benchmarks.bench_layers import medians, seconds

VOCABULARY, LENGTHS, ROWS, BATCH, RATE, MOMENTUM = 2048, (96, 256), 32, 16, 1e-4, 0.9
SHAPE = {
    "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 704,
    "max_position_embeddings": max(LENGTHS), "vocab_size": VOCABULARY, "tie_word_embeddings": True, "use_cache": False,
}  # fmt: skip
SCOPES: dict[str, str | list[str]] = {
    "o_proj and down_proj": ["*.o_proj", "*.down_proj"],
    "all layers": "usable",
    "LoRA": "adapters",
}


def part_of(scope: str, length: int, again: bool = False) -> Layers:
    """The layers of a new model, the same ones at every call."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE))
    if scope == "LoRA":
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(model, LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM"))
    model.eval()
    if again:
        checkpoint_blocks(model)
    example = torch.randint(0, VOCABULARY, (2, length))
    names = choose_layers(model, example, SCOPES[scope], "")
    task = SequenceTask(ForgetSetConfig(), length, VOCABULARY)
    return Layers.of_names(model, task, names, example, UnlearnConfig())


def rows_of(length: int) -> tuple[Tensor, Tensor]:
    """Tokens, and the label of each position."""
    drawn = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (ROWS, length), generator=drawn)
    lengths = torch.randint(length // 2, length + 1, (ROWS, 1), generator=drawn)
    lengths[::BATCH] = length
    labels = torch.cat([tokens[:, 1:], torch.full((ROWS, 1), IGNORE)], 1)
    return tokens, labels.masked_fill(torch.arange(length) + 1 >= lengths, IGNORE)


def shard_of(length: int) -> FeatureShard:
    """Blocks of a batch each."""
    tokens, labels = (each.numpy() for each in rows_of(length))
    ids = pa.array([str(row) for row in range(ROWS)])
    return FeatureShard(tokens.astype(np.float32), labels, ids, (BATCH,) * (ROWS // BATCH))


class Plain:
    """A plain loop over the whole model, with gradients of the layers alone."""

    def __init__(self, part: Layers) -> None:
        self.model: nn.Module = part.cut.model.requires_grad_(False)
        layers = [self.model.get_submodule(name) for name in part.parameters]
        self.moved = [tensor.requires_grad_() for layer in layers for tensor in layer.parameters(recurse=False)]
        self.tokens, self.labels = rows_of(part.task.positions)
        self.weights = torch.rand(ROWS, generator=torch.Generator().manual_seed(2))
        self.optimiser = torch.optim.SGD(self.moved, RATE, MOMENTUM, weight_decay=5e-4)
        self.directions = [torch.randn_like(tensor) for tensor in self.moved]

    def losses(self, rows: slice) -> Tensor:
        """Mean over the labelled tokens of each row."""
        labels = self.labels[rows]
        logits = self.model(self.tokens[rows]).logits
        each = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORE)
        return each.sum(1) / (labels != IGNORE).sum(1)

    def ascend(self, rows: slice) -> None:
        """A step."""
        self.optimiser.zero_grad()
        (-(self.losses(rows) * self.weights[rows]).sum() / self.weights[rows].sum()).backward()
        self.optimiser.step()

    def backward(self, rows: slice) -> None:
        """Forward and backward."""
        torch.autograd.grad(self.losses(rows).sum(), self.moved)

    def score(self, rows: slice) -> None:
        """Influence and gradient norm of one row after the other."""
        for row in range(rows.start, rows.stop):
            grads = torch.autograd.grad(self.losses(slice(row, row + 1)).sum(), self.moved)
            for grad, direction in zip(grads, self.directions, strict=True):
                float((grad * direction).sum()), float(grad.square().sum())


class Ours:
    """The library's step, and its scores of a shard."""

    def __init__(self, part: Layers) -> None:
        settings = {
            "ascent.scope": "usable",
            "ascent.learning_rate": RATE,
            "ascent.momentum": MOMENTUM,
            "ascent.l1": 0.0,
        }
        self.config = UnlearnConfig.from_recipe("paper").with_overrides(settings).ascent
        self.part, self.shard = part, shard_of(part.task.positions)
        self.scope = LayersScope(part, {"forget": FeatureStore([self.shard])}, Workers())
        self.weights = torch.rand(ROWS, generator=torch.Generator().manual_seed(2)).double().numpy()
        self.optimiser = Optimiser(self.scope.parameters(), self.config, {})
        self.directions = {name: torch.randn_like(matrix) for name, matrix in part.parameters.items()}

    def ascend(self, rows: slice) -> None:
        """A step."""
        batch, pieces = np.arange(rows.start, rows.stop), self.config.piece_rows
        parameters = self.optimiser.parameters
        self.optimiser.step(
            self.scope.batch_gradient(parameters, batch, self.weights, OBJECTIVES["ascent"], pieces), RATE
        )

    def score(self) -> None:
        """Loss, influence and gradient norm of the shard."""
        self.part.scores(self.shard, self.directions)


def over(work: Callable[[slice], None]) -> Callable[[], None]:
    """The work on every batch."""

    def all_batches() -> None:
        for start in range(0, ROWS, BATCH):
            work(slice(start, start + BATCH))

    return all_batches


def compared(repeat: int, lengths: Iterable[int], sides_of: Callable[..., dict[str, Any]], *bases: str) -> Any:
    found = {}
    for length, scope in itertools.product(lengths, SCOPES):
        sides = sides_of(scope, length)
        rounds = [{name: (seconds(work), seconds(work))[1] for name, work in sides.items()} for _ in range(repeat)]
        found[f"{scope}, {length}"] = {"rows": ROWS, **medians(rounds, *bases)}
        print(scope, length, found[f"{scope}, {length}"], flush=True)
    return found


def ascent(repeat: int, lengths: Iterable[int]) -> dict[str, Any]:
    """Steps over the same batches."""

    def sides_of(*case: Any) -> dict[str, Any]:
        return {"plain": over(Plain(part_of(*case)).ascend), "ours": over(Ours(part_of(*case)).ascend)}

    return compared(repeat, lengths, sides_of, "plain")


def scoring(repeat: int, lengths: Iterable[int]) -> dict[str, Any]:
    """Scores of the same blocks."""

    def sides_of(*case: Any) -> dict[str, Any]:
        plain = Plain(part_of(*case))
        return {"pass": over(plain.backward), "one_by_one": over(plain.score), "ours": Ours(part_of(*case)).score}

    return compared(repeat, lengths, sides_of, "pass", "one_by_one")


def grown(results: Any, scope: str, length: int, side: str, again: bool) -> None:
    """By how many MB a process grows at most in a batch."""
    kind, work = side.split(".")
    made = {"plain": Plain, "ours": Ours}[kind](part_of(scope, length, again))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    getattr(made, work)(*([] if side == "ours.score" else [slice(0, BATCH)]))
    results.put(round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1))


def memory(repeat: int, lengths: Iterable[int]) -> dict[str, Any]:
    """Each in a process of its own."""
    sides = [
        ("plain.ascend", False),
        ("ours.ascend", False),
        ("ours.ascend", True),
        ("plain.backward", False),
        ("ours.score", False),
    ]
    context, found = multiprocessing.get_context("forkserver"), {}  # of a process that has not run anything
    context.set_forkserver_preload(["__main__"])
    for length, scope in itertools.product(lengths, SCOPES):
        found[f"{scope}, {length}"] = grew = {}
        for side, again in sides:
            results = context.Queue()
            process = context.Process(target=grown, args=(results, scope, length, side, again))
            process.start()
            grew[f"{side}{' again' * again}_mb"] = results.get()
            process.join()
        print(scope, length, grew, flush=True)
    return found


def main() -> None:
    """Measure and record."""
    parts = {"ascent": ascent, "scoring": scoring, "memory": memory}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--lengths", nargs="+", type=int, choices=LENGTHS, default=LENGTHS)
    default = Path(__file__).with_name("results") / f"language-{time.strftime('%Y-%m-%d')}.json"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    made = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in options.only:
        made |= {"processor": processor(), "torch": torch.__version__, "repeat": options.repeat, "batch": BATCH}
        made[name] = parts[name](options.repeat, options.lengths)
        options.out.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
