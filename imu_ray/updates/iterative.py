"""The ascent of the head on cached features, from the first check to the last; the same code for one worker and for many."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from imu_ray.config import AscentConfig
from imu_ray.influence.curvature.base import FittedCurvature
from imu_ray.progress import Progress
from imu_ray.run.directory import UpdateState
from imu_ray.scopes.features import FeatureShard
from imu_ray.scopes.head import Head
from imu_ray.scopes.measure import Record, measure
from imu_ray.updates.batches import FeatureStore, Positions, epoch_batches, microbatches
from imu_ray.updates.objectives import OBJECTIVES
from imu_ray.updates.optimiser import HeadOptimiser, batch_gradient, learning_rate
from imu_ray.updates.rescoring import Rescoring
from imu_ray.updates.stopping import StopTarget, guard_violation
from imu_ray.updates.workers import Workers

HALVINGS = 40
EXPLODED = 1e200  # entries of a head from which logits could overflow: features are within the range of float32


@dataclass(frozen=True)
class AscentProblem:
    """What is ascended: the original head, the forget set's features and weights ``[N]``, and what is measured beside it."""

    head: Head
    weights: npt.NDArray[np.float64]
    config: AscentConfig
    seed: int
    targets: Sequence[StopTarget] = ()
    preconditioner: FittedCurvature | None = None
    forget: FeatureStore = field(default_factory=lambda: FeatureStore(()))
    evaluation: Mapping[str, FeatureStore] = field(default_factory=dict)
    rescoring: Rescoring | None = None
    curvature_set: str | None = None  # of the evaluation sets, where influence is fitted on other samples


@dataclass(frozen=True)
class AscentOutcome:
    """The head kept and its record, why the ascent ended, and the trajectory (a row per check)."""

    head: Head
    record: Record
    status: str
    reason: str
    trajectory: list[Record]


