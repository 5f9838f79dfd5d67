"""The ascent of the head on cached features, from the first check to the last; the same code for one worker and for many."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imu_ray.ascent.batches import FeatureStore, Positions, epoch_batches
from imu_ray.ascent.objectives import OBJECTIVES
from imu_ray.ascent.step import HeadOptimiser, Workers, batch_gradient
from imu_ray.ascent.stopping import StopTarget
from imu_ray.config import AscentConfig
from imu_ray.influence.scores import sample_losses
from imu_ray.models import Head
from imu_ray.progress import Progress

Record = dict[str, float]


@dataclass(frozen=True)
class AscentProblem:
    """What is ascended: the original head, the forget set's features and weights ``[N]``, and what is measured beside it."""

    head: Head
    weights: npt.NDArray[np.float64]
    config: AscentConfig
    seed: int
    target: StopTarget | None
    forget: FeatureStore = field(default_factory=lambda: FeatureStore(()))
    evaluation: Mapping[str, FeatureStore] = field(default_factory=dict)


@dataclass
class AscentState:
    """All that the next step depends on, and the trajectory so far."""

    step: int
    tensors: dict[str, Tensor]
    trajectory: list[Record]


@dataclass(frozen=True)
class AscentOutcome:
    """The head at the end, why it ended there, and the trajectory (a row per check)."""

    head: Head
    status: str
    reason: str
    trajectory: list[Record]


class Ascent:
    """One worker's view of an ascent."""

    def __init__(self, problem: AscentProblem, workers: Workers) -> None:
        self.problem, self.workers, self.config = problem, workers, problem.config
        self.optimiser = HeadOptimiser(problem.head, problem.config, workers.device)
        self.kept = np.flatnonzero(problem.weights > 0)
        self.steps_per_epoch = math.ceil(len(self.kept) / self.config.batch_size)
        self.total_steps = self.steps_per_epoch * self.config.epochs
        self.step, self.gradient_norm = 0, 0.0
        self._epoch = -1
        self._batches: list[list[Positions]] = []

    def take_step(self) -> None:
        """One global step."""
        epoch, place = divmod(self.step, self.steps_per_epoch)
        if epoch != self._epoch:
            starts = self.problem.forget.block_starts
            self._epoch, self._batches = epoch, epoch_batches(self.kept, starts, self.config, self.problem.seed, epoch)
        gradient = batch_gradient(
            self._batches[place],
            self.problem.forget,
            self.problem.weights,
            OBJECTIVES[self.config.objective],
            self.optimiser.matrix,
            self.problem.head,
            self.workers,
        )
        self.gradient_norm = float(gradient.norm())
        self.optimiser.step(gradient)
        self.step += 1

    def check(self) -> Record:
        """Loss and accuracy on every set with the present head; each worker measures its share of the blocks."""
        sets = {"forget": self.problem.forget, **self.problem.evaluation}
        sums = torch.zeros(len(sets), 2, dtype=torch.float64, device=self.workers.device)
        for row, store in zip(sums, sets.values(), strict=True):
            blocks = (block for shard in store.shards for block in shard.blocks())
            for index, (features, labels) in enumerate(blocks):
                if index % self.workers.world == self.workers.rank and len(labels):
                    labels = labels.to(self.workers.device)
                    logits = self.problem.head.inputs(features.to(self.workers.device)) @ self.optimiser.matrix.T
                    row += torch.stack([sample_losses(logits, labels).sum(), (logits.argmax(1) == labels).sum().double()])
        self.workers.sum(sums)
        record: Record = {"step": self.step, "epoch": self.step / self.steps_per_epoch}
        for (name, store), (loss, hits) in zip(sets.items(), sums.tolist(), strict=True):
            record |= {f"{name}_loss": loss / len(store), f"{name}_accuracy": hits / len(store)}
        original = self.problem.head.matrix_CD
        weights = self.problem.weights
        record["parameter_drift"] = float((self.optimiser.matrix.cpu() - original).norm() / original.norm())
        record["gradient_norm"] = self.gradient_norm
        record["effective_sample_size"] = float(weights.sum() ** 2 / (weights**2).sum())
        return record

    def snapshot(self) -> tuple[int, dict[str, Tensor]]:
        """Copies of all that the next step depends on."""
        return self.step, self.optimiser.state()

    def restore(self, snapshot: tuple[int, dict[str, Tensor]]) -> None:
        """Go back to a snapshot."""
        self.step = snapshot[0]
        self.optimiser.load_state(snapshot[1])


def run_ascent(
    problem: AscentProblem,
    workers: Workers,
    *,
    resume: AscentState | None = None,
    save: Callable[[AscentState], None] = lambda state: None,
) -> AscentOutcome:
    """Ascend until the target is reached, the epochs are done, or the next stretch would leave finite numbers.

    Args:
        problem: what is ascended.
        workers: this worker and the others.
        resume: state to go on from.
        save: called with the state after every check.

    Returns:
        Status ``reached``, ``not_reached`` (a target, but the epochs ended first), ``epochs_done`` (no target) or
        ``stopped_by_guard`` (loss or head were no longer finite; the head is that of the last good check).
    """
    ascent = Ascent(problem, workers)
    started = time.monotonic()

    def checked() -> Record:
        return {**ascent.check(), "seconds": time.monotonic() - started}

    if resume is None:
        trajectory = [checked()]
    else:
        ascent.restore((resume.step, resume.tensors))
        trajectory = list(resume.trajectory)
        started -= trajectory[-1]["seconds"]
    good = ascent.snapshot()
    status, reason = _verdict(problem.target, trajectory[-1], ended=False)
    with Progress("ascent", ascent.total_steps, "steps", quiet=workers.rank > 0) as progress:
        progress.advance(ascent.step)
        while not status and ascent.step < ascent.total_steps:
            stretch = min(problem.config.stop.every_steps, ascent.total_steps - ascent.step)
            for _ in range(stretch):
                ascent.take_step()
            record = checked()
            if not math.isfinite(record["forget_loss"] + record["parameter_drift"]):
                status, reason = "stopped_by_guard", f"loss or head not finite after step {ascent.step}"
                ascent.restore(good)
                break
            trajectory.append(record)
            good = ascent.snapshot()
            save(AscentState(ascent.step, good[1], trajectory))
            status, reason = _verdict(problem.target, record, ended=False)
            progress.advance(stretch, note=f"forget accuracy {record['forget_accuracy']:.3f}")
    if not status:
        status, reason = _verdict(problem.target, trajectory[-1], ended=True)
    head = Head(problem.head.name, ascent.optimiser.matrix.detach().cpu().clone(), problem.head.has_bias)
    return AscentOutcome(head, status, reason, trajectory)


def _verdict(target: StopTarget | None, record: Record, *, ended: bool) -> tuple[str, str]:
    """Status and reason after a check, or two empty strings to go on."""
    if target is not None and target.reached(record):
        return "reached", f"{target.metric} {record[target.metric]:.4f} <= {target.threshold:.4f} ({target.reason})"
    if not ended:
        return "", ""
    if target is None:
        return "epochs_done", "no stop rule applied; all epochs were run"
    return (
        "not_reached",
        f"{target.metric} is {record[target.metric]:.4f} after all epochs; target {target.threshold:.4f} ({target.reason})",
    )
