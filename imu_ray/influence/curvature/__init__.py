"""Curvature of the forget-set loss in the head (kronecker.py: in any layer): a class per kind, and their registries."""

from imu_ray.influence.curvature.base import Curvature, LayerCurvature, Preconditioner
from imu_ray.influence.curvature.diagonal import DiagonalFisher, Identity
from imu_ray.influence.curvature.ggn import BlockGGN, FeatureSecondMoment, FullGGN
from imu_ray.influence.curvature.hessian import Hessian
from imu_ray.influence.curvature.kronecker import KFAC

CURVATURES: dict[str, Curvature] = {
    "diagonal_fisher": DiagonalFisher(),
    "identity": Identity(),
    "kfac": KFAC(),
    "hessian": Hessian(),
}
# Apart, because they are scaled, so that a learning rate means about the same under each.
PRECONDITIONERS: dict[str, Preconditioner] = {
    "feature_second_moment": FeatureSecondMoment(),
    "block_ggn": BlockGGN(),
    "full_ggn": FullGGN(),
}
# Of one layer among several; not rescaled.
LAYER_CURVATURES: dict[str, LayerCurvature] = {"block_ggn": BlockGGN(), "kfac": KFAC()}
