"""Each baseline of the study against its equation written out, on tiny float64 nets."""

import itertools

import pytest
import torch
from torch import nn

from tests.benchmarks import baselines
from tests.benchmarks.baselines import Problem

CLASSES, LR = 4, 0.1


def problem_of(model=None, rows=7):
    """A linear model by default, which has closed forms; images look the same when they are flipped."""
    torch.manual_seed(0)
    images = torch.randn(rows, 3, 2, 2, dtype=torch.float64)
    model = model or nn.Sequential(nn.Flatten(), nn.Linear(12, CLASSES))
    images, labels = images + images.flip(3), torch.arange(rows) % CLASSES
    return Problem(
        model.double().eval(), images, labels, crop=0, train_images=images.flip(0), train_labels=labels.flip(0)
    )


def parts(problem, inputs=None):
    """Inputs of the head with a 1 appended, and output gradients."""
    h = problem.images.flatten(1) if inputs is None else inputs
    r = (
        baselines.head_of(problem.model)(h).detach().softmax(1)
        - torch.eye(CLASSES, dtype=torch.float64)[problem.labels]
    )
    return torch.cat([h, torch.ones_like(h[:, :1])], 1), r


def matrix(problem):
    head = baselines.head_of(problem.model)
    return torch.cat([head.weight, head.bias[:, None]], 1).detach().clone()


def moved(problem, method, steps=1, **settings):
    """The head before the last of some steps, after it, and what its h and r were."""
    progress = method(problem, **settings)
    for _ in range(steps - 1):
        next(progress)
    before, (h, r) = matrix(problem), parts(problem)
    next(progress)
    return before, matrix(problem), h, r


@pytest.mark.parametrize("method", [baselines.ascend, baselines.ascend_head])
def test_ascent_adds_the_mean_gradient(method):
    before, after, h, r = moved(problem_of(), method, lr=LR)
    torch.testing.assert_close(after, before + LR * r.T @ h / len(h))


@pytest.mark.parametrize("beta", [0.1, 1.0, 4.0])
def test_npo_weighs_gradients_by_how_far_the_probability_has_fallen(beta):
    problem = problem_of()
    original = matrix(problem)
    with torch.no_grad():
        baselines.head_of(problem.model).weight.add_(torch.randn_like(original[:, :-1]))
    h, r = parts(problem)
    rows = torch.arange(len(h))
    now, then = ((h @ m.T).softmax(1)[rows, problem.labels] for m in (matrix(problem), original))
    loss = baselines.npo_loss(problem.model(problem.images), problem.labels, -then.log(), beta)
    gradient = torch.autograd.grad(loss, baselines.head_of(problem.model).weight)[0]
    weights = 2 * now**beta / (now**beta + then**beta)
    torch.testing.assert_close(gradient, -(weights[:, None] * r).T @ h[:, :-1] / len(h))


def test_npo_begins_as_gradient_ascent():
    before, after, h, r = moved(problem_of(), baselines.negative_preference, lr=LR, beta=1.0)
    torch.testing.assert_close(after, before + LR * r.T @ h / len(h))


def test_mu_mis_descends_the_target_rows_and_ascends_the_irrelevant_ones():
    problem = problem_of()
    before, after, _, _ = moved(problem, baselines.suppress_sensitivity, lr=LR)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(problem.labels), generator=torch.Generator().manual_seed(0))
    labels = problem.labels[order]
    others = (labels + torch.randint(1, CLASSES, labels.shape, generator=generator)) % CLASSES
    assert (others != labels).all()
    counts = torch.bincount(labels, minlength=CLASSES) - torch.bincount(others, minlength=CLASSES)
    expected = before.clone()
    expected[:, :-1] -= LR * 2 * counts[:, None] * before[:, :-1] / len(labels)  # dz_c/dx = W_c
    torch.testing.assert_close(after, expected)


