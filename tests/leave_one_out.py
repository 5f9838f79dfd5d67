"""What influence ought to predict: a regularised head is refitted without one row, and the mean forget loss changes.

python tests/leave_one_out.py      prints the Spearman correlation of every curvature's scores with the truth
"""

import torch
from pure import classifier_io
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression

from imu_ray.influence.curvature import CURVATURES
from imu_ray.influence.curvature.base import Damping, Moments, damped_direction, merge_tree
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


def fit(inputs, labels):
    """The head ``[C, D]`` that minimises (sum of the cross-entropies) / ROWS + L2/2 |W|^2."""
    solver = LogisticRegression(C=1 / (ROWS * L2), fit_intercept=False, solver="newton-cg", tol=1e-10, max_iter=1000)
    return torch.from_numpy(solver.fit(inputs.numpy(), labels.numpy()).coef_)


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
        changes.append(forget_loss(fit(inputs[others], labels[others]), inputs, labels) - before)
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