class Ascent:
    """One worker's view of an ascent: steps, checks and snapshots. Every worker takes the same decisions."""

    def __init__(self, problem: AscentProblem, workers: Workers) -> None:
        self.problem, self.workers, self.config = problem, workers, problem.config
        self.optimiser = HeadOptimiser(problem.head, problem.config, problem.preconditioner, workers.device)
        # Samples that are not kept now may be when they are scored again.
        self.candidates = np.flatnonzero(problem.weights > 0) if problem.rescoring is None else np.arange(len(problem.weights))
        self.weights, self._scored_at = problem.weights, problem.head.matrix_CD
        self.steps_per_epoch = math.ceil(len(self.candidates) / self.config.batch_size)
        steps = self.steps_per_epoch * self.config.stop.max_epochs
        self.total_steps = min(steps, self.config.stop.max_steps or steps)
        self.step, self.gradient_norm, self.scale = 0, 0.0, 1.0
        self.started = time.monotonic()
        self._now: Record | None = None  # the forget set under the present head, where known
        self._epoch = -1
        self._batches: list[list[Positions]] = []

    def take_step(self) -> None:
        """One global step, halved as long as it leaves the trust region, if there is one."""
        epoch, place = divmod(self.step, self.steps_per_epoch)
        problem, matrix = self.problem, self.optimiser.matrix
        if epoch != self._epoch:
            starts = problem.forget.block_starts
            self._epoch, self._batches = epoch, epoch_batches(self.candidates, starts, self.config, problem.seed, epoch)
        batch = self._batches[place]
        if problem.rescoring is not None:
            self._rescore(problem.rescoring, place)
            rows = np.concatenate(batch)
            batch = microbatches(rows[self.weights[rows] > 0], self.config)
        gradient = batch_gradient(
            batch, problem.forget, self.weights, OBJECTIVES[self.config.objective], matrix, problem.head, self.workers
        )
        self.gradient_norm = float(gradient.norm())
        rate = learning_rate(self.config, self.step, self.total_steps)
        control = self.config.step_control
        if control.max_accuracy_change is None and control.max_loss_change is None:
            self.optimiser.step(gradient, rate)
        else:
            self._controlled_step(gradient, rate)
        self.step += 1

    def _rescore(self, rescoring: Rescoring, place: int) -> None:
        """New weights, of this batch at every step; or of the forget set at the start of every epoch after the first."""
        problem = self.problem
        if rescoring.every_step:
            batch = self._batches[place]
            self.weights = np.zeros(len(problem.forget))
            self.weights[np.concatenate(batch)] = self._scored(
                rescoring, map(problem.forget.shard_of, batch), self.head(self.optimiser.matrix)
            )
        elif place == 0 and self.step > 0:
            self._score_at(rescoring, self.optimiser.matrix)

    def _score_at(self, rescoring: Rescoring, matrix_CD: Tensor) -> None:
        problem, head = self.problem, self.head(matrix_CD)
        self._scored_at = head.matrix_CD
        self.weights = problem.weights
        if not torch.equal(self._scored_at, problem.head.matrix_CD):
            self.weights = self._scored(rescoring, problem.forget.shards, head)

    def _scored(self, rescoring: Rescoring, shards: Iterable[FeatureShard], head: Head) -> npt.NDArray[np.float64]:
        """New weights of the samples of ``shards``, the first worker's on every worker; NaN when the head has exploded."""
        problem, name, weights = self.problem, self.problem.curvature_set, np.empty(0)
        fitted_on = None if name is None else problem.evaluation[name]
        if self.workers.rank == 0:
            scored = list(shards)
            if (head.matrix_CD.abs() < EXPLODED).all():
                weights = rescoring.weights(scored, head, fitted_on, problem.seed)
            else:  # the next check finds what the head has come to, and the guard goes back
                weights = np.full(sum(len(shard.labels_n) for shard in scored), np.nan)
        return self.workers.agree(weights)

    def head(self, matrix_CD: Tensor) -> Head:
        """A head with a copy of this matrix, on the CPU."""
        return Head(self.problem.head.name, matrix_CD.detach().cpu().clone(), self.problem.head.has_bias)

    def _controlled_step(self, gradient_CD: Tensor, rate: float) -> None:
        if self._now is None:
            self._now = self._measure_forget()
        state = self.optimiser.state()
        for _ in range(HALVINGS):
            self.optimiser.step(gradient_CD, rate * self.scale)
            after = self._measure_forget()
            if self._within_trust_region(self._now, after):
                self.scale, self._now = min(1.0, 2 * self.scale), after
                return
            self.optimiser.load_state(state)
            self.scale /= 2

    def _within_trust_region(self, before: Record, after: Record) -> bool:
        control = self.config.step_control
        loss = abs(after["forget_loss"] - before["forget_loss"])
        accuracy = abs(after["forget_accuracy"] - before["forget_accuracy"])
        # One sample more or less must be allowed, or a small set could never move.
        limit = math.inf if control.max_accuracy_change is None else max(control.max_accuracy_change, 1 / len(self.problem.forget))
        return math.isfinite(loss) and accuracy <= limit + 1e-12 and loss <= (control.max_loss_change or math.inf)

    def _measure_forget(self) -> Record:
        return measure({"forget": self.problem.forget}, self.problem.head, self.optimiser.matrix, self.workers)

    def check(self, step: float | None = None) -> Record:
        """Every figure of the trajectory with the present head; ``step`` when it lies between two steps."""
        at = float(self.step if step is None else step)
        original, weights = self.problem.head, self.weights
        sets = {"forget": self.problem.forget, **self.problem.evaluation}
        record = {"step": at, "epoch": at / self.steps_per_epoch, **measure(sets, original, self.optimiser.matrix, self.workers)}
        drift = float((self.optimiser.matrix.cpu() - original.matrix_CD).norm() / original.matrix_CD.norm())
        record |= {"parameter_drift": drift, f"parameter_drift.{original.name}": drift, "gradient_norm": self.gradient_norm}
        record["effective_sample_size"] = float(weights.sum() ** 2 / (weights**2).sum()) if weights.any() else 0.0
        return {**record, "seconds": time.monotonic() - self.started}

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of all that the next step depends on."""
        counters = {"at_step": torch.tensor(self.step), "scale": torch.tensor(self.scale, dtype=torch.float64)}
        scored = {} if self.problem.rescoring is None else {"scored_at": self._scored_at}
        return {**self.optimiser.state(), **counters, **scored}

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Go back to a snapshot."""
        self.step, self.scale, self._now = int(snapshot["at_step"]), float(snapshot["scale"]), None
        self.optimiser.load_state({key: value for key, value in snapshot.items() if key not in ("at_step", "scale", "scored_at")})
        if self.problem.rescoring is not None and not torch.equal(snapshot["scored_at"], self._scored_at):
            self._score_at(self.problem.rescoring, snapshot["scored_at"])

    def go_on(self, good: Mapping[str, Tensor]) -> Record:
        """Steps up to the next check, and the check; from ``good``, the last one, an overshoot is taken back."""
        for _ in range(min(self.config.stop.every_steps, self.total_steps - self.step)):
            self.take_step()
        record = self.check()
        target = next((target for target in self.problem.targets if target.reached(record)), None)
        if target is not None and target.overshoot(record) > target.tolerance and math.isfinite(record["forget_loss"]):
            return self.back_to(target, good)
        return record

    def back_to(self, target: StopTarget, good: Mapping[str, Tensor]) -> Record:
        """From the last check before an overshoot, go to the first point of the path that meets the target.

        Steps are taken again one by one; within the step that crosses, the least fraction is found by bisection.
        """
        self.restore(good)
        while True:
            before = self.optimiser.matrix.clone()
            self.take_step()
            record = self.check()
            if target.reached(record):
                break
        after = self.optimiser.matrix.clone()
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            if target.overshoot(record) <= target.tolerance:
                break
            middle = (low + high) / 2
            self.optimiser.matrix.copy_(before + middle * (after - before))
            tried = self.check(self.step - 1 + middle)
            if target.reached(tried):
                high, record = middle, tried
            else:
                low = middle
        self.optimiser.matrix.copy_(before + high * (after - before))
        return record