def test_sensitivities_are_squared_norms_of_input_gradients():
    problem = problem_of(nn.Sequential(nn.Conv2d(3, 5, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(45, CLASSES)))
    inputs = problem.images.requires_grad_()
    found = baselines.sensitivities(problem.model(inputs), inputs, problem.labels).detach()
    for row, (image, label) in enumerate(zip(problem.images, problem.labels, strict=True)):
        jacobian = torch.autograd.functional.jacobian(lambda x: problem.model(x[None])[0], image)
        torch.testing.assert_close(found[row], jacobian[label].square().sum())


def test_influence_weights_follow_the_equations_row_by_row():
    problem = problem_of(rows=40)
    h, r = parts(problem)
    gradients = torch.einsum("nc,nd->ncd", r, h)
    scores = -torch.stack([(g * gradients.mean(0) / (gradients.square().mean(0) + 0.01)).sum() for g in gradients])
    roots = scores.abs().sqrt()
    expected = torch.where(scores < 0, roots.clamp(max=roots[scores < 0].quantile(0.93)), 0.0)
    found = baselines.influence_weights(h[:, :-1], problem.model(problem.images), problem.labels)
    torch.testing.assert_close(found, expected)
    assert (found == 0).any()


@pytest.mark.parametrize("method", [baselines.ascend_head, baselines.published_imu])
def test_imu_ascends_by_the_normalised_weights_and_shrinks_the_head(method):
    problem = problem_of()
    h, _ = parts(problem)
    weights = baselines.influence_weights(h[:, :-1], problem.model(problem.images), problem.labels)
    influence = {"influence": True} if method is baselines.ascend_head else {}
    before, after, h, r = moved(problem, method, lr=LR, l1=0.05, decay=0.02, **influence)
    expected = before + LR * ((weights[:, None] * r).T @ h / weights.sum() - 0.05 * before.sign() - 0.02 * before)
    torch.testing.assert_close(after, expected)


@pytest.mark.parametrize("everything", [False, True])
def test_the_published_code_lets_batch_norm_drift_and_moves_the_head_alone(everything):
    problem = problem_of(nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, CLASSES)))
    before = {name: value.clone() for name, value in problem.model.state_dict().items()}
    next(baselines.published_imu(problem, lr=LR, everything=everything))
    changed = {name for name, value in problem.model.state_dict().items() if not torch.equal(value, before[name])}
    drifted = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert changed == (set(before) if everything else drifted | {"3.weight", "3.bias"})
    assert problem.model[1].num_batches_tracked == 2


@pytest.mark.parametrize("method", ["gradient ascent", "NPO", "MU-Mis", "IMU, head", "uniform, head"])
def test_the_others_keep_batch_norm_statistics(method):
    problem = problem_of(nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, CLASSES)))
    problem.model.train()
    tried = baselines.METHODS[method]
    list(itertools.islice(tried.run(problem, **tried.settings[0]), 3))
    assert problem.model[1].num_batches_tracked == 0


def test_the_projection_takes_the_class_out_and_keeps_a_simplex():
    problem = problem_of()
    head, label = baselines.head_of(problem.model), int(problem.labels[0])
    simplex = torch.eye(CLASSES, dtype=torch.float64) - 1 / CLASSES
    head.weight.data = torch.nn.functional.pad(simplex, (0, 12 - CLASSES))
    list(baselines.project_class(problem))
    rows = torch.nn.functional.normalize(head.weight.detach()[torch.arange(CLASSES) != label])
    torch.testing.assert_close(head.weight[label].detach(), torch.zeros(12, dtype=torch.float64))
    cosine = -1 / (CLASSES - 2)  # a simplex of one class less
    torch.testing.assert_close(rows @ rows.T, (1 - cosine) * torch.eye(CLASSES - 1, dtype=torch.float64) + cosine)


def test_ssd_dampens_where_the_forget_set_is_more_important():
    problem = problem_of()
    before, strength = matrix(problem), 0.5
    with torch.no_grad():
        fishers = []
        for images, labels in ((problem.train_images, problem.train_labels), (problem.images[:3], problem.labels[:3])):
            h, r = parts(Problem(problem.model, images, labels, 0))
            fishers.append((r.square().T @ h.square()) / len(h))
    problem.images, problem.labels = problem.images[:3], problem.labels[:3]
    for notes in baselines.dampen_synapses(problem, strength):
        factor = torch.where(
            fishers[1] > notes["alpha"] * fishers[0], (strength * fishers[0] / fishers[1]).clamp(max=1), 1.0
        )
        torch.testing.assert_close(matrix(problem), factor * before)
    assert (factor < 1).any()


def test_ssd_without_the_training_set_is_refused():
    problem = problem_of()
    problem.train_images = None
    with pytest.raises(ValueError, match="give them"):
        next(baselines.dampen_synapses(problem))
