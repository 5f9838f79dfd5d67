"""The iterative update: weighted steps over global batches with checks between them, for any number of workers."""

import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from imu_ray.progress import Progress
from imu_ray.run.directory import UpdateState
from imu_ray.scopes.base import Parameters, Record, Scope, Weights, norm
from imu_ray.scopes.features import Positions, of_rows
from imu_ray.updates.base import UpdateOutcome, UpdateProblem, ignore_check, ignore_state
from imu_ray.updates.batches import epoch_batches
from imu_ray.updates.objectives import OBJECTIVES
from imu_ray.updates.optimiser import Optimiser, learning_rate, part_of
from imu_ray.updates.rescoring import Rescoring
from imu_ray.updates.stopping import StopTarget, guard_violation, verdict

HALVINGS = 40
EXPLODED = 1e200  # entries from which outputs could overflow: features are within the range of float32


class Iteration:
    """One worker's view of an iterative update: steps, checks and snapshots. Every worker takes the same decisions."""

    def __init__(self, scope: Scope, problem: UpdateProblem) -> None:
        self.scope, self.problem, self.config = scope, problem, problem.config
        self.original = scope.parameters()
        self.optimiser = Optimiser(self.original, problem.config, problem.preconditioners)
        # Samples that are not kept now may be when they are scored again.
        kept = np.flatnonzero(of_rows(problem.weights) > 0)
        self.candidates = kept if problem.rescoring is None else np.arange(scope.rows)
        self.weights, self._scored_at = problem.weights, self.original
        self.steps_per_epoch = math.ceil(len(self.candidates) / self.config.batch_size)
        steps = self.steps_per_epoch * self.config.stop.max_epochs
        self.total_steps = min(steps, self.config.stop.max_steps or steps)
        self.step, self.gradient_norm, self.scale = 0, 0.0, 1.0
        self.started = time.monotonic()
        self._now: Record | None = None  # the forget set under the present parameters, where known
        self._epoch = -1
        self._batches: list[Positions] = []

    @property
    def parameters(self) -> Parameters:
        """The present parameters; steps change them in place."""
        return self.optimiser.parameters

    def take_step(self) -> None:
        """One global step, within the trust region if there is one."""
        epoch, place = divmod(self.step, self.steps_per_epoch)
        problem = self.problem
        if epoch != self._epoch:
            starts = self.scope.block_starts
            self._epoch, self._batches = epoch, epoch_batches(self.candidates, starts, self.config, problem.seed, epoch)
        batch = self._batches[place]
        if problem.rescoring is not None:
            self._rescore(problem.rescoring, place)
            batch = batch[self.weights[batch] > 0]
        objective = OBJECTIVES[self.config.objective]
        gradient = self.scope.batch_gradient(self.parameters, batch, self.weights, objective, self.config.piece_rows)
        self.gradient_norm = norm(gradient)
        limit = self.config.max_gradient_norm
        if limit is not None and self.gradient_norm > limit:
            gradient = {name: tensor * (limit / self.gradient_norm) for name, tensor in gradient.items()}
        rate = learning_rate(self.config, self.step, self.total_steps)
        if self.config.max_change:
            self._controlled_step(gradient, rate)
        else:
            self.optimiser.step(gradient, rate)
        self.step += 1

    def _rescore(self, rescoring: Rescoring, place: int) -> None:
        """New weights of this batch, or of the forget set at the start of every epoch after the first."""
        if rescoring.every_step:
            batch = self._batches[place]
            self.weights = np.zeros(self.scope.rows)
            self.weights[batch] = self._scored(rescoring, self.parameters, batch)
        elif place == 0 and self.step > 0:
            self._score_at(rescoring, self.parameters)

    def _score_at(self, rescoring: Rescoring, parameters: Mapping[str, Tensor]) -> None:
        self._scored_at = {name: tensor.clone() for name, tensor in parameters.items()}
        self.weights = self.problem.weights
        if not _same(self._scored_at, self.original):
            self.weights = self._scored(rescoring, self._scored_at, None)

    def _scored(self, rescoring: Rescoring, parameters: Parameters, batch: Positions | None) -> Weights:
        """New weights of the forget set or of a batch, the first worker's on every worker.

        NaN when the parameters have exploded.
        """
        problem, scope, weights = self.problem, self.scope, np.empty(0)
        if scope.workers.rank == 0:
            if all(bool((tensor.abs() < EXPLODED).all()) for tensor in parameters.values()):
                pieces = self.config.piece_rows
                weights = rescoring.weights(scope, parameters, problem.curvature_set, batch, pieces, problem.seed)
            else:  # the next check finds what the parameters have come to, and the guard goes back
                weights = np.full(scope.rows if batch is None else len(batch), np.nan)
        return scope.workers.agree(weights)

    def _controlled_step(self, gradient: Parameters, rate: float) -> None:
        """A step within the trust region: halved until it is, and the next one doubled if it used less than half."""
        if self._now is None:
            self._now = self.scope.measure(self.parameters, ["forget"])
        state = self.optimiser.state()
        for _ in range(HALVINGS):
            self.optimiser.step(gradient, rate * self.scale)
            after = self.scope.measure(self.parameters, ["forget"])
            used = self._share_of_trust_region(self._now, after)
            if used <= 1:
                self.scale, self._now = self.scale * (2 if used < 0.5 else 1), after
                return
            self.optimiser.load_state(state)
            self.scale /= 2

    def _share_of_trust_region(self, before: Record, after: Record) -> float:
        """Largest change of a metric as a share of what is allowed; infinite when the loss is not finite."""
        shares = [0.0 if math.isfinite(after["forget.loss"]) else math.inf]
        for name, limit in self.config.max_change.items():
            counted = self.scope.metrics[name.rpartition(".")[2]].counted
            # One sample more or less must be allowed, or a small set could never move.
            allowed = max(limit, 1 / self.scope.rows) + 1e-12 if counted else limit
            shares.append(abs(after[name] - before[name]) / allowed)
        return max(shares)

    def check(self, step: float | None = None) -> Record:
        """Every figure of the trajectory with the present parameters; ``step`` when it lies between two steps."""
        at = float(self.step if step is None else step)
        weights = of_rows(self.weights)
        return {
            "step": at,
            "epoch": at / self.steps_per_epoch,
            **self.scope.measure(self.parameters),
            **drift(self.parameters, self.original),
            "gradient_norm": self.gradient_norm,
            "effective_sample_size": float(weights.sum() ** 2 / (weights**2).sum()) if weights.any() else 0.0,
            "seconds": time.monotonic() - self.started,
        }

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of all that the next step depends on."""
        counters = {"at_step": torch.tensor(self.step), "scale": torch.tensor(self.scale, dtype=torch.float64)}
        scored = {} if self.problem.rescoring is None else self._scored_at
        return {
            **self.optimiser.state(),
            **counters,
            **{f"scored_at.{name}": tensor.cpu() for name, tensor in scored.items()},
        }

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Go back to a snapshot."""
        self.step, self.scale, self._now = int(snapshot["at_step"]), float(snapshot["scale"]), None
        self.optimiser.load_state(snapshot)
        if self.problem.rescoring is not None:
            scored_at = {
                name: tensor.to(self.scope.workers.device) for name, tensor in part_of(snapshot, "scored_at").items()
            }
            if not _same(scored_at, self._scored_at):
                self._score_at(self.problem.rescoring, scored_at)

    def run_to_check(self, good: Mapping[str, Tensor]) -> Record:
        """Steps up to the next check, and the check; from ``good``, the last one, an overshoot is taken back."""
        for _ in range(min(self.config.stop.every_steps, self.total_steps - self.step)):
            self.take_step()
        record = self.check()
        target = next((target for target in self.problem.targets if target.reached(record)), None)
        if target is not None and target.overshoot(record) > target.tolerance and math.isfinite(record["forget.loss"]):
            return self.bisect_to(target, good)
        return record

    def bisect_to(self, target: StopTarget, good: Mapping[str, Tensor]) -> Record:
        """From the last check before an overshoot, find the first point of the path that meets the target.

        Steps are taken again one by one; within the step that crosses, the least fraction is found by bisection.
        """
        self.restore(good)
        while True:
            before = {name: tensor.clone() for name, tensor in self.parameters.items()}
            self.take_step()
            record = self.check()
            if target.reached(record):
                break
        after = {name: tensor.clone() for name, tensor in self.parameters.items()}

        def go_to(share: float) -> None:
            self.optimiser.set({name: tensor + share * (after[name] - tensor) for name, tensor in before.items()})

        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            if target.overshoot(record) <= target.tolerance:
                break
            middle = (low + high) / 2
            go_to(middle)
            tried = self.check(self.step - 1 + middle)
            if target.reached(tried):
                high, record = middle, tried
            else:
                low = middle
        go_to(high)
        return record


