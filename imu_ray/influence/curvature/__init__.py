"""Curvature of the forget-set loss in the head: one class per kind, and the registries that the stages read."""

from imu_ray.influence.curvature.base import Curvature
from imu_ray.influence.curvature.diagonal import DiagonalFisher, Identity
from imu_ray.influence.curvature.ggn import BlockGGN, FeatureSecondMoment, FullGGN

CURVATURES: dict[str, Curvature] = {
    "diagonal_fisher": DiagonalFisher(),
    "identity": Identity(),
}
# Apart, because their damping is a share of the mean eigenvalue and that of the others is absolute.
PRECONDITIONERS: dict[str, Curvature] = {
    "feature_second_moment": FeatureSecondMoment(),
    "block_ggn": BlockGGN(),
    "full_ggn": FullGGN(),
}
