"""The update in one step: a gradient and a curvature of the whole forget set, then a search for the step's length."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from imu_ray.progress import Progress
from imu_ray.run.directory import UpdateState
from imu_ray.scopes.base import Parameters, Record, Scope, norm
from imu_ray.scopes.features import of_rows
from imu_ray.updates.base import UpdateOutcome, UpdateProblem, ignore_check, ignore_state
from imu_ray.updates.iterative import copies, drift
from imu_ray.updates.objectives import OBJECTIVES
from imu_ray.updates.optimiser import part_of
from imu_ray.updates.stopping import StopTarget, guard_violation, verdict

FIRST_LENGTH = 1e-2  # of the first trial, as a share of the parameters' norm; runs were seen to end at 0.01 to 20 of it
FIRST_STEP = 2**-5  # from the length that a part of the rows ends at, as a share of it: nearer they seldom agree
TRIALS = 80  # of lengths on one set of rows


class Line:
    """A line of parameters: an origin, a unit direction by layer, and the norm of the step that it comes from."""

    def __init__(self, origin: Parameters, unit: Parameters, size: float) -> None:
        self.origin, self.unit, self.size = origin, unit, size

    @classmethod
    def of(cls, scope: Scope, problem: UpdateProblem, origin: Parameters) -> "Line":
        """In the direction in which the forget set's objective falls fastest under the curvature."""
        kept, settings = np.flatnonzero(of_rows(problem.weights) > 0), problem.config
        objective = OBJECTIVES[settings.objective]
        gradient = scope.batch_gradient(origin, kept, problem.weights, objective, settings.piece_rows)
        for name, fitted in problem.preconditioners.items():
            gradient[name] = fitted.apply_inverse(gradient[name])
        size = norm(gradient)
        return cls(origin, {name: -tensor / size for name, tensor in gradient.items()} if size else gradient, size)

    def at(self, length: float) -> Parameters:
        """The parameters so far from the origin."""
        return {name: tensor + length * self.unit[name] for name, tensor in self.origin.items()}

    def state(self) -> dict[str, Tensor]:
        """What a run that is taken up begins with."""
        size = torch.tensor(self.size, dtype=torch.float64)
        return {"size": size, **{f"unit.{name}": tensor.cpu() for name, tensor in self.unit.items()}}


@dataclass
class Bracket:
    """Lengths between which a target is first met: steps that double until both are known, then halves of what is left.

    The first steps are up from a length that met none, and down from one that did.
    """

    length: float
    step: float
    low: float = 0.0
    high: float = 0.0

    def narrow(self, met: bool) -> None:
        """Take in whether the length that was tried met a target."""
        if met:
            self.high = self.length
        else:
            self.low = self.length
        middle = (self.low + self.high) / 2
        self.length = max(middle, self.high - self.step) if self.high else self.low + self.step
        self.step *= 2