def run_iterative(
    scope: Scope,
    problem: UpdateProblem,
    *,
    resume: UpdateState | None = None,
    save: Callable[[UpdateState], None] = ignore_state,
    checked: Callable[[Record, Parameters], None] = ignore_check,
) -> UpdateOutcome:
    """Take steps until a target is met, steps run out, or a guard speaks; arguments as in ``Update``.

    Returns:
        Status ``already_met``, ``reached``, ``not_reached`` (no target was met, or one was jumped over),
        ``epochs_done`` (there was no target) or ``stopped_by_guard`` (the parameters are those of the last good check).
    """
    iteration, config = Iteration(scope, problem), problem.config
    trajectory = [iteration.check()] if resume is None else list(resume.trajectory)
    best = copies(iteration.parameters)
    if resume is not None:
        best = part_of(resume.tensors, "best")
        iteration.restore(resume.tensors)
        iteration.started -= trajectory[-1]["seconds"]
    good = iteration.snapshot()
    status, reason = verdict(problem.targets, trajectory[-1])
    checks = 0
    with Progress("ascent", iteration.total_steps, "steps", quiet=scope.workers.rank > 0) as progress:
        progress.advance(iteration.step)
        while not status and iteration.step < iteration.total_steps:
            begun = iteration.step
            record = iteration.run_to_check(good)
            violation = guard_violation(record, config.guard, scope.metrics)
            if violation:
                status = "stopped_by_guard"
                reason = f"{violation} at step {record['step']:g}; went back to step {int(good['at_step'])}"
                iteration.restore(good)
                break
            trajectory.append(record)
            good = iteration.snapshot()
            status, reason = verdict(problem.targets, record)
            checked(record, copies(iteration.parameters))
            if nearest_check(problem.targets, trajectory) == len(trajectory) - 1:
                best = copies(iteration.parameters)
            checks += 1
            if not status and checks % config.state_every_checks == 0:
                kept = {f"best.{name}": tensor for name, tensor in best.items()}
                save(UpdateState(iteration.step, {**good, **kept}, list(trajectory)))
            progress.advance(iteration.step - begun, note=f"forget loss {record['forget.loss']:.3f}")
    kept_record = trajectory[-1]
    if config.keep == "best":
        iteration.optimiser.set(best)
        kept_record = trajectory[nearest_check(problem.targets, trajectory)]
    if not status:
        status, reason = _steps_ran_out(problem.targets, kept_record)
    return UpdateOutcome(copies(iteration.parameters), kept_record, status, reason, trajectory)


