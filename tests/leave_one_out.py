"""What influence ought to predict: a regularised head is refitted without one row, and the mean forget loss changes.

python tests/leave_one_out.py      prints the Spearman correlation of every curvature's scores with the truth
"""

import torch
from scipy.stats import spearmanr

from imu_ray.influence.curvature import CURVATURES
from imu_ray.influence.curvature.base import Damping, Moments, damped_direction, merge_tree
from imu_ray.influence.gradients import classifier_io
from imu_ray.influence.scores import influence_scores

ROWS, FORGET, LEFT_OUT, C, D, L2 = 1000, 300, 150, 5, 8, 1e-2


def samples(seed=0):
    """Inputs with overlapping classes, a bias input, and one label in ten wrong."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, C, (ROWS,), generator=generator)
    centres = torch.randn(C, D - 1, generator=generator, dtype=torch.float64)
    scale = torch.rand(ROWS, 1, generator=generator, dtype=torch.float64) + 0.5
    inputs = centres[labels] + scale * torch.randn(ROWS, D - 1, generator=generator, dtype=torch.float64)
    wrong = torch.rand(ROWS, generator=generator) < 0.1
    labels = torch.where(wrong, torch.randint(0, C, (ROWS,), generator=generator), labels)
    return torch.cat([inputs, torch.ones(ROWS, 1, dtype=torch.float64)], 1), labels


def gradient_and_hessian(matrix, inputs, labels):
    """Of (sum of the cross-entropies) / ROWS + L2/2 |W|^2, written out."""
    p = torch.softmax(inputs @ matrix.T, 1)
    gradient = (p - torch.nn.functional.one_hot(labels, C)).T @ inputs / ROWS + L2 * matrix
    outer = torch.einsum("nc,nd->ncd", p, -p) + torch.diag_embed(p)
    hessian = torch.einsum("nab,nd,ne->adbe", outer, inputs, inputs).reshape(C * D, C * D) / ROWS
    return gradient, hessian + L2 * torch.eye(C * D, dtype=torch.float64)


def fit(inputs, labels, matrix=None):
    """Newton's method to a gradient norm below 1e-10."""
    matrix = torch.zeros(C, D, dtype=torch.float64) if matrix is None else matrix.clone()
    for _ in range(50):
        gradient, hessian = gradient_and_hessian(matrix, inputs, labels)
        if gradient.norm() < 1e-10:
            return matrix
        matrix -= torch.linalg.solve(hessian, gradient.reshape(-1)).reshape(C, D)
    raise AssertionError("the head was not fitted")


def forget_loss(matrix, inputs, labels):
    return float(torch.nn.functional.cross_entropy(inputs[:FORGET] @ matrix.T, labels[:FORGET]))


def truth():
    """Inputs, labels, the fitted head, and the change of the mean forget loss without each of the first rows."""
    inputs, labels = samples()
    matrix = fit(inputs, labels)
    before = forget_loss(matrix, inputs, labels)
    changes = []
    for row in range(LEFT_OUT):
        others = torch.arange(ROWS) != row
        changes.append(forget_loss(fit(inputs[others], labels[others], matrix), inputs, labels) - before)
    return inputs, labels, matrix, changes


def layer_io(inputs, labels, matrix, rows):
    return classifier_io(inputs[rows], inputs[rows] @ matrix.T, labels[rows])


def scores(inputs, labels, matrix, curvature, fitted_rows, damping=L2):
    """Influence of the first rows on the mean forget loss; leaving a row out changes it by -I/n."""
    blocks = [slice(start, min(start + 64, fitted_rows)) for start in range(0, fitted_rows, 64)]
    reduce = lambda statistics: merge_tree(statistics(layer_io(inputs, labels, matrix, rows)) for rows in blocks)
    fitted = CURVATURES[curvature].fit(reduce, Damping(damping))
    direction = damped_direction(fitted, Moments.of(layer_io(inputs, labels, matrix, slice(0, FORGET))))
    return influence_scores(layer_io(inputs, labels, matrix, slice(0, LEFT_OUT)), direction).numpy()


def agreement(problem, curvature, fitted_rows, damping=L2):
    """Spearman correlation of -I with the truth."""
    inputs, labels, matrix, changes = problem
    return float(spearmanr(-scores(inputs, labels, matrix, curvature, fitted_rows, damping), changes).statistic)


if __name__ == "__main__":
    problem = truth()
    for name in sorted(CURVATURES):
        figures = [agreement(problem, name, rows, damping) for rows in (ROWS, FORGET) for damping in (L2, 1e-4)]
        print(f"{name:<18}" + "".join(f"{figure:8.3f}" for figure in figures))