class Search:
    """The trials of lengths along a line, and the shortest that met a target. Each that stands is a check.

    Where a trial on all rows costs much, the length is first searched on a fixed part of them, and then on all.
    """

    def __init__(
        self, scope: Scope, problem: UpdateProblem, checked: Callable[[Record, Parameters], None], progress: Progress
    ) -> None:
        self.scope, self.problem, self.checked, self.progress = scope, problem, checked, progress
        self.original = self.kept = scope.parameters()
        self.scale = norm(self.original) or 1.0
        self.started = time.monotonic()
        self.best = self._check(self.original, 0.0, 0.0)
        self.trajectory = [self.best]

    @property
    def judged(self) -> list[str]:
        """The sample sets that targets and guards look at."""
        named = [target.metric for target in self.problem.targets] + list(self.problem.config.guard.limits)
        sets = {"forget", *(name.rpartition(".")[0] for name in named)} - {"membership"}
        return sorted(sets | ({"test"} if "membership.auc" in named else set()))

    def _check(
        self, parameters: Parameters, length: float, gradient_norm: float, measured: Record | None = None
    ) -> Record:
        weights = of_rows(self.problem.weights)
        return {
            "step": float(len(self.trajectory)) if length else 0.0,
            "length": length,
            **(self.scope.measure(parameters) if measured is None else measured),
            **drift(parameters, self.original),
            "gradient_norm": gradient_norm,
            "effective_sample_size": float(weights.sum() ** 2 / (weights**2).sum()),
            "seconds": time.monotonic() - self.started,
        }

    def begin(self, line: Line) -> Bracket:
        """Where the search on all rows begins: at what a part of them ends at, where a trial on all costs much."""
        first = FIRST_LENGTH * self.scale
        bracket = Bracket(first, first)
        for _ in range(TRIALS):
            parameters = line.at(bracket.length)
            measured = self.scope.probe(parameters, self.judged)
            if measured is None:
                break
            record = self._check(parameters, bracket.length, line.size, measured)
            target = self._met(record)
            self.progress.advance(note=f"forget loss {record['forget.loss']:.3f} on a part of the rows")
            if target is None and guard_violation(record, self.problem.config.guard, self.scope.metrics):
                break
            bracket.narrow(target is not None)
            if target is not None and target.overshoot(record) <= target.tolerance:
                break
        if bracket.high:
            return Bracket(bracket.high, max(bracket.high - bracket.low, FIRST_STEP * bracket.high))
        last = bracket.low or first
        return Bracket(last, last)

    def _met(self, record: Record) -> StopTarget | None:
        return next((target for target in self.problem.targets if target.reached(record)), None)

    def follow(self, line: Line) -> tuple[str, str]:
        """Find the shortest length of a line that meets a target, and keep it; status and reason."""
        targets, config = self.problem.targets, self.problem.config
        bracket = self.begin(line)
        for _ in range(TRIALS):
            length = bracket.length
            parameters = line.at(length)
            record = self._check(parameters, length, line.size)
            target = self._met(record)
            violation = guard_violation(record, config.guard, self.scope.metrics)
            self.progress.advance(note=f"forget loss {record['forget.loss']:.3f}")
            if not violation:
                self.trajectory.append(record)
                self.checked(record, copies(parameters))
            elif target is None:
                where = "; ".join(target.describe(record) for target in targets)
                return (
                    "stopped_by_guard",
                    f"{violation} at length {length:.3g}, where {where}; the parameters are as they were",
                )
            bracket.narrow(target is not None)
            if target is not None:
                self.kept, self.best = parameters, record
                if target.overshoot(record) <= target.tolerance:
                    break
        violation = guard_violation(self.best, config.guard, self.scope.metrics)
        if violation:
            self.kept, self.best = self.original, self.trajectory[0]
            return "stopped_by_guard", f"{violation} wherever the target is met; the parameters are as they were"
        return verdict(targets, self.best) if bracket.high else ("not_reached", f"no length of {TRIALS} met the target")


def run_one_step(
    scope: Scope,
    problem: UpdateProblem,
    *,
    resume: UpdateState | None = None,
    save: Callable[[UpdateState], None] = ignore_state,
    checked: Callable[[Record, Parameters], None] = ignore_check,
) -> UpdateOutcome:
    r"""Move along one direction to the nearest point that meets a target; arguments as in ``Update``.

    .. math:: \theta \leftarrow \theta - \epsilon\, P^{-1} \bar g

    with :math:`\bar g` the weighted mean gradient of the objective over the whole forget set and P the curvature. The
    length is doubled until a target is met and then bisected until the overshoot is within the target's tolerance.
    Where none is met the parameters are left as they were. There is no learning rate and there are no epochs. A run
    that is taken up begins anew on the head, where it takes seconds; on layers it goes on with the direction that it
    had found.

    Returns:
        Status ``already_met``, ``reached``, ``not_reached`` (also when a target was jumped over), or
        ``stopped_by_guard``.
    """
    with Progress("ascent", TRIALS, "trials", quiet=scope.workers.rank > 0) as progress:
        search = Search(scope, problem, checked, progress)
        status, reason = verdict(problem.targets, search.best)
        if not status:
            line = take_line(scope, problem, search, resume, save)
            status, reason = search.follow(line) if line.size else ("not_reached", "no sample pulls on the parameters")
    return UpdateOutcome(copies(search.kept), search.best, status, reason, search.trajectory)


def take_line(
    scope: Scope,
    problem: UpdateProblem,
    search: Search,
    resume: UpdateState | None,
    save: Callable[[UpdateState], None],
) -> Line:
    """The line of a run that is taken up, or a new one, which is saved where it costs more than seconds."""
    if resume is not None:
        return Line(search.original, part_of(resume.tensors, "unit"), float(resume.tensors["size"]))
    line = Line.of(scope, problem, search.original)
    if problem.config.deep:
        save(UpdateState(0, line.state(), search.trajectory))
    return line