def copies(parameters: Mapping[str, Tensor]) -> Parameters:
    """Copies on the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in parameters.items()}


def drift(parameters: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> Record:
    """How far the parameters are from the original ones, as a share of their norm: in all, and by layer; 0 of zeros."""
    moved = {name: tensor - original[name] for name, tensor in parameters.items()}
    by_layer = {
        f"parameter_drift.{name}": _share(float(moved[name].norm()), float(original[name].norm())) for name in moved
    }
    return {"parameter_drift": _share(norm(moved), norm(original)), **by_layer}


def _share(part: float, whole: float) -> float:
    return part / whole if whole else part


def nearest_check(targets: Sequence[StopTarget], trajectory: Sequence[Record]) -> int:
    """Index of the check nearest the first target; the latest when there is none."""
    if not targets:
        return len(trajectory) - 1
    return min(range(len(trajectory)), key=lambda i: (abs(targets[0].overshoot(trajectory[i])), i))


def _steps_ran_out(targets: Sequence[StopTarget], kept: Record) -> tuple[str, str]:
    if not targets:
        return "epochs_done", "there was no target; all steps were taken"
    return "not_reached", f"of all steps, at step {kept['step']:g} " + "; ".join(
        target.describe(kept) for target in targets
    )


def _same(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(tensor, others[name]) for name, tensor in some.items())