def run_ascent(
    problem: AscentProblem,
    workers: Workers,
    *,
    resume: UpdateState | None = None,
    save: Callable[[UpdateState], None] = lambda state: None,
    checked: Callable[[Record, Head], None] = lambda record, head: None,
) -> AscentOutcome:
    """Ascend until a target is met, steps run out, or a guard speaks.

    Args:
        problem: what is ascended.
        workers: this worker and the others.
        resume: state to go on from.
        save: called with the state after every ``state_every_checks`` checks.
        checked: called with the record and the head of every good check.

    Returns:
        Status ``reached``, ``not_reached`` (no target was met, or one was jumped over), ``epochs_done`` (there was no target)
        or ``stopped_by_guard`` (the head is that of the last good check).
    """
    ascent, config = Ascent(problem, workers), problem.config
    trajectory = [ascent.check()] if resume is None else list(resume.trajectory)
    best = ascent.optimiser.matrix.clone()
    if resume is not None:
        best = resume.tensors["best"]
        ascent.restore({key: value for key, value in resume.tensors.items() if key != "best"})
        ascent.started -= trajectory[-1]["seconds"]
    good = ascent.snapshot()
    status, reason = _verdict(problem.targets, trajectory[-1])
    checks = 0
    with Progress("ascent", ascent.total_steps, "steps", quiet=workers.rank > 0) as progress:
        progress.advance(ascent.step)
        while not status and ascent.step < ascent.total_steps:
            begun = ascent.step
            record = ascent.go_on(good)
            violation = guard_violation(record, config.guard)
            if violation:
                status, reason = "stopped_by_guard", f"{violation} at step {record['step']:g}; went back to step {int(good['at_step'])}"
                ascent.restore(good)
                break
            trajectory.append(record)
            good = ascent.snapshot()
            status, reason = _verdict(problem.targets, record)
            checked(record, ascent.head(ascent.optimiser.matrix))
            if _nearest(problem.targets, trajectory) == len(trajectory) - 1:
                best = ascent.optimiser.matrix.clone()
            checks += 1
            if not status and checks % config.state_every_checks == 0:
                save(UpdateState(ascent.step, {**good, "best": best.cpu()}, list(trajectory)))
            progress.advance(ascent.step - begun, note=f"forget accuracy {record['forget_accuracy']:.3f}")
    kept = trajectory[-1]
    if config.keep == "best":
        ascent.optimiser.matrix.copy_(best)
        kept = trajectory[_nearest(problem.targets, trajectory)]
    if not status:
        status, reason = _steps_ran_out(problem.targets, kept)
    return AscentOutcome(ascent.head(ascent.optimiser.matrix), kept, status, reason, trajectory)


def _steps_ran_out(targets: Sequence[StopTarget], kept: Record) -> tuple[str, str]:
    if not targets:
        return "epochs_done", "there was no target; all steps were taken"
    return "not_reached", f"of all steps, at step {kept['step']:g} " + "; ".join(target.describe(kept) for target in targets)


def _nearest(targets: Sequence[StopTarget], trajectory: Sequence[Record]) -> int:
    """Index of the check nearest the first target; the latest when there is none."""
    if not targets:
        return len(trajectory) - 1
    return min(range(len(trajectory)), key=lambda i: (abs(targets[0].overshoot(trajectory[i])), i))


def _verdict(targets: Sequence[StopTarget], record: Record) -> tuple[str, str]:
    """Status and reason after a check, or two empty strings to go on."""
    for target in targets:
        if target.reached(record):
            if record["step"] == 0:
                return "reached", f"the original model is there already and is left as it is: {target.describe(record)}"
            if target.overshoot(record) > target.tolerance:
                return "not_reached", f"the target was jumped over by more than ascent.stop.tolerance: {target.describe(record)}"
            return "reached", target.describe(record)
    return "", ""
