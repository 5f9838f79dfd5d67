"""What each objective does to a sample's logits: the gradient that a descent step is taken along.

Not every useful one is the gradient of a loss. Shapes: B samples, C classes; everything float64.
"""

from collections.abc import Callable

from torch import Tensor

from imu_ray.influence.gradients import output_gradient

LogitGradient = Callable[[Tensor, Tensor, Tensor], Tensor]


def ascent(logits_BC: Tensor, labels_B: Tensor, original_logits_BC: Tensor) -> Tensor:
    r"""Ascent on the cross-entropy: :math:`-(p - \mathrm{onehot}(y))`, the gradient of :math:`-\ell`.

    Args:
        logits_BC: current logits.
        labels_B: class indices.
        original_logits_BC: logits before unlearning; not used.

    Returns:
        ``[B, C]``. Source: arXiv:2508.01620.
    """
    return -output_gradient(logits_BC, labels_B)


OBJECTIVES: dict[str, LogitGradient] = {"ascent": ascent}
