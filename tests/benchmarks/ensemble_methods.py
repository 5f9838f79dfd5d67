"""Methods of ``baselines.py`` and two more as an ensemble calls them: each is stopped where the library's own stops.

    ensemble:
      methods:
        NPO: {call: "tests.benchmarks.ensemble_methods:baseline", name: NPO, setting: 0, epochs: 20}

A method is stopped at the first check at which the mean loss of the forgotten rows, each bounded by that of a uniform
guess, has risen to that of unseen rows; or after so many epochs over the rows it uses.
"""

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tests.benchmarks.baselines import METHODS, Problem, batches, losses_of, sgd, step

Rows = tuple[Tensor, Tensor]


def baseline(
    model: nn.Module,
    forget: Rows,
    retain: Rows,
    unseen: Rows,
    seed: int,
    *,
    name: str,
    setting: int,
    epochs: float = 20,
) -> nn.Module:
    """A method of ``METHODS`` with one of its settings."""
    method = METHODS[name]
    train = [torch.cat(parts) for parts in zip(forget, retain, strict=True)]
    problem = Problem(copy.deepcopy(model), *forget, 0, seed, *train)
    return stopped(problem, method.run(problem, **method.settings[setting]), unseen, epochs)


def fine_tune(
    model: nn.Module, forget: Rows, retain: Rows, unseen: Rows, seed: int, *, lr: float, epochs: float
) -> nn.Module:
    """SGD on the retained rows: what is not practised is forgotten. Reads them; runs all its epochs."""
    problem = Problem(copy.deepcopy(model), *retain, 0, seed)
    for _ in limited(descend(problem, problem.labels, lr), epochs):
        pass
    return problem.model


def random_labels(
    model: nn.Module, forget: Rows, retain: Rows, unseen: Rows, seed: int, *, lr: float, epochs: float
) -> nn.Module:
    """SGD on the forgotten rows, each with another label, drawn once."""
    problem = Problem(copy.deepcopy(model), *forget, 0, seed)
    classes = int(torch.cat([forget[1], retain[1]]).max()) + 1
    moved = torch.randint(1, classes, forget[1].shape, generator=torch.Generator().manual_seed(seed))
    return stopped(problem, descend(problem, (forget[1] + moved) % classes, lr), unseen, epochs)


def descend(problem: Problem, labels: Tensor, lr: float) -> Iterator[dict[str, float]]:
    """SGD on the problem's rows with these labels; statistics are frozen."""
    optimiser = sgd(problem.model.parameters(), lr)
    for epochs, rows, inputs in batches(problem, size=64):
        problem.model.eval()
        step(optimiser, losses_of(problem.model(inputs), labels[rows]).mean())
        yield {"epochs": epochs}


def stopped(problem: Problem, progress: Iterator[dict[str, float]], unseen: Rows, epochs: float) -> nn.Module:
    """The model at the first check at which the forgotten rows' bounded loss has come to that of unseen rows."""
    target = bounded_loss(problem.model, unseen)
    if bounded_loss(problem.model, (problem.images, problem.labels)) >= target:
        return problem.model
    for _ in limited(progress, epochs):
        if bounded_loss(problem.model, (problem.images, problem.labels)) >= target:
            break
    return problem.model


def limited(progress: Iterator[dict[str, float]], epochs: float) -> Iterator[dict[str, float]]:
    """What a method yields until it has taken so many epochs; one that counts none runs to its end."""
    for told in progress:
        yield told
        if told["epochs"] >= epochs:
            return


@torch.no_grad()
def bounded_loss(model: nn.Module, rows: Rows) -> float:
    """Mean of min(loss, ln C), of the model in eval mode."""
    logits = model.eval()(rows[0])
    return float(losses_of(logits, rows[1]).clamp_max(math.log(logits.shape[1])).mean())
