"""What every update works on and gives back."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from imu_ray.config import AscentConfig
from imu_ray.influence.curvature.base import FittedCurvature
from imu_ray.run.directory import UpdateState
from imu_ray.scopes.base import Parameters, Record, Scope, Weights
from imu_ray.updates.rescoring import Rescoring
from imu_ray.updates.stopping import StopTarget


@dataclass(frozen=True)
class UpdateProblem:
    """What an update is to do: weights of the forget set, settings, targets, and the curvature that steers it.

    Attributes:
        weights: intensities of the forget set, ``[N]``, 0 where a sample is not kept; or of its tokens, ``[N, T]``, NaN
            where there is none.
        config: ``ascent.*``.
        seed: seed of the run.
        targets: the first that is met ends the update.
        preconditioners: damped inverse curvature by layer; empty: none.
        rescoring: how intensities are made again; None: never.
        curvature_set: evaluation set that influence is fitted on when it is scored again; None: the forget set.
    """

    weights: Weights
    config: AscentConfig
    seed: int
    targets: Sequence[StopTarget] = ()
    preconditioners: Mapping[str, FittedCurvature] = field(default_factory=dict)
    rescoring: Rescoring | None = None
    curvature_set: str | None = None


@dataclass(frozen=True)
class UpdateOutcome:
    """The parameters kept and their record, how the update ended and why, and the trajectory (a row per check)."""

    parameters: Parameters
    record: Record
    status: str
    reason: str
    trajectory: list[Record]


def ignore_state(state: UpdateState) -> None:
    """Nobody keeps the state."""


def ignore_check(record: Record, parameters: Parameters) -> None:
    """Nobody waits for the checks."""


class Update(Protocol):
    """A way to move the parameters of a scope to a target; the same code for one worker and for many."""

    def __call__(
        self,
        scope: Scope,
        problem: UpdateProblem,
        *,
        resume: UpdateState | None = None,
        save: Callable[[UpdateState], None] = ignore_state,
        checked: Callable[[Record, Parameters], None] = ignore_check,
    ) -> UpdateOutcome:
        """Run until a target is met, nothing is left to try, or a guard speaks.

        Args:
            scope: what moves.
            problem: what is to be done.
            resume: state to take up.
            save: called with the state after every ``state_every_checks`` checks.
            checked: called with the record and the parameters of every good check.
        """
        ...
