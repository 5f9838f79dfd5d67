"""Curvature of the forget-set loss in the head: one class per kind, and the registry that every stage reads."""

from imu_ray.influence.curvature.base import Curvature
from imu_ray.influence.curvature.diagonal import DiagonalFisher, Identity
from imu_ray.influence.curvature.ggn import BlockGGN, FeatureSecondMoment, FullGGN

CURVATURES: dict[str, Curvature] = {
    "diagonal_fisher": DiagonalFisher(),
    "identity": Identity(),
    "feature_second_moment": FeatureSecondMoment(),
    "block_ggn": BlockGGN(),
    "full_ggn": FullGGN(),
}
